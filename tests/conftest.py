"""A tiny Llama and tokenizer built in code, so that no test needs a network; one local Ray for all."""

import json
import os
import socket

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# By default Ray's workers give way to every other process of the machine.
os.environ.setdefault("RAY_worker_niceness", "0")

from pathlib import Path

import pytest

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def pytest_collection_modifyitems(items):
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_terminal_summary(terminalreporter):
    """Print the table of faults and stages, of what `survived` has noted (tests/faults)."""
    # Properties, because they come with a report also out of another process.
    noted = [dict(report.user_properties).get("survived") for report in terminalreporter.getreports("passed")]
    table = {(fault, stage): how for fault, stage, how in filter(None, noted)}
    if not table:
        return
    stages = list(dict.fromkeys(stage for _, stage in table))
    terminalreporter.write_line("")
    terminalreporter.write_line("| fault | " + " | ".join(stages) + " |")
    terminalreporter.write_line("|---|" + "---|" * len(stages))
    for fault in dict.fromkeys(fault for fault, _ in table):
        cells = (table.get((fault, stage), "") for stage in stages)
        terminalreporter.write_line(f"| {fault} | " + " | ".join(cells) + " |")


def byte_tokenizer(template=CHATML, bos=None, specials=("<|im_start|>", "<|im_end|>"), eos="<|im_end|>"):
    """A byte-level tokenizer: every byte is a token, plus the special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = [*([bos] if bos else []), *specials]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*specials, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(specials)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=eos)
    fast.chat_template = template
    return fast


def tiny_config(tokenizer, **changes):
    from transformers import LlamaConfig

    settings = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return LlamaConfig(**{**settings, **changes})


def save_model(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tokenizer):
    """Folder of a random two-layer Llama with a byte tokenizer."""
    import torch
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    return save_model(tmp_path_factory.mktemp("tiny"), LlamaForCausalLM(tiny_config(tokenizer)), tokenizer)


@pytest.fixture(scope="session")
def tiny_classifier(tmp_path_factory, tokenizer):
    """Folder of a random Llama with a reward head."""
    import torch
    from transformers import LlamaForSequenceClassification

    torch.manual_seed(1)
    model = LlamaForSequenceClassification(tiny_config(tokenizer, num_labels=1))
    return save_model(tmp_path_factory.mktemp("reward"), model, tokenizer)


@pytest.fixture(scope="session")
def ray_cluster():
    """A local Ray for the tests of a session."""
    import ray

    context = ray.init(
        "local", num_cpus=4, object_store_memory=200 << 20, dashboard_host="127.0.0.1", log_to_driver=False
    )
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield context
    ray.shutdown()


@pytest.fixture(scope="session")
def process_group():
    """A process group of one, so that a `Trainer` runs in this process; DeepSpeed takes only one in its life."""
    import torch

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "RANK": "0",
            "LOCAL_RANK": "0",
            "WORLD_SIZE": "1",
            "DS_ACCELERATOR": "cpu",
            **place,
        }.items():
            patch.setenv(name, value)
        torch.distributed.init_process_group("gloo")
        yield
        torch.distributed.destroy_process_group()


@pytest.fixture
def job_table(tiny_model, tmp_path):
    """The tables of a valid job over the tiny model; tests change what they are about."""
    return valid_job(tiny_model, tmp_path)


def valid_job(tiny_model, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"question {i}", "split": split_of(i)} for i in range(12)])
    return {
        "name": "tiny",
        "student": {"model": tiny_model, "dtype": "float32"},
        "prompts": {"source": str(tmp_path / "prompts.jsonl"), "max_prompt_tokens": 128},
        "synthesis": {
            "task": "roleplay",
            "sampling": {"max_tokens": 6, "temperature": 1.0},
            "engine": {"max_model_len": 1024, "kv_cache_gib": 1, "batch_rows": 4},
        },
        "rewards": [{"kind": "function", "name": "length", "function": "tests.rewards:length"}],
        "reference": {"max_length": 256, "tokens_per_batch": 1024},
        "training": {"batch_size": 4, "tokens_per_batch": 1024, "learning_rate": 1e-3},
        "evaluation": {"sampling": {"max_tokens": 6}, "engine": {"max_model_len": 256, "kv_cache_gib": 1}},
    }


ALL_STAGES = (
    *("prompts", "calibration", "synthesis", "rewards", "pairs", "reference"),
    *("training", "policy", "evaluation", "model"),
)


def whole_job(source, student, classifier):
    """The tables of a job from end to end, in fp32, with two training workers and checkpoints."""
    engine = {"max_model_len": 1024, "kv_cache_gib": 1, "batch_rows": 4, "batches_in_flight": 1}
    engine["options"] = {"dtype": "float32"}
    speech = {"sampling": {"max_tokens": 8, "temperature": 1.0}, "engine": engine}
    return {
        "name": "tiny",
        "student": {"model": student, "dtype": "float32"},
        "prompts": {"source": str(source), "max_prompt_tokens": 128},
        "synthesis": {"task": "roleplay", **speech},
        "rewards": [{"kind": "classifier", "name": "rm", "model": classifier, "dtype": "float32"}],
        "pairs": {"direction": "reward"},
        "reference": {"max_length": 256, "tokens_per_batch": 1024},
        "training": {
            "batch_size": 4,
            "tokens_per_batch": 1024,
            "num_workers": 2,
            "learning_rate": 1e-3,
            "checkpoint_every": 2,
            "lora": {"rank": 4},
        },
        "evaluation": speech,
    }


def split_of(index):
    return "heldout" if index % 4 == 0 else "train"


def write_jsonl(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_job(path, table):
    import tomli_w

    Path(path).write_text(tomli_w.dumps(table), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="session")
def wordy_models(tmp_path_factory, tokenizer):
    """Two random Llamas whose answers differ: untied heads, with weights large enough for peaked choices."""
    import torch
    from transformers import LlamaForCausalLM

    folders = []
    for seed in (2, 3):
        torch.manual_seed(seed)
        config = tiny_config(tokenizer, tie_word_embeddings=False, initializer_range=0.2)
        folders.append(save_model(tmp_path_factory.mktemp(f"wordy{seed}"), LlamaForCausalLM(config), tokenizer))
    return folders
