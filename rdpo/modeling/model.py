"""The policy: a causal language model whose forward gives completion log-probs, never all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rdpo.config import Layout, Lora, TokenWeights
from rdpo.errors import InputError
from rdpo.modeling import attention
from rdpo.modeling.adapters import with_adapter
from rdpo.modeling.layout import Batch, PackedRow, Tokens, packed_batch, padded_batch
from rdpo.modeling.loading import check_loaded
from rdpo.modeling.logits import logit_transform
from rdpo.modeling.logprobs import CompletionHead, sum_by_sequence
from rdpo.modeling.reading import read_packed, read_padded
from rdpo.modeling.start_adapter import put_on
from rdpo.modeling.tiling import tile_mlps
from rdpo.modeling.token_weights import pair_weights
from rdpo.records import SIDES

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel


@dataclass(frozen=True)
class ForwardSettings:
    """How a model's weights are held and read."""

    dtype: str
    """Precision, by torch's name for it."""
    chunk: int
    """Completion tokens whose logits are made at once."""
    layout: Layout = "auto"
    quantization: str = "none"
    """`nf4`: weights in four bits, computed with in `dtype`."""
    trust_remote_code: bool = False
    weights: TokenWeights | None = None
    """What tokens weigh, see `rdpo.modeling.token_weights`."""


@dataclass(frozen=True)
class Tuning:
    """What is added to a model so that it can be trained; nothing by default."""

    lora: Lora | None = None
    """A fresh adapter, over weights that are frozen; without one, all weights are trained."""
    adapter: Path | None = None
    """Folder of an adapter that lies on them already, and is trained further, or read."""
    dropout: float = 0.0
    """On the input of that adapter."""
    gradient_checkpointing: bool = False
    mlp_tile: int | None = None
    """Tokens that an MLP reads at a time, see `rdpo.modeling.tiling`."""
    seed: int = 0
    """Of the adapter's first weights."""


