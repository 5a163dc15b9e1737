"""Output that is there whole or not at all: made beside its place, and moved into it at the end.

Where it takes the place of an earlier one, the files of that one go, and whatever else lies in the folder stays.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from peft_posthoc.errors import AdapterError, CheckpointError, OutputError
from peft_posthoc.room import OLD, room_beside
from peft_posthoc.text import asked


@contextmanager
def staged(
    target: str | os.PathLike[str],
    *,
    what: str,
    called: str | os.PathLike[str] | None = None,
    force: bool = False,
    ours: Collection[str] = (),
) -> Iterator[Path]:
    """Give a path to write a file or a folder to, which takes the target's place when the `with` block ends well.

    Folders above it are made, and go again if nothing was written. A link stays one: what it leads to is written.

    Args:
        target: Where the output is to be.
        what: What messages call it: `The adapter`.
        called: What they call the target, where that is not its path.
        force: Replace what is there; see before whether it may be.
        ours: Of a folder that is there, the files that go, by their paths in it.

    Yields:
        A path in a new folder beside the target: moving it is a rename within one file system.

    Raises:
        AdapterError: The output cannot be written, or without `force` something is there by now.
    """
    place, label = Path(os.path.realpath(target)), target if called is None else called
    missing = [path for path in place.parents if not path.exists()]
    with ExitStack() as stack:
        stack.callback(_remove, missing, place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            room = stack.enter_context(room_beside(place))
        except OSError as error:
            raise AdapterError(f"Cannot write to `{Path(label).parent}`: {error.strerror or error}.") from error
        made, old = room / "new", room / OLD
        try:
            yield made
            if force and place.is_dir():
                _check_apart(place, made, ours)
                made.chmod(place.stat().st_mode & 0o7777)
                place.rename(old)
            elif not force and place.is_file():
                raise FileExistsError(0, "something is there by now")
            made.rename(place)
        except (OSError, SafetensorError) as error:
            reason = getattr(error, "strerror", None) or error
            raise AdapterError(
                f"{what} could not be written to `{label}`: {reason}. Nothing was left there."
            ) from error
        finally:
            if old.exists() and not place.exists():
                old.rename(place)
            elif old.exists():
                _bring_back(old, place, ours)


def _remove(folders: Collection[Path], place: Path) -> None:
    """Remove the folders that were made for a place where nothing came to be."""
    if not place.exists():
        for path in folders:
            with suppress(OSError):  # Not made, or another process has something there by now.
                path.rmdir()


def check_free(target: str | os.PathLike[str], *, is_file: bool = False) -> bool:
    """See before the work whether something can be written there.

    Args:
        target: Where it is to be written.
        is_file: Whether it will be a single file.

    Returns:
        Whether something is there that would have to be replaced.

    Raises:
        AdapterError: Nothing can be written there, whatever is replaced.
    """
    place = Path(target)
    above = next((path for path in place.parents if path.exists()), place.parent)
    if not above.is_dir():
        raise AdapterError(f"`{place}` cannot be made: `{above}` is not a folder.")
    if not place.exists() and not place.is_symlink():
        return False
    if not (place.is_file() if is_file else place.is_dir()):
        found = "a folder" if place.is_dir() else "no regular file" if is_file else "not a folder"
        raise AdapterError(f"`{place}` exists and is {found}.")
    if not is_file and os.path.samefile(place, os.curdir):
        raise AdapterError(f"`{place}` is the current directory, which would be replaced. Name another folder.")
    return is_file or any(place.iterdir())


def check_apart(folder: Path, files: Collection[str], ours: Collection[str], spoil: Collection[str]) -> None:
    """See before the work that what stays in a folder leaves room for new files, and does not spoil what they are.

    Args:
        folder: Where an earlier output is.
        files: What will be written into it.
        ours: What goes.
        spoil: What must not lie beside it: names, or what they end in (`.safetensors`).

    Raises:
        AdapterError: Something is in the way.
    """
    stays = [path.name for path in sorted(folder.iterdir()) if path.name not in ours]
    for name in stays:
        if name in files:
            raise AdapterError(
                f"`{folder / name}` is not the file that belongs there; `{asked('force')}` would delete it. Move it "
                "elsewhere."
            )
        if name.endswith(tuple(spoil)):
            raise AdapterError(
                f"`{folder}` also holds `{name}`, which would be loaded with what is written; `{asked('force')}` does "
                "not delete it. Move it elsewhere."
            )


def free_at(path: Path) -> int:
    """Free bytes on the disk of a path, which need not be there yet."""
    return shutil.disk_usage(_above(path)).free


def on_one_disk(one: Path, other: Path) -> bool:
    """Tell whether what is written to two paths, which need not be there yet, takes the same disk's room."""
    return _above(one).stat().st_dev == _above(other).stat().st_dev


