"""Chat template to token ids, once and in one place, for teacher and student alike.

The promises: one BOS; the prompt's ids are a prefix of prompt and completion; both together are the beginning of what
the template writes of the whole conversation, in text always, and in ids where no token reaches across the answer's
beginning; a completion ends with the end of the turn only if it was generated (a cut-off answer stays cut off); no
completion is empty.

What a template writes between the place where it asks and the answer (Qwen3's empty think block, the channel of
gpt-oss) belongs to the prompt: it is the same for every answer, so no answer is to be preferred for it, and an engine
that continues from there writes what is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from rdpo.config import TEMPLATE_DATE
from rdpo.errors import InputError
from rdpo.modeling.template import Opening, Template, Unfit, reads_date
from rdpo.records import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rdpo.modeling.weights import ModelRef


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the tokens that end an assistant's turn.

    `stop_ids` end generation, `end_id` is the one of them that the template writes. `ending` are the tokens that it
    writes behind an answer, up to that one; none where it writes none of them. `opening` is what it writes before an
    answer beyond where it asks for one.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    end_id: int
    stop_ids: tuple[int, ...]
    ending: tuple[int, ...] = ()
    opening: str = ""

    def prompt_ids(self, messages: Messages, prefill: str = "") -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins (`prefill`: its first words).

        Raises:
            ValueError: the template refuses the conversation, or leaves out a part of it.
        """
        opening = self.template.opening(messages)
        ids = self._ids(opening.text)
        return ids + self.text_ids(opening.blanks + prefill) if prefill else ids

    def asking_ids(self, messages: Messages) -> list[int]:
        """Token ids of a conversation up to where the template asks: before the thoughts of a model that thinks.

        Raises:
            ValueError: the template refuses the conversation, or leaves out a part of it.
        """
        return self._ids(self.template.asking(messages))

    def pair_ids(self, messages: Messages, answers: dict[str, tuple[str, bool]]) -> dict[str, list[int]]:
        """Token ids of a conversation, as `prompt`, and of several answers by name; with each, whether it is finished.

        Raises:
            ValueError: the template refuses the conversation, or writes it or an answer in another way than it is.
        """
        opening = self.template.opening(messages)
        prompt = self._ids(opening.text)
        completions = {name: self._answer_ids(opening, prompt, *answer) for name, answer in answers.items()}
        return {"prompt": prompt, **completions}

    def completion_ids(self, answer: str, finished: bool) -> list[int]:
        """Token ids of an answer; with the end of the turn only where the model wrote it itself."""
        ids = self.text_ids(answer)
        return [*ids, *self.ending] if finished and ids else ids

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens; text that looks like one stays text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _answer_ids(self, opening: Opening, prompt: list[int], answer: str, finished: bool) -> list[int]:
        """Token ids of an answer, after a look at the whole conversation.

        Raises:
            ValueError: it does not stand there like this.
        """
        if not answer:
            return []

        whole = self._ids(self.template.answered(opening, answer))
        alone = self.completion_ids(opening.blanks + answer, finished)
        if whole[: len(prompt) + len(alone)] == prompt + alone:
            return alone

        # The usual case is done; what follows are tokenizers for which text alone and text in place differ.
        # Tokenizers that put a blank before every text do so before an answer that stands alone, too.
        joined = self._ids(opening.text + opening.blanks + answer)
        within = [*joined[len(prompt) :], *(self.ending if finished else ())]
        if whole[: len(prompt) + len(within)] == prompt + within and not self._has_special(joined[len(prompt) :]):
            return within

        # A line break that begins the answer makes one token with the one before it, and an answer may hold text that
        # looks like a special token: the text is the template's, and the ids are those that a model would write.
        if self._decoded(whole).startswith(self._decoded(prompt + alone)):
            return alone
        raise ValueError("the tokenizer does not give back the answer as it stands in the conversation")

    def _has_special(self, ids: list[int]) -> bool:
        return not set(ids).isdisjoint(self.tokenizer.all_special_ids)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def _ids(self, text: str) -> list[int]:
        """Token ids of what the template wrote; a BOS that it and the tokenizer both put there stands once."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        bos = self.tokenizer.bos_token_id
        while bos is not None and ids[:2] == [bos, bos]:
            ids.pop(0)
        return ids


def make_chat(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    name: str,
    day: date = TEMPLATE_DATE,
    only_asks: bool = False,
) -> Chat:
    """Check a tokenizer and its chat template, and find the end of a turn.

    Args:
        tokenizer: the model's.
        stop_ids: the tokens that end generation, beside its EOS token.
        name: of the model, for messages.
        day: today, for templates that ask.
        only_asks: answers are read and never trained on, so that they may begin with thoughts.

    Raises:
        InputError: it has no chat template that works, none that writes answers where a model is asked for them, or no
            EOS token.
    """
    if not tokenizer.chat_template:
        raise InputError(f"model {name}: the tokenizer has no chat template; use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {name}: the tokenizer has no EOS token, so no answer could end; set one")

    stops = tuple(dict.fromkeys([tokenizer.eos_token_id, *stop_ids]))
    template = Template(tokenizer, day)
    try:
        if only_asks:
            template.asking([{"role": "user", "content": "x"}])
            return Chat(tokenizer, template, tokenizer.eos_token_id, stops)
        opening = template.fit_opening()
        ending = _ending(tokenizer, template, stops)
    except Unfit as error:
        raise InputError(
            f"model {name}: its chat template does not fit: {error}. rdpo trains on answers without thoughts, where "
            "the template itself puts them: use another model, or save its tokenizer with a template that writes both "
            "alike"
        ) from None
    except ValueError as error:
        raise InputError(
            f"model {name}: its chat template fails on a conversation of plain text: {str(error)[:200]}; use another "
            "model, or save its tokenizer with a template for text"
        ) from None
    return Chat(tokenizer, template, ending[-1] if ending else tokenizer.eos_token_id, stops, ending, opening)


def _ending(tokenizer: PreTrainedTokenizerBase, template: Template, stops: tuple[int, ...]) -> tuple[int, ...]:
    """What the template writes behind an answer up to the first token that stops generation; nothing if none does."""
    behind = list(tokenizer(template.ending(), add_special_tokens=False)["input_ids"])
    place = next((place for place, token in enumerate(behind) if token in stops), None)
    return () if place is None else tuple(behind[: place + 1])


@lru_cache(maxsize=8)
def load_chat(model: ModelRef, day: date = TEMPLATE_DATE, only_asks: bool = False) -> Chat:
    """The chat of a model, see `make_chat`; loaded once in a process.

    Raises:
        InputError: there is none that works, or the model's settings of generation cannot be read.
    """
    from transformers import GenerationConfig

    folder, tokenizer = model.folder(weights=False), model.tokenizer()
    has_generation = (folder / "generation_config.json").is_file()
    try:
        stops = GenerationConfig.from_pretrained(folder).eos_token_id if has_generation else None
    except (OSError, ValueError, TypeError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise InputError(f"model {model.name}: its generation_config.json cannot be read: {reason}") from None
    stop_ids = [stops] if isinstance(stops, int) else list(stops or [])
    return make_chat(tokenizer, stop_ids, model.name, day, only_asks)


def rendering_settings(model: ModelRef, day: date, only_asks: bool = False) -> dict[str, Any]:
    """What a stage that renders with a model depends on beside the model's files; nothing for most templates.

    Raises:
        InputError: the model cannot be had, or its chat template does not fit.
    """
    chat = load_chat(model, day, only_asks)
    found: dict[str, Any] = {}
    if reads_date(chat.tokenizer):
        found["date"] = day.isoformat()
    if chat.opening:
        found["opening"] = chat.opening
    if not only_asks and chat.ending != (chat.end_id,):
        found["ending"] = list(chat.ending)
    return {"rendering": found} if found else {}
