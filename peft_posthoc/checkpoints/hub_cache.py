"""Models of the hub that are on this machine already: nothing is asked of the hub."""

from __future__ import annotations

from pathlib import Path

from peft_posthoc.checkpoints.model_files import weight_files


def cached(repo_id: str) -> Path | None:
    """The snapshot of a repository's default branch in the hub's cache; None where there is none with weights."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(repo_id, "config.json")
    folder = Path(found).parent if isinstance(found, str) else None
    return folder if folder is not None and _has_weights(folder) else None


def cached_models() -> dict[str, Path]:
    """By hub id, the snapshot of every model in the cache: the default branch's, else the newest."""
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        repositories = scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return {}
    found: dict[str, Path] = {}
    for one in sorted(repositories, key=lambda one: one.repo_id):
        snapshots = sorted(one.revisions, key=lambda at: ("main" in at.refs, at.last_modified), reverse=True)
        whole = (at.snapshot_path for at in snapshots if _has_weights(at.snapshot_path))
        if one.repo_type == "model" and (folder := next(whole, None)) is not None:
            found[one.repo_id] = folder
    return found


def _has_weights(folder: Path) -> bool:
    return folder.is_dir() and bool(weight_files({path.name for path in folder.iterdir()}))
