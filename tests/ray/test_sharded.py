"""A model partitioned over two processes: its log-probs are those of one process, and a process that dies is replaced.

The weights are above DeepSpeed's threshold for what every process keeps whole, so they are really partitioned.
"""

import os
import signal

import pyarrow as pa
import pytest
import ray
import torch
from transformers import LlamaForCausalLM

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.evaluation.generate import START, TRAINED, Divergence
from rdpo.files.stage_folder import StageFolder
from rdpo.preference.reference import FORWARD, Reference, add_reference, reference_pool
from rdpo.preference.rewards.implicit import Implicit
from tests.support.adapters import adapter_on
from tests.support.architectures import SMALL, small_model
from tests.support.jobs import valid_job
from tests.support.models import save_model, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.long, pytest.mark.usefixtures("ray_cluster"), pytest.mark.timeout(600)]

WIDE = {"hidden_size": 128, "intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.fixture(scope="module")
def models(tmp_path_factory, tokenizer):
    """Two models of one architecture whose matrices are partitioned."""
    folders = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(tokenizer, **WIDE))
        folders.append(save_model(tmp_path_factory.mktemp("wide"), model, tokenizer))
    return folders


def job_of(model, place, shards, **tables):
    table = valid_job(model, place)
    return Job.model_validate({**table, **tables, "reference": {**table["reference"], "shards": shards}})


def pair(number):
    return {
        "prompt_id": f"p{number:02d}",
        "prompt": [{"role": "user", "content": "why? " * (1 + number % 3)}],
        "chosen": [{"role": "assistant", "content": "because " * (1 + number % 5)}],
        "rejected": [{"role": "assistant", "content": f"no {number}"}],
        "chosen_finished": True,
        "rejected_finished": number % 2 > 0,
    }


def logps(rows):
    columns = [[row[f"reference_{side}_logps"] for side in ("chosen", "rejected")] for row in rows]
    return sorted(zip((row["prompt_id"] for row in rows), columns, strict=True))


def values(rows):
    return [value for _, both in logps(rows) for value in both]


@pytest.fixture(scope="module")
def whole(models, tmp_path_factory):
    """Thirty pairs as one process reads them."""
    job = job_of(models[0], tmp_path_factory.mktemp("whole"), shards=1)
    return Reference(job)(pa.Table.from_pylist([pair(number) for number in range(30)])).to_pylist()


def test_two_processes_read_what_one_reads(models, whole, tmp_path):
    job = job_of(models[0], tmp_path, shards=2)
    rows = add_reference(ray.data.from_items([pair(number) for number in range(30)]), job, run_dir=str(tmp_path))
    found = rows.take_all()
    assert [row["dropped"] for row in found] == [None] * 30
    assert [name for name, _ in logps(found)] == [name for name, _ in logps(whole)]
    assert values(found) == pytest.approx(values(whole), abs=1e-4)
    assert StageFolder(str(tmp_path), "reference").read_json(FORWARD)["layout"] == "packed"


def test_two_processes_read_an_adapter_beside_the_weights(models, whole, tmp_path):
    adapter = adapter_on(models[0], tmp_path / "sft")
    student = {"model": models[0], "dtype": "float32", "adapter": adapter, "adapter_use": "continue"}
    alone, divided = (job_of(models[0], tmp_path, shards, student=student) for shards in (1, 2))
    expected = Reference(alone)(pa.Table.from_pylist([pair(number) for number in range(8)])).to_pylist()
    rows = add_reference(ray.data.from_items([pair(number) for number in range(8)]), divided).take_all()
    assert values(rows) == pytest.approx(values(expected), abs=1e-4)
    # By far not what the model says without it.
    without = dict(logps(whole))
    assert all(abs(both[0] - without[name][0]) > 1e-2 for name, both in logps(expected))


class DiesOnce(Reference):
    """Ends one of its processes when it is given the second block, unless that was done before."""

    def __call__(self, batch):
        mark = os.path.join(self.run_dir, "died")
        if "p20" in batch["prompt_id"].to_pylist() and not os.path.exists(mark):
            with open(mark, "w"):
                pass
            victim = self.reader.group.shards[1].__ray_call__.remote(lambda shard: os.getpid())
            os.kill(ray.get(victim), signal.SIGKILL)
        return super().__call__(batch)


def test_a_process_that_is_killed_is_replaced_and_no_row_is_lost(models, whole, tmp_path):
    job = job_of(models[0], tmp_path, shards=2)
    blocks = [pa.Table.from_pylist([pair(number) for number in range(*ends)]) for ends in ((0, 15), (15, 30))]
    found = reference_pool(job).map(ray.data.from_arrow(blocks), DiesOnce, job=job, run_dir=str(tmp_path)).take_all()
    assert (tmp_path / "died").exists()
    assert [name for name, _ in logps(found)] == [name for name, _ in logps(whole)]
    assert values(found) == pytest.approx(values(whole), abs=1e-4)


def test_the_divergence_and_an_implicit_reward_are_read_by_two_processes_too(models, tmp_path):
    rows = [
        {"prompt_id": str(number), "prompt": pair(number)["prompt"], "answer": "so " * (number + 1)}
        | {"answer_finish_reason": "stop", "dropped": None}
        for number in range(5)
    ]
    table = pa.Table.from_pylist(rows)
    sides = {TRAINED: models[0], START: None}
    one, two = (
        Divergence(job_of(models[1], tmp_path, shards), sides, "answer")(table)["kl"].to_pylist() for shards in (1, 2)
    )
    assert two == pytest.approx(one, abs=1e-4)
    assert len({round(kl, 3) for kl in one}) == 5

    def scores(shards):
        reward = {"kind": "implicit", "name": "own", "model": models[0], "dtype": "float32", "shards": shards}
        job = job_of(models[1], tmp_path, 1, rewards=[reward])
        return Implicit(job.rewards[0], ["answer"], job).score(rows, "answer")

    assert scores(2) == pytest.approx(scores(1), abs=1e-4)


def test_what_a_model_cannot_do_is_said_by_its_processes_too(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setitem(SMALL, "vocab_size", len(tokenizer))
    model = save_model(tmp_path / "masked", small_model("phimoe"), tokenizer)
    job = job_of(model, tmp_path, shards=2)
    job = job.model_copy(update={"training": job.training.model_copy(update={"layout": "packed"})})
    with pytest.raises(InputError, match=r"training\.layout: .* cannot be read in packed rows"):
        _ = Reference(job).reader
