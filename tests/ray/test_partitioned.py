"""ZeRO-3 on two ranks with every weight partitioned, against plain torch in one process.

DeepSpeed leaves weights below a threshold whole on every rank, and those of the tests' models are all below it:
without lowering it, ZeRO-3 would partition nothing here.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from rdpo.modeling.model import ForwardSettings
from rdpo.modeling.readers import FrozenModel, forward
from rdpo.modeling.weights import ModelRef
from tests.support.models import save_model, tiny_config
from tests.support.partitioned_steps import READ, steps
from tests.support.plain_backend import PlainBackend

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("process_group")]

LORA = {"rank": 4}
CASES = {
    "tied": {"zero_stage": 3},
    "untied": {"zero_stage": 3},
    "checkpointing": {"zero_stage": 3, "gradient_checkpointing": True},
    "heldout": {"zero_stage": 3, "heldout": True},
    "lora": {"zero_stage": 3, "lora": LORA, "gradient_checkpointing": True, "heldout": True},
    "lora-bf16": {"zero_stage": 3, "lora": LORA, "gradient_checkpointing": True, "dtype": "bfloat16"},
    "lora-bf16-stage-1": {"zero_stage": 1, "lora": LORA, "gradient_checkpointing": True, "dtype": "bfloat16"},
}
"""Keyword arguments of `steps` by name; "untied" has a model of its own."""


@pytest.fixture(scope="module")
def models(tiny_model, tokenizer, tmp_path_factory):
    torch.manual_seed(5)
    untied = LlamaForCausalLM(tiny_config(tokenizer, tie_word_embeddings=False))
    folder = save_model(tmp_path_factory.mktemp("untied"), untied, tokenizer)
    return {name: folder if name == "untied" else tiny_model for name in CASES}


@pytest.fixture(scope="module")
def two_ranks(models, tmp_path_factory):
    """The results of all cases; one pair of processes runs them, for their start takes longest."""
    folder = tmp_path_factory.mktemp("two-ranks")
    settings = [{"model": models[name], **case} for name, case in CASES.items()] + [{"read": models["untied"]}]
    (folder / "settings.json").write_text(json.dumps(settings))
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, *ranks, "-m", "tests.support.partitioned_steps", str(folder)]
    compiled = folder / "compiled"
    env = {**os.environ, "DS_ACCELERATOR": "cpu", "TORCH_EXTENSIONS_DIR": str(compiled)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    assert not compiled.exists(), "DeepSpeed compiled something, which takes minutes in a fresh environment"
    return dict(zip([*CASES, "read"], json.loads((folder / "results.json").read_text()), strict=True))


@pytest.mark.parametrize("name", ["tied", "untied", "checkpointing", "heldout", "lora"])
def test_two_ranks_of_partitioned_weights_equal_plain_torch(two_ranks, models, tmp_path, name):
    plain, two = steps(models[name], tmp_path, PlainBackend, **{**CASES[name], "zero_stage": 0}), two_ranks[name]
    assert two["whole"] == 0 < plain["whole"]
    assert two["losses"] == pytest.approx(plain["losses"], abs=1e-4)
    assert two["norms"] == pytest.approx(plain["norms"], rel=1e-3)
    assert two["margins"] == pytest.approx(plain["margins"], abs=1e-3)
    assert len(two["margins"]) == (3 if CASES[name].get("heldout") else 0)
    assert two["left"] == pytest.approx(plain["left"], rel=1e-3)
    assert two["losses"][0] != two["losses"][-1]


def test_a_model_that_is_only_read_has_the_log_probs_of_a_whole_one(two_ranks, models):
    frozen = FrozenModel(ModelRef(models["untied"]), ForwardSettings("float32", 8), "a model")
    policy, read_as = frozen.open("cpu")
    two = two_ranks["read"]
    assert (two["whole"], two["layout"]) == (0, read_as.layout)
    assert two["logps"] == pytest.approx(forward(policy, policy.batch(*READ)), abs=1e-4)


def test_held_out_pairs_in_between_leave_no_trace(two_ranks):
    assert two_ranks["heldout"]["losses"] == two_ranks["tied"]["losses"]


def test_adapters_in_bfloat16_train_as_with_whole_weights(two_ranks):
    """Against stage 1, whose weights are whole: the same rounding, in sums of another order."""
    partitioned, whole = two_ranks["lora-bf16"], two_ranks["lora-bf16-stage-1"]
    assert partitioned["whole"] == 0 < whole["whole"]
    assert partitioned["losses"] == pytest.approx(whole["losses"], abs=2e-2)
    assert partitioned["norms"] == pytest.approx(whole["norms"], rel=5e-2)
    assert partitioned["left"] == pytest.approx(whole["left"], rel=5e-2)
    assert partitioned["losses"][0] != partitioned["losses"][-1]
