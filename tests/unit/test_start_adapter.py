"""The adapter that a student starts with: merged into its model, or trained further beside it."""

import json
import math
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.evaluation.publish import publish
from rdpo.modeling.student import frozen_student, student_forward, weights_of_start
from rdpo.modeling.weights import ModelRef
from rdpo.preference.reference import Reference
from rdpo.training.checkpoint import EXPORT, MERGED, export_policy, finish_policy
from rdpo.training.loop import PairTable, Trainer
from tests.support.adapters import adapter_on, edited
from tests.support.jobs import valid_job
from tests.support.model_card import FACTS
from tests.support.models import save_model, tiny_config
from tests.support.pairs import pairs
from tests.support.plain_backend import PlainBackend

PROMPT, ANSWERS = [10, 20, 30], [[40, 50], [60, 70, 80]]
CASES = {
    "merged, all weights": {"adapter_use": "merge"},
    "merged, a new adapter": {"adapter_use": "merge", "lora": {"rank": 2}},
    "continued": {"adapter_use": "continue"},
    "continued, said twice": {
        "adapter_use": "continue",
        "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "up_proj"]},
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def half_model(tmp_path, tokenizer):
    """A model that is stored in 16 bits, and large enough in its numbers for rounding to be seen."""
    torch.manual_seed(3)
    model = LlamaForCausalLM(tiny_config(tokenizer)).to(torch.bfloat16)
    for weight in model.parameters():
        weight.data *= 5
    return save_model(tmp_path / "half", model, tokenizer)


def job_from(base, place, dtype="float32", lora=None, **student):
    table = valid_job(base, place)
    table["student"] |= {"adapter": str(place / "sft"), "dtype": dtype, **student}
    training = {"zero_stage": 0, "warmup_ratio": 0.0, "schedule": "constant", "learning_rate": 1e-2}
    # Without the gap of rewards, so that the loss of equal models is ln 2.
    training |= {"reward_as": "none"}
    table["training"] |= training | ({"lora": lora} if lora else {})
    return Job.model_validate(table)


def logps(policy):
    with torch.inference_mode():
        return policy(policy.batch([PROMPT], *([answer] for answer in ANSWERS)))


def referred(job):
    """The trainer's pairs with the log-probs that the job's reference gives them."""
    data = pairs()
    table = data.table
    columns = [table[name].to_pylist() for name in ("prompt_ids", "chosen_ids", "rejected_ids")]
    chosen, rejected = Reference(job).reader(*columns)
    for side, values in (("chosen", chosen), ("rejected", rejected)):
        name = f"reference_{side}_logps"
        table = table.set_column(table.column_names.index(name), name, pa.array(values))
    return PairTable(table, data.sizes)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_the_first_loss_is_that_of_a_policy_that_is_its_reference(case, dtype, half_model, tmp_path, process_group):
    adapter_on(half_model, tmp_path / "sft", lora_dropout=0.5)
    job = job_from(half_model, tmp_path, dtype, **CASES[case])
    trainer = Trainer(job, referred(job), torch.device("cpu"), backend=PlainBackend)
    first = trainer.step(0, 9, [0, 1])
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["rewards/margins"] == 0
    assert trainer.step(1, 9, [0, 1])["loss"] < first["loss"]


@pytest.mark.parametrize("case", CASES)
def test_the_start_is_the_model_with_its_adapter(case, tiny_model, tmp_path):
    adapter_on(tiny_model, tmp_path / "sft")
    job = job_from(tiny_model, tmp_path, **CASES[case])
    plain = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = PeftModel.from_pretrained(plain, tmp_path / "sft").eval()
    with torch.inference_mode():
        expected = adapted(torch.tensor([PROMPT])).logits
        merged = AutoModelForCausalLM.from_pretrained(ModelRef.student(job).folder())
        assert (merged(torch.tensor([PROMPT])).logits - expected).abs().max() < 1e-5
    start = frozen_student(job).load()
    for other in (student_forward(job), student_forward(job, to_train=True)):
        assert torch.equal(logps(other.eval()), logps(start))
    without = student_forward(job.model_copy(update={"student": job.student.model_copy(update={"adapter": None})}))
    assert (logps(without.eval()) - logps(start)).abs().max() > 0.1


def published(job, place, process_group):
    """What a training of two steps leaves, as the stages make it."""
    trainer = Trainer(job, referred(job), torch.device("cpu"), backend=PlainBackend)
    for step in range(2):
        trainer.step(step, 2, [0, 1])
    export_policy(trainer.engine, place / EXPORT)
    compared = finish_policy(place / EXPORT, weights_of_start(job).folder(), place / MERGED)
    publish(job, place / EXPORT, place / MERGED, place / "published", FACTS)
    return compared


def logits(model):
    with torch.inference_mode():
        return model.float().eval()(torch.tensor([PROMPT + ANSWERS[1]])).logits


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_continued_adapter_is_published_for_the_model_itself(dtype, half_model, tiny_model, tmp_path, process_group):
    base = half_model if dtype == "bfloat16" else tiny_model
    adapter_on(base, tmp_path / "sft")
    job = job_from(base, tmp_path, dtype, adapter_use="continue")
    compared = published(job, tmp_path, process_group)
    assert compared["merge_difference"] < 1e-3

    folder = tmp_path / "published"
    stated = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == base
    worn = AutoPeftModelForCausalLM.from_pretrained(folder / "adapter")
    trained, before = (
        load_file(folder / "adapter" / "adapter_model.safetensors"),
        load_file(tmp_path / "sft" / "adapter_model.safetensors"),
    )
    assert trained.keys() == before.keys()
    assert all(not torch.equal(trained[name].float(), before[name].float()) for name in trained)
    # What is merged is rounded to the precision of the model; without that both are the same.
    whole = AutoModelForCausalLM.from_pretrained(folder)
    rounded = worn.merge_and_unload()
    for name, weight in whole.state_dict().items():
        assert (weight.float() - rounded.state_dict()[name].float()).abs().max() <= weight.float().abs().max() * 2**-8
    if dtype == "float32":
        assert (logits(whole) - logits(rounded)).abs().max() < 1e-4


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_of_a_merged_start_the_whole_model_is_published(lora, half_model, tmp_path, process_group):
    adapter_on(half_model, tmp_path / "sft")
    job = job_from(half_model, tmp_path, adapter_use="merge", lora=lora)
    published(job, tmp_path, process_group)
    assert not (tmp_path / "published" / "adapter").exists()
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "published").dtype == torch.bfloat16


def test_a_continued_adapter_may_be_published_alone(tiny_model, tmp_path, process_group):
    adapter_on(tiny_model, tmp_path / "sft")
    job = job_from(tiny_model, tmp_path, adapter_use="continue")
    job = job.model_copy(update={"publish": job.publish.model_copy(update={"merge": False})})
    published(job, tmp_path, process_group)
    worn = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "published")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / MERGED)
    assert (logits(worn) - logits(merged)).abs().max() < 1e-4


