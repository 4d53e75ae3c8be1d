"""Data sets of the hub are read, and known, at one commit."""

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

from rdpo.config import Prompts
from rdpo.errors import InputError
from rdpo.synthesis import hub, sources
from rdpo.synthesis.columns import Reading
from rdpo.synthesis.hub import HubSource
from rdpo.synthesis.sources import content_hash

NEW, OLD = "a" * 40, "b" * 40


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache of the hub, and nothing known from before."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    hub._commit.cache_clear()
    yield tmp_path
    hub._commit.cache_clear()


@pytest.fixture
def answers(monkeypatch):
    """What the hub says of each revision; without any the network is away."""
    known = {}

    class Api:
        def dataset_info(self, name, revision):
            if not known:
                raise ConnectionError("no route to host")
            return type("Info", (), {"sha": known[name, revision]})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return known


def test_a_data_set_that_moved_on_is_another_content(answers):
    answers["own/er", "main"] = OLD
    before = content_hash("hf:own/er")
    answers["own/er", "main"] = NEW
    assert content_hash("hf:own/er") == before, "within one process it stays the same"
    hub._commit.cache_clear()
    assert content_hash("hf:own/er") == f"hf:own/er@{NEW}" != before
    assert before.former() == "hf:own/er"


def test_a_tag_and_its_commit_are_one_content_and_a_commit_is_not_asked_for(answers):
    answers["own/er", "v1"] = OLD
    assert content_hash("hf:own/er@v1") == content_hash(f"hf:own/er@{OLD}")


def test_what_was_downloaded_is_known_without_a_network(answers, cache):
    noted = cache / "datasets--own--er" / "refs" / "main"
    noted.parent.mkdir(parents=True)
    noted.write_text(OLD)
    assert HubSource.of("hf:own/er").commit() == OLD
    with pytest.raises(InputError, match=r"does not say which commit v2 is \(ConnectionError: no route"):
        HubSource.of("hf:own/er@v2").commit()
    (cache / "datasets--own--er" / "secret").write_text("s")
    with pytest.raises(InputError):
        HubSource.of("hf:own/er@../secret").commit()


def test_that_commit_is_read(answers, monkeypatch):
    answers["own/er", "main"] = NEW
    asked = []

    def load(name, subset, split, revision):
        asked.append((name, revision))
        raise OSError("enough")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(InputError, match="hf:own/er cannot be loaded: enough"):
        sources.raw_rows(Prompts(source="hf:own/er"), Reading("prompts.source", ()))
    assert asked == [("own/er", NEW)]
