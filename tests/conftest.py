"""A tiny Llama and tokenizer built in code, so that no test needs a network; one local Ray for all."""

import os
import socket

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# By default Ray's workers give way to every other process of the machine.
os.environ.setdefault("RAY_worker_niceness", "0")


import pytest

from tests.support import stores
from tests.support.jobs import valid_job
from tests.support.models import byte_tokenizer, save_model, tiny_config


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


@pytest.fixture(scope="session")
def port():
    """Port of an S3 server on loopback."""
    pytest.importorskip("moto", reason="the S3 server of the tests is not installed")
    with stores.server() as port:
        yield port


@pytest.fixture(scope="session")
def endpoint(port):
    return f"http://127.0.0.1:{port}"


@pytest.fixture
def reached(monkeypatch):
    """Makes an endpoint the environment's."""

    def reach(endpoint):
        for name, value in stores.environment(endpoint).items():
            monkeypatch.setenv(name, value)

    return reach


@pytest.fixture
def bucket(endpoint, reached, request):
    """A new bucket, with the environment to reach it."""
    reached(endpoint)
    name = f"bucket-{abs(hash(request.node.nodeid))}"
    stores.client(endpoint).create_bucket(Bucket=name)
    return name


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

    from rdpo.cluster.connection import start_local

    context = start_local(
        ray, num_cpus=4, object_store_memory=200 << 20, dashboard_host="127.0.0.1", log_to_driver=False
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