class Policy(nn.Module):
    """A causal language model, with or without a LoRA adapter, as a function from batches to log-probs.

    `packed` says in which layout it reads: every prompt once, without padding, or padded rows. `weights`: what the
    tokens of pairs weigh, once the model has been compared with its own logits. `measures_likeness`: a forward gives
    beside log-probs how like the policy's own answers each answer is (WPO, see `rdpo.training.losses.policy_weight`).
    `stash`: the context in which the layers run, where what they keep for the backward pass may be put elsewhere.
    """

    weights: TokenWeights | None = None
    measures_likeness = False
    stash: Callable[[], AbstractContextManager[object]] = nullcontext

    def __init__(self, model: PreTrainedModel | PeftModel, chunk: int, packed: bool):
        super().__init__()
        self.model = model
        self.padded_attention = self.causal.config._attn_implementation
        self.read_as(packed)
        transform = logit_transform(self.causal)
        self.head = CompletionHead(self.causal.get_output_embeddings(), chunk, *transform)

    @property
    def causal(self) -> PreTrainedModel:
        """The language model itself, an adapter's layers within it."""
        return self.model.get_base_model() if hasattr(self.model, "get_base_model") else self.model

    @property
    def config(self) -> PretrainedConfig:
        """The language model's configuration."""
        return self.causal.config.get_text_config()

    @property
    def dtype(self) -> torch.dtype:
        """Precision that the model computes in."""
        dtype: torch.dtype = self.causal.dtype
        return dtype

    @property
    def adapted(self) -> bool:
        """Whether an adapter is trained over frozen weights."""
        return hasattr(self.model, "peft_config")

    def read_as(self, packed: bool) -> None:
        """Read in this layout from now on."""
        self.packed = packed
        if packed:
            read_packed(self.causal)
        else:
            read_padded(self.causal, self.padded_attention)

    def layers(self) -> list[nn.Module]:
        """The decoder layers."""
        types = tuple(self.layer_types())
        return [module for module in self.modules() if isinstance(module, types)]

    def layer_types(self) -> list[type]:
        """Classes of the architecture's decoder layers."""
        names = set(self.causal._no_split_modules or ())
        return list({type(module) for module in self.modules() if type(module).__name__ in names})

    def compile_layers(self, backend: str = "inductor") -> None:
        """Let torch compile decoder layers and head at their first forward, for all lengths at once.

        Packed attention stays as it is. `backend` is the compiler's, by its name in torch.
        """
        self.head.compile_chunks(backend)
        for layer in self.layers():
            layer.compile(dynamic=True, backend=backend)

    def batch(
        self, prompts: Sequence[Tokens], *answers: Sequence[Tokens], others: Sequence[Sequence[Tokens]] = ()
    ) -> Batch:
        """P prompts with K answers each, and perhaps `others` of each, in the layout that the policy reads."""
        made = (packed_batch if self.packed else padded_batch)(prompts, answers, others)
        # A lone answer, as those that KL is measured on, has nothing to be compared with.
        if self.weights is None or len(answers) != len(SIDES):
            return made
        found = [pair_weights(chosen, rejected, self.weights) for chosen, rejected in zip(*answers, strict=True)]
        return replace(made, weights=torch.tensor([*chain.from_iterable(chain(*zip(*found, strict=True)))]))

    def forward(self, batch: Batch) -> Tensor:
        """Summed completion log-probs (S,) in fp32; (2, S) where likeness is measured, which stands below them."""
        if self.measures_likeness:
            return self._logps_and_likeness(batch)
        logps = self.token_logps(batch)
        weighted = logps if batch.weights is None else logps * batch.weights
        return sum_by_sequence(weighted, batch.sequence, len(batch.lengths))

    def _logps_and_likeness(self, batch: Batch) -> Tensor:
        """Summed log-probs and, without a gradient, mean_t(log pi_t - log sum_v pi_v^2) of each sequence, (2, S)."""
        logps, log_squares = self.head(self._predicting_states(batch), batch.labels, squares=True)
        count = len(batch.lengths)
        likeness = sum_by_sequence(logps.detach() - log_squares, batch.sequence, count) / batch.lengths
        return torch.stack([sum_by_sequence(logps, batch.sequence, count), likeness])

    def token_logps(self, batch: Batch) -> Tensor:
        """Log-probs (C,) in fp32 of every completion token."""
        logps: Tensor = self.head(self._predicting_states(batch), batch.labels)
        return logps

    def _predicting_states(self, batch: Batch) -> Tensor:
        """Hidden states (C, H) that predict the completion tokens."""
        hidden = self.hidden_states(batch)
        return hidden.reshape(-1, hidden.shape[-1])[batch.predict_at]

    def hidden_states(self, batch: Batch) -> Tensor:
        """Last hidden states (rows, T, H) of a batch's tokens."""
        if batch.spans:
            layout: dict[str, Any] = {"position_ids": batch.position_ids, "row": PackedRow(batch.spans)}
        else:
            layout = {"attention_mask": batch.attention_mask}
        # Not of the whole model, whose head would make the logits of every position.
        with self.stash():
            output = self.causal.base_model(input_ids=batch.input_ids, use_cache=False, **layout)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Within this context a LoRA policy is its own reference: the adapter is switched off."""
        with self.model.disable_adapter():
            yield


def load_policy(folder: str | Path, settings: ForwardSettings, tuning: Tuning | None = None) -> Policy:
    """Load a policy; a fresh adapter leaves it equal to the base model.

    Raises:
        InputError: the weights are not those of the architecture, the layout is "packed" and the architecture cannot
            read it, the adapter's targets cannot be trained, or `quantization` is asked for and bitsandbytes is not
            installed.
    """
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, settings.dtype),
        use_safetensors=True,
        trust_remote_code=settings.trust_remote_code,
        quantization_config=_four_bits(settings.dtype) if settings.quantization == "nf4" else None,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    check_loaded(f"model {folder}", model, info)
    return as_policy(model, settings, tuning)


def as_policy(model: PreTrainedModel, settings: ForwardSettings, tuning: Tuning | None = None) -> Policy:
    """A causal language model of transformers as a policy, see `load_policy`."""
    packed = _packs(model, settings.layout)
    tuning = tuning or Tuning()
    if tuning.gradient_checkpointing:
        # The reentrant kind passes no gradient on through inputs that need none, as those of frozen layers.
        model.gradient_checkpointing_enable({"use_reentrant": False})
    adapted: PreTrainedModel | PeftModel = model
    if tuning.adapter:
        adapted = put_on(model, tuning.adapter, tuning.dropout)
    elif tuning.lora:
        adapted = with_adapter(model, tuning.lora, tuning.seed)
    policy = Policy(adapted, settings.chunk, packed)
    if tuning.mlp_tile:
        tile_mlps(policy.layers(), tuning.mlp_tile)
    return policy


def _four_bits(dtype: str) -> Any:
    """NF4 with doubly quantised scales, as in QLoRA (arXiv 2305.14314)."""
    from importlib.util import find_spec

    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise InputError('student.quantization: nf4 needs bitsandbytes; pip install "rdpo[qlora]"')
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, dtype),
    )


def _packs(model: PreTrainedModel, layout: Layout) -> bool:
    """Whether a model reads packed rows, by what the job asks for and by what is known of the architecture."""
    possible = attention.can_pack(model)
    if layout == "packed" and not possible:
        dropout = attention.dropout_of(model.config.get_text_config())
        why = f", whose {dropout} needs padded ones" if dropout else ""
        raise InputError(f"training.layout: {type(model).__name__} cannot read packed rows{why}; use auto or padded")
    return possible and layout != "padded"
