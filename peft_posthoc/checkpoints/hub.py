"""Checkpoints on the Hugging Face hub: only the files that are needed are fetched, when they are, at one commit."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from glob import escape
from pathlib import Path
from typing import Any

from torch import Tensor

from peft_posthoc.checkpoints.checkpoint import Checkpoint, Header
from peft_posthoc.checkpoints.folder import Folder, dtype_of
from peft_posthoc.checkpoints.gguf import SUFFIX, only_model, split_names
from peft_posthoc.checkpoints.model_files import config_of, is_index, no_weights, shards_of, weight_files
from peft_posthoc.errors import CheckpointError
from peft_posthoc.files import free_at, on_one_disk
from peft_posthoc.text import size

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# An adapter's files, as PEFT names them.
# What says how a checkpoint is quantized where its configuration does not.
_OF_CODES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
_ADAPTER = ("adapter_config.json", "adapter_model.safetensors")
# By repository and commit, what its card names as its base: the hub tells it with the files.
_BASES: dict[tuple[str, str | None], list[str]] = {}


def is_repo_id(source: str) -> bool:
    """Tell whether `source` could be a hub id, by its form alone."""
    return _REPO_ID.fullmatch(source) is not None


def repo_and_file(source: str) -> tuple[str, str | None] | None:
    """A hub id, and the file of `org/name/FILE.gguf`; None where it is neither by its form."""
    parts = source.split("/", 2)
    repo_id, file = "/".join(parts[:2]), parts[2] if len(parts) == 3 else None
    return (repo_id, file) if is_repo_id(repo_id) and (file is None or file.endswith(SUFFIX)) else None


@dataclass(frozen=True)
class Repository:
    """A repository at one commit, with the files that are needed of it."""

    repo_id: str
    commit: str
    folder: Path
    """In the hub's own cache, with the small files."""
    files: tuple[str, ...]
    """The files with the weights."""
    sizes: Mapping[str, int]
    """Their bytes, as far as the hub says."""
    role: str

    @property
    def is_adapter(self) -> bool:
        """Whether there are no whole weights, but an adapter's."""
        return _ADAPTER[1] in self.files

    @property
    def missing(self) -> list[str]:
        """The files that are not in the cache."""
        from huggingface_hub import try_to_load_from_cache

        found = ((file, try_to_load_from_cache(self.repo_id, file, revision=self.commit)) for file in self.files)
        return [file for file, path in found if not isinstance(path, str)]

    @property
    def to_fetch(self) -> int:
        """Bytes of the files that are not in the cache."""
        return sum(self.sizes.get(file, 0) for file in self.missing)

    @property
    def streams(self) -> bool:
        """Whether the weights can be fetched one at a time, and are not in the cache yet."""
        safetensors = all(file.endswith(".safetensors") for file in self.files)
        return safetensors and not self.is_adapter and bool(self.missing)

    def get(self) -> Path:
        """Fetch the weights.

        Raises:
            CheckpointError: The files cannot be fetched, or the disk of the cache has no room for them.
        """
        from huggingface_hub import snapshot_download

        check_room(self.to_fetch, self.repo_id)
        with told(self.repo_id, self.commit, self.role):
            patterns = [escape(file) for file in self.files]
            return Path(snapshot_download(self.repo_id, revision=self.commit, allow_patterns=patterns))

    def headers(self) -> tuple[dict[str, Header], dict[str, str]] | None:
        """Those of all tensors, and what the files say of themselves, from the beginnings of the files.

        None where that needs the files, or they are there.

        Raises:
            CheckpointError: The files cannot be fetched, or are no safetensors.
        """
        from huggingface_hub import HfApi

        if not self.missing or not all(file.endswith(".safetensors") for file in self.files):
            return None
        found: dict[str, Header] = {}
        said: dict[str, str] = {}
        with told(self.repo_id, self.commit, self.role):
            for file in self.files:
                read = HfApi().parse_safetensors_file_metadata(self.repo_id, file, revision=self.commit)
                found |= {
                    name: Header(tuple(info.shape), dtype_of(info.dtype, f"`{file}` of `{self.repo_id}`", name))
                    for name, info in read.tensors.items()
                }
                said |= read.metadata
        return found, said


class OnHub(Checkpoint):
    """A repository's weights: the headers at once, the files when the first tensor is read."""

    def __init__(self, repository: Repository, headers: Mapping[str, Header], metadata: Mapping[str, str]) -> None:
        self.label = repository.repo_id
        self.revision: str | None = repository.commit
        self.identity: Any = [repository.repo_id, repository.commit]
        self.config = config_of(repository.folder)
        self.headers, self.metadata = headers, metadata
        self.folder: Path | None = repository.folder
        """In the hub's own cache; with the weights once one is read."""
        self.to_fetch = repository.to_fetch
        self._repository = repository

    @cached_property
    def _fetched(self) -> Folder:
        return Folder(self._repository.get(), label=self.label, revision=self.revision)

    @property
    def files(self) -> Mapping[str, str]:
        """By tensor, the name of its file."""
        return self._fetched.files

    def read(self, name: str) -> Tensor:
        """The tensor of that name."""
        return self._fetched.read(name)


