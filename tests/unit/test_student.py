"""The one forward of a job's student, and which weights are in four bits where."""

import pytest
import torch

from rdpo.config import Job
from rdpo.evaluation.generate import Divergence
from rdpo.inspection.token_logps import TokenReader
from rdpo.modeling.student import student_forward
from rdpo.modeling.weights import ModelRef
from rdpo.preference.reference import Reference
from tests.support.jobs import valid_job

PROMPT, ANSWERS = [10, 20, 30], [[40, 50], [60, 70, 80]]


@pytest.fixture
def quantised(tiny_model, tmp_path):
    table = valid_job(tiny_model, tmp_path)
    table["student"]["quantization"] = "nf4"
    return Job.model_validate({**table, "training": {**table["training"], "lora": {"rank": 4}, "zero_stage": 1}})


class TrainedRun:
    """What a reader of token log-probs asks of a run whose policy stage is done."""

    def __init__(self, job, merged):
        self.job, self.merged = job, merged

    def job_of(self, stage):
        return self.job

    def manifest(self, stage):
        return stage

    def folder(self, stage):
        return self

    def local(self, name):
        return self.merged


def four_bits(policy):
    return sum(weight.dtype == torch.uint8 for weight in policy.parameters())


def logps(policy):
    with torch.inference_mode():
        return policy(policy.batch([PROMPT], *([answer] for answer in ANSWERS)))


def test_the_start_is_in_four_bits_wherever_it_is_read_and_the_trained_model_nowhere(quantised, tiny_model):
    divergence = Divergence(quantised, {"trained": tiny_model, "start": None}, "trained").readers
    reader = TokenReader(TrainedRun(quantised, tiny_model))
    starts = [Reference(quantised).reader.policy, divergence["start"].policy, reader.reference]
    starts += [student_forward(quantised).eval()]
    trained = [divergence["trained"].policy, reader.policy]
    assert {four_bits(policy) for policy in starts} == {14}
    assert {four_bits(policy) for policy in trained} == {0}
    assert all(torch.equal(logps(policy), logps(starts[0])) for policy in starts)
    assert all(torch.equal(logps(policy), logps(trained[0])) for policy in trained)
    # The same weights as stored, so this is what four bits rounded away.
    assert 0 < (logps(trained[0]) - logps(starts[0])).abs().max() < 1


def test_the_student_to_train_begins_as_its_reference(quantised):
    trained, start = student_forward(quantised, to_train=True).eval(), student_forward(quantised).eval()
    assert trained.adapted and not start.adapted
    assert four_bits(trained) == 14
    assert torch.equal(logps(trained), logps(start))


def test_trust_and_revision_stay_with_the_student(quantised):
    student = quantised.student.model_copy(update={"revision": "abc", "trust_remote_code": True})
    job = quantised.model_copy(update={"student": student})
    assert ModelRef.of(job, None) == ModelRef.student(job) == ModelRef(job.student.model, "abc", trust=True)
    assert ModelRef.of(job, "owner/other") == ModelRef("owner/other", None, trust=False)
