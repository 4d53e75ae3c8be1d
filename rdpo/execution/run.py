"""A run while it is made: its job, its folders, and what has been done so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution.lock import Say
from rdpo.files.stage_folder import Manifest, StageFolder
from rdpo.tracking.console import Console


@dataclass
class Run:
    """One run: its job, its directory, run directories whose stages it may take over, whom to tell when a stage is made
    and others are to come, and what has been done so far: the manifests of finished stages, and which of them this run
    has made.
    """

    job: Job
    dir: str
    console: Console
    prepare: Callable[[Job, Say], bool]
    siblings: tuple[str, ...] = ()
    on_stage: Callable[[Run], None] | None = None
    manifests: dict[str, Manifest] = field(default_factory=dict)
    made: set[str] = field(default_factory=set)

    @cached_property
    def streams(self) -> bool:
        """Whether stages may run at the same time here; known once the job's models are tried and Ray is started."""
        for section in self.job.trusted_code:
            self.console.warn(f"{section}.trust_remote_code: Python code that ships with the model is run")
        return self.prepare(self.job, self.console.say)

    def folder(self, stage: str) -> StageFolder:
        """Folder of a stage."""
        return StageFolder(self.dir, stage)

    def made_by_siblings(self, stage: str) -> Iterator[tuple[StageFolder, dict[str, Any]]]:
        """The committed folders of a stage in run directories that this one may take from, with their settings."""
        for folder in (StageFolder(sibling, stage) for sibling in self.siblings):
            if manifest := folder.manifest():
                yield folder, manifest.settings

    def manifest(self, stage: str, wanted_by: str) -> Manifest:
        """Manifest of a committed stage.

        Raises:
            InputError: it is not finished.
        """
        manifest = self.manifests.get(stage) or self.folder(stage).manifest()
        if manifest is None:
            raise InputError(f"{wanted_by} needs the {stage} stage, which is not finished; `rdpo run` makes both")
        return manifest
