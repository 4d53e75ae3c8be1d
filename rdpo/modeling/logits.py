"""What an architecture does with its output layer's product before it calls it logits: a factor, a cap.

    logits = cap * tanh(factor * product / cap), or factor * product where there is no cap

Configurations name both in many ways, and one name means a factor in one architecture and a divisor in another. So the
model is asked: its own forward runs with a known product in place of its layers. No weights are needed for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

SMALL, LARGE = 2.0**-10, 2.0**20
TRIED = (-LARGE, -100.0, -8.0, -1.0, -SMALL, 0.0, SMALL, 1.0, 8.0, 100.0, LARGE)
EXACT, ROUNDED = 1e-4, 1e-6


class LogitTransform(NamedTuple):
    """A factor of the output layer's product, and the cap on what comes of it, if there is one."""

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, product: Tensor) -> Tensor:
        """Logits of the output layer's product, elementwise."""
        scaled = self.scale * product
        return self.softcap * torch.tanh(scaled / self.softcap) if self.softcap else scaled


def logit_transform(model: PreTrainedModel) -> LogitTransform:
    """The transform of a causal language model, whose weights may be anywhere: partitioned, or on no device.

    Where its forward cannot be asked, what its configuration says; `rdpo.modeling.probe` tells whether that is true.
    """
    products = torch.tensor(TRIED, device="cpu")
    asked = _asked(model, products)
    found = _fitted(products, asked.logits) if asked else None
    if not asked or not found:
        return _configured(model.config.get_text_config())

    # A factor of the hidden states is one of the product, unless the output layer adds something to it.
    return found._replace(scale=found.scale * asked.hidden_scale)


class _Asked(NamedTuple):
    """What a forward made of its output layer's product, and before that of hidden states that are all 1."""

    logits: Tensor
    hidden_scale: float


def _fitted(products: Tensor, logits: Tensor) -> LogitTransform | None:
    """The transform that gives these logits; None if none does."""
    if logits.shape != products.shape or not torch.isfinite(logits).all():
        return None

    scale = float(logits[TRIED.index(SMALL)]) / SMALL
    # A tanh near 0 rounds; a factor of 1 would be none.
    scale = 1.0 if abs(scale - 1.0) < ROUNDED else scale
    most = float(logits[-1])
    found = LogitTransform(scale, most if most < scale * LARGE / 2 else None)

    exact = scale > 0 and torch.allclose(found(products), logits, atol=EXACT, rtol=EXACT)
    return found if exact else None


def _configured(config: PretrainedConfig) -> LogitTransform:
    """What the best-known names of a configuration say (Cohere multiplies, Granite divides, Gemma 2 caps)."""
    cap = getattr(config, "final_logit_softcapping", None)
    if divisor := getattr(config, "logits_scaling", None):
        return LogitTransform(1.0 / float(divisor), cap)
    return LogitTransform(float(getattr(config, "logit_scale", None) or 1.0), cap)


def _asked(model: PreTrainedModel, products: Tensor) -> _Asked | None:
    """What the model's own forward makes of an output layer's product; None if it does not run like that."""
    output = model.get_output_embeddings()
    # By identity: tied to the embedding or not, it is found under the name that its forward calls it by.
    names = [name for name, module in model.named_modules() if module is output]
    base = getattr(model, "base_model_prefix", "")
    if not names or base not in model._modules:
        return None

    head = _Output(output, products)
    try:
        with _in_place_of(model, {base: _Layers(model._modules[base]), names[0]: head}), torch.no_grad():
            found = model(input_ids=torch.zeros(1, 1, dtype=torch.long, device="cpu"), use_cache=False)
        return _Asked(found.logits.reshape(-1).float(), float(head.hidden))
    except Exception:
        # An architecture's forward may want anything of its layers.
        return None


@contextmanager
def _in_place_of(model: nn.Module, stand_ins: dict[str, nn.Module]) -> Iterator[None]:
    """Within this context some modules of a model, by name, are others."""
    places = {name: (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in stand_ins}
    kept = {name: parent._modules[own] for name, (parent, own) in places.items()}
    try:
        for name, (parent, own) in places.items():
            parent._modules[own] = stand_ins[name]
        yield
    finally:
        for name, (parent, own) in places.items():
            parent._modules[own] = kept[name]


class _StandIn(nn.Module):
    """In place of a module, whose attributes it has beside its own."""

    def __init__(self, original: nn.Module):
        super().__init__()
        # Not as a submodule: the original would be found in the model twice.
        self.__dict__["original"] = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["original"], name)


class _Layers(_StandIn):
    """In place of all layers below the output layer: one hidden state, which is 1."""

    def forward(self, *_: Any, **__: Any) -> Any:
        """What architectures read of their layers' output; whatever else they ask for is None."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        class Output(BaseModelOutputWithPast):  # type: ignore[misc]
            def __getattr__(self, name: str) -> None:
                if name.startswith("__"):
                    raise AttributeError(name)

        return Output(last_hidden_state=torch.ones(1, 1, 1, device="cpu"))


class _Output(_StandIn):
    """In place of the output layer: a known product."""

    def __init__(self, original: nn.Module, products: Tensor):
        super().__init__(original)
        self.__dict__["products"] = products
        # Some forwards ask it for a precision or a device.
        self.__dict__["weight"] = torch.zeros(1, 1, device="cpu")
        self.__dict__["hidden"] = None

    def forward(self, hidden: Tensor) -> Tensor:
        """The product, whatever the hidden states, which are kept."""
        self.__dict__["hidden"] = hidden
        product: Tensor = self.products.reshape(1, 1, -1).clone()
        return product
