"""A run seen from Python: its job, manifests and tables, read from the run directory when they are asked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from markupsafe import Markup

from rdpo.errors import InputError
from rdpo.evaluation.export import export
from rdpo.evaluation.page import REPORT
from rdpo.evaluation.report import headline
from rdpo.folder import Folder
from rdpo.pipeline import job_of_run
from rdpo.records import visible
from rdpo.rounds import round_dir
from rdpo.stage_names import known_stage
from rdpo.storage import METRICS, Manifest, StageFolder, finished
from rdpo.streaming import ID

if TYPE_CHECKING:
    import pyarrow as pa
    import ray.data

TABLE = Markup("<table><tr><th>stage</th><th>rows</th><th>dropped</th><th>seconds</th></tr>{}</table>")
LINE = Markup("<tr><td>{}</td><td>{}</td><td>{}</td><td>{:.0f}</td></tr>")
PAGE = Markup("<div><b>{}</b> <code>{}</code>{}<pre>{}</pre></div>")


class RunView:
    """What a run directory holds, on disk or in an object store. It only reads, also while the run goes on.

    `dir` is the run directory, `job` its job with all defaults.
    """

    def __init__(self, run_dir: str):
        """Look at a run.

        Raises:
            InputError: there is none in this directory.
        """
        self.dir = run_dir.rstrip("/")
        self.job = job_of_run(self.dir)

    @property
    def manifests(self) -> dict[str, Manifest]:
        """What is told of each finished stage, by its name: settings, rows, dropped rows by reason, tokens, seconds."""
        return finished(self.dir, self.job.stages)

    @property
    def rounds(self) -> list[RunView]:
        """The rounds of a job that has several, each a run of its own."""
        folders = (round_dir(self.dir, number) for number in range(1, self.job.rounds.count + 1))
        return [RunView(folder) for folder in folders if Folder(folder).files()]

    @property
    def headline(self) -> list[str]:
        """The result in a few lines of text; none before the evaluation."""
        return headline(self.dir)

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The metrics of every optimizer step, in order; none before training is finished."""
        return StageFolder(self.dir, "training").read_lines(METRICS)

    @property
    def model(self) -> str | None:
        """Where the published model is: a folder, or an address in an object store; None before there is one."""
        folder = StageFolder(self.dir, "model")
        return folder.address() if folder.manifest() else None

    @property
    def report(self) -> str | None:
        """Where the report is; None before there is one."""
        folder = Folder(self.dir)
        return folder.address(REPORT) if folder.exists(REPORT) else None

    def table(self, stage: str, columns: list[str] | None = None, dropped: bool = False) -> pa.Table:
        """The rows of a stage in the order of their ids, as far as they are made; or those that it dropped.

        Raises:
            InputError: there is no such stage, or it has not begun.
        """
        table = self._folder(stage).table("dropped" if dropped else "", columns)
        return table.sort_by(ID) if ID in table.column_names else table

    def dataset(self, stage: str) -> ray.data.Dataset:
        """The rows of a stage as a Ray Dataset.

        Raises:
            InputError: there is no such stage, or it has not begun.
        """
        return self._folder(stage).dataset()

    def export(self, what: Literal["pairs", "answers"], target: str) -> None:
        """Write the pairs as a preference data set, or the evaluated answers as AlpacaEval's outputs, in a new folder.

        Raises:
            InputError: they are not made yet or there are none, or the folder is not empty.
        """
        export(self.dir, what, target)

    def _folder(self, stage: str) -> StageFolder:
        folder = StageFolder(self.dir, known_stage(stage))
        if not folder.files():
            raise InputError(f"{self.dir}: the {stage} stage has not begun")
        return folder

    def __repr__(self) -> str:
        return f"RunView({self.dir!r}: {', '.join(self.manifests) or 'no stage finished'})"

    def _repr_html_(self) -> str:
        """The stages and the result, for a notebook."""
        rows = [LINE.format(stage, *_counts(manifest), manifest.seconds) for stage, manifest in self.manifests.items()]
        told = visible("\n".join(self.headline))
        return str(PAGE.format(visible(self.job.name), visible(self.dir), TABLE.format(Markup("").join(rows)), told))


def _counts(manifest: Manifest) -> tuple[int | str, int | str]:
    """Rows and dropped rows of a stage that has rows."""
    return (manifest.rows_out, sum(manifest.dropped.values())) if manifest.rows_in else ("", "")
