"""Fingerprints of models: what they are, not when or where they were made."""

import json
import shutil

import pytest

from rdpo.modeling.weights import ModelRef, fingerprint, tokenizer_fingerprint


@pytest.fixture
def model(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "model")


def edited(path, **changes):
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **changes}))


def test_when_a_published_model_was_made_does_not_count(model):
    before = fingerprint(str(model))
    edited(model / "manifest.json", created="now", settings={"license": "mit"})
    assert fingerprint(str(model)) == before
    # Earlier versions counted it, and know their runs by that.
    assert fingerprint(str(model)).former() != before
    assert before.former() == before
    edited(model / "config.json", rope_theta=5.0)
    assert fingerprint(str(model)) != before


def test_the_tokenizer_has_a_fingerprint_of_its_own(model):
    before = tokenizer_fingerprint(str(model))
    (model / "model.safetensors").write_bytes(b"other weights")
    edited(model / "config.json", rope_theta=5.0)
    edited(model / "generation_config.json", temperature=0.5)
    assert tokenizer_fingerprint(str(model)) == before
    edited(model / "tokenizer_config.json", chat_template="{{ messages }}")
    after = tokenizer_fingerprint(str(model))
    assert after != before
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert tokenizer_fingerprint(str(model)) != after


def test_code_that_may_run_counts_for_the_tokenizer(model):
    trusting, other = ModelRef(str(model), trust=True), ModelRef(str(model))
    before = trusting.tokenizer_fingerprint(), other.tokenizer_fingerprint()
    (model / "tokenization_own.py").write_text("x = 1")
    assert trusting.tokenizer_fingerprint() != before[0]
    assert other.tokenizer_fingerprint() == before[1]
