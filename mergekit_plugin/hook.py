"""Registers `phlora` when mergekit's merge methods are imported. `phlora mergekit enable` copies this file.

It runs whenever the interpreter starts: the standard library only, and nothing that is not needed at once.
"""

import sys

TARGET = "mergekit.merge_methods"


def install():
    """Wait for mergekit's merge methods; what else is imported goes its usual way."""
    if not any(getattr(finder, "registers", None) == "phlora" for finder in sys.meta_path):
        sys.meta_path.insert(0, Finder())


class Finder:
    """Finds that one module, and adds to it once it has run."""

    registers = "phlora"

    def find_spec(self, name, path=None, target=None):
        """The spec of that one module, whose loader registers `phlora` at its end."""
        if name != TARGET:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path)
        if spec is None or spec.loader is None:
            return None
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            try:
                from mergekit_plugin import register
            except ModuleNotFoundError:
                return  # peft-posthoc was uninstalled; mergekit is as it was
            try:
                register()
            except Exception as error:  # another mergekit than ours; its own methods work all the same
                import warnings

                warnings.warn(f"`merge_method: phlora` could not be registered: {error}", stacklevel=2)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
