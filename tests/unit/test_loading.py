"""A policy is looked at before work: tensors, token ids, lengths, and whether it can be trained and saved as asked."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from rdpo.config import ImplicitReward
from rdpo.errors import InputError
from rdpo.modeling.chat import load_chat
from rdpo.modeling.student import student_forward
from rdpo.modeling.weights import ModelRef
from rdpo.preference.reference import Reference
from rdpo.preference.rewards.implicit import checked_implicit
from rdpo.stages.checks import prepare
from tests.support.models import CHATML, byte_tokenizer, llama, save_model
from tests.support.students import checked, job_of


def edited(folder, change):
    """The folder, its tensors changed."""
    file = Path(folder) / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return str(folder)


FOREIGN = {
    "a wrapper's prefix": (lambda found: {f"wrapped.{name}": one for name, one in found.items()}, "not in the weights"),
    "a layer short": (lambda found: {name: one for name, one in found.items() if ".1." not in name}, "would be random"),
    "a bias too much": (lambda found: found | {"lm_head.bias": torch.zeros(3)}, "no place for: lm_head.bias"),
    "another width": (
        lambda found: {name: one[:, :32].clone() if one.dim() > 1 else one for name, one in found.items()},
        "shape",
    ),
}


@pytest.mark.parametrize("change", FOREIGN)
def test_a_checkpoint_of_other_tensors_is_refused_before_work_and_when_it_is_loaded(change, tmp_path, tokenizer):
    alter, says = FOREIGN[change]
    job = job_of(edited(llama(tmp_path / "model", tokenizer, tie_word_embeddings=False), alter), tmp_path)
    with pytest.raises(InputError, match=f"student.model .*{says}"):
        checked(job)
    with pytest.raises(InputError, match=says):
        student_forward(job)


def test_a_run_ends_before_it_begins(tmp_path, tokenizer):
    model = edited(llama(tmp_path / "model", tokenizer), FOREIGN["a wrapper's prefix"][0])
    with pytest.raises(InputError, match=r"student\.model .*of the 21 tensors"):
        prepare(job_of(model, tmp_path), print)


def test_a_stored_copy_of_a_tied_head_is_no_fault(tmp_path, tokenizer):
    model = edited(
        llama(tmp_path / "model", tokenizer),
        lambda found: found | {"lm_head.weight": found["model.embed_tokens.weight"].clone()},
    )
    checked(job_of(model, tmp_path))


@pytest.mark.parametrize("side", ["model", "reference"])
def test_both_models_of_an_implicit_reward_are_looked_at(side, tiny_model, tmp_path, tokenizer):
    foreign = edited(llama(tmp_path / "model", tokenizer), FOREIGN["a layer short"][0])
    reward = ImplicitReward(
        kind="implicit", name="own", **{"model": tiny_model, "reference": tiny_model, side: foreign}
    )
    with pytest.raises(InputError, match=r"rewards\.own: .*would be random"):
        checked_implicit(reward, job_of(tiny_model, tmp_path))


def test_ids_beyond_the_embedding_are_refused_with_the_numbers(tmp_path, tokenizer):
    model = llama(tmp_path / "model", tokenizer, vocab_size=len(tokenizer) - 6, eos_token_id=1, pad_token_id=1)
    with pytest.raises(
        InputError, match=f"{len(tokenizer) - 6} rows, and 6 ids of the tokenizer, up to {len(tokenizer) - 1}"
    ):
        checked(job_of(model, tmp_path))


def with_added(tokenizer, template):
    """A tokenizer to which special tokens were added behind its vocabulary, and the ids it had."""
    own = byte_tokenizer(template)
    before = len(own)
    own.add_special_tokens({"additional_special_tokens": ["<image>", "<turn>"]})
    return own, before


def test_added_tokens_that_every_text_has_must_have_rows(tmp_path):
    own, rows = with_added(byte_tokenizer(), CHATML.replace("<|im_start|>", "<turn>"))
    model = llama(tmp_path / "model", own, vocab_size=rows)
    with pytest.raises(InputError, match="1 ids of the tokenizer"):
        checked(job_of(model, tmp_path))


def test_rows_with_an_added_token_beyond_the_embedding_are_dropped(tmp_path):
    own, rows = with_added(byte_tokenizer(), CHATML)
    job = job_of(llama(tmp_path / "model", own, vocab_size=rows), tmp_path)
    checked(job)
    import pyarrow as pa

    pairs = [
        {
            "prompt": [{"role": "user", "content": text}],
            "chosen": [{"role": "assistant", "content": "yes"}],
            "rejected": [{"role": "assistant", "content": "no"}],
            "chosen_finished": True,
            "rejected_finished": True,
        }
        for text in ("plain", "look: <image>")
    ]
    found = Reference(job)(pa.Table.from_pylist(pairs)).to_pylist()
    assert [row["dropped"] for row in found] == [None, "a token lies beyond the model's embedding"]
    assert found[0]["reference_chosen_logps"] < 0


def gpt2(folder, tokenizer, positions):
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=positions, n_embd=16, n_layer=1, n_head=2)
    return save_model(folder, GPT2LMHeadModel(config), tokenizer)


@pytest.mark.parametrize("setting", ["reference.max_length", "evaluation.engine.max_model_len"])
def test_texts_beyond_learned_positions_are_refused(setting, tmp_path, tokenizer):
    lengths = {"reference.max_length": 128, "evaluation.engine.max_model_len": 128, setting: 129}
    tables = {
        "reference": {"max_length": lengths["reference.max_length"]},
        "evaluation": {"engine": {"max_model_len": lengths["evaluation.engine.max_model_len"], "kv_cache_gib": 1}},
    }
    model = gpt2(tmp_path / "model", tokenizer, 128)
    with pytest.raises(InputError, match=f"{setting} = 129: .*positions for 128 tokens; set it to 128 or less"):
        checked(job_of(model, tmp_path, **tables))
    tables["reference"]["max_length"] = tables["evaluation"]["engine"]["max_model_len"] = 128
    checked(job_of(model, tmp_path, **tables))


def test_frequencies_that_change_with_the_longest_text_are_refused(tmp_path, tokenizer):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4, "original_max_position_embeddings": 128}
    model = llama(tmp_path / "model", tokenizer, rope_parameters=rope, max_position_embeddings=128)
    with pytest.raises(InputError, match="as if each stood alone up to 128 tokens"):
        checked(job_of(model, tmp_path))
    short = {"engine": {"max_model_len": 128, "kv_cache_gib": 1}}
    checked(job_of(model, tmp_path, reference={"max_length": 128}, evaluation=short))


def test_a_layout_that_cannot_be_is_refused_before_work(tmp_path, tokenizer):
    model = llama(tmp_path / "model", tokenizer, attention_dropout=0.1)
    with pytest.raises(InputError, match="attention_dropout needs padded ones; use auto or padded"):
        checked(job_of(model, tmp_path, training={"layout": "packed"}))
    assert not student_forward(job_of(model, tmp_path)).packed


def test_a_configuration_that_could_not_be_saved_is_refused_before_work(tmp_path, tokenizer, monkeypatch):
    from transformers import LlamaConfig

    def refuse(self, *_, **__):
        raise ValueError("Some generation parameters are set in the model config")

    model = llama(tmp_path / "model", tokenizer)
    monkeypatch.setattr(LlamaConfig, "save_pretrained", refuse)
    with pytest.raises(InputError, match=r"config\.json loads but could not be saved after training: Some generation"):
        checked(job_of(model, tmp_path))


def test_settings_of_generation_that_cannot_be_read_are_refused(tmp_path, tokenizer):
    model = llama(tmp_path / "model", tokenizer)
    (Path(model) / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"generation_config\.json cannot be read"):
        load_chat(ModelRef(model))
    assert json.loads((Path(model) / "config.json").read_text())["model_type"] == "llama"


def test_a_configuration_of_wrong_types_is_refused(tmp_path, tokenizer):
    model = llama(tmp_path / "model", tokenizer)
    file = Path(model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": "wide"}))
    with pytest.raises(InputError, match=r"its config\.json cannot be read: .*hidden_size"):
        ModelRef(model).config()


QUANTISED = {
    "all weights": ({}, {}, "stored quantised, and cannot be trained as they are; set training.lora"),
    "ids": ({"vocab_size": 200}, {"training": {"lora": {"rank": 2}}}, "the embedding has 200 rows"),
    "targets": ({}, {"training": {"lora": {"rank": 2, "target_modules": ["query"]}}}, "can be named are down_proj"),
    "lengths": (
        {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}, "max_position_embeddings": 128},
        {"training": {"lora": {"rank": 2}}},
        "as if each stood alone up to 128 tokens",
    ),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_of_a_quantised_student_what_its_configuration_says_is_looked_at(case, tmp_path, tokenizer):
    changes, tables, says = QUANTISED[case]
    model = llama(tmp_path / "model", tokenizer)
    file = Path(model) / "config.json"
    stored = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
    file.write_text(json.dumps(json.loads(file.read_text()) | stored | changes))
    with pytest.raises(InputError, match=says):
        checked(job_of(model, tmp_path, **tables))


def test_a_quantised_student_whose_adapter_can_be_trained_is_taken(tmp_path, tokenizer):
    model = llama(tmp_path / "model", tokenizer)
    file = Path(model) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "fp8"}}))
    checked(job_of(model, tmp_path, training={"lora": {"rank": 2}}))
    checked(job_of(model, tmp_path, training={"max_steps": 0}))
