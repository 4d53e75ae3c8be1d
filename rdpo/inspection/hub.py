"""A run's model, or its pairs as a data set, on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from http import HTTPStatus
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from rdpo.errors import InputError
from rdpo.execution.reader import RunReader
from rdpo.files.folder import IN_PROGRESS, MANIFEST
from rdpo.inspection.export import export

KINDS = {"model": "model", "pairs": "dataset"}


def push(run_dir: str, what: str, repository: str, public: bool = False) -> str:
    """Put the published `model` or the `pairs` of a run on the hub; the address of the commit.

    A repository that is not there is made, private unless `public`; one that is there keeps its visibility, and gets
    one commit more. The token is the machine's: of `hf auth login`, or HF_TOKEN.

    Raises:
        InputError: the stage is not finished, the name is none, or the hub refuses or cannot be reached.
    """
    run = RunReader(run_dir)
    if what == "model":
        run.require("model")
        return _upload(Path(run.folder("model").local()), run, what, repository, public)
    with tempfile.TemporaryDirectory() as made:
        export(run_dir, what, made)
        return _upload(Path(made), run, what, repository, public)


def _upload(folder: Path, run: RunReader, what: str, repository: str, public: bool) -> str:
    api, kind = HfApi(), KINDS[what]
    try:
        # Before the hub is asked, which would say of a name that is none that it is not found.
        validate_repo_id(repository)
        api.create_repo(repository, repo_type=kind, private=not public, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            repo_type=kind,
            folder_path=folder,
            commit_message=f"{what} of {run.job.name}, made by rdpo",
            ignore_patterns=[MANIFEST, IN_PROGRESS],
        )
    except HFValidationError as error:
        raise InputError(f"{repository}: no name of a repository on the hub, as owner/name is: {error}") from None
    except HfHubHTTPError as error:
        raise InputError(f"{repository}: the hub refuses it: {_first_line(error)}; {_remedy(error)}") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{repository}: HF_HUB_OFFLINE is set; unset it to reach the hub") from None
    except HTTPError as error:
        raise InputError(
            f"{repository}: the hub cannot be reached ({_first_line(error)}); the same command tries again"
        ) from None
    return str(commit.commit_url)


def _remedy(error: HfHubHTTPError) -> str:
    if error.response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return "log in by `hf auth login`, or set HF_TOKEN to a token that may write there"
    return "the same command tries again"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
