"""A patch of mergekit's function that resolves parameters: those that `phlora` does not have are refused."""

from __future__ import annotations

import sys
from typing import Any

from mergekit import parameter_resolver

from mergekit_plugin.settings import PARAMETERS
from peft_posthoc.errors import PosthocError

# Who has imported the function that resolves the parameters of a weight, the one place that sees them in every command.
_USERS = ("mergekit.parameter_resolver", "mergekit.plan", "mergekit.scripts.merge_raw_pytorch")


def patch_resolver(method: str) -> None:
    """Put it in the place of mergekit's in every module that has imported that, for parameters of this method."""
    resolve = parameter_resolver.resolve_parameters
    if hasattr(resolve, "refuses"):
        return

    def resolve_parameters(spec: Any, *, inputs: Any, sources: Any, **others: Any) -> Any:
        if spec.name == method:
            known = {parameter.name for parameter in PARAMETERS}
            given = {name for model in (None, *inputs) for scope in sources(model) for name in scope or ()}
            for name in sorted(given - known):
                raise PosthocError(
                    f"`merge_method: {method}` has no parameter `{name}`. It has: {', '.join(sorted(known))}."
                )
        return resolve(spec, inputs=inputs, sources=sources, **others)

    resolve_parameters.refuses = method  # type: ignore[attr-defined]
    for name in _USERS:
        if name in sys.modules:
            sys.modules[name].resolve_parameters = resolve_parameters  # type: ignore[attr-defined]
