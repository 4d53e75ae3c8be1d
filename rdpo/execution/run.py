"""A run while it is made: what its files say, whom to tell, and what this process has done so far."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rdpo.config import Job
from rdpo.execution.lock import Check, Say
from rdpo.execution.reader import RunReader
from rdpo.execution.stage import Stage
from rdpo.files.manifest import Manifest, Settings
from rdpo.files.stage_folder import StageFolder
from rdpo.tracking.console import Console


class Run(RunReader):
    """One run that this process makes.

    `streams` says whether stages may run at the same time; it is known once the run is `prepared`. `manifests` are
    those of stages found up to date or made here, `made` the names of those made here.
    """

    def __init__(
        self,
        job: Job,
        run_dir: str,
        console: Console,
        prepare: Callable[[Job, Say], bool],
        siblings: Sequence[str] = (),
        on_stage: Callable[[Run], None] | None = None,
        stages: Sequence[Stage] = (),
        check: Check = lambda: None,
    ):
        """Begin nothing yet.

        Args:
            job: the run's job.
            run_dir: where it lives.
            console: whom to tell.
            prepare: tries models and starts Ray before the first stage is made; whether stages may stream.
            siblings: run directories whose stages it may take over.
            on_stage: called when a stage is made and others are to come.
            stages: all stages of the job, in order.
            check: asks whether this process still holds the run directory, before anything in it is begun, removed or
                committed; an InputError if not.
        """
        super().__init__(run_dir, job)
        self.console, self.prepare, self.siblings = console, prepare, tuple(siblings)
        self.on_stage, self.stages, self.check = on_stage, tuple(stages), check
        self.prepared = self.streams = False
        self.manifests: dict[str, Manifest] = {}
        self.made: set[str] = set()

    def manifest(self, stage: str) -> Manifest | None:
        """Manifest of a stage, the known one before that on file; None while it is not finished."""
        return self.manifests.get(stage) or super().manifest(stage)

    def made_by_siblings(self, stage: str) -> Iterator[tuple[StageFolder, Settings]]:
        """The committed folders of a stage in run directories that this one may take from, with their settings."""
        for folder in (StageFolder(sibling, stage) for sibling in self.siblings):
            if manifest := folder.manifest():
                yield folder, manifest.settings
