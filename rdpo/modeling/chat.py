"""Chat template to token ids, once and in one place, for teacher and student alike.

The promises: one BOS; the prompt's ids are a prefix of prompt and completion; a completion ends
with the end-of-turn token only if it was generated (a cut-off answer stays cut off); no completion
is empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rdpo.errors import InputError
from rdpo.records import Messages

if TYPE_CHECKING:
    from rdpo.modeling.weights import ModelRef

PROBE = "x"


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the token that ends an assistant's turn."""

    tokenizer: Any
    end_id: int
    stop_ids: tuple[int, ...]

    def prompt_ids(self, messages: Messages, prefill: str = "") -> list[int]:
        """Token ids of a conversation up to where the assistant begins (`prefill`: its first words).

        Raises:
            ValueError: the template refuses the conversation.
        """
        ids = _render(self.tokenizer, messages)
        return ids + self.text_ids(prefill) if prefill else ids

    def completion_ids(self, answer: str, finished: bool) -> list[int]:
        """Token ids of an answer; with the end-of-turn token only where the model wrote it itself."""
        ids = self.text_ids(answer)
        return [*ids, self.end_id] if finished and ids else ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens; text that looks like one stays text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids


def _render(tokenizer: Any, messages: Messages, asks: bool = True) -> list[int]:
    """Token ids of a conversation, `asks`: up to where the assistant begins; transformers renders in a sandbox."""
    try:
        rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=asks, tokenize=True, return_dict=True)
    except Exception as error:
        raise ValueError(str(error)) from None
    ids = list(rendered["input_ids"])
    bos = tokenizer.bos_token_id
    while bos is not None and ids[:2] == [bos, bos]:
        ids.pop(0)
    return ids


def end_of_turn(tokenizer: Any, stop_ids: tuple[int, ...]) -> int:
    """The token that ends an assistant's turn: the first one the template writes after the content.

    Falls back to the tokenizer's EOS where the template writes none that stops generation.
    """
    user = [{"role": "user", "content": PROBE}]
    prompt = _render(tokenizer, user)
    rest = _render(tokenizer, [*user, {"role": "assistant", "content": PROBE}], asks=False)[len(prompt) :]
    return next((token for token in rest if token in stop_ids), tokenizer.eos_token_id)


def make_chat(tokenizer: Any, stop_ids: list[int], name: str) -> Chat:
    """Check a tokenizer and find its end of turn.

    Raises:
        InputError: it has no chat template that works, or no EOS token.
    """
    if not tokenizer.chat_template:
        raise InputError(f"model {name}: the tokenizer has no chat template; use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {name}: the tokenizer has no EOS token, so no answer could end; set one")
    stops = tuple(dict.fromkeys([tokenizer.eos_token_id, *stop_ids]))
    try:
        return Chat(tokenizer, end_of_turn(tokenizer, stops), stops)
    except ValueError as error:
        raise InputError(f"model {name}: its chat template fails: {str(error)[:200]}") from None


@lru_cache(maxsize=8)
def load_chat(model: ModelRef) -> Chat:
    """The chat of a model; loaded once in a process.

    Raises:
        InputError: there is none that works, or the model's settings of generation cannot be read.
    """
    from transformers import GenerationConfig

    folder, tokenizer = model.folder(), model.tokenizer()
    has_generation = (folder / "generation_config.json").is_file()
    try:
        stops = GenerationConfig.from_pretrained(folder).eos_token_id if has_generation else None
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"model {model.name}: its generation_config.json cannot be read: {reason}") from None
    stop_ids = [stops] if isinstance(stops, int) else list(stops or [])
    return make_chat(tokenizer, stop_ids, model.name)
