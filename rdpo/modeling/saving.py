"""A model written to a folder: its weights and configuration by transformers, all else as its start model has it."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.errors import InputError
from rdpo.modeling.weights import CODE, CONFIG, WEIGHTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GENERATION_CONFIG = "generation_config.json"


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
