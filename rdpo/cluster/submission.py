"""A job sent to a Ray cluster: the working directory goes along, and the driver starts there."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rdpo.errors import InputError

RUNTIME_ENV = "jobs/runtime_env.yaml"
TOO_LARGE = "status code 413"
LARGEST = 3


def submit(address: str, name: str, arguments: Sequence[str], runtime_env: str | None = None) -> None:
    """Send the working directory to a cluster and start `rdpo run` with these arguments there.

    Args:
        address: URL of the cluster's dashboard.
        name: id of the Ray job.
        arguments: of `rdpo run`.
        runtime_env: YAML file of what goes along and what does not; by default `RUNTIME_ENV`, where there is one.

    Raises:
        InputError: the cluster is not there, or refuses the token, the working directory or the name.
    """
    # Ray reads it as it is imported.
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    along = {**_read(runtime_env), "working_dir": "."}
    try:
        client = JobSubmissionClient(address)
        client.submit_job(
            entrypoint=shlex.join(["python", "-m", "rdpo", "run", *arguments]), submission_id=name, runtime_env=along
        )
    except AuthenticationError:
        where = "RAY_AUTH_TOKEN, or the file that RAY_AUTH_TOKEN_PATH names (~/.ray/auth_token)"
        raise InputError(f"{address}: the cluster refuses the token in {where}; ask for the cluster's own") from None
    except ConnectionError:
        raise InputError(f"{address}: no Ray dashboard answers there; open the tunnel, or give --address") from None
    except (RuntimeError, ValueError) as error:
        raise InputError(_refusal(address, str(error))) from None


def _read(runtime_env: str | None) -> dict[str, Any]:
    import yaml

    path = Path(runtime_env or RUNTIME_ENV)
    if runtime_env is None and not path.is_file():
        return {}
    try:
        read = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: {error}") from None
    if not isinstance(read, dict):
        raise InputError(f"{path}: a runtime environment is a table, as in {RUNTIME_ENV}")
    return read


def _refusal(address: str, said: str) -> str:
    if TOO_LARGE in said:
        return (
            f"{address}: the working directory is too large for Ray, which takes 100 MiB packed; its largest files are "
            f"{', '.join(_largest())}; name under `excludes` in {RUNTIME_ENV} what the job can do without"
        )
    lines = [line for line in said.splitlines() if line.strip()]
    return f"{address}: {lines[-1].strip() if lines else 'the cluster refuses the job'}"


def _largest() -> list[str]:
    sizes = {path: path.stat().st_size for path in Path().rglob("*") if path.is_file() and not path.is_symlink()}
    found = sorted(sizes, key=lambda path: -sizes[path])[:LARGEST]
    return [f"{path} ({sizes[path] >> 20} MiB)" for path in found]
