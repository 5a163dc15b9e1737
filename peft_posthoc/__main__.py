"""`python -m peft_posthoc`: the `phlora` command."""

from peft_posthoc.cli.main import main

if __name__ == "__main__":
    main(prog_name="phlora")
