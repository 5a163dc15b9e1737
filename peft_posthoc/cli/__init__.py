"""The `phlora` command."""
