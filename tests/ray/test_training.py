"""Training through Ray Train and DeepSpeed: right losses, whatever the number of workers; resume; export."""

import json
import math
import random
from pathlib import Path
from uuid import uuid4

import pytest
import torch
from ray.train import TrainingFailedError
from safetensors.torch import load_file

from rdpo.config import Job
from rdpo.files.stage_folder import StageFolder
from rdpo.modeling.student import weights_of_start
from rdpo.training.checkpoint import finish_policy
from rdpo.training.heldout import LOSS, best_step
from rdpo.training.loop import NonFiniteStep
from rdpo.training.trainer import heldout_margins
from tests.support.adapters import adapter_on
from tests.support.jobs import valid_job
from tests.support.reference_stage import losses, pair, referenced
from tests.support.training import die_at, stopped_at, train, train_alone

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def table(tiny_model, place):
    """A job of 12 steps: 24 pairs, 4 in a step, two epochs, full fine-tuning in fp32."""
    job = valid_job(tiny_model, place)
    job["reference"]["max_length"] = 64
    return {**job, "training": {**job["training"], "epochs": 2, "checkpoint_every": 3, "offset_coef": 0.7}}


@pytest.fixture(scope="module")
def run_dir(ray_cluster, place, table):
    """A run whose reference stage is done: 24 pairs of random tokens and three held out, with the actor's log-probs."""
    draw = random.Random(0)
    return referenced(place, table, [pair(draw, index) for index in range(27)])


def test_known_log_probs_need_no_model(run_dir, table):
    import ray

    from rdpo.preference.known_logps import known_logps
    from rdpo.preference.reference import Reference

    made = StageFolder(run_dir, "reference").table()
    known = ray.put(known_logps([made]))
    reference = Reference(Job.model_validate(table), known)
    plain = [name for name in made.column_names if not name.endswith(("_ids", "_logps"))]
    again = reference(made.select(plain))
    assert "policy" not in vars(reference)
    assert again.select(made.column_names).to_pylist() == made.to_pylist()


@pytest.fixture(scope="module")
def undisturbed(run_dir, table):
    """Metrics and folder of ZeRO-3 on two workers from the first step to the last."""
    return train(run_dir, table, "undisturbed", zero_stage=3, num_workers=2)


def first_gaps(run_dir):
    from rdpo.modeling.packing import epoch_order
    from rdpo.training.loop import PairTable

    data = PairTable.load(run_dir)
    return data.rows(tuple(epoch_order(len(data), 0, 0)[:4]))["reward_gap"]


def test_first_loss_is_minus_log_sigmoid_of_minus_the_offset(run_dir, undisturbed):
    first, gaps = undisturbed[0][0], first_gaps(run_dir)
    expected = [math.log1p(math.exp(0.7 * gap)) for gap in gaps]
    assert first["loss"] == pytest.approx(sum(expected) / 4, abs=1e-4)
    assert first["offset/negative_share"] == sum(gap < 0 for gap in gaps) / 4


@pytest.mark.usefixtures("process_group")
def test_two_workers_under_zero3_equal_one_with_smaller_micro_batches(run_dir, table, undisturbed):
    (one, margins), two = train_alone(run_dir, table, zero_stage=1, tokens_per_batch=128), undisturbed[0]
    assert len(one) == 12
    assert losses(two) == pytest.approx(losses(one), abs=1e-3)
    assert sum(step["rewards/margins"] for step in one[6:]) > 0.1
    norms = [step["grad_norm"] for step in two]
    assert [step["grad_norm"] for step in one] == pytest.approx(norms, rel=1e-2)
    assert norms[0] > 0
    assert sorted(margins) == ["p24", "p25", "p26"]
    assert min(map(abs, margins.values())) > 1e-3
    assert heldout_margins(undisturbed[1]) == pytest.approx(margins, abs=2e-2)


@pytest.mark.long
def test_the_weights_of_the_best_step_leave(run_dir, table):
    table = {**table, "pairs": {"heldout_fraction": 0.1}}
    # A rate at which training soon does more harm than good.
    plain = {"zero_stage": 0, "schedule": "constant", "warmup_ratio": 0.0, "learning_rate": 6e-2}
    history, folder = train(run_dir, table, "best", **plain, select="best", checkpoint_every=2, keep_checkpoints=1)
    best = best_step(history)
    assert 0 < best < len(history)
    assert [step["step"] for step in history if LOSS in step] == [2, 4, 6, 8, 10, 12]
    _, stopped = train(run_dir, table, "stopped", **plain, max_steps=best)
    assert heldout_margins(folder) == heldout_margins(stopped)
    left, expected = (load_file(Path(one.local("policy")) / "model.safetensors") for one in (folder, stopped))
    assert all(torch.equal(left[name], tensor) for name, tensor in expected.items())


def test_adapter_trains_and_merges(run_dir, table):
    lora = {"rank": 4, "alpha": 8}
    history, folder = train(run_dir, table, "lora", num_workers=2, lora=lora, learning_rate=1e-2, offset_coef=0.0)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert sum(step["rewards/margins"] for step in history[6:]) > 0.1
    adapter, merged = Path(folder.local("policy")), Path(folder.local("merged"))
    weights = load_file(adapter / "adapter_model.safetensors")
    assert weights
    assert all(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)
    base = Path(table["student"]["model"])
    finish_policy(adapter, base, merged)
    before, after = load_file(base / "model.safetensors"), load_file(merged / "model.safetensors")
    assert before.keys() == after.keys()
    assert len([name for name in before if not torch.equal(before[name], after[name])]) == 14
    assert (merged / "tokenizer.json").is_file()