def _above(path: Path) -> Path:
    path = path.absolute()
    return next(there for there in (path, *path.parents) if there.exists())


def files_in(folder: Path, names: Collection[str]) -> set[str]:
    """The names that are files or links in the folder."""
    return {name for name in names if (folder / name).is_file() or (folder / name).is_symlink()}


def _check_apart(place: Path, made: Path, ours: Collection[str]) -> None:
    """See once more, with what was really written.

    Raises:
        AdapterError: Something that is to stay is in the way.
    """
    check_apart(place, {path.name for path in made.iterdir() if path.is_file()}, ours, ())


def _bring_back(old: Path, place: Path, ours: Collection[str]) -> None:
    """Move what is not of the earlier output into the new one.

    Raises:
        AdapterError: A file cannot be moved, and stays in `old`.
    """
    try:
        try:
            _move_others(old, place, ours, "")
        except KeyboardInterrupt:
            if old.exists():
                _move_others(old, place, ours, "")
            raise
    except OSError as error:
        raise AdapterError(
            f"`{place}` is written, but what else lay there could not be moved back ({error.strerror or error}): it "
            f"is in `{old}`."
        ) from error


def _move_others(old: Path, new: Path, ours: Collection[str], within: str) -> None:
    for path in sorted(old.iterdir()):
        name = f"{within}{path.name}"
        is_folder = path.is_dir() and not path.is_symlink()
        if name in ours and not is_folder:
            path.unlink()
        elif is_folder and ((new / path.name).is_dir() or any(one.startswith(f"{name}/") for one in ours)):
            (new / path.name).mkdir(exist_ok=True)
            _move_others(path, new / path.name, ours, f"{name}/")
            if not any((new / path.name).iterdir()):
                (new / path.name).rmdir()
        else:
            path.rename(new / path.name)
    old.rmdir()


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def regular(path: Path) -> Path:
    """The path itself, seen not to be a pipe, a socket or a device before anybody opens it.

    Raises:
        OSError: The path is one of these, or is not there.
    """
    if kind := _KINDS.get(stat.S_IFMT(path.stat().st_mode)):
        raise OSError(f"it is {kind}, not a regular file")
    return path


def check_folder(folder: str | os.PathLike[str]) -> None:
    """See that a library which opens what it likes of a folder will not hang.

    Raises:
        CheckpointError: There is a pipe, a socket or a device in it.
    """
    for path in sorted(Path(folder).iterdir()):
        try:
            regular(path)
        except FileNotFoundError:
            continue  # A link to nowhere: to open it fails.
        except OSError as error:
            raise CheckpointError(f"`{path}` cannot be read: {getattr(error, 'strerror', None) or error}.") from error


def write_whole(path: str | os.PathLike[str], content: bytes | str) -> None:
    """Write a file: beside its place first, and then moved there.

    Args:
        path: Of a file that is replaced, or is not there yet. A link stays one: the file that it leads to is written.
            A pipe or a device is written to as it is.
        content: All of it; text becomes UTF-8.

    Raises:
        OutputError: The file cannot be written. An earlier one is still there.
    """
    content = content.encode() if isinstance(content, str) else content
    try:
        _write(Path(path), content)
    except OSError as error:
        raise OutputError(f"`{path}` could not be written: {error.strerror or error}.") from error


def _write(path: Path, content: bytes) -> None:
    if path.exists() and not path.is_file():
        path.write_bytes(content)  # There is nothing to move onto.
        return
    target = Path(os.path.realpath(path))
    with room_beside(target) as room, (room / "new").open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # Some file systems tell only then that they are full.
        os.chmod(room / "new", _mode(target))
        os.replace(room / "new", target)


def _mode(target: Path) -> int:
    """The file's own mode, or that of a new file."""
    if target.exists():
        return target.stat().st_mode & 0o7777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask
