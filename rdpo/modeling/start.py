"""Whether the adapter that a job's student starts with can be used as the job says, before any weight is read."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from rdpo.errors import InputError
from rdpo.modeling.adapters import with_adapter
from rdpo.modeling.model_files import ADAPTER_CONFIG, files_of, fingerprint_of, of_weights
from rdpo.modeling.start_adapter import check_fits, read_config
from rdpo.modeling.weights import ModelRef, is_on_hub, local_adapter

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

    from rdpo.config import Job, Lora

CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/")
"""Where the hub's cache keeps a model of an owner and a name."""
SAYS_NOTHING = re.compile(r"(model|base|start|merged|policy|final|output|checkpoint)?[-_]?\d*", re.IGNORECASE)
"""Names that folders of any model have."""


def checked_start(job: Job, model: PreTrainedModel) -> PreTrainedModel:
    """The student's model without its numbers, as it was, once its adapter is known to fit.

    Raises:
        InputError: the adapter is of another model, is none that can be used so, or says something else than the job.
    """
    student, further = ModelRef.student(job), job.student.continues
    if student.adapter is None:
        return model

    where, folder = f"student.adapter {student.adapter}", local_adapter(student.adapter)
    if further and job.training.lora:
        _check_agrees(where, read_config(where, folder, further), job.training.lora)
    plain, modules = check_adapter(where, student, model, further)
    if further and job.training.lora:
        _check_modules(where, modules, plain, job.training.lora)
    return plain


def check_adapter(
    where: str, of: ModelRef, model: PreTrainedModel, further: bool = False
) -> tuple[PreTrainedModel, set[str]]:
    """Compare the adapter of a model with the model; that as it was, and the names of the modules that are adapted.

    Args:
        where: what a message begins with: the setting, and the adapter's name.
        of: the model with its adapter, by name.
        model: the same, its tensors on any device, `meta` included.
        further: the adapter is to be trained further, and not merged.

    Raises:
        InputError: the adapter is of another model, or is none that can be used so.
    """
    folder = local_adapter(of.adapter or "")
    config = read_config(where, folder, further)
    _check_base(where, config, of)
    adapted = check_fits(where, folder, config, model, further)
    modules = set(adapted.base_model.targeted_module_names)
    plain: PreTrainedModel = adapted.unload()
    return plain, modules


def _check_base(where: str, config: LoraConfig, student: ModelRef) -> None:
    """Raise if an adapter says that it was trained on another model: shapes alone do not tell two apart."""
    stated, revision = config.base_model_name_or_path, config.revision
    if stated and not _is_same(stated, student):
        raise InputError(
            f"{where}: was trained on {stated}, and is to lie on {student.name}; name that model, or, where both are "
            f"the same, write {student.name} as base_model_name_or_path into the adapter's {ADAPTER_CONFIG}"
        )
    if revision and student.revision and revision != student.revision:
        raise InputError(
            f"{where}: was trained on revision {revision} of its model, and student.revision is {student.revision}"
        )


def _is_same(stated: str, student: ModelRef) -> bool:
    if stated.casefold() == student.name.casefold():
        return True
    path, own = Path(os.path.expanduser(stated)), student.base.folder()
    if path.is_dir():
        return path.resolve() == own or _weights_in(path) == _weights_in(own)

    cached = CACHED.search(f"{stated}/")
    stated = f"{cached[1]}/{cached[2]}" if cached else stated
    if is_on_hub(student.name) and not stated.startswith((".", "/", "~")) and stated.count("/") == 1:
        return stated.casefold() == student.name.casefold()
    # A folder of another machine, or a copy of a model of the hub.
    name = _last(stated)
    return not SAYS_NOTHING.fullmatch(name) and name in {_last(student.name), own.name.casefold()}


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2].casefold().removesuffix(".gguf")


def _weights_in(folder: Path) -> str:
    return fingerprint_of(file for file in files_of(folder) if of_weights(file.name))


def _check_agrees(where: str, config: LoraConfig, lora: Lora) -> None:
    """Raise if `training.lora` has other numbers than the adapter that is trained further."""
    found = {"rank": config.r, "alpha": config.lora_alpha}
    for name, value in found.items():
        if getattr(lora, name) != value:
            raise InputError(
                f"training.lora: {name} = {getattr(lora, name):g}, and {where} has {value:g}, which is trained "
                "further; leave [training.lora] out, or set it to that"
            )
    if others := [name for name in ("rank_pattern", "alpha_pattern", "use_rslora") if getattr(config, name)]:
        raise InputError(f"training.lora: {where} has a {others[0]}, which no setting says; leave [training.lora] out")


def _check_modules(where: str, own: set[str], model: PreTrainedModel, lora: Lora) -> None:
    """Raise if `training.lora` names other modules than those of the adapter that is trained further."""
    asked: PeftModel = with_adapter(model, lora, seed=0)
    wanted = set(asked.base_model.targeted_module_names)
    asked.unload()
    if wanted != own:
        part = sorted(wanted ^ own)
        raise InputError(
            f"training.lora: target_modules = {lora.target_modules!r} are other modules than those of {where} "
            f"({part[0]} is among one of them alone); leave [training.lora] out"
        )
