"""Data sets of the Hugging Face hub: `hf:OWNER/NAME`, or `hf:OWNER/NAME@REVISION`, each at one commit."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from rdpo.errors import InputError

PREFIX = "hf:"
COMMIT = re.compile(r"[0-9a-f]{40}")
DEFAULT = "main"


class HubSource(NamedTuple):
    """A data set of the hub, and the branch, tag or commit of it that is read."""

    name: str
    revision: str = DEFAULT

    @classmethod
    def of(cls, source: str) -> HubSource:
        """The data set that a source with the prefix names."""
        name, _, revision = source.removeprefix(PREFIX).partition("@")
        return cls(name, revision or DEFAULT)

    def commit(self) -> str:
        """The commit that the revision stands for, the same for all that this process reads.

        Raises:
            InputError: the hub does not say, and nothing of the data set is in its cache here.
        """
        return _commit(self.name, self.revision)


@lru_cache(maxsize=64)
def _commit(name: str, revision: str) -> str:
    if COMMIT.fullmatch(revision):
        return revision
    try:
        from huggingface_hub import HfApi

        found = HfApi().dataset_info(name, revision=revision).sha
    except Exception as error:
        found, reason = _cached_commit(name, revision), f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    else:
        reason = "it names none"
    if not found:
        raise InputError(
            f"{PREFIX}{name}: the hub does not say which commit {revision} is ({reason}); check the name, the network, "
            f"or HF_TOKEN for a gated data set, or write {PREFIX}{name}@COMMIT"
        )
    return found


def _cached_commit(name: str, revision: str) -> str | None:
    """The commit that was last downloaded to this machine."""
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    if ".." in revision:
        return None
    noted = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type="dataset") / "refs" / revision
    return noted.read_text(encoding="utf-8").strip() if noted.is_file() else None
