"""What leaves training becomes a whole model that is what was trained, beside files that are the start model's."""

import json
import shutil
import threading
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.evaluation.publish import publish
from rdpo.modeling.chat import load_chat
from rdpo.modeling.saving import copy_weights
from rdpo.modeling.student import student_forward
from rdpo.modeling.weights import ModelRef
from rdpo.training import checkpoint
from rdpo.training.checkpoint import EXPORT, MERGED, export_policy, finish_policy
from tests.support.model_card import FACTS
from tests.support.models import byte_tokenizer, save_model, tiny_config
from tests.support.pairs import pairs, trainer_of
from tests.support.plain_backend import PlainBackend

ODD = {"temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2]}
"""Settings of generation that transformers loads and refuses to save: there is no `do_sample`."""


@pytest.fixture
def odd_model(tiny_model, tmp_path):
    """A start model with such settings, in a file that no library would write like that."""
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps(ODD, indent=7) + "\n", encoding="utf-8")
    return str(folder)


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_settings_of_generation_are_published_as_they_were(lora, odd_model, tmp_path, process_group):
    trainer = trainer_of(odd_model, tmp_path, pairs(), backend=PlainBackend, lora=lora)
    trainer.step(0, 2, [0, 1])
    export_policy(trainer.engine, tmp_path / EXPORT)
    compared = finish_policy(tmp_path / EXPORT, Path(odd_model), tmp_path / MERGED)
    publish(trainer.job, tmp_path / EXPORT, tmp_path / MERGED, tmp_path / "published", FACTS)
    start = (Path(odd_model) / "generation_config.json").read_bytes()
    assert not (tmp_path / EXPORT / "generation_config.json").exists()
    assert (tmp_path / MERGED / "generation_config.json").read_bytes() == start
    assert (tmp_path / "published" / "generation_config.json").read_bytes() == start
    assert max(compared.values()) < 1e-5
    assert ("merge_difference" in compared) == bool(lora)


def test_settings_of_generation_that_transformers_does_not_even_load_are_refused_before_work(tiny_model, tmp_path):
    folder = tmp_path / "odd"
    shutil.copytree(tiny_model, folder)
    (folder / "generation_config.json").write_text(json.dumps(ODD | {"num_return_sequences": 2}))
    with pytest.raises(InputError, match=r"generation_config\.json cannot be read: Greedy methods"):
        load_chat(ModelRef(str(folder)))


def test_a_start_model_without_settings_of_generation_stays_without(tiny_model, tmp_path):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    (base / "generation_config.json").unlink()
    finish_policy(base, base, tmp_path / MERGED)
    assert not (tmp_path / MERGED / "generation_config.json").exists()


def adapter_of(base, folder, targets, **settings):
    """An adapter on a model, its update not zero."""
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    config = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM", **settings)
    adapted = get_peft_model(model, config)
    for name, weight in adapted.named_parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1 if "lora" in name else 0.3)
    adapted.save_pretrained(folder)


MERGES = {
    "tied embedding": (True, ["q_proj", "embed_tokens"], {}, True),
    "untied embedding": (False, ["q_proj", "embed_tokens"], {}, False),
    "head": (False, ["lm_head"], {}, True),
    "magnitudes": (True, ["q_proj", "up_proj"], {"use_dora": True}, False),
    "a norm in whole": (True, ["q_proj"], {"modules_to_save": ["norm"]}, False),
    "a tied head in whole": (True, ["q_proj"], {"modules_to_save": ["lm_head"]}, False),
    "a head in whole": (False, ["q_proj"], {"modules_to_save": ["lm_head"]}, False),
}