MERGES = {
    "plain": {},
    "scaled by the root of its rank": {"use_rslora": True},
    "ranks of its own": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "magnitudes": {"use_dora": True},
    "a norm in whole": {"modules_to_save": ["norm"]},
    "one layer": {"layers_to_transform": [1]},
    "all linear layers": {"targets": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]},
}


@pytest.mark.parametrize("case", MERGES)
def test_a_merge_is_what_peft_makes_of_the_two(case, tiny_model, tmp_path):
    adapter = adapter_on(tiny_model, tmp_path / "sft", **MERGES[case])
    merged = AutoModelForCausalLM.from_pretrained(ModelRef(tiny_model, adapter=adapter).folder())
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
    assert (logits(merged) - logits(expected)).abs().max() < 1e-4
    assert (logits(merged) - logits(AutoModelForCausalLM.from_pretrained(tiny_model))).abs().max() > 0.05


@pytest.mark.parametrize("settings", [{"modules_to_save": ["lm_head"]}, {"targets": ["q_proj", "lm_head"]}])
def test_an_output_layer_of_its_own_is_merged(settings, tmp_path, tokenizer):
    base = save_model(tmp_path / "base", LlamaForCausalLM(tiny_config(tokenizer, tie_word_embeddings=False)), tokenizer)
    adapter = adapter_on(base, tmp_path / "sft", **settings)
    merged = AutoModelForCausalLM.from_pretrained(ModelRef(base, adapter=adapter).folder())
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert (logits(merged) - logits(expected)).abs().max() < 1e-4


