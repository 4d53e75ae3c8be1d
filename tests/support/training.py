"""Training on a reference stage that is made: through Ray Train, alone in this process, and ended in the middle."""

from contextlib import contextmanager

import torch

from rdpo.config import Job
from rdpo.files.stage_folder import StageFolder


def job_of(table, **training):
    """The job of a table, with changes to its training."""
    return Job.model_validate({**table, "training": {**table["training"], **training}})


def train(run_dir, table, name, on_step=lambda metrics: None, **training):
    """Train through Ray Train into the folder `name`, or go on there; metrics of all steps, and the folder."""
    from rdpo.training import trainer

    folder = StageFolder(run_dir, name)
    if not folder.exists("in_progress.json"):
        folder.begin("k")
    return trainer.train(job_of(table, **training), run_dir, folder, on_step), folder


def train_alone(run_dir, table, **training):
    """Metrics of all steps of one worker in this process, without Ray, and the margins of held-out pairs."""
    from rdpo.training.loop import PairTable

    trainer, history = trainer_alone(run_dir, table, **training)
    margins = trainer.margins(PairTable.load(run_dir, heldout=True))
    return history, {margin["prompt_id"]: margin["margin"] for margin in margins}


def trainer_alone(run_dir, table, **training):
    """A worker in this process that has taken all steps, and their metrics."""
    from rdpo.training.loop import PairTable, Trainer, step_pairs

    job = job_of(table, **training)
    data = PairTable.weighted(run_dir, job)
    trainer, steps = Trainer(job, data, torch.device("cpu")), list(step_pairs(len(data), job))
    return trainer, [trainer.step(index, len(steps), pairs) for index, pairs in enumerate(steps)]


def die_at(run_dir, table, name, step, **training):
    """Train with a sink that fails when it hears of a step, and no failures allowed."""
    with deadly_sink(step):
        train(run_dir, table, name, **training, max_failures=0)


@contextmanager
def deadly_sink(step):
    """Every training's sink fails when it hears of a step, as long as the context lasts."""
    from rdpo.training import trainer

    class Deadly(trainer.MetricsSink):
        def record(self, steps):
            if any(metrics["step"] == step for metrics in steps):
                raise RuntimeError("the machine is gone")
            super().record(steps)

    original, trainer.MetricsSink = trainer.MetricsSink, Deadly
    try:
        yield
    finally:
        trainer.MetricsSink = original


def stopped_at(run_dir, table, name, step, **training):
    """Train, and interrupt the driver after one of its steps."""

    def interrupt(metrics):
        if metrics["step"] == step:
            raise KeyboardInterrupt

    train(run_dir, table, name, interrupt, **training)
