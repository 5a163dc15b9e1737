"""mergekit: `merge_method: phlora`, and adapters out of any merge. Importing this does nothing; `register()` does."""


def register() -> None:
    """Make `merge_method: phlora` known to mergekit in this process; again and again is the same as once."""
    from mergekit_plugin.register import register as run

    run()