def test_a_merge_rounds_once(half_model, tmp_path):
    """Each weight is the nearest number of 16 bits to the exact sum."""
    adapter = adapter_on(half_model, tmp_path / "sft")
    merged = load_file(ModelRef(half_model, adapter=adapter).folder() / "model.safetensors")
    start, parts = load_file(Path(half_model) / "model.safetensors"), load_file(f"{adapter}/adapter_model.safetensors")
    layer = "model.layers.0.self_attn.q_proj"
    first, second = (parts[f"base_model.model.{layer}.lora_{side}.weight"].double() for side in "AB")
    exact = start[f"{layer}.weight"].double() + 2 * second @ first
    assert torch.equal(merged[f"{layer}.weight"], exact.to(torch.bfloat16))
    untouched = "model.layers.0.self_attn.k_proj.weight"
    assert torch.equal(merged[untouched], start[untouched])


def test_a_merge_is_made_once_and_again_when_the_adapter_is_another(tiny_model, tmp_path):
    student = ModelRef(tiny_model, adapter=adapter_on(tiny_model, tmp_path / "sft"))
    first = student.folder()
    made = (first / "model.safetensors").stat().st_mtime_ns
    assert student.folder() == first and (first / "model.safetensors").stat().st_mtime_ns == made
    before = student.fingerprint()
    adapter_on(tiny_model, tmp_path / "sft", rank=2)
    assert student.folder() != first and student.fingerprint() != before
    assert student.base.fingerprint() == ModelRef(tiny_model).fingerprint()


@pytest.mark.long
def test_one_of_several_processes_merges_in_a_process_of_its_own(tiny_model, tmp_path, monkeypatch):
    student = ModelRef(tiny_model, adapter=adapter_on(tiny_model, tmp_path / "sft"))
    expected = load_file(student.folder() / "model.safetensors")
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "other"))
    monkeypatch.setattr("rdpo.modeling.converted._one_of_several", lambda: True)
    # In this process nothing can be saved, as in one that is not the first.
    monkeypatch.setattr("rdpo.modeling.start_adapter.save_model", None)
    found = load_file(student.folder() / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    # What is wrong is said as if it were said here.
    broken = ModelRef(tiny_model, adapter=edited(adapter_on(tiny_model, tmp_path / "broken"), r=7))
    with pytest.raises(InputError, match="in another shape"):
        broken.folder()


def test_the_tokenizer_beside_an_adapter_is_the_students(tiny_model, tmp_path, tokenizer):
    student = ModelRef(tiny_model, adapter=adapter_on(tiny_model, tmp_path / "sft"))
    before = student.tokenizer_fingerprint()
    assert before == ModelRef(tiny_model).tokenizer_fingerprint()
    template = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    (tmp_path / "sft" / "chat_template.jinja").write_text(template)
    assert student.tokenizer_fingerprint() != before
    for folder in (student.folder(), student.folder(weights=False)):
        assert (folder / "chat_template.jinja").read_text() == template
    assert student.tokenizer().chat_template == template
    assert student.config().vocab_size == len(tokenizer)
    assert not list(student.folder(weights=False).glob("*.safetensors"))
