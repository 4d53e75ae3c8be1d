"""The files of a model and of an adapter, by their names, and a hash of what they hold."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain
from pathlib import Path

from rdpo.files.digests import file_digest

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
WEIGHTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CODE = "*.py"
"""Code that ships with a model: fetched, hashed, run and published where the job trusts it, else left where it is."""

CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARY = (
    *("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
)
"""What a tokenizer may consist of beside its configuration and its chat template."""


def files_of(folder: Path) -> list[Path]:
    """A model's weights, configuration and tokenizer."""
    return sorted(chain.from_iterable(map(folder.glob, WEIGHTS)))


def of_weights(name: str) -> bool:
    """Whether a file of that name holds weights, or says which file does."""
    return name.endswith((".safetensors", ".index.json"))


def fingerprint_of(files: Iterable[Path]) -> str:
    """A hash of the names of some files and of what they hold."""
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        total.update(file.name.encode())
        total.update(file_digest(file))
    return total.hexdigest()
