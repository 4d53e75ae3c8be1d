"""A run from Python: what a view reads of a run directory, and which job `rdpo.run` runs."""

import pytest

import rdpo
from rdpo.config import Job
from rdpo.errors import InputError
from tests.support.jobs import write_job
from tests.support.made_up import HOSTILE, made_up_run


@pytest.fixture
def view(job_table, tmp_path):
    return rdpo.load_run(made_up_run(tmp_path / "run", job_table))


def test_tables_are_in_the_order_of_ids_with_dropped_rows_apart(view):
    pairs = view.table("pairs")
    ids = pairs["prompt_id"].to_pylist()
    assert (len(ids), ids) == (7, sorted(ids))
    assert view.table("pairs", dropped=True)["reward_gap"].to_pylist() == [0.5]
    assert view.table("pairs", columns=["reward_gap"]).column_names == ["reward_gap"]
    assert view.manifests["pairs"].dropped == {"reward gap is below pairs.min_gap": 1}


def test_a_stage_that_is_none_or_has_not_begun_is_refused(view):
    with pytest.raises(InputError, match="no stage pair"):
        view.table("pair")
    with pytest.raises(InputError, match="the rewards stage has not begun"):
        view.dataset("rewards")


def test_result_and_metrics(view):
    assert view.headline[0].startswith("win rate    1.000")
    assert [step["loss"] for step in view.metrics] == [0.7, 0.5]
    assert (view.model, view.report, view.rounds) == (None, None, [])
    assert repr(view) == f"RunView({view.dir!r}: pairs, training, evaluation)"


def test_the_page_of_a_notebook_holds_no_markup_of_the_data(job_table, tmp_path):
    folder = made_up_run(tmp_path / HOSTILE.replace("/", "-"), job_table)
    page = rdpo.load_run(folder)._repr_html_()
    assert "<td>pairs</td><td>7</td><td>1</td>" in page
    assert "<td>training</td><td></td><td></td>" in page
    assert "win rate    1.000" in page
    assert "<script" not in page and "\u202e" not in page


def test_a_directory_without_a_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no run here"):
        rdpo.load_run(tmp_path)


@pytest.mark.parametrize("form", ["path", "tables", "job"])
def test_run_takes_a_path_tables_or_a_job(job_table, tmp_path, monkeypatch, form):
    executed = []

    def execute(job, run_dir, fresh, until, trace):
        assert not trace
        executed.append((job.training.beta, job.rewards[0].weight, run_dir, until))
        made_up_run(run_dir, job_table)

    monkeypatch.setattr("rdpo.api.execute", execute)
    monkeypatch.chdir(tmp_path)
    forms = {"path": lambda: write_job("job.toml", job_table), "tables": lambda: job_table}
    job = forms.get(form, lambda: Job.model_validate(job_table))()
    changes = {"training.beta": 0.3, "rewards.0.weight": 2}
    assert rdpo.run(job, until="pairs", overrides=changes).dir == "runs/tiny"
    assert executed == [(0.3, 2.0, "runs/tiny", "pairs")]
    assert "beta" not in job_table["training"]


def test_run_refuses_what_no_job_has(job_table):
    with pytest.raises(InputError, match="the job's stages are prompts, "):
        rdpo.run(job_table, until="pear")
    with pytest.raises(InputError, match=r"training\.bta: unknown key.*`beta`"):
        rdpo.run(job_table, overrides={"training.bta": 1})
    with pytest.raises(InputError, match="the list has entries 0 to 0"):
        rdpo.run(job_table, overrides={"rewards.3.weight": 1})


def test_the_bad_input_behind_a_worker_s_error_is_raised(job_table, tmp_path, monkeypatch):
    def fail(*_, **__):
        error = RuntimeError("ray::MapBatches()")
        error.cause = InputError("prompts.source: nothing is there")
        raise error

    monkeypatch.setattr("rdpo.api.execute", fail)
    with pytest.raises(InputError, match="nothing is there"):
        rdpo.run(job_table, tmp_path)


def test_every_public_name_is_there():
    assert all(getattr(rdpo, name) for name in rdpo.__all__)
    assert set(rdpo.__all__) <= set(dir(rdpo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        rdpo.nothing  # noqa: B018