@pytest.mark.parametrize("use", ["continue", pytest.param("merge", marks=pytest.mark.long)])
def test_a_student_with_an_adapter_begins_as_its_reference(use, ray_cluster, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    base, draw = Path(table["student"]["model"]), random.Random(0)
    adapter_on(base, "sft")
    # Another one each time: no worker finds it merged.
    Path("sft", "salt.json").write_text(json.dumps(str(uuid4())), encoding="utf-8")
    started = {**table, "student": {**table["student"], "adapter": "sft", "adapter_use": use}}
    run_dir = referenced(tmp_path / "run", started, [pair(draw, index) for index in range(24)])

    options = {"learning_rate": 1e-2, "offset_coef": 0.0}
    lora = {"lora": {"rank": 2, "alpha": 4}} if use == "merge" else {}
    history, folder = train(run_dir, started, use, num_workers=2, zero_stage=3, **options, **lora)
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert max(abs(step["rewards/margins"]) for step in history[1:]) > 0.01

    left = Path(folder.local("policy"))
    trained, before = (load_file(place / "adapter_model.safetensors") for place in (left, tmp_path / "sft"))
    assert (trained.keys() == before.keys()) == (use == "continue")
    start = weights_of_start(Job.model_validate(started)).folder()
    assert (start == base.resolve()) == (use == "continue")
    assert finish_policy(left, start, tmp_path / "merged")["merge_difference"] < 1e-4


def test_full_weights_are_exported_whole_from_zero3(table, undisturbed):
    policy = Path(undisturbed[1].local("policy"))
    base, exported = (load_file(Path(folder) / "model.safetensors") for folder in (table["student"]["model"], policy))
    assert {name: tensor.shape for name, tensor in base.items()} == {n: t.shape for n, t in exported.items()}
    assert not list(policy.glob("*.bin"))


def test_interrupted_training_resumes_as_if_nothing_had_happened(run_dir, table, undisturbed):
    """The run dies after its first checkpoint; the same call again gives the undisturbed losses."""
    with pytest.raises(TrainingFailedError):
        die_at(run_dir, table, "broken", 5, num_workers=2)
    resumed, folder = train(run_dir, table, "broken", num_workers=2)
    assert losses(resumed) == losses(undisturbed[0])
    stored = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").decode().splitlines()]
    assert [step["step"] for step in stored] == list(range(1, 13))


def test_a_loss_that_is_not_finite_ends_training_at_once_and_names_the_rows(run_dir, table):
    with pytest.raises(NonFiniteStep, match=r"rows of the batch: p\d\d, p\d\d, p\d\d, p\d\d$"):
        train(run_dir, table, "diverged", learning_rate=1e30, warmup_ratio=0.0, schedule="constant")
    steps = [json.loads(line) for line in StageFolder(run_dir, "diverged").read_bytes("metrics.jsonl").splitlines()]
    assert [step["step"] for step in steps] == [1]


@pytest.mark.long
def test_training_resumes_with_another_number_of_workers(run_dir, table, undisturbed):
    """Stopped after a step on two workers, to the end on one."""
    with pytest.raises(KeyboardInterrupt):
        stopped_at(run_dir, table, "moved", 3, num_workers=2, zero_stage=3)
    resumed, _ = train(run_dir, table, "moved", num_workers=1, zero_stage=3)
    assert losses(resumed) == pytest.approx(losses(undisturbed[0]), abs=1e-4)


@pytest.mark.long
def test_training_resumes_from_its_checkpoints_with_less_memory(run_dir, table, undisturbed):
    """The settings that do not count for the stage are such that training can change in the middle."""
    with pytest.raises(KeyboardInterrupt):
        stopped_at(run_dir, table, "smaller", 3, num_workers=2, zero_stage=3)
    less = {"tokens_per_batch": 128, "gradient_checkpointing": True, "logprob_chunk": 7, "layout": "padded"}
    resumed, folder = train(run_dir, table, "smaller", num_workers=2, zero_stage=3, **less)
    assert losses(resumed) == pytest.approx(losses(undisturbed[0]), abs=1e-3)
    stored = [json.loads(line) for line in folder.read_bytes("metrics.jsonl").decode().splitlines()]
    assert [step["step"] for step in stored] == list(range(1, 13))


@pytest.mark.long
@pytest.mark.parametrize("settings", [{"zero_stage": 3}, {"zero_stage": 1}, {"zero_stage": 3, "lora": {"rank": 4}}])
def test_training_resumes_with_fewer_and_with_more_workers(run_dir, table, settings):
    """Stopped after a step on two workers, on to a second one on one worker, and to the end on two."""
    name = f"back-{settings['zero_stage']}-{len(settings)}"
    whole, _ = train(run_dir, table, f"{name}-whole", num_workers=2, **settings)
    for workers, until in ((2, 3), (1, 7)):
        with pytest.raises(KeyboardInterrupt):
            stopped_at(run_dir, table, name, until, num_workers=workers, **settings)
    resumed, folder = train(run_dir, table, name, num_workers=2, **settings)
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
    assert Path(folder.local("policy")).is_dir()
