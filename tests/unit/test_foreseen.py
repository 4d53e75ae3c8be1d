"""What a comparison would do, before it does it."""

import pytest
import tomli_w

from rdpo.cli import main
from rdpo.errors import InputError
from rdpo.experiments.comparison import load_comparison
from rdpo.experiments.foreseen import foreseen, totals
from tests.support.jobs import write_job

TRAINED_ALONE = ["training", "policy", "evaluation"]


@pytest.fixture
def comparison(job_table, tmp_path):
    write_job(tmp_path / "base.toml", job_table)
    arms = {"dpo": {"training": {"offset_coef": 0.0}}, "rdpo": {"training": {"offset_coef": 0.5}}}
    table = {"name": "two", "job": "base.toml", "baseline": "dpo", "seeds": [0, 1], "arms": arms}
    path = tmp_path / "compare.toml"
    path.write_text(tomli_w.dumps(table))
    return path


def test_stages_that_arms_have_in_common_are_made_once(comparison, tmp_path):
    first, other_seed, arm, _ = runs = foreseen(*load_comparison(comparison), str(tmp_path / "run"))
    assert not first.taken
    assert first.made[0] == "prompts"
    # Prompts are the same for every seed, answers are not.
    assert other_seed.taken["prompts"] == "dpo, seed 0"
    assert "synthesis" in other_seed.made
    assert arm.made == TRAINED_ALONE
    assert set(arm.taken) == set(first.made) - set(TRAINED_ALONE)
    assert totals(runs).startswith("4 runs; to be made: 1 x prompts, ")
    assert "2 x synthesis" in totals(runs)
    assert "4 x training" in totals(runs)


def test_one_seed_alone_makes_by_itself_what_another_has_not_made(comparison, tmp_path):
    loaded, folder = load_comparison(comparison), str(tmp_path / "run")
    first, arm = foreseen(*loaded, folder, [1])
    assert (first.seed, arm.seed) == (1, 1)
    assert not first.taken
    assert set(arm.taken.values()) == {"dpo, seed 1"}
    with pytest.raises(InputError, match="--seed 7: the comparison's seeds are 0, 1"):
        foreseen(*loaded, folder, [7])


def test_a_dry_run_prints_it_and_makes_nothing(comparison, tmp_path, capsys):
    folder = tmp_path / "run"
    assert main(["compare", str(comparison), "--dry-run", "--run-dir", str(folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[2].startswith("rdpo, seed 0: makes training, policy, evaluation; takes prompts, ")
    assert not folder.exists()
