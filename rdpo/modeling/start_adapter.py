"""A LoRA adapter that a model starts with: what of it can be honoured, whether it fits, and how both become one.

Merged (`merge`), both are a model like any other: each update is added in float64 and rounded once, to the precision
that the model is stored in, so that every machine which merges the same files writes the same numbers. Beside the
model's own weights (`put_on`) the adapter is trained further, and read as the reference in the same way.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.errors import InputError
from rdpo.modeling.adapters import check_shared
from rdpo.modeling.loading import load_whole, named
from rdpo.modeling.model_files import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from rdpo.modeling.saving import save_model

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from transformers import PreTrainedModel

ABOUT = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config"),
}
"""Settings that say what an adapter is, and nothing of what it computes."""
PLAIN = {
    *("r", "lora_alpha", "lora_dropout", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights"),
}
"""Settings of an adapter that consists of pairs of matrices alone."""
MERGED = {"bias", "use_dora", "modules_to_save"}
"""Settings of what else a merge makes part of the model."""
UNDER = ".base_layer."
"""In the name of a tensor of the model itself, under an adapter."""
PLAIN_INITS = ("gaussian", "orthogonal", "eva")
"""First weights by name that leave the model's own as they are."""


def read_config(where: str, folder: Path, further: bool = False) -> LoraConfig:
    """The configuration of an adapter.

    Args:
        where: what a message begins with: the setting, and the adapter's name.
        folder: the adapter's.
        further: it is to be trained further, and not merged.

    Raises:
        InputError: it is no LoRA adapter of a causal language model, or has settings that cannot be honoured.
    """
    from peft import LoraConfig

    try:
        table = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        kind = table.get("peft_type")
    except (ValueError, AttributeError) as error:
        raise InputError(f"{where}: its {ADAPTER_CONFIG} cannot be read: {error}") from None
    if kind != "LORA":
        raise InputError(f"{where}: is an adapter of kind {kind}, and no LoRA; merge it into its model by peft first")
    for name in ("base_model_name_or_path", "revision"):
        if not isinstance(table.get(name), str | None):
            raise InputError(f"{where}: its {ADAPTER_CONFIG} cannot be read: {name} is no text")
    if table.get("task_type") not in (None, "CAUSAL_LM"):
        raise InputError(f"{where}: was trained for {table['task_type']}, and not as a causal language model")
    _check_settings(where, table, further)

    try:
        # What is left out now is at rest, or unknown to this version of peft.
        return LoraConfig(**{name: table[name] for name in sorted(ABOUT | PLAIN | MERGED) if name in table})
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: its {ADAPTER_CONFIG} cannot be read: {' '.join(str(error).split())}") from None


def _check_settings(where: str, table: Mapping[str, Any], further: bool) -> None:
    """Raise if an adapter computes something that a merge, or training it further, would not honour."""
    from peft import LoraConfig

    at_rest = LoraConfig().to_dict()
    for name, value in table.items():
        if name in ABOUT | PLAIN or not value or value == at_rest.get(name):
            continue
        setting = f"{name} = {json.dumps(value)[:80]}"
        if name not in MERGED:
            raise InputError(f"{where}: its {setting} cannot be honoured; merge it into its model by peft first")
        if further:
            raise InputError(f'{where}: its {setting} cannot be trained further; set student.adapter_use = "merge"')

    init = table.get("init_lora_weights", True)
    if isinstance(init, str) and init not in PLAIN_INITS:
        raise InputError(
            f"{where}: was initialised by {init}, which changes the weights under it; convert it to a plain LoRA "
            "(path_initial_model_for_weight_conversion in peft's save_pretrained)"
        )


def check_fits(where: str, folder: Path, config: LoraConfig, model: PreTrainedModel, further: bool) -> PeftModel:
    """Compare an adapter with the model that it is for, without reading the weights of either.

    Args:
        where: what a message begins with.
        folder: the adapter's.
        config: its configuration.
        model: the model, its tensors on any device, `meta` included; it is wrapped in place.
        further: the adapter is to be trained further, and not merged.

    Returns the adapted model, the adapter without its numbers.

    Raises:
        InputError: the model lacks modules that the adapter has, or has them in other shapes; or the adapter's merge
            would change more than the adapter does.
    """
    from peft import get_peft_model_state_dict

    adapted = _wrapped(where, model, config)
    check_shared(adapted, where, merged=not further)
    stored, own = _stored_shapes(where, folder), get_peft_model_state_dict(adapted, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in own.items()}
    # peft stores an embedding or output layer whole beside the adapter on it.
    beside = {name: tensor for name, tensor in adapted.state_dict().items() if name in stored and UNDER in name}
    if beside and further:
        raise InputError(
            f"{where}: holds {min(beside)}, weights of the model itself, which are not trained further; set "
            'student.adapter_use = "merge"'
        )
    _check_tensors(where, wanted | {name: tuple(tensor.shape) for name, tensor in beside.items()}, stored)
    return adapted


