"""Rules about what PEFT itself does with an adapter on its base: the installed one is asked."""

from __future__ import annotations

from peft_posthoc.adapters.names import PREFIX, own_name
from peft_posthoc.serving.rules.names import strangers, unfitting
from peft_posthoc.serving.rules.rule import REFUSED, WARNING, WRONG, Rule
from peft_posthoc.serving.rules.targets import untargeted_in_peft
from peft_posthoc.serving.subject import Subject

_SEEN = "asked: the installed PEFT"


def dropped(subject: Subject) -> tuple[str, ...]:
    """Tensors that PEFT drops, of modules that the base has and the adapter's configuration means."""
    if subject.in_peft is None or subject.base is None or subject.in_peft.found.error:
        return ()
    found, classes = subject.in_peft.found, subject.base.layout.classes
    told = tuple(f"{PREFIX}{module}." for module in (*strangers(subject), *untargeted_in_peft(subject)))
    return tuple(
        name
        for name in found.lost
        if name.startswith(PREFIX)
        and not name.startswith(told)
        and name not in found.misfits
        # PEFT leaves biases alone that the configuration does not speak of.
        and not name.endswith(".bias")
        # The base that is given may be served as another class, which has a head of its own.
        and (".lora_" in name or own_name(name).rpartition(".")[0] in classes)
    )


def refused(subject: Subject) -> tuple[str, ...]:
    """What PEFT raises; or tensors of other shapes than the base's, but for those of layers that are told already."""
    if subject.in_peft is None:
        return ()
    found = subject.in_peft.found
    if found.error:
        return () if found.absent else (found.error,)
    told = tuple(f"{PREFIX}{one.partition(' ')[0]}." for one in unfitting(subject, larger=True, smaller=True))
    return tuple(name for name in found.misfits if not name.startswith(told))


def vocabulary(subject: Subject) -> tuple[str, ...]:
    """The size of the adapter's vocabulary, where the base's must be brought to it."""
    size = subject.in_peft.vocabulary if subject.in_peft is not None else None
    return () if size is None else (f"{size} tokens",)


RULES: tuple[Rule, ...] = (
    Rule(
        name="dropped-by-peft",
        engines=("peft",),
        severity=WRONG,
        finds=dropped,
        message="drops these tensors, with a warning at most: for transformers 5 they have other names",
        way_out="extract it again: `phlora extract` files them as PEFT takes them, or tells that they are left out",
        source=_SEEN,
        needs_base=True,
    ),
    Rule(
        name="refused-by-peft",
        engines=("peft",),
        severity=REFUSED,
        finds=refused,
        message="ends with this error, or with a size mismatch at these tensors",
        way_out="serve it on the base, and as the class, that it was made for",
        source=_SEEN,
        needs_base=True,
    ),
    Rule(
        name="resized-vocabulary",
        engines=("peft",),
        severity=WARNING,
        finds=vocabulary,
        message="refuses it on the base as it is: the adapter was made for a model with a vocabulary of another size",
        way_out="`base.resize_token_embeddings(...)` first, as below",
        source=_SEEN,
        needs_base=True,
    ),
)
