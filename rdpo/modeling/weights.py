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
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rdpo.errors import InputError
from rdpo.files.folder import IN_PROGRESS, MANIFEST
from rdpo.files.stores import fetched, is_remote
from rdpo.modeling.converted import dequantised, with_adapter
from rdpo.modeling.hub import hub_hashes, not_given
from rdpo.modeling.model_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CODE,
    CONFIG,
    WEIGHTS,
    files_of,
    fingerprint_of,
    of_weights,
)
from rdpo.modeling.saving import tokenizer_files
from rdpo.records import Fingerprint, digest

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

    from rdpo.config import Job


class ModelRef(NamedTuple):
    """A model as a job names it, whether Python code that ships with it may run, and a LoRA adapter merged into it."""

    name: str
    revision: str | None = None
    trust: bool = False
    adapter: str | None = None

    @classmethod
    def of(cls, job: Job, name: str | None) -> ModelRef:
        """The model of that name, whose own code may not run; or the job's student, where there is none."""
        return cls(*job.model_or_student(name))

    @classmethod
    def student(cls, job: Job) -> ModelRef:
        """The job's student."""
        return cls.of(job, None)

    @property
    def base(self) -> ModelRef:
        """The same model without its adapter."""
        return self._replace(adapter=None)

    def folder(self, weights: bool = True) -> Path:
        """Its folder on this machine; downloads, converts or merges it if need be, from the hub without its `weights`.

        Raises:
            InputError: there is no such model or adapter, or it has no safetensors weights.
        """
        base = local_model(self.name, self.revision, weights, code=self.trust)
        if self.adapter is None:
            return base
        return with_adapter(base, local_adapter(self.adapter), weights, self.trust)

    def fingerprint(self) -> str:
        """A hash of its weights, configuration and tokenizer."""
        of_base = fingerprint(self.name, self.revision)
        return digest(of_base, adapter_fingerprint(self.adapter)) if self.adapter else of_base

    def tokenizer_fingerprint(self) -> str:
        """A hash of its tokenizer and chat template alone, and of the code that may read them."""
        read = tokenizer_fingerprint(self.name, self.revision)
        if self.adapter and (own := adapter_tokenizer_fingerprint(self.adapter)):
            read = digest(read, own)
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
        return model_config(self.name, self.revision, self.trust)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Its tokenizer.

        Raises:
            InputError: there is no such model, or its tokenizer cannot be read without running code that ships with it.
        """
        return _tokenizer_of(self.name, self.folder(weights=False), self.trust)


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
    return _checked_folder(path, weights) if path.is_dir() else dequantised(path)


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
    if path.suffix == ".gguf" or not _is_hub_id(name):
        raise InputError(f"model {name}: no such folder or file")
    return None


def _is_hub_id(name: str) -> bool:
    return name.count("/") == 1 and not name.startswith((".", "/", "~"))


def fingerprint(name: str, revision: str | None = None) -> Fingerprint:
    """A hash of the weights, configuration and tokenizer that a name stands for.

    A model of the hub is known by the hashes that the hub has of its files, and is not downloaded. The manifest of a
    model that a run has published says when it was made, not what it is; only earlier versions counted it.
    """
    if is_on_hub(name):
        of_hub = digest(list(hub_hashes(name, revision, WEIGHTS).items()))
        return Fingerprint(of_hub, former=lambda: fingerprint_of(files_of(local_model(name, revision))))
    files = files_of(local_model(name, revision))
    of_model = [file for file in files if file.name not in (MANIFEST, IN_PROGRESS)]
    return Fingerprint(fingerprint_of(of_model), former=lambda: fingerprint_of(files))


def tokenizer_fingerprint(name: str, revision: str | None = None) -> str:
    """A hash of what a model's tokenizer and chat template are read from; its weights are not looked at."""
    folder = local_model(name, revision, weights=False)
    others = (CONFIG, "generation_config.json", MANIFEST, IN_PROGRESS)
    files = [file for file in files_of(folder) if file.name not in others and not of_weights(file.name)]
    # Of the model's configuration only these say which class reads the files.
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    chosen = {field: config.get(field) for field in ("model_type", "tokenizer_class", "auto_map")}
    return digest(fingerprint_of(files), chosen)


def _path(name: str) -> Path:
    # pathlib's own raises an error where there is no such user.
    return Path(os.path.expanduser(name))


def adapter_fingerprint(name: str) -> str:
    """A hash of an adapter's weights and configuration; one of the hub is not downloaded for it."""
    if _adapter_is_on_hub(name):
        return digest(list(hub_hashes(name, None, WEIGHTS).items()))
    return fingerprint_of(files_of(local_adapter(name)))


def adapter_tokenizer_fingerprint(name: str) -> str | None:
    """A hash of the tokenizer or chat template that lies beside an adapter; None where neither does."""
    files = tokenizer_files(local_adapter(name))
    return fingerprint_of(files) if files else None


def local_adapter(name: str) -> Path:
    """Folder of a LoRA adapter on this machine: itself, or fetched from an object store or the hub.

    Raises:
        InputError: there is none, it has no such configuration, or weights other than safetensors.
    """
    path = _adapter_place(name)
    if not (path / ADAPTER_CONFIG).is_file():
        raise InputError(f"adapter {name}: the folder has no {ADAPTER_CONFIG}, so it is no LoRA adapter")
    if not (path / ADAPTER_WEIGHTS).is_file():
        raise InputError(f"adapter {name}: no {ADAPTER_WEIGHTS}; pickled weights are not loaded, convert them")
    return path.resolve()


def _adapter_place(name: str) -> Path:
    if is_remote(name):
        return fetched(name)
    return _downloaded_adapter(name) if _adapter_is_on_hub(name) else _path(name)


def _adapter_is_on_hub(name: str) -> bool:
    return not is_remote(name) and not _path(name).exists() and _is_hub_id(name)


@lru_cache(maxsize=16)
def _downloaded_adapter(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*WEIGHTS]))
    except Exception as error:
        raise not_given(name, error, "adapter") from None


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
    return _tokenizer_of(name, local_model(name, revision, weights=False, code=trust_remote_code), trust_remote_code)


def _tokenizer_of(name: str, folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(f"model {name}: {_unreadable(error, 'tokenizer')}") from None


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
