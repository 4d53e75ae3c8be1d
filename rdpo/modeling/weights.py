"""From a model's name to a local folder with safetensors weights, and to a fingerprint of it.

A name is a folder (on disk or in an object store), a hub id, a `.gguf` file, or `package:NAME/FILE`
(a GGUF file or a folder inside an installed Python package). GGUF files are dequantised once into a
cache, folders of a store are fetched into it. Pickled weights are never loaded.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
from collections.abc import Iterable
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from rdpo.errors import InputError
from rdpo.files.digests import file_digest
from rdpo.files.folder import IN_PROGRESS, MANIFEST
from rdpo.files.stores import cache_dir, fetched, is_remote
from rdpo.modeling.hub import hub_hashes, not_given
from rdpo.records import Fingerprint, digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rdpo.config import Job

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
WEIGHTS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja")
CODE = "*.py"
"""Code that ships with a model: fetched, hashed, run and published where the job trusts it, else left where it is."""


class ModelRef(NamedTuple):
    """A model as a job names it, and whether Python code that ships with it may run."""

    name: str
    revision: str | None = None
    trust: bool = False

    @classmethod
    def of(cls, job: Job, name: str | None) -> ModelRef:
        """The model of that name, whose own code may not run; or the job's student, where there is none."""
        return cls(*job.model_or_student(name))

    @classmethod
    def student(cls, job: Job) -> ModelRef:
        """The job's student."""
        return cls.of(job, None)

    def folder(self, weights: bool = True) -> Path:
        """Its folder on this machine; downloads or converts it if need be, from the hub without its `weights`.

        Raises:
            InputError: there is no such model, or it has no safetensors weights.
        """
        return local_model(self.name, self.revision, weights, code=self.trust)

    def fingerprint(self) -> str:
        """A hash of its weights, configuration and tokenizer."""
        return fingerprint(self.name, self.revision)

    def tokenizer_fingerprint(self) -> str:
        """A hash of its tokenizer and chat template alone, and of the code that may read them."""
        read = tokenizer_fingerprint(self.name, self.revision)
        return digest(read, self.code_fingerprint()) if self.trust else read

    def code_fingerprint(self) -> str:
        """A hash of the Python code that ships with it."""
        total, folder = hashlib.blake2b(digest_size=16), self.folder(weights=False)
        for file in sorted(folder.rglob(CODE)):
            total.update(str(file.relative_to(folder)).encode() + b"\0" + file.read_bytes())
        return total.hexdigest()

    def config(self) -> PretrainedConfig:
        """Its configuration.

        Raises:
            InputError: there is no such model, or it cannot be read without running code that ships with it.
        """
        return model_config(*self)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            InputError: there is no such model, or its tokenizer cannot be read without running code that ships with it.
        """
        return load_tokenizer(*self)


def local_model(name: str, revision: str | None = None, weights: bool = True, code: bool = False) -> Path:
    """Folder of a model on this machine; downloads or converts it if need be, with the `code` that ships with it.

    Raises:
        InputError: there is no such model, or it has no safetensors weights.
    """
    if is_remote(name):
        # What a store holds may have changed since the last call.
        return _checked_folder(fetched(name), weights)
    return _model_of_name(name, revision, weights, code)


def is_on_hub(name: str) -> bool:
    """Whether a name is a hub id, and stands for nothing on this machine or in a store."""
    return not is_remote(name) and _place(name) is None


def named_anywhere(name: str) -> str:
    """A model's name that holds in any working directory: a local folder's or file's whole path, any other as it is."""
    if is_remote(name) or name.startswith("package:") or not _path(name).exists():
        return name
    return str(_path(name).resolve())


@lru_cache(maxsize=64)
def _model_of_name(name: str, revision: str | None, weights: bool, code: bool) -> Path:
    path = _place(name)
    if path is None:
        return _downloaded(name, revision, weights, code)
    return _checked_folder(path, weights) if path.is_dir() else _dequantised(path)


def check_model_name(name: str) -> None:
    """Look at what a name stands for, without a download or conversion.

    Raises:
        InputError: there is no such folder or file, or it holds no model; a hub id is taken as it is.
    """
    path = None if is_remote(name) else _place(name)
    if path is not None and path.is_dir():
        _checked_folder(path, weights=True)


def _place(name: str) -> Path | None:
    """The folder or GGUF file that a name stands for on this machine; None for a hub id."""
    path = _package_file(name) if name.startswith("package:") else _path(name)
    if path.is_dir() or (path.is_file() and path.suffix == ".gguf"):
        return path
    if path.suffix == ".gguf" or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise InputError(f"model {name}: no such folder or file")
    return None


def fingerprint(name: str, revision: str | None = None) -> Fingerprint:
    """A hash of the weights, configuration and tokenizer that a name stands for.

    A model of the hub is known by the hashes that the hub has of its files, and is not downloaded. The manifest of a
    model that a run has published says when it was made, not what it is; only earlier versions counted it.
    """
    if is_on_hub(name):
        of_hub = digest(list(hub_hashes(name, revision, WEIGHTS).items()))
        return Fingerprint(of_hub, former=lambda: _folder_fingerprint(_files(local_model(name, revision))))
    files = _files(local_model(name, revision))
    of_model = [file for file in files if file.name not in (MANIFEST, IN_PROGRESS)]
    return Fingerprint(_folder_fingerprint(of_model), former=lambda: _folder_fingerprint(files))


