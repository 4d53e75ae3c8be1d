"""Models of the hub: known without their weights, and looked for by each node in its own cache."""

import io
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.execution.run import Run
from rdpo.modeling import hub, model_files, weights
from rdpo.modeling.chat import load_chat
from rdpo.modeling.weights import ModelRef, fingerprint
from rdpo.tracking.console import Console

NAME, COMMIT = "own/er", "c" * 40
LARGE = (".safetensors",)


@pytest.fixture(autouse=True)
def nothing_known():
    """Each test begins as a new process does."""
    caches = (hub.hub_hashes, weights._model_of_name, load_chat)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def node(tmp_path, tiny_model, monkeypatch):
    """A machine with a cache of its own that holds the model, with or without its weights; which becomes this one."""

    def become(name, with_weights=True):
        for cache in (hub.hub_hashes, weights._model_of_name, load_chat):
            cache.cache_clear()
        place = tmp_path / name
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(place))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        repository = place / "models--own--er"
        if repository.exists():
            return repository
        snapshot = repository / "snapshots" / COMMIT
        for folder in (snapshot, repository / "blobs", repository / "refs"):
            folder.mkdir(parents=True)
        (repository / "refs" / "main").write_text(COMMIT)
        for file in Path(tiny_model).iterdir():
            if file.is_file() and (with_weights or file.suffix not in LARGE):
                shutil.copy(file, repository / "blobs" / f"hash-of-{file.name}")
                (snapshot / file.name).symlink_to(f"../../blobs/hash-of-{file.name}")
        return repository

    return become


@pytest.fixture
def asked(monkeypatch, tiny_model):
    """The hub, which has the model; what it is asked for."""
    files = [file.name for file in Path(tiny_model).iterdir() if file.is_file()]
    calls = []

    class Api:
        def model_info(self, name, revision, files_metadata):
            calls.append((name, revision))
            siblings = [SimpleNamespace(rfilename=file, lfs=None, blob_id=f"hash-of-{file}") for file in files]
            siblings[0].lfs = SimpleNamespace(sha256=siblings[0].blob_id)
            return SimpleNamespace(siblings=[*siblings, SimpleNamespace(rfilename="sub/x.json", lfs=None, blob_id="x")])

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return calls


def test_a_model_is_known_without_a_download_and_as_in_the_cache(node, asked, monkeypatch):
    node("empty", with_weights=False)
    read = []
    monkeypatch.setattr(model_files, "file_digest", lambda path: read.append(path) or b"")
    from_hub = fingerprint(NAME)
    assert asked == [(NAME, None)] and read == []

    node("full")
    monkeypatch.setattr(huggingface_hub, "HfApi", None)
    assert fingerprint(NAME) == from_hub and read == []


def test_a_cache_without_the_weights_does_not_tell_what_the_model_is(node):
    node("light", with_weights=False)
    with pytest.raises(InputError, match="model own/er: no such folder here, and the hub does not give it"):
        fingerprint(NAME)


def test_whoever_tokenizes_downloads_no_weights(node, monkeypatch):
    node("light", with_weights=False)
    patterns = []
    download = huggingface_hub.snapshot_download

    def watched(name, **options):
        patterns.append(options["allow_patterns"])
        return download(name, **options)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", watched)
    model = ModelRef(NAME)
    assert load_chat(model).tokenizer.encode("a") and model.config().model_type and model.tokenizer_fingerprint()
    assert patterns and not [one for asked_for in patterns for one in asked_for if "safetensors" in one]


def test_each_node_answers_with_the_copy_in_its_own_cache(node, job_table, tmp_path, monkeypatch):
    from rdpo.evaluation import generate
    from rdpo.stages.evaluation import evaluate

    sent = {}

    def answers(prompts, job, models, known):
        sent.update(models)
        raise RuntimeError("enough")

    monkeypatch.setattr(generate, "answer_prompts", answers)
    driver = node("driver")
    job = Job.model_validate({**job_table, "student": {"model": NAME}})
    run = Run(job, str(tmp_path / "run"), Console(io.StringIO()), lambda *_: False)
    with pytest.raises(RuntimeError, match="enough"):
        evaluate(SimpleNamespace(take_all=lambda: []), run)
    assert sent[generate.START].folder().is_relative_to(driver.resolve())
    other = node("other")
    assert sent[generate.START].folder().is_relative_to(other.resolve())
