"""Weights of rows: all ones are no weights, others are those of the gradient, and what a file of them may hold."""

import pytest
import torch

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution.keys import same_settings
from rdpo.files.folder import Folder
from rdpo.stages import training
from rdpo.training.row_weights import read_weights, write_weights
from tests.support.pairs import PAIRS, pairs, trainer_of, weights
from tests.support.plain_backend import PlainBackend

IDS = [f"p{index}" for index in range(PAIRS)]
STEPS = 3


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def plain(model, place, data, **settings):
    return trainer_of(model, place, data, PlainBackend, **settings)


def trained(trainer, indices=range(PAIRS)):
    """Metrics of some steps without their times, and the weights behind them."""
    history = []
    for index in range(STEPS):
        step = trainer.step(index, STEPS, list(indices))
        history.append({name: step[name] for name in ("loss", "grad_norm", "rewards/margins")})
    return history, weights(trainer)


def weighted(*values):
    return pairs().with_weights(dict(zip(IDS, values, strict=True)))


@pytest.mark.usefixtures("process_group", "one_thread")
@pytest.mark.parametrize("loss", ["dpo", "plackett_luce"])
def test_weights_of_all_ones_train_as_none_do_to_the_last_bit(tiny_model, tmp_path, loss):
    (history, one), (expected, none) = (
        trained(plain(tiny_model, tmp_path, data, loss=loss)) for data in (weighted(1.0, 1.0, 1.0, 1.0), pairs())
    )
    assert history == expected
    assert all(torch.equal(one[name], none[name]) for name in none)


@pytest.mark.usefixtures("process_group", "one_thread")
def test_a_row_of_weight_two_counts_as_the_row_twice_and_one_of_weight_zero_for_nothing(tiny_model, tmp_path):
    settings = {"max_grad_norm": 1e9}
    history, _ = trained(plain(tiny_model, tmp_path, weighted(2.0, 0.0, 1.0, 1.0), **settings))
    twice, _ = trained(plain(tiny_model, tmp_path, pairs(), **settings), [0, 0, 2, 3])
    for name in ("loss", "grad_norm"):
        assert [step[name] for step in history] == pytest.approx([step[name] for step in twice], rel=1e-4), name


@pytest.mark.usefixtures("process_group", "one_thread")
def test_the_losses_of_rows_are_those_without_weights(tiny_model, tmp_path):
    trainer = plain(tiny_model, tmp_path, weighted(3.0, 0.0, 0.5, 1.0))
    losses = {row["prompt_id"]: row["loss"] for row in trainer.row_losses()}
    assert list(losses) == sorted(losses) == IDS
    loss = trainer.step(0, 9, [0, 1, 2, 3])["loss"]
    assert loss == pytest.approx((3.0 * losses["p0"] + 0.5 * losses["p2"] + losses["p3"]) / PAIRS, rel=1e-6)
    assert [row["loss"] for row in trainer.row_losses()] != list(losses.values())


@pytest.mark.usefixtures("process_group", "one_thread")
@pytest.mark.parametrize("offset_coef", [0.0, 0.7])
def test_the_losses_of_groups_of_two_are_those_of_pairs_to_the_last_bit(tiny_model, tmp_path, offset_coef):
    one, two = (
        plain(tiny_model, tmp_path, weighted(2.0, 1.0, 1.0, 0.5), loss=loss, offset_coef=offset_coef)
        for loss in ("dpo", "plackett_luce")
    )
    (history, _), (expected, _) = trained(one), trained(two)
    assert history == expected
    assert one.row_losses() == two.row_losses()


def test_every_row_needs_a_weight():
    with pytest.raises(InputError, match="no weight for the row p3"):
        pairs().with_weights({"p0": 1.0, "p1": 1.0, "p2": 1.0, "another": 1.0})


def test_weights_are_read_as_they_were_written(tmp_path):
    known = {"a": 0.1, "b": 1 / 3, "c": 0.0, "ä": 1e-300}
    address = write_weights(Folder(str(tmp_path / "below")), "weights.jsonl", known)
    assert read_weights(address) == known


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "write {"),
        ('{"prompt_id": "a"}', "write {"),
        ('["a", 1.0]', "write {"),
        ('{"prompt_id": "a", "weight": -1}', "finite number of 0 or more"),
        ('{"prompt_id": "a", "weight": NaN}', "finite number of 0 or more"),
        ('{"prompt_id": "a", "weight": true}', "finite number of 0 or more"),
        ('{"prompt_id": 1, "weight": 1.0}', "must be a text"),
    ],
)
def test_a_line_that_is_no_weight_is_named(tmp_path, line, said):
    path = tmp_path / "weights.jsonl"
    path.write_text('{"prompt_id": "a", "weight": 1.0}\n' + line + "\n")
    with pytest.raises(InputError, match=said) as error:
        read_weights(str(path))
    assert f"{path}:2" in str(error.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_weights(str(tmp_path / "nothing.jsonl"))


def test_training_depends_on_the_weights_and_not_on_where_they_lie(job_table, tmp_path):
    found = {}
    for name, weight in (("here", 1.0), ("there", 1.0), ("other", 2.0)):
        address = write_weights(Folder(str(tmp_path / name)), "weights.jsonl", {"a": weight})
        table = {**job_table, "training": {**job_table["training"], "row_weights": address}}
        found[name] = training.settings(Job.model_validate(table))
    assert same_settings(found["here"], found["there"])
    assert not same_settings(found["here"], found["other"])
    assert not same_settings(found["here"], training.settings(Job.model_validate(job_table)))
