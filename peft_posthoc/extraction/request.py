"""What an extraction is asked for: every option once, with its type, its default and its help.

Python's signatures and docstrings, the command line's options and what is handed to another process are made of this.
Importing it is cheap: no tensor, no model.
"""

import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypedDict, TypeVar, Unpack, cast

from peft_posthoc.text import asked, type_name

if TYPE_CHECKING:
    import torch

    from peft_posthoc.extraction.plan import Choice
    from peft_posthoc.ranks.rules import Rank
    from peft_posthoc.sources import Source

F = TypeVar("F", bound=Callable[..., Any])


class Option(NamedTuple):
    """What every surface says of an option."""

    help: str
    default: Any = None
    choices: tuple[str, ...] = ()
    flag: str = ""
    """On the command line, where it is not the name."""
    opposite: str = ""
    """The flag that says its default there, if there is one."""
    metavar: str = ""
    """What the command line calls its value."""


class Options(TypedDict, total=False):
    """The options of an extraction, in the order in which they are shown."""

    base_revision: Annotated[str | None, Option("Branch, tag or commit, where BASE is a hub id.", metavar="REV")]
    tuned_revision: Annotated[str | None, Option("Branch, tag or commit, where TUNED is a hub id.", metavar="REV")]
    tuned_name: Annotated[str | None, Option("What the adapter calls TUNED.  [default: TUNED]", metavar="NAME")]
    include: Annotated[
        str | Iterable[str], Option("Carry only weights whose name this is found in.", (), metavar="REGEX")
    ]
    exclude: Annotated[
        str | Iterable[str], Option("Do not carry weights whose name this is found in.", (), metavar="REGEX")
    ]
    embeddings: Annotated[bool, Option("Carry token embeddings too.", False)]
    head: Annotated[bool, Option("Carry the output head (lm_head) too.", False)]
    conv: Annotated[bool, Option("Carry convolutions too.", False)]
    experts: Annotated[
        Literal["none", "per-expert", "fused"] | None,
        Option(
            "Carry experts: per-expert for serving engines, fused for PEFT.  [default: none; fused in the peft form]",
            choices=("none", "per-expert", "fused"),
        ),
    ]
    choose: Annotated[
        "Choice | None",
        Option("Which modules to adapt, in place of `embeddings`, `head`, `conv` and whether to carry `experts`."),
    ]
    leave_out: Annotated[
        Mapping[str, str] | None,
        Option("By the stored name of a tensor that is not carried, the reason that the report gives."),
    ]
    rename: Annotated[
        str | Iterable[str],
        Option(
            "Rename tensors of both before they are compared, each rule what the one before left.",
            (),
            flag="map",
            metavar="'REGEX=>NAME'",
        ),
    ]
    serve_as: Annotated[
        str | None,
        Option("The class, or a model's folder, that the adapter is for.  [default: BASE's]", metavar="CLASS"),
    ]
    for_base: Annotated[
        "Source | None",
        Option(
            "BASE's quantised form, which the adapter is served on: its factors stay those of BASE and TUNED.",
            metavar="MODEL",
        ),
    ]
    vocab: Annotated[
        Literal["error", "truncate", "extend"],
        Option(
            "Where the vocabularies differ: stop, compare what both have, or keep tuned's embeddings whole (in the "
            "peft form).",
            "error",
            ("error", "truncate", "extend"),
        ),
    ]
    rank_pattern: Annotated[
        Mapping[str, int] | None,
        Option("Ranks by hand, for modules whose name ends in a regular expression, as in PEFT."),
    ]
    conv_rank: Annotated[int | None, Option("Rank of the convolutions, which are carried then.", metavar="R")]
    with_tokenizer: Annotated[
        bool, Option("Copy TUNED's tokenizer, chat template and generation config beside the adapter.", False)
    ]
    form: Annotated[
        Literal["portable", "peft"],
        Option(
            "portable: what every engine loads. peft: all that changed, as exactly as PEFT can hold it.",
            "portable",
            ("portable", "peft"),
        ),
    ]
    exact: Annotated[bool, Option("LAPACK's full SVD for every weight.", False)]
    stream: Annotated[
        bool,
        Option(
            "Fetch each weight of a hub id when it is read, and keep none on disk; or download its files into the "
            "hub's cache, where they stay.  [default: keep-downloads]",
            False,
            opposite="keep-downloads",
        ),
    ]
    device: Annotated[str, Option("Where to compute: cpu, cuda (all GPUs), cuda:N or auto.", "cpu")]
    dtype: Annotated[
        "torch.dtype | str | None",
        Option(
            "Type of the adapter's values.  [default: the tuned checkpoint's]",
            choices=("float32", "bfloat16", "float16"),
        ),
    ]
    unrelated: Annotated[bool, Option("Go on where BASE and TUNED have nothing in common.", False)]
    min_energy: Annotated[
        float | None,
        Option("Write nothing that holds less than this share of the whole fine-tune's energy.", metavar="SHARE"),
    ]


