"""Disk that training takes, from numbers of weights: against figures by hand, and against what is really written."""

import pytest
import torch

from rdpo.config import Annotators, Job
from rdpo.modeling.flops import Arithmetic
from rdpo.planning.disk import checkpoint_bytes, disk, node_parts, nodes_of, run_dir_parts
from rdpo.planning.memory import Rehearsal
from tests.support.jobs import valid_job

BILLION = 10**9


@pytest.fixture
def job_of(tiny_model, tmp_path):
    def job_of(dtype="bfloat16", publish=None, **training):
        table = valid_job(tiny_model, tmp_path)
        table["student"]["dtype"] = dtype
        more = {"pairs": {"heldout_fraction": 0.1}, **({"publish": publish} if publish else {})}
        return Job.model_validate({**table, **more, "training": {**table["training"], **training}})

    return job_of


def rehearsal(weights, trained):
    return Rehearsal(weights, trained, 0, 0, Arithmetic(weights, 0, 0, trained < weights), True)


def test_the_checkpoint_of_a_70b_model_is_its_float32_weights_and_moments(job_of):
    """Twelve bytes a weight under ZeRO-3: 840 GB."""
    whole = rehearsal(70 * BILLION, 70 * BILLION)
    assert checkpoint_bytes(job_of(zero_stage=3, batch_size=32, num_workers=32), whole) == 840 * BILLION
    assert checkpoint_bytes(job_of(zero_stage=3, offload="all", gpus_per_worker=1), whole) == 840 * BILLION
    # Below stage 3 the 16-bit weights are beside it.
    assert checkpoint_bytes(job_of(zero_stage=1), whole) == 980 * BILLION
    # Without ZeRO there are no copies: float32 weights and two moments.
    assert checkpoint_bytes(job_of("float32", zero_stage=0), whole) == 840 * BILLION


def test_of_an_adapter_only_what_is_trained_counts(job_of):
    adapted = rehearsal(8 * BILLION + 10**8, 10**8)
    job = job_of(zero_stage=3, lora={"rank": 4})
    assert checkpoint_bytes(job, adapted) == 12 * 10**8
    parts = run_dir_parts(job, adapted)
    # The tiny model of the test is stored in float32.
    assert parts["policy, whole"] == 4 * 8 * BILLION
    assert parts["published model"] == 4 * 8 * BILLION + 2 * 10**8
    bare = run_dir_parts(job_of(zero_stage=3, lora={"rank": 4}, publish={"merge": False}), adapted)
    assert bare["published model"] == 2 * 10**8


def test_a_start_with_an_adapter_lies_on_each_node_merged_too(job_of):
    job = job_of(zero_stage=3)
    student = job.student.model_copy(update={"adapter": "sft", "adapter_use": "continue"})
    further = job.model_copy(update={"student": student})
    adapted = rehearsal(8 * BILLION + 10**8, 10**8)
    assert run_dir_parts(further, adapted)["published model"] == 4 * 8 * BILLION + 2 * 10**8
    parts = node_parts(further, adapted, gpus=False)
    assert parts["start model"] == parts["start model, its adapter merged into it"] == 4 * 8 * BILLION
    said = list(disk(further, adapted, gpus=False))
    most = float(said[-1].split()[-1])
    assert most == pytest.approx((2 * 4 * 8 * BILLION + 3 * 12 * 10**8) / 2**30, abs=0.01)


def test_the_run_directory_holds_the_kept_checkpoints_and_the_one_that_is_written(job_of):
    whole = rehearsal(BILLION, BILLION)
    last, best = (job_of(zero_stage=3, keep_checkpoints=3, select=select) for select in ("last", "best"))
    (kept,) = (amount for name, amount in run_dir_parts(last, whole).items() if name.startswith("checkpoints, 4 of"))
    assert kept == 4 * 12 * BILLION
    left = "weights that leave training"
    assert run_dir_parts(last, whole)[left] == 2 * 2 * BILLION
    assert run_dir_parts(best, whole)[left] == 5 * 2 * BILLION


def test_every_training_of_types_of_annotators_is_counted_and_a_model_for_each(job_of):
    whole, job = rehearsal(BILLION, BILLION), job_of(zero_stage=3, loss="plackett_luce")
    settings = {"annotators": Annotators(types=2, steps=5)}
    of_types = job.model_copy(update=settings)
    one, all_of_them = (list(run_dir_parts(case, whole).values()) for case in (job, of_types))
    assert [several / single for several, single in zip(all_of_them, one, strict=True)] == [11, 11, 2, 2]
    assert "11 trainings at most" in list(disk(of_types, whole, gpus=False))[-1]


def test_a_node_holds_its_share_of_a_checkpoint_or_all_of_it_three_times_to_convert_it(job_of):
    whole = rehearsal(BILLION, BILLION)
    job = job_of(zero_stage=3, num_workers=32, batch_size=32)
    assert (nodes_of(job, gpus=True), nodes_of(job, gpus=False)) == (4, 1)
    start, share, converted = node_parts(job, whole, gpus=True).values()
    assert (start, share, converted) == (4 * BILLION, 3 * BILLION, 36 * BILLION)
    lines = "\n".join(disk(job, whole, gpus=True))
    assert "each of 4 nodes" in lines and f"{40 * BILLION / 2**30:,.2f}" in lines


def test_a_checkpoint_is_as_large_as_what_torch_writes(job_of, tmp_path):
    """Float32 weights and AdamW's two moments, as an engine without ZeRO saves them."""
    weight = torch.nn.Parameter(torch.zeros(500_000))
    optimizer = torch.optim.AdamW([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.save({"module": weight, "optimizer": optimizer.state_dict()}, tmp_path / "one.pt")
    planned = checkpoint_bytes(job_of("float32", zero_stage=0), rehearsal(500_000, 500_000))
    assert (tmp_path / "one.pt").stat().st_size == pytest.approx(planned, rel=0.01)