def find(
    repo_id: str,
    *,
    revision: str | None = None,
    role: str = "source",
    adapter: bool = False,
    file: str | None = None,
) -> Repository:
    """See what of a hub repository is needed, and fetch its small files: the configuration, an index of shards.

    Args:
        repo_id: `org/name`.
        revision: Branch, tag or commit; the default branch if None.
        role: What messages call it.
        adapter: Take the LoRA adapter; otherwise only where the repository has no whole weights.
        file: Take this GGUF file, with the others that it is one of.

    Raises:
        CheckpointError: No such repository or revision, no access, no connection, or no weights in it.
    """
    from huggingface_hub import HfApi, snapshot_download

    with told(repo_id, revision, role):
        info = HfApi().model_info(repo_id, revision=revision, files_metadata=True)
        _BASES[repo_id, info.sha] = _bases(info.card_data)
        sizes = {entry.rfilename: entry.size or 0 for entry in info.siblings or ()}
        names = sizes.keys()
        wanted = [] if adapter else weight_files(names)
        if file is not None:
            wanted = split_names(file)
            if missing := [part for part in wanted if part not in names]:
                raise CheckpointError(f"`{repo_id}` on the hub has no file `{missing[0]}`.")
        if not wanted and (adapter or _ADAPTER[0] in names):
            wanted = [file for file in _ADAPTER if file in names]
        if not wanted and (model := only_model(names, repo_id)):
            wanted = split_names(model)
        if not wanted:
            raise CheckpointError(no_weights(f"`{repo_id}` on the hub", names))
        indexed = is_index(wanted[0])
        beside = ("config.json", "modules.json", _ADAPTER[0], *_OF_CODES)
        small = [escape(file) for file in (*beside, *(wanted if indexed else ()))]
        folder = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=small))
        if indexed:
            wanted = sorted(set(shards_of(folder / wanted[0]).values()))
            missing = [shard for shard in wanted if shard not in names]
            if missing:
                raise CheckpointError(
                    f"The index of `{repo_id}` names shards that are not there: {', '.join(missing)}."
                )
        return Repository(repo_id, str(info.sha), folder, tuple(wanted), sizes, role)


def bases_in_card(repo_id: str, commit: str | None = None) -> list[str]:
    """What a repository's card names as its base; none where the hub cannot be asked.

    Args:
        repo_id: `org/name`.
        commit: Of one that was found already, of which the hub is not asked again; the default branch if None.
    """
    from huggingface_hub import HfApi

    if (repo_id, commit) not in _BASES:
        try:
            return _bases(HfApi().model_info(repo_id, revision=commit).card_data)
        except Exception:  # As many kinds as its HTTP library has; a card is for people.
            return []
    return _BASES[repo_id, commit]


def _bases(card: Any) -> list[str]:
    named = None if card is None else card.to_dict().get("base_model")
    return [one for one in (named if isinstance(named, list) else [named]) if isinstance(one, str)]


def check_room(needed: int, *what: str, out: Path | None = None, taken: int = 0, instead: str = "") -> None:
    """See that the disk of the hub's cache holds what is to be downloaded.

    Args:
        needed: Bytes.
        what: The models, for messages.
        out: Where else something will be written.
        taken: How many bytes, which count where that is the same disk.
        instead: Another way out, behind "or".

    Raises:
        CheckpointError: There is less room.
    """
    if not needed:
        return
    from huggingface_hub.constants import HF_HUB_CACHE

    cache = Path(HF_HUB_CACHE)
    free = free_at(cache) - (taken if out is not None and on_one_disk(out, cache) else 0)
    if needed > free:
        raise CheckpointError(
            f"To download `{'` and `'.join(what)}` takes {size(needed)}, and {size(max(free, 0))} are free at "
            f"`{cache}`. Make room, {instead and f'{instead}, '}or set `HF_HOME` to a folder on another disk."
        )


def fetch_config(repo_id: str, *, revision: str | None = None, role: str = "base") -> Mapping[str, Any] | None:
    """The configuration of a model on the hub, without its weights; None if it has none.

    Raises:
        CheckpointError: No such repository or revision, no access, or no connection.
    """
    from huggingface_hub import snapshot_download

    repo_id = repo_id.rstrip("/")
    if not is_repo_id(repo_id):
        raise CheckpointError(f"The {role} `{repo_id}` is neither a folder nor a hub id such as `org/name`.")
    with told(repo_id, revision, role):
        return config_of(Path(snapshot_download(repo_id, revision=revision, allow_patterns=["config.json"])))


def fetch_beside(repo_id: str, patterns: Iterable[str], *, revision: str | None) -> None:
    """Download more files of a repository to where its weights are.

    Raises:
        CheckpointError: No access, or no connection.
    """
    from huggingface_hub import snapshot_download

    with told(repo_id, revision, "base"):
        snapshot_download(repo_id, revision=revision, allow_patterns=list(patterns))


@contextlib.contextmanager
def told(repo_id: str, revision: str | None, role: str) -> Iterator[None]:
    """Say what is wrong in one line."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        # The hub's client raises its own errors and those of whichever HTTP library it is built on.
        where = f"{repo_id}{f'@{revision}' if revision else ''}"
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if isinstance(error, RevisionNotFoundError):
            why = f"`{repo_id}` on the hub has no revision `{revision or 'main'}`. Give a branch, tag or commit of it."
        elif isinstance(error, GatedRepoError):
            why = f"`{repo_id}` on the hub is gated. Ask for access on its page, and log in with `hf auth login`."
        elif isinstance(error, RepositoryNotFoundError):
            why = (
                f"`{repo_id}` is neither a local folder nor a repository on the hub that you can see. Check the name; "
                "for a private one, log in with `hf auth login`."
            )
        else:
            why = (
                f"`{where}` is no local folder, and could not be fetched from the hub: {first.rstrip('.')}. Without a "
                "connection, give a local folder."
            )
        raise CheckpointError(f"The {role} {why}") from error