OPTIONS: Mapping[str, Option] = {name: given.__metadata__[0] for name, given in Options.__annotations__.items()}

_LISTS = ("include", "exclude", "rename")
_OF_PYTHON = ("choose", "leave_out")  # a function, and what a caller in this process knows


@dataclass(frozen=True)
class Request:
    """Everything that an extraction is asked for but its two models: `Request.of(rank, head=True, ...)`."""

    rank: "Rank | Mapping[str, Rank]"
    options: Options
    """All of them, those that were not given at their defaults."""

    @classmethod
    def of(cls, rank: "Rank | Mapping[str, Rank] | Request" = 32, **options: Unpack[Options]) -> "Request":
        """Make a request of what a caller gives.

        Args:
            rank: As in `extract`; or a request, of which `options` change some.
            options: As `Options` has them.

        Raises:
            TypeError: There is no such option.
            ValueError: An option has no such value, or two contradict each other.
        """
        given, before = (rank.rank, dict(rank.options)) if isinstance(rank, Request) else (rank, {})
        if unknown := [name for name in options if name not in OPTIONS]:
            raise TypeError(f"There is no option `{unknown[0]}`. There are {', '.join(OPTIONS)}.")
        made: dict[str, Any] = {name: option.default for name, option in OPTIONS.items()} | {**before, **options}
        for name in _LISTS:
            made[name] = (made[name],) if isinstance(made[name], str) else tuple(made[name])
        made["rank_pattern"] = dict(made["rank_pattern"] or {})
        made["leave_out"] = dict(made["leave_out"] or {})
        if isinstance(made["for_base"], PathLike):
            made["for_base"] = str(made["for_base"])
        made["dtype"] = made["dtype"] and type_name(str(made["dtype"]))
        _check(made)
        return cls(given, cast(Options, MappingProxyType(made)))

    def to_json(self) -> dict[str, Any]:
        """The request as plain JSON values: the rank as `ranks.spelling` has it, and what is not at its default.

        Raises:
            ValueError: A part of it is a function, or only means something in this process.
        """
        from peft_posthoc.ranks.spelling import spell

        told = {name: value for name, value in self.options.items() if value not in (OPTIONS[name].default, {})}
        own = [name for name in _OF_PYTHON if name in told]
        if own or not isinstance(told.get("for_base", ""), str):
            raise ValueError(f"`{[*own, 'for_base'][0]}` cannot be handed to another process.")
        return {"rank": spell(self.rank), **{k: list(v) if isinstance(v, tuple) else v for k, v in told.items()}}

    @classmethod
    def from_json(cls, told: Mapping[str, Any]) -> "Request":
        """The request that `to_json` told.

        Raises:
            TypeError: It has an option that there is not.
            ValueError: It has a value that there is not.
        """
        from peft_posthoc.ranks.spelling import parse

        options = {name: value for name, value in told.items() if name != "rank"}
        return cls.of(parse(told["rank"]) or 32, **cast(Options, options))


def _check(options: Mapping[str, Any]) -> None:
    for name, option in OPTIONS.items():
        value = options[name]
        if option.choices and name != "dtype" and value is not None and value not in option.choices:
            raise ValueError(f"`{name}` must be one of {', '.join(option.choices)}. Got {value!r}.")
    least = options["min_energy"]
    if least is not None and not (isinstance(least, int | float) and 0 < least <= 1):
        raise ValueError(f"`{asked('min_energy', None)}` is a share above 0, and at most 1. Got {least!r}.")
    if options["form"] == "peft" and options["experts"] == "per-expert":
        raise ValueError(
            f"PEFT computes with stacked experts: `{asked('form', 'peft')}` takes `{asked('experts', 'fused')}` or "
            "`none`, not `per-expert`."
        )
    if options["vocab"] == "extend" and options["form"] != "peft":
        raise ValueError(
            f"`{asked('vocab', 'extend')}` keeps embeddings whole, which only `{asked('form', 'peft')}` can."
        )


def takes_options(function: F) -> F:
    """Show the options in the signature and the docstring of a function that takes `**options: Unpack[Options]`."""
    signature = inspect.signature(function)
    own = [each for each in signature.parameters.values() if each.kind is not each.VAR_KEYWORD]
    shown = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=option.default, annotation=_written(name))
        for name, option in OPTIONS.items()
        if name not in signature.parameters
    ]
    function.__signature__ = signature.replace(parameters=[*own, *shown])  # type: ignore[attr-defined]
    function.__doc__ = with_options(function.__doc__ or "")
    return function


def with_options(docstring: str) -> str:
    """The docstring, with every option where it says `**options: As `Options` has them.`."""
    lines = [
        textwrap.fill(f"{name}: {option.help}", 116, initial_indent="    ", subsequent_indent=" " * 8)
        for name, option in OPTIONS.items()
    ]
    return inspect.cleandoc(docstring).replace("    **options: As `Options` has them.", "\n".join(lines))


def _written(name: str) -> Any:
    kind = Options.__annotations__[name].__origin__
    return getattr(kind, "__forward_arg__", kind)
