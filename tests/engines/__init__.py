"""Adapters in the engines themselves: what each computes with them, beside PEFT and the tuned model.

`make test-engines` installs the engines, each in an environment of its own, and runs it; `outcomes.json` keeps what
they did, and `docs/engines.md` shows it. PEFT and transformers run with the other tests.
"""