def _wrapped(where: str, model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    from peft import get_peft_model

    # Numbers are read into it afterwards, or none at all.
    config.init_lora_weights = True
    try:
        # In the model's own precision, as `rdpo.modeling.adapters` has it.
        return get_peft_model(model, config, autocast_adapter_dtype=False)
    except (ValueError, KeyError, TypeError, AttributeError, re.error) as error:
        said = " ".join(str(error).split())[:300]
        raise InputError(f"{where}: does not fit {type(model).__name__}, so it is of another model: {said}") from None


def _stored_shapes(where: str, folder: Path) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(folder / ADAPTER_WEIGHTS, "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InputError(f"{where}: its {ADAPTER_WEIGHTS} cannot be read: {error}") from None


def _check_tensors(where: str, wanted: Mapping[str, tuple[int, ...]], stored: Mapping[str, tuple[int, ...]]) -> None:
    missing, unused = sorted(wanted.keys() - stored.keys()), sorted(stored.keys() - wanted.keys())
    both = sorted(wanted.keys() & stored.keys())
    wrong = [f"{name} {stored[name]} for {wanted[name]}" for name in both if stored[name] != wanted[name]]

    found = []
    if wrong:
        found.append(f"{len(wrong)} stored in another shape: {named(wrong)}")
    if unused:
        found.append(f"{len(unused)} stored that the model has no place for: {named(unused)}")
    if missing:
        found.append(f"{len(missing)} not stored: {named(missing)}")
    if found:
        raise InputError(
            f"{where}: does not fit the student, so it is of another model: of {len(wanted)} tensors of the adapter, "
            f"{'; '.join(found)}"
        )


def put_on(model: PreTrainedModel, folder: Path, dropout: float = 0.0) -> PeftModel:
    """A model with an adapter beside its weights, which are frozen; the adapter is trained further, or read.

    Args:
        model: the model that the adapter is for; on the `meta` device the adapter has no numbers either.
        folder: the adapter's.
        dropout: on the adapter's input, in training mode.

    Raises:
        InputError: the adapter does not fit, or cannot be trained.
    """
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    where = f"student.adapter {folder}"
    config = read_config(where, folder, further=True)
    config.lora_dropout, config.inference_mode = dropout, False
    adapted = check_fits(where, folder, config, model, further=True)
    # As in `rdpo.modeling.adapters`: the first layer's input needs a gradient.
    model.enable_input_require_grads()
    if not next(adapted.parameters()).is_meta:
        set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_WEIGHTS))
    return adapted


def merge(base: Path, folder: Path, target: Path, trust_remote_code: bool = False) -> None:
    """Write the weights and configuration of a model that an adapter is merged into, in the precision it is stored in.

    Args:
        base: folder of the model.
        folder: the adapter's.
        target: folder to write; it is there.
        trust_remote_code: whether Python code that ships with the model may run.

    Raises:
        InputError: the adapter is none that can be merged, or does not fit.
    """
    import torch
    from peft import set_peft_model_state_dict
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file

    where = f"adapter {folder}"
    model = load_whole(base, "auto", trust_remote_code)
    adapted = check_fits(where, folder, read_config(where, folder), model, further=False)
    for name, weight in adapted.named_parameters():
        if ".lora_" in name:
            # Else its numbers would be rounded to the model's precision before they are multiplied.
            weight.data = weight.data.double()
    set_peft_model_state_dict(adapted, load_file(folder / ADAPTER_WEIGHTS))

    for layer in [module for module in adapted.modules() if isinstance(module, BaseTunerLayer)]:
        stored: torch.dtype = layer.get_base_layer().weight.dtype
        # One layer at a time, as numbers of eight bytes take much room.
        layer.double()
        try:
            layer.merge(safe_merge=True)
        except ValueError as error:
            raise InputError(f"{where}: cannot be merged: {error}") from None
        layer.to(stored)
    save_model(adapted.unload(), target)
