"""`python -m mergekit_plugin` is the `mergekit-phlora` command."""

import sys


def main() -> None:
    """Run it; without mergekit, tell what to install."""
    try:
        from mergekit_plugin.command import main as command
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "mergekit":
            raise
        sys.exit("mergekit-phlora: error: mergekit is not installed. Use `pip install 'peft-posthoc[mergekit]'`.")
    command()


if __name__ == "__main__":
    main()
