"""A model written to a folder: its weights and configuration by transformers, all else as its start model has it."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.errors import InputError
from rdpo.modeling.model_files import CHAT_TEMPLATE, CODE, CONFIG, TOKENIZER_CONFIG, VOCABULARY, WEIGHTS

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel

GENERATION_CONFIG = "generation_config.json"
INDEX = "model.safetensors.index.json"
SHARD_NAMES = "model{suffix}.safetensors"
SHARD_BYTES = 2 << 30


def save_model(model: PreTrainedModel, folder: Path, **options: Any) -> None:
    """Write weights and configuration, or an adapter; `options`: as for `save_pretrained`.

    transformers loads settings of generation that it then refuses to save (a temperature without `do_sample`). They are
    no part of what is trained, so the start model's file is taken as it is, by `copy_companions`.
    """
    from transformers import GenerationConfig

    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    kept = getattr(whole, "generation_config", None)
    whole.generation_config = GenerationConfig()
    try:
        model.save_pretrained(folder, **options)
    finally:
        whole.generation_config = kept
    # What was written there are the settings of the stand-in.
    (folder / GENERATION_CONFIG).unlink(missing_ok=True)


def copy_weights(source: Path, target: Path, dtype: torch.dtype) -> None:
    """Copy a model's weights, floating numbers in `dtype`; one file of `SHARD_BYTES` at most is in memory at a time."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors import safe_open
    from safetensors.torch import save_file

    target.mkdir(parents=True, exist_ok=True)
    files, sizes = {}, {}
    for file in sorted(source.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118
                files[name] = file
                sizes[name] = dtype.itemsize * math.prod(opened.get_slice(name).get_shape())

    split = split_state_dict_into_shards_factory(
        sizes, get_storage_size=int, filename_pattern=SHARD_NAMES, max_shard_size=SHARD_BYTES
    )
    total = 0
    for shard, names in split.filename_to_tensors.items():
        tensors = {name: _stored(files[name], name, dtype) for name in names}
        total += sum(tensor.nbytes for tensor in tensors.values())
        save_file(tensors, target / shard, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": {"total_size": total}, "weight_map": split.tensor_to_filename}
        (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _stored(file: Path, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A tensor of a file, in `dtype` if its numbers are floating."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        tensor: torch.Tensor = opened.get_tensor(name)
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def copy_companions(source: Path, target: Path, code: bool) -> None:
    """Copy a model's tokenizer and settings of generation, and where it is trusted its `code`."""
    # All of a model's files but its weights.
    for pattern in WEIGHTS[1:]:
        for file in source.glob(pattern):
            if file.name != CONFIG and not file.name.endswith(".index.json"):
                shutil.copy(file, target / file.name)

    for file in source.rglob(CODE) if code else ():
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, place)


def tokenizer_files(folder: Path) -> list[Path]:
    """The files of the tokenizer, or of the chat template alone, that lie beside an adapter; mostly none."""
    names = [CHAT_TEMPLATE]
    if (folder / TOKENIZER_CONFIG).is_file():
        names += [TOKENIZER_CONFIG, *VOCABULARY]
    return [folder / name for name in names if (folder / name).is_file()]


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer, or the chat template alone, that lies beside an adapter: in it the adapter was trained."""
    files = tokenizer_files(source)
    if any(file.name == TOKENIZER_CONFIG for file in files):
        # A vocabulary of another form would stay beside the new one.
        for name in VOCABULARY:
            (target / name).unlink(missing_ok=True)
    for file in files:
        shutil.copy(file, target / file.name)


def check_config_saves(where: str, config: PretrainedConfig) -> None:
    """Try what would otherwise be tried after training.

    Raises:
        InputError: transformers loads the configuration, but refuses to save it.
    """
    with tempfile.TemporaryDirectory(prefix="rdpo-config-") as folder:
        try:
            config.save_pretrained(folder)
        except (ValueError, TypeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{where}: its {CONFIG} loads but could not be saved after training: {reason}") from None