def tokenizer_fingerprint(name: str, revision: str | None = None) -> str:
    """A hash of what a model's tokenizer and chat template are read from; its weights are not looked at."""
    folder = local_model(name, revision, weights=False)
    others = (CONFIG, "generation_config.json", MANIFEST, IN_PROGRESS)
    files = [file for file in _files(folder) if file.name not in others and not _of_weights(file.name)]
    # Of the model's configuration only these say which class reads the files.
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    chosen = {field: config.get(field) for field in ("model_type", "tokenizer_class", "auto_map")}
    return digest(_folder_fingerprint(files), chosen)


def _of_weights(name: str) -> bool:
    return name.endswith((".safetensors", ".index.json"))


def _path(name: str) -> Path:
    # pathlib's own raises an error where there is no such user.
    return Path(os.path.expanduser(name))


def adapter_fingerprint(folder: str) -> str:
    """A hash of an adapter's weights and configuration."""
    return _folder_fingerprint(_files(local_adapter(folder)))


def local_adapter(name: str) -> Path:
    """Folder of a LoRA adapter.

    Raises:
        InputError: it has no such configuration, or weights other than safetensors.
    """
    path = fetched(name) if is_remote(name) else _path(name)
    if not (path / ADAPTER_CONFIG).is_file():
        raise InputError(f"adapter {name}: the folder has no {ADAPTER_CONFIG}, so it is no LoRA adapter")
    if not (path / "adapter_model.safetensors").is_file():
        raise InputError(f"adapter {name}: no adapter_model.safetensors; pickled weights are not loaded, convert them")
    return path.resolve()


def model_config(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PretrainedConfig:
    """The configuration of a model.

    Raises:
        InputError: there is no such model, or it cannot be read without running code that ships with it.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    folder = local_model(name, revision, weights=False, code=trust_remote_code)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise InputError(f"model {name}: {_unreadable(error, CONFIG)}") from None


def _unreadable(error: Exception, what: str) -> str:
    """Why transformers cannot read a part of a model; where it ships code of its own, what would run it."""
    if "trust_remote_code" in str(error):
        return "it needs Python code that ships with it; student.trust_remote_code = true runs that of the student"
    return f"its {what} cannot be read: {str(error).strip().splitlines()[0][:200]}"


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        InputError: there is no such model, or its tokenizer cannot be read without running code that ships with it.
    """
    from transformers import AutoTokenizer

    folder = local_model(name, revision, weights=False, code=trust_remote_code)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name}: {_unreadable(error, 'tokenizer')}") from None


def _files(folder: Path) -> list[Path]:
    return sorted(chain.from_iterable(map(folder.glob, WEIGHTS)))


def _folder_fingerprint(files: Iterable[Path]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for file in files:
        total.update(file.name.encode())
        total.update(file_digest(file))
    return total.hexdigest()


def _package_file(name: str) -> Path:
    package, _, inside = name.removeprefix("package:").partition("/")
    found = importlib.util.find_spec(package) if package.isidentifier() else None
    if found is None or not found.submodule_search_locations:
        raise InputError(f"model {name}: the Python package `{package}` is not installed")
    root = Path(found.submodule_search_locations[0]).resolve()
    path = (root / inside).resolve()
    # Not by `..` to somewhere else on this machine.
    if not path.is_relative_to(root) or not path.exists():
        raise InputError(f"model {name}: the package has no `{inside}`")
    return path


def _checked_folder(path: Path, weights: bool) -> Path:
    if (path / ADAPTER_CONFIG).is_file():
        # transformers would take the weights of whatever model this file names.
        raise InputError(f"model {path}: the folder holds a LoRA adapter; merge it into its model first")
    if not (path / CONFIG).is_file():
        raise InputError(f"model {path}: the folder has no {CONFIG}, so it is no Hugging Face model")
    if weights and not any(path.glob("*.safetensors")):
        raise InputError(f"model {path}: no .safetensors weights; pickled weights are not loaded, convert them")
    return path.resolve()


def _downloaded(name: str, revision: str | None, weights: bool, code: bool) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [*(WEIGHTS if weights else WEIGHTS[1:]), *([CODE] if code else [])]
    try:
        folder = snapshot_download(name, revision=revision, allow_patterns=patterns)
    except Exception as error:
        raise not_given(name, error) from None
    return _checked_folder(Path(folder), weights)


def _dequantised(file: Path) -> Path:
    stat = file.stat()
    stamp = f"{file.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    folder = cache_dir() / "models" / f"{file.stem}-{hashlib.blake2b(stamp.encode(), digest_size=6).hexdigest()}"

    folder.parent.mkdir(parents=True, exist_ok=True)
    # Several actors of one machine begin at the same time, and each wants the same model.
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            partial = folder.with_name(f"{folder.name}.partial")
            shutil.rmtree(partial, ignore_errors=True)
            _convert_gguf(file, partial)
            partial.rename(folder)
    return folder


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
