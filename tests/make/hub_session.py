"""The command in one process that asks the fake hub, and what came of it."""

import json

from safetensors.torch import load_file

# More bytes than a disk has.
HUGE = 10**17

# One interpreter for a module of tests: the client reads its address and cache when it is imported; that takes seconds.
SESSION = """
import json, sys
import click
from click.testing import CliRunner
from peft_posthoc.cli.main import main

@main.command()
@click.argument("base")
@click.argument("tuned")
def from_delta(base, tuned):
    from peft_posthoc import LoraConfig
    LoraConfig.from_delta(base, tuned)

for line in sys.stdin:
    result = CliRunner().invoke(main, json.loads(line))
    crashed = result.exception is not None and not isinstance(result.exception, SystemExit)
    error = repr(result.exception) if crashed else None
    print(json.dumps([result.exit_code, result.stdout, result.stderr, error]), flush=True)
"""


def adapter_of(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    report = json.loads((folder / "phlora_report.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config, report["provenance"]


def refused(ran, out_parent, *fragments, status=1):
    code, stdout, stderr = ran
    assert code == status
    assert stdout == ""
    last = stderr.splitlines()[-1]
    assert last.startswith("phlora: error: "), stderr
    assert stderr.count("phlora: error: ") == 1
    assert "Traceback" not in stderr
    for fragment in fragments:
        assert fragment in last
    assert list(out_parent.iterdir()) == []
    return last
