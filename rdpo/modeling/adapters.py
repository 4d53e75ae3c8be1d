"""LoRA adapters on a causal language model: only where training reaches them, and where a merge is what was trained."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from rdpo.config import Lora
from rdpo.errors import InputError

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor
    from transformers import PreTrainedModel

SETTING = "training.lora.target_modules"
ALL_LINEAR = "all-linear"
SHOWN = 3


def with_adapter(model: PreTrainedModel, lora: Lora, seed: int) -> PeftModel:
    """A model with a fresh adapter, over weights that are frozen.

    Raises:
        InputError: a target is no module of the model, is none that can be adapted, or shares its weights.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    # Else the first layer's input has no gradient, and ZeRO-3 takes its backward for done before it began.
    model.enable_input_require_grads()
    try:
        # Adapters in the model's own precision, for their products run on large activations; the optimizer keeps fp32
        # copies of them. peft by itself would make them float32, and cast every activation there and back.
        adapted = get_peft_model(
            model,
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=lora.target_modules,
                task_type="CAUSAL_LM",
            ),
            autocast_adapter_dtype=False,
        )
    except (ValueError, re.error) as error:
        raise InputError(f"{SETTING}: {' '.join(str(error).split())[:300]}; {_could_be(model)}") from None

    _check_found(adapted, lora)
    check_shared(adapted)
    return adapted


def _check_found(adapted: PeftModel, lora: Lora) -> None:
    """Raise if a name of a list is that of no module: peft leaves it aside."""
    if isinstance(lora.target_modules, str):
        return
    names = adapted.base_model.targeted_module_names
    unknown = [target for target in lora.target_modules if not _is_among(target, names)]
    if unknown:
        model = adapted.get_base_model()
        raise InputError(
            f"{SETTING}: {type(model).__name__} has no module {', '.join(unknown)} that can be adapted; "
            f"{_could_be(model)}"
        )


def _is_among(target: str, names: Iterable[str]) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _could_be(model: PreTrainedModel, but: Collection[str] = (), but_ends: Collection[str] = ()) -> str:
    """Which modules can be targeted: linear layers by the ends of their names, without the output layer."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head, found = model.get_output_embeddings(), set()
    for name, module in model.named_modules():
        own = name.removesuffix(".base_layer")
        if isinstance(module, nn.Linear | Conv1D) and module is not head and own not in but and ".lora_" not in own:
            found.add(own.rpartition(".")[2])
    names = sorted(found.difference(but_ends))
    return f"linear layers that can be named are {', '.join(names)}" if names else "it has no linear layers to name"


def check_shared(adapted: PeftModel, setting: str = SETTING, merged: bool = False) -> None:
    """Raise if the weights under an adapter are used elsewhere: there the adapter is not, but its merge would be.

    Args:
        adapted: the model with its adapter.
        setting: what a message begins with.
        merged: the adapter is merged at once, and not trained; then it may be on the output layer too.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    model = adapted.get_base_model()
    head = model.get_output_embeddings()
    output = _weight_under(head)
    holders: dict[int, set[int]] = {}
    for module in model.modules():
        for weight in module._parameters.values():
            holders.setdefault(id(weight), set()).add(id(module))

    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        weight = _weight_under(module)
        if module is head and not merged:
            raise InputError(
                f"{setting}: {name} is the output layer, whose weights are read where no adapter is: it would not be "
                f"trained; leave it out (`{ALL_LINEAR}` does)"
            )
        if weight is not None and ((weight is output and module is not head) or len(holders[id(weight)]) > 1):
            raise InputError(
                f"{setting}: {name} shares its weights with another layer (tied embeddings): its merge would change "
                "that layer too, and the published model would not be the trained one; leave it out"
            )


def _weight_under(module: Any) -> Tensor | None:
    """The weights of a layer, or of the one that an adapter lies on."""
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if inner is None:
            break
        module = inner
    found: Tensor | None = getattr(module, "weight", None)
    return found


def check_reached(adapted: PeftModel, hidden: Tensor, one_of_many: bool = False, setting: str = SETTING) -> None:
    """Raise if a loss on the hidden states gives no gradient to an adapter.

    Args:
        adapted: the model with its adapter.
        hidden: last hidden states that it made of any tokens; on the `meta` device nothing is computed.
        one_of_many: of experts, of which few read the tokens, one with a gradient speaks for the others of its layer.
        setting: what a message begins with.

    Raises:
        InputError: an adapter is not reached, with its name.
    """
    hidden.float().sum().backward()
    trained = {name: weight.grad is not None for name, weight in adapted.named_parameters() if weight.requires_grad}
    adapted.zero_grad(set_to_none=True)
    reached = {_expert(name) for name, has_gradient in trained.items() if has_gradient} if one_of_many else set()
    missed = [name for name, has_gradient in trained.items() if not has_gradient and _expert(name) not in reached]

    modules = list(dict.fromkeys(name.partition(".lora_")[0].removeprefix("base_model.model.") for name in missed))
    if modules:
        more = f" and {len(modules) - SHOWN} more" if len(modules) > SHOWN else ""
        raise InputError(
            f"{setting}: no gradient reaches {', '.join(modules[:SHOWN])}{more}, which would not be trained; "
            f"name modules that text passes through; {_could_be(adapted.get_base_model(), modules)}"
        )


def check_wraps(adapted: PeftModel, read: Callable[[], object]) -> None:
    """Raise if a layer under an adapter gives something else than one tensor, to which the adapter could add.

    Some routers of experts are linear layers by their class, and return several tensors.

    Args:
        adapted: a model with its adapter, which could not be read.
        read: reads it; done here without the adapter.

    Raises:
        InputError: with the layers' names.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    others: list[str] = []
    hooks = []
    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer):
            noted = partial(_note_output, others, name)
            hooks.append(module.get_base_layer().register_forward_hook(noted))
    # Where even that fails, as without the kernels of a GPU, what came before is known.
    with suppress(Exception), torch.no_grad(), adapted.disable_adapter():
        read()
    for hook in hooks:
        hook.remove()

    if others:
        more = f" and {len(others) - SHOWN} more" if len(others) > SHOWN else ""
        ends = {name.rpartition(".")[2] for name in others}
        raise InputError(
            f"{SETTING}: {', '.join(others[:SHOWN])}{more} cannot be adapted: the output is not one tensor; "
            f"{_could_be(adapted.get_base_model(), others, ends)}"
        )


def _note_output(others: list[str], name: str, module: object, given: object, output: object) -> None:
    from torch import Tensor

    if not isinstance(output, Tensor):
        others.append(name)


def _expert(name: str) -> str:
    """The name of a parameter without the number of its expert: all numbers but the first, which is the layer's."""
    first, number, rest = re.split(r"(\.\d+\.)", name, maxsplit=1) if re.search(r"\.\d+\.", name) else (name, "", "")
    return first + number + re.sub(r"\.?\d+\.", ".", rest)
