"""Models of the Hugging Face hub by the hashes that it has of their files: nothing is downloaded or read for them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path

from rdpo.errors import InputError

Hashes = Mapping[str, str]
"""For each file its SHA-256, where the hub stores it apart, else its hash in the repository."""


@lru_cache(maxsize=64)
def hub_hashes(name: str, revision: str | None, patterns: tuple[str, ...]) -> Hashes:
    """The hashes of those of a model's files that lie at the top and have such names.

    Where the hub does not answer they are those of the copy on this machine, if that is whole.

    Raises:
        InputError: neither is to be had.
    """
    try:
        return _asked(name, revision, patterns)
    except Exception as error:
        found = _cached(name, revision, patterns)
        if found is None:
            raise not_given(name, error) from None
        return found


def not_given(name: str, error: Exception, what: str = "model") -> InputError:
    """What a person is told of a model, or of an adapter, that the hub does not give."""
    reason = str(error).strip().split("\n")[0]
    return InputError(
        f"{what} {name}: no such folder here, and the hub does not give it ({type(error).__name__}: {reason}); "
        "check the name, the network, or HF_TOKEN for a gated model"
    )


def unreadable(models: Iterable[tuple[str, str | None]]) -> list[str]:
    """Those of some models, by name and revision, that the hub refuses to this machine and that it has no copy of.

    A hub that does not answer refuses nothing.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    refused = []
    for name, revision in models:
        if Path(name).exists() or _cached(name, revision, ("*.safetensors",)) is not None:
            continue
        try:
            HfApi().auth_check(name)
        except (GatedRepoError, RepositoryNotFoundError):
            refused.append(name)
        except (OSError, ValueError):
            continue
    return refused


def _asked(name: str, revision: str | None, patterns: tuple[str, ...]) -> Hashes:
    from huggingface_hub import HfApi

    files = HfApi().model_info(name, revision=revision, files_metadata=True).siblings or []
    found: dict[str, str] = {}
    for file in files:
        known = file.lfs.sha256 if file.lfs else file.blob_id
        if known and _wanted(file.rfilename, patterns):
            found[file.rfilename] = known
    return dict(sorted(found.items()))


def _cached(name: str, revision: str | None, patterns: tuple[str, ...]) -> Hashes | None:
    """By the names of the files to which those of a snapshot link; None of a snapshot without its weights."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:
        return None
    files = sorted(file for file in folder.iterdir() if _wanted(file.name, patterns))
    if not any(file.suffix == ".safetensors" for file in files) or not all(file.is_symlink() for file in files):
        return None
    return {file.name: file.readlink().name for file in files}


def _wanted(name: str, patterns: tuple[str, ...]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in patterns)
