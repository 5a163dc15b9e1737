"""Make the method known to mergekit, in this process."""

from mergekit import merge_methods

from mergekit_plugin.method import PHLORA


def register() -> None:
    """Register `phlora`, unless that has been done."""
    if PHLORA not in merge_methods.registered_methods():
        merge_methods.register(PHLORA)