@pytest.mark.parametrize("case", MERGES)
def test_a_merge_is_what_was_trained_or_is_refused_and_the_adapter_kept(case, tmp_path, tokenizer):
    tied, targets, settings, differs = MERGES[case]
    torch.manual_seed(1)
    config = tiny_config(tokenizer, tie_word_embeddings=tied)
    base = Path(save_model(tmp_path / "base", LlamaForCausalLM(config), tokenizer))
    adapter_of(base, tmp_path / EXPORT, targets, **settings)
    before = {file.name: file.read_bytes() for file in (tmp_path / EXPORT).iterdir()}
    if differs:
        with pytest.raises(InputError, match=f"model merged has other log-probs .* is kept in {tmp_path / EXPORT}"):
            finish_policy(tmp_path / EXPORT, base, tmp_path / MERGED)
    else:
        assert finish_policy(tmp_path / EXPORT, base, tmp_path / MERGED)["merge_difference"] < 1e-4
        # Engines go by what the configuration says.
        whole = AutoModelForCausalLM.from_pretrained(tmp_path / MERGED)
        assert whole.config.tie_word_embeddings == (whole.lm_head.weight is whole.model.embed_tokens.weight)
    assert {file.name: file.read_bytes() for file in (tmp_path / EXPORT).iterdir()} == before


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]])
def test_a_model_that_is_stored_in_16_bits_is_what_was_trained(dtype, targets, tmp_path, tokenizer):
    """Rounding to 16 bits is that of the weights alone: rotary frequencies stay in 32."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer)).to(getattr(torch, dtype))
    for weight in model.parameters():
        weight.data *= 5
    base = save_model(tmp_path / "base", model, tokenizer)
    if targets:
        adapter_of(base, tmp_path / EXPORT, targets)
    else:
        shutil.copytree(base, tmp_path / EXPORT)
    compared = finish_policy(tmp_path / EXPORT, Path(base), tmp_path / MERGED)
    assert compared["reload_difference"] < 1e-4
    stored = load_file(tmp_path / MERGED / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}


def test_weights_of_which_some_are_missing_are_not_published(tiny_model, tmp_path):
    exported = tmp_path / EXPORT
    shutil.copytree(tiny_model, exported)
    tensors = load_file(exported / "model.safetensors")
    tensors.pop("model.norm.weight")
    save_file(tensors, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"would be random: model\.norm\.weight"):
        finish_policy(exported, Path(tiny_model), tmp_path / MERGED)


CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

from .names import KIND


class OwnConfig(LlamaConfig):
    model_type = KIND


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def coded_model(tiny_model, tmp_path):
    """A model whose Python code ships with it, in two files."""
    folder = tmp_path / "coded"
    shutil.copytree(tiny_model, folder)
    (folder / "own.py").write_text(CODE, encoding="utf-8")
    (folder / "names.py").write_text('KIND = "own_kind"\n', encoding="utf-8")
    config = json.loads((folder / "config.json").read_text())
    own = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    changed = config | {"model_type": "own_kind", "architectures": ["OwnModel"], "auto_map": own}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder


def test_trusted_code_is_published_with_the_model(coded_model, job_table, tmp_path):
    job_table["student"] |= {"model": str(coded_model), "trust_remote_code": True}
    job = Job.model_validate(job_table)
    policy = student_forward(job, to_train=False)
    policy.model.save_pretrained(tmp_path / EXPORT)
    finish_policy(tmp_path / EXPORT, coded_model, tmp_path / MERGED, trust_remote_code=True)
    publish(job, None, tmp_path / MERGED, tmp_path / "published", FACTS)
    for folder in (tmp_path / MERGED, tmp_path / "published"):
        assert (folder / "own.py").read_text() == CODE
        assert (folder / "names.py").is_file()
        loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__name__ == "OwnModel"


def test_code_is_fetched_where_it_is_trusted_alone(tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def download(name, revision, allow_patterns):
        asked.append((name, revision, "*.py" in allow_patterns, "*.safetensors" in allow_patterns))
        save_model(tmp_path / "hub", LlamaForCausalLM(tiny_config(byte_tokenizer())), byte_tokenizer())
        return str(tmp_path / "hub")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    for trust in (False, True):
        model = ModelRef("someone/coded-model", "v1", trust)
        model.config(), model.tokenizer(), model.folder()
    of = ("someone/coded-model", "v1")
    # Weights are fetched where the model itself is wanted, not for its configuration or tokenizer.
    assert asked == [(*of, trust, weights) for trust in (False, True) for weights in (False, True)]
    assert AutoTokenizer.from_pretrained(tmp_path / "hub").eos_token == "<|im_end|>"


def test_code_that_is_run_is_part_of_the_stage_keys(coded_model, job_table):
    from rdpo.stages.settings import student_settings

    job_table["student"]["model"] = str(coded_model)
    untrusted = student_settings(Job.model_validate(job_table))
    job_table["student"]["trust_remote_code"] = True
    trusted = student_settings(Job.model_validate(job_table))
    (coded_model / "names.py").write_text('KIND = "own_kind"  # other\n', encoding="utf-8")
    assert "code" not in untrusted
    assert trusted != student_settings(Job.model_validate(job_table))


@pytest.fixture
def large_model(tmp_path, tokenizer):
    """A model of 64 MB in bfloat16, and what training left of it in float32."""
    torch.manual_seed(0)
    config = tiny_config(tokenizer, hidden_size=512, intermediate_size=4096, num_hidden_layers=4, head_dim=64)
    model = LlamaForCausalLM(config)
    for name, dtype in (("trained", torch.float32), ("base", torch.bfloat16)):
        save_model(tmp_path / name, model.to(dtype), tokenizer)
    return tmp_path


class OwnMemory:
    """Most bytes that this process holds beyond what it had, those that are mapped from files aside."""

    def __enter__(self):
        self.first, self.most, self.over = self.now(), 0, threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while not self.over.wait(0.002):
            self.most = max(self.most, self.now() - self.first)

    @staticmethod
    def now():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))

    def __exit__(self, *error):
        self.over.set()
        self.thread.join()


@pytest.mark.parametrize("trained", ["base", "trained"])
def test_weights_that_are_cast_at_most_go_from_file_to_file(trained, large_model, monkeypatch):
    """Whole weights are never in memory in float32, and where they are cast not even the half of them at a time."""
    exported, merged = large_model / trained, large_model / MERGED
    whole = sum(file.stat().st_size for file in (large_model / "base").glob("*.safetensors"))
    monkeypatch.setattr("rdpo.modeling.saving.SHARD_BYTES", whole // 8)
    loaded = []
    load = checkpoint.load_whole
    monkeypatch.setattr(checkpoint, "load_whole", lambda *given: loaded.append(given[:2]) or load(*given))
    with OwnMemory() as cast:
        copy_weights(exported, merged, torch.bfloat16)
    assert cast.most < whole / 2
    with OwnMemory() as finished:
        compared = finish_policy(exported, large_model / "base", merged)
    assert compared["reload_difference"] < 1e-4
    assert {dtype for _, dtype in loaded} == {torch.bfloat16}
    if trained == "base":
        assert finished.most < whole / 2


@pytest.mark.parametrize("tied", [True, False])
def test_streamed_weights_are_those_that_a_loaded_model_would_save(tied, tmp_path, tokenizer, monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config(tokenizer, tie_word_embeddings=tied))
    save_model(tmp_path / "trained", model, tokenizer)
    save_model(tmp_path / "base", model.to(torch.bfloat16), tokenizer)
    model.save_pretrained(tmp_path / "expected")
    monkeypatch.setattr("rdpo.modeling.saving.SHARD_BYTES", 20_000)
    finish_policy(tmp_path / "trained", tmp_path / "base", tmp_path / MERGED)
    files = sorted((tmp_path / MERGED).glob("*.safetensors"))
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    expected = load_file(tmp_path / "expected" / "model.safetensors")
    assert len(files) > 1 and found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    index = json.loads((tmp_path / MERGED / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in (MERGED, "expected")]
    assert configs[0] == configs[1]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / MERGED)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
