"""Models that this machine makes of what a name stands for: GGUF files dequantised, adapters merged into their models.

Each is made once and kept in the cache, known by what it is made of.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from filelock import FileLock

from rdpo.files.stores import cache_dir
from rdpo.modeling.model_files import CODE, CONFIG, files_of, fingerprint_of, of_weights
from rdpo.modeling.saving import copy_companions, copy_tokenizer, tokenizer_files
from rdpo.modeling.start_adapter import merge
from rdpo.records import digest


def dequantised(file: Path) -> Path:
    """Folder of a GGUF file's model, its weights in bfloat16."""
    stat = file.stat()
    stamp = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    folder = cache_dir() / "models" / f"{file.stem}-{hashlib.blake2b(stamp.encode(), digest_size=6).hexdigest()}"

    return _made_once(folder, partial(_convert_gguf, file))


def _made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of the cache, made by the first process of this machine that wants it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several actors of one machine begin at the same time, and each wants the same model.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            unfinished = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(unfinished, ignore_errors=True)
            if _one_of_several():
                # transformers would partition what it loads here, and let the first process alone write what it saves.
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as own:
                    own.submit(make, unfinished).result()
            else:
                make(unfinished)
            unfinished.rename(folder)
    return folder


def _one_of_several() -> bool:
    """Whether this process is one of several that train, or read a model, together."""
    from torch import distributed

    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def with_adapter(base: Path, adapter: Path, weights: bool, code: bool) -> Path:
    """Folder of a model that an adapter is merged into, known by what both hold; or of all its files but the `weights`.

    It lies in this machine's cache, as a converted GGUF file does: every machine merges the same numbers by itself,
    where one copy would have to travel through the run directory to each of them.
    """
    if not weights and not tokenizer_files(adapter):
        return base
    files = [file for file in files_of(base) if weights or not of_weights(file.name)]
    parts = [fingerprint_of(files), fingerprint_of(files_of(adapter))]
    parts += [fingerprint_of(sorted(base.rglob(CODE)))] if code else []
    folder = cache_dir() / "models" / f"{base.name}-{'merged' if weights else 'text'}-{digest(*parts)[:12]}"

    return _made_once(folder, partial(_put_together, base, adapter, weights, code))


def _put_together(base: Path, adapter: Path, weights: bool, code: bool, folder: Path) -> None:
    folder.mkdir()
    if weights:
        merge(base, adapter, folder, code)
    else:
        shutil.copy(base / CONFIG, folder)
    copy_companions(base, folder, code)
    copy_tokenizer(adapter, folder)


def _convert_gguf(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}

    quantised = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **source)
    config = quantised.config
    # Else whoever loads the folder would look for weights in few bits.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.dtype = torch.bfloat16
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(quantised.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(file.parent, **source)
    tokens: dict[str, Any] = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    model.generation_config = GenerationConfig(**tokens)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
