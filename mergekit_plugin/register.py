"""Make the method known to mergekit, in this process."""

from __future__ import annotations

from typing import Any

from mergekit import merge_methods, parameter_resolver

from mergekit_plugin.method import NAME, PHLORA
from peft_posthoc.errors import PosthocError


def register() -> None:
    """Register `phlora`; and from then on refuse parameters that it does not have, which mergekit overlooks."""
    if PHLORA not in merge_methods.registered_methods():
        merge_methods.register(PHLORA)
        _check_parameters()


def _check_parameters() -> None:
    # The one place that sees the settings of every command. What has imported it by name has to be told.
    import sys

    resolve = parameter_resolver.resolve_parameters

    def resolve_parameters(spec: Any, *, inputs: Any, sources: Any, **others: Any) -> Any:
        if spec.name == NAME:
            known = {parameter.name for parameter in spec.parameters}
            for model in (None, *inputs):
                for scope in sources(model):
                    for name in scope or ():
                        if name not in known:
                            raise PosthocError(
                                f"`merge_method: {NAME}` has no parameter `{name}`. It has: {', '.join(sorted(known))}."
                            )
        return resolve(spec, inputs=inputs, sources=sources, **others)

    for module in (parameter_resolver, *(sys.modules.get(name) for name in _USERS)):
        if module is not None:
            module.resolve_parameters = resolve_parameters


_USERS = ("mergekit.plan", "mergekit.scripts.merge_raw_pytorch")
