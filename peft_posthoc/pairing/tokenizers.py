"""Two tokenizers, and two ways to generate text, compared by the files beside the weights. No code is run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from filecmp import cmp
from functools import cached_property
from pathlib import Path
from typing import Any

from peft_posthoc.checkpoints.checkpoint import Checkpoint, place_of
from peft_posthoc.checkpoints.hub import fetch_beside, is_repo_id
from peft_posthoc.files import regular
from peft_posthoc.json_file import LARGEST, read_json
from peft_posthoc.pairing.difference import Difference, alike
from peft_posthoc.text import counted, shorten

_CONFIG, _SPECIAL, _WHOLE = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
_MORE = "additional_chat_templates"
_TEMPLATE, _TEMPLATES, _GENERATION = "chat_template.jinja", "chat_template.json", "generation_config.json"
# What is fetched from the hub to be compared: a few kB. The vocabulary is not.
_SMALL = (_CONFIG, _SPECIAL, _TEMPLATE, _TEMPLATES, _GENERATION)
# Of tokenizers that have no tokenizer.json.
_VOCABULARIES = ("tokenizer.model", "spiece.model", "vocab.txt", "vocab.json", "merges.txt")
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "cls_token", "mask_token", "pad_token")
_FRAMES = ("add_bos_token", "add_eos_token", "padding_side")
# Of tokenizer.json, how text is cut into tokens.
_CUTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_NAMED = 4


def tokenizer_differences(base: Checkpoint, tuned: Checkpoint) -> list[Difference]:
    """What differs in the files beside two checkpoints; nothing where one of them has none.

    Raises:
        CheckpointError: They are on the hub, and could not be fetched.
    """
    here, there = place_of(base), place_of(tuned)
    if here is None or there is None:
        return []
    before, after = _Beside(here, base), _Beside(there, tuned)
    found = [*_generations(before, after)]
    if before.has_tokenizer and after.has_tokenizer:
        found = [*_templates(before, after), *_settings(before, after), *_vocabularies(before, after), *found]
    unread = [
        Difference("tokenizer", name, None, None, f"`{name}` of {side}, which cannot be read ({why})", material=False)
        for side, one in (("base", before), ("tuned", after))
        for name, why in one.unread.items()
    ]
    return [*found, *unread]


class _Beside:
    """The files beside a checkpoint's weights."""

    def __init__(self, folder: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.revision is not None and is_repo_id(checkpoint.label):
            fetch_beside(checkpoint.label, _SMALL, revision=checkpoint.revision)
        self.folder = folder
        self.model = checkpoint.config or {}
        self.unread: dict[str, str] = {}
        """By file that is there and cannot be read, why."""

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in (_CONFIG, _WHOLE))

    @cached_property
    def config(self) -> Mapping[str, Any]:
        return self.read(_SPECIAL) | self.read(_CONFIG)

    @cached_property
    def templates(self) -> Mapping[str, str]:
        """By name: the default one, and those for tools and the like."""
        more = {path.stem: self._text(f"{_MORE}/{path.name}").strip() for path in self.folder.glob(f"{_MORE}/*.jinja")}
        found = self._text(_TEMPLATE) or self.read(_TEMPLATES).get("chat_template") or self.config.get("chat_template")
        if isinstance(found, list):
            own = {str(one.get("name")): str(one.get("template")).strip() for one in found if isinstance(one, dict)}
        else:
            own = {"default": str(found).strip()} if found else {}
        return own | more

    def read(self, name: str) -> dict[str, Any]:
        """The object in a file; empty if there is none."""
        value: Any = {}
        try:
            if (self.folder / name).exists():
                value = read_json(self.folder / name)
        except ValueError as error:
            self.unread[name] = str(error)
        return value if isinstance(value, dict) else {}

    def _text(self, name: str) -> str:
        try:
            small = regular(self.folder / name).stat().st_size <= LARGEST
            return (self.folder / name).read_text(encoding="utf-8", errors="replace") if small else ""
        except FileNotFoundError:
            return ""
        except OSError as error:
            self.unread[name] = error.strerror or str(error)
            return ""


def _templates(base: _Beside, tuned: _Beside) -> Iterator[Difference]:
    before, after = base.templates, tuned.templates
    if before != after:
        only = "" if before and after else f", which only {'tuned' if after else 'base'} has"
        one, other = ({name: f"{len(text)} characters" for name, text in side.items()} for side in (before, after))
        yield Difference("tokenizer", "chat_template", one, other, f"the chat template{only}", material=bool(after))


