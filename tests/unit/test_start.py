"""What is refused of a student's adapter, in one message, before any work."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import IA3Config, get_peft_model
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rdpo.config import Job
from rdpo.config.files import job_of as job_of_table
from rdpo.errors import InputError
from rdpo.modeling.start import _is_same
from rdpo.modeling.weights import ModelRef, adapter_fingerprint, local_adapter
from tests.support.adapters import adapter_on, edited
from tests.support.models import llama, save_model, tiny_config
from tests.support.students import checked, job_of

USES = ["merge", "continue"]


@pytest.fixture
def adapter(tiny_model, tmp_path):
    return adapter_on(tiny_model, tmp_path / "sft")


def with_adapter(model, place, adapter, use="merge", **tables):
    return job_of(model, place, student={"adapter": adapter, "adapter_use": use}, **tables)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "v_proj", "up_proj"]}])
def test_an_adapter_of_the_model_is_taken(use, lora, adapter, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    checked(with_adapter(tiny_model, tmp_path, adapter, use, training={"lora": lora} if lora else {}))
    # Nothing is merged only to look at it.
    assert not list((tmp_path / "cache").glob("models/*merged*"))


def test_all_linear_may_be_the_modules_of_an_adapter(tiny_model, tmp_path):
    linear = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapter = adapter_on(tiny_model, tmp_path / "sft", linear)
    checked(with_adapter(tiny_model, tmp_path, adapter, "continue", training={"lora": {"rank": 4, "alpha": 8.0}}))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"rank": 8, "alpha": 8.0}, r"rank = 8, and student.adapter \S+ has 4.*leave \[training.lora\] out"),
        ({"rank": 4, "alpha": 32.0}, "alpha = 32, and student.adapter .* has 8"),
        ({"rank": 4, "alpha": 8.0}, "target_modules = 'all-linear' are other modules"),
        ({"rank": 4, "alpha": 8.0, "target_modules": ["q_proj"]}, "are other modules"),
    ],
)
def test_a_continued_adapter_and_another_lora_clash(lora, message, adapter, tiny_model, tmp_path):
    with pytest.raises(InputError, match=message):
        checked(with_adapter(tiny_model, tmp_path, adapter, "continue", training={"lora": lora}))


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("stated", ["someone/other-model", "/elsewhere/llama", "runs/a/model", "../base"])
def test_an_adapter_of_another_model_is_refused_by_its_name(use, stated, adapter, tiny_model, tmp_path):
    edited(adapter, base_model_name_or_path=stated)
    with pytest.raises(InputError, match=f"student.adapter {adapter}: was trained on {stated}, .* lie on {tiny_model}"):
        checked(with_adapter(tiny_model, tmp_path, adapter, use))


def test_the_same_model_has_several_names(tiny_model, tmp_path, monkeypatch):
    copy = shutil.copytree(tiny_model, tmp_path / "Llama-3")
    other = llama(tmp_path / "other", ModelRef(tiny_model).tokenizer(), hidden_size=32)
    here = ModelRef(str(copy))
    assert _is_same(str(copy), here) and _is_same(tiny_model, here)
    assert _is_same("meta-llama/llama-3", here) and _is_same("/far/away/Llama-3/", here)
    assert _is_same("/home/somebody/.cache/huggingface/hub/models--meta--Llama-3/snapshots/0123abcd", here)
    assert not _is_same(other, here) and not _is_same("meta/llama-3.1", here)

    monkeypatch.setattr("rdpo.modeling.weights.local_model", lambda *of, **how: copy)
    on_hub = ModelRef("meta/llama-3")
    assert _is_same("meta/Llama-3", on_hub) and _is_same("/far/llama-3", on_hub)
    assert not _is_same("you/llama-3", on_hub)
    assert not _is_same("/home/somebody/.cache/huggingface/hub/models--you--Llama-3/snapshots/0123abcd", on_hub)


def test_an_adapter_that_names_no_model_is_known_by_its_tensors(adapter, tiny_model, tmp_path):
    checked(with_adapter(tiny_model, tmp_path, edited(adapter, base_model_name_or_path=None)))


def test_another_revision_of_the_model_is_refused(adapter, tiny_model, tmp_path):
    job = with_adapter(tiny_model, tmp_path, edited(adapter, revision="v1"))
    job = job.model_copy(update={"student": job.student.model_copy(update={"revision": "v2"})})
    with pytest.raises(InputError, match=r"was trained on revision v1 of its model, and student.revision is v2"):
        checked(job)


@pytest.mark.parametrize("use", USES)
def test_tensors_of_another_shape_are_refused(use, tiny_model, tmp_path, tokenizer):
    other = llama(tmp_path / "other", tokenizer, hidden_size=32, num_key_value_heads=2)
    adapter = edited(adapter_on(other, tmp_path / "sft"), base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"is of another model: of 12 tensors .* in another shape: .*\(4, 32\) for"):
        checked(with_adapter(tiny_model, tmp_path, adapter, use))


@pytest.mark.parametrize("use", USES)
def test_layers_that_the_model_lacks_are_refused(use, tiny_model, tmp_path, tokenizer):
    deeper = llama(tmp_path / "deeper", tokenizer, num_hidden_layers=3)
    adapter = edited(adapter_on(deeper, tmp_path / "sft"), base_model_name_or_path=None)
    with pytest.raises(InputError, match=r"6 stored that the model has no place for: .*layers\.2\."):
        checked(with_adapter(tiny_model, tmp_path, adapter, use))


@pytest.mark.parametrize("use", USES)
def test_modules_that_the_model_lacks_are_refused(use, adapter, tiny_model, tmp_path):
    edited(adapter, target_modules=["query_key_value"])
    with pytest.raises(InputError, match="does not fit LlamaForCausalLM, so it is of another model: Target modules"):
        checked(with_adapter(tiny_model, tmp_path, adapter, use))


def test_tensors_that_are_not_stored_are_refused(adapter, tiny_model, tmp_path):
    tensors = load_file(f"{adapter}/adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, f"{adapter}/adapter_model.safetensors")
    with pytest.raises(InputError, match="of 12 tensors of the adapter, 1 not stored"):
        checked(with_adapter(tiny_model, tmp_path, adapter))


@pytest.mark.parametrize("use", USES)
def test_other_adapters_than_lora_are_refused(use, tiny_model, tmp_path):
    config = IA3Config(target_modules=["k_proj"], feedforward_modules=[], task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(tmp_path / "sft")
    with pytest.raises(InputError, match="is an adapter of kind IA3, and no LoRA"):
        checked(with_adapter(tiny_model, tmp_path, str(tmp_path / "sft"), use))


@pytest.mark.parametrize(
    ("changes", "use", "message"),
    [
        ({"task_type": "SEQ_CLS"}, "merge", "was trained for SEQ_CLS"),
        ({"init_lora_weights": "pissa"}, "merge", "was initialised by pissa, which changes the weights under it"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "merge", "its layer_replication = .* cannot be honoured"),
        ({"trainable_token_indices": [1, 2]}, "continue", "its trainable_token_indices = .* cannot be honoured"),
        ({"a_setting_of_next_year": 3}, "merge", "its a_setting_of_next_year = 3 cannot be honoured"),
        ({"use_dora": True}, "continue", 'its use_dora = true cannot be trained further; set student.adapter_use = "m'),
        ({"bias": "all"}, "continue", 'its bias = "all" cannot be trained further'),
        ({"modules_to_save": ["norm"]}, "continue", "its modules_to_save = .* cannot be trained further"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(changes, use, message, adapter, tiny_model, tmp_path):
    with pytest.raises(InputError, match=message):
        checked(with_adapter(tiny_model, tmp_path, edited(adapter, **changes), use))


@pytest.mark.parametrize("settings", [{"targets": ["q_proj", "embed_tokens"]}, {"modules_to_save": ["lm_head"]}])
def test_what_shares_its_weights_is_refused(settings, tiny_model, tmp_path):
    adapter = adapter_on(tiny_model, tmp_path / "sft", **settings)
    with pytest.raises(InputError, match=r"student\.adapter \S+: .* shares its weights with another layer"):
        checked(with_adapter(tiny_model, tmp_path, adapter))


def test_an_output_layer_is_not_trained_further(tmp_path, tokenizer):
    base = save_model(tmp_path / "base", LlamaForCausalLM(tiny_config(tokenizer, tie_word_embeddings=False)), tokenizer)
    adapter = adapter_on(base, tmp_path / "sft", ["q_proj", "lm_head"])
    checked(with_adapter(base, tmp_path, adapter))
    with pytest.raises(InputError, match="lm_head is the output layer"):
        checked(with_adapter(base, tmp_path, adapter, "continue"))


def test_pickled_weights_are_not_loaded(adapter, tiny_model, tmp_path):
    torch.save(load_file(f"{adapter}/adapter_model.safetensors"), f"{adapter}/adapter_model.bin")
    Path(adapter, "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match="pickled weights are not loaded, convert them"):
        checked(with_adapter(tiny_model, tmp_path, adapter))
    with pytest.raises(InputError, match="pickled weights are not loaded"):
        adapter_fingerprint(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model_name_or_path": 5},
        {"r": "four"},
        {"r": 0},
        {"rank_pattern": [1]},
        {"target_modules": "*["},
        {"lora_alpha": None},
    ],
)
def test_settings_that_are_no_settings_are_refused(changes, adapter, tiny_model, tmp_path):
    with pytest.raises(InputError, match=rf"student\.adapter {adapter}"):
        checked(with_adapter(tiny_model, tmp_path, edited(adapter, **changes)))


@pytest.mark.parametrize("damage", ["config", "weights"])
def test_a_broken_adapter_is_refused(damage, adapter, tiny_model, tmp_path):
    name = {"config": "adapter_config.json", "weights": "adapter_model.safetensors"}[damage]
    Path(adapter, name).write_bytes(b"[1, 2")
    with pytest.raises(InputError, match=rf"student\.adapter {adapter}: its {name} cannot be read"):
        checked(with_adapter(tiny_model, tmp_path, adapter))


def test_a_quantised_model_takes_no_adapter_in(adapter, tiny_model, tmp_path):
    file = Path(shutil.copytree(tiny_model, tmp_path / "quantised"), "config.json")
    stored = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": stored}))
    lora = {"lora": {"rank": 4}}
    with pytest.raises(InputError, match=r"stored quantised, and cannot take student\.adapter in exactly"):
        checked(with_adapter(str(file.parent), tmp_path, adapter, training=lora))


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"student": {"quantization": "nf4"}}, r"student: adapter: weights in four bits \(nf4\)"),
        ({"student": {"adapter": None, "adapter_use": "continue"}}, "student: adapter_use = 'continue': there is no"),
        ({"synthesis": {"adapter": "another"}}, "synthesis: adapter would lie on the student"),
        ({"training": {"lora": {"rank": 2}}, "publish": {"merge": False}}, "publish: merge = false leaves an adapter"),
        ({"student": {"adapter_use": "continue"}, "training": {"extrapolation": 0.5}}, "training: extrapolation moves"),
        (
            {"student": {"adapter_use": "continue"}, "rounds": {"count": 2}, "publish": {"merge": False}},
            "the next round begins with the whole model",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(tables, message, job_table):
    for section in ("student", *tables):
        job_table[section] = job_table.get(section, {}) | tables.get(section, {})
    job_table["student"].setdefault("adapter", "sft")
    job_table["student"] = {name: value for name, value in job_table["student"].items() if value is not None}
    with pytest.raises(InputError, match=message):
        job_of_table(job_table, "job.toml")


def test_a_teacher_of_its_own_may_wear_one(job_table):
    job_table["student"]["adapter"] = "sft"
    job_table["synthesis"] |= {"adapter": "another", "teacher": "large"}
    assert ModelRef.of(Job.model_validate(job_table), "large").adapter is None
    with pytest.raises(ValidationError):
        Job.model_validate({**job_table, "student": {**job_table["student"], "adapter": "s3://key:secret@bucket/sft"}})


def test_whoever_is_the_student_has_the_adapter(job_table):
    job_table["student"]["adapter"] = "sft"
    job = Job.model_validate(job_table)
    assert ModelRef.of(job, None) == ModelRef.student(job) == ModelRef(job.student.model, adapter="sft")


def test_an_adapter_of_the_hub_is_fetched_without_pickled_weights(adapter, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, allow_patterns):
        asked.append((name, "*.safetensors" in allow_patterns, "*.bin" in allow_patterns))
        return adapter

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert local_adapter("someone/an-adapter") == Path(adapter)
    assert asked == [("someone/an-adapter", True, False)]