def _settings(base: _Beside, tuned: _Beside) -> Iterator[Difference]:
    """Those that both name: what a file does not name is its class's to say."""
    for key in (*_SPECIAL_TOKENS, *_FRAMES):
        if key in base.config and key in tuned.config:
            one, other = (_content(side.config[key]) for side in (base, tuned))
            if not alike(one, other):
                yield Difference.between("tokenizer", key, one, other, material=not key.startswith("pad"))


def _content(token: Any) -> Any:
    return token.get("content") if isinstance(token, dict) else token


def _vocabularies(base: _Beside, tuned: _Beside) -> Iterator[Difference]:
    names = [name for name in (_WHOLE, *_VOCABULARIES) if all((one.folder / name).is_file() for one in (base, tuned))]
    for name in names[:1] if _WHOLE in names else names:
        try:
            if cmp(base.folder / name, tuned.folder / name, shallow=False):
                continue
        except OSError as error:
            tuned.unread[name] = error.strerror or str(error)
            continue
        if name != _WHOLE:
            yield Difference("tokenizer", name, None, None, f"the vocabulary in `{name}`")
            continue
        before, after = base.read(name), tuned.read(name)
        if before and after:
            yield from _in_whole(before, after)


def _in_whole(base: Mapping[str, Any], tuned: Mapping[str, Any]) -> Iterator[Difference]:
    before, after = _ids(base), _ids(tuned)
    said = []
    for one, other, side in ((after, before, "tuned"), (before, after, "base")):
        if only := [token for token in one if token not in other]:
            names = ", ".join(f"`{shorten(token, 30).replace('`', chr(39))}`" for token in only[:_NAMED])
            said.append(
                f"{counted(len(only), 'token')} that only {side} has ({names}{', ...' if len(only) > _NAMED else ''})"
            )
    if moved := sum(before[token] != after[token] for token in before.keys() & after.keys()):
        said.append(f"other ids of {moved} tokens")
    if not said and _merges(base) != _merges(tuned):
        said.append("the merges of the vocabulary")
    if said:
        yield Difference("tokenizer", "tokens", len(before), len(after), ", ".join(said))
    cuts = [key for key in _CUTS if base.get(key) != tuned.get(key)]
    if cuts and (cuts := _unlike_as_read(base, tuned, cuts)):
        yield Difference("tokenizer", "cuts", None, None, f"how text is cut ({', '.join(cuts)})", material=False)


def _model(whole: Mapping[str, Any]) -> Mapping[str, Any]:
    model = whole.get("model")
    return model if isinstance(model, dict) else {}


def _ids(whole: Mapping[str, Any]) -> dict[str, Any]:
    """The id of every token."""
    vocab, added = _model(whole).get("vocab"), whole.get("added_tokens")
    if isinstance(vocab, list):  # of a unigram model: token and score
        vocab = {str(one[0]): index for index, one in enumerate(vocab) if isinstance(one, list) and one}
    found = dict(vocab) if isinstance(vocab, dict) else {}
    tokens = [one for one in added if isinstance(one, dict)] if isinstance(added, list) else []
    return found | {str(one.get("content")): one.get("id") for one in tokens}


def _merges(whole: Mapping[str, Any]) -> list[str]:
    """In their older spelling, as one text each."""
    merges = _model(whole).get("merges")
    return [" ".join(map(str, one)) if isinstance(one, list) else str(one) for one in merges or ()]


def _unlike_as_read(base: Mapping[str, Any], tuned: Mapping[str, Any], keys: list[str]) -> list[str]:
    """Which of these differ when the library that is here has read both: versions spell one thing in several ways."""
    import json

    from tokenizers import Tokenizer

    try:
        read = [json.loads(Tokenizer.from_str(json.dumps(one)).to_str()) for one in (base, tuned)]
    except Exception:  # It has no other for a file that it cannot read.
        return keys
    return [key for key in keys if read[0].get(key) != read[1].get(key)]


def _generations(base: _Beside, tuned: _Beside) -> Iterator[Difference]:
    before, after = base.read(_GENERATION), tuned.read(_GENERATION)
    ends = [_ends(own, side.model) for own, side in ((before, base), (after, tuned))]
    if all(ends) and set(ends[0]) != set(ends[1]):
        yield Difference.between("generation", "eos_token_id", *ends)
    if before and after:
        for key in {**before, **after}:
            named = not key.startswith("_") and not key.endswith(("_token_id", "_version"))
            if named and not alike(before.get(key), after.get(key)):
                yield Difference.between("generation", key, before.get(key), after.get(key), material=False)


def _ends(generation: Mapping[str, Any], model: Mapping[str, Any]) -> list[int]:
    """The tokens that end a text."""
    text = model.get("text_config") or {}
    found: Any = next((one for side in (generation, model, text) if (one := side.get("eos_token_id")) is not None), [])
    return [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, int)]
