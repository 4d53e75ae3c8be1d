"""Chat template to token ids, once and in one place, for teacher and student alike.

The promises: one BOS; the prompt's ids are a prefix of prompt and completion; both together are the beginning of what
the template writes of the whole conversation, in text always, and in ids where no token reaches across the answer's
beginning; a completion ends with the end of the turn only if it was generated (a cut-off answer stays cut off); no
completion is empty.

What a template writes between the place where it asks and the answer (Qwen3's empty think block, the channel of
gpt-oss) belongs to the prompt: it is the same for every answer, so no answer is to be preferred for it, and an engine
that continues from there writes what is trained on. Of a model that is trained to think (`reasoning`), the prompt ends
where the template asks, and a completion is its reasoning with the answer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import date
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from rdpo.config import TEMPLATE_DATE
from rdpo.errors import InputError
from rdpo.modeling.masking import masked
from rdpo.modeling.messages import answer_ids, specials
from rdpo.modeling.reasoning import ReasoningForm, reasoning_template, thinks
from rdpo.modeling.template import Opening, Template, Unfit, check_arguments, reads_date, template_ids
from rdpo.modeling.weights import ModelRef
from rdpo.records import Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rdpo.config import Job


Thinking = Literal["off", "keep", "mask", "free"]
"""Whether answers begin with reasoning, and whether its tokens count; `free`: answers are read and never trained on, so
that a model that thinks may do so."""


class Answer(NamedTuple):
    """An answer, whether the model ended it by itself, the reasoning before it (for a chat that has any), its tokens as
    a model with the same vocabulary drew them, and its messages where they are more than a text (`modeling.messages`).
    """

    text: str
    finished: bool
    reasoning: str = ""
    drawn: tuple[int, ...] = ()
    messages: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Chat:
    """A tokenizer with its chat template and the tokens that end an assistant's turn.

    `stop_ids` end generation, `end_id` is the one of them that the template writes. `ending` are the tokens that it
    writes behind an answer, up to that one; none where it writes none of them. `opening` is what it writes before an
    answer beyond where it asks for one. `reasoning`: how answers begin with reasoning; None: without any. `masks`: its
    tokens are read and not counted (see `rdpo.modeling.masking`). `free`: nothing is trained on, so that prompts end
    where the template asks in any case.
    """

    tokenizer: PreTrainedTokenizerBase
    template: Template
    end_id: int
    stop_ids: tuple[int, ...]
    ending: tuple[int, ...] = ()
    opening: str = ""
    reasoning: ReasoningForm | None = None
    masks: bool = False
    free: bool = False

    def prompt_ids(self, messages: Messages, prefill: str = "") -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins (`prefill`: its first words).

        With reasoning, that is where the template asks, and the prefill is the reasoning's.

        Raises:
            ValueError: the template refuses the conversation, or leaves out a part of it.
        """
        opening = self._opening(messages)
        ids = self.written_ids(opening.text)
        return ids + self.text_ids(opening.blanks + prefill) if prefill else ids

    def pair_ids(self, messages: Messages, answers: Mapping[str, Answer]) -> dict[str, list[int]]:
        """Token ids of a conversation, as `prompt`, and of several answers by name.

        Raises:
            ValueError: the template refuses the conversation, or writes it or an answer in another way than it is.
        """
        opening = self._opening(messages)
        prompt = self.written_ids(opening.text)
        return {"prompt": prompt, **{name: self._completion(opening, prompt, one) for name, one in answers.items()}}

    def _completion(self, opening: Opening, prompt: list[int], answer: Answer) -> list[int]:
        """Token ids of one answer behind its prompt."""
        if answer.messages:
            return answer_ids(self, opening, prompt, list(answer.messages))
        ids = (self._reasoned_ids if self.reasoning else self._answer_ids)(opening, prompt, answer)
        return self._as_drawn(prompt, ids, answer)

    def completion_ids(self, answer: str, finished: bool, reasoning: str = "") -> list[int]:
        """Token ids of an answer; with the end of the turn only where the model wrote it itself."""
        ids = self.text_ids(answer)
        thought = self.reasoning_ids(reasoning) if ids and reasoning else []
        thought = masked(thought) if self.masks else thought
        return [*thought, *ids, *self.ending] if finished and ids else [*thought, *ids]

    def reasoning_ids(self, reasoning: str) -> list[int]:
        """Token ids of reasoning, with the marks around it that the template writes behind the place where it asks."""
        form = self.reasoning
        if form is None:
            raise TypeError("this chat has no reasoning")
        # The marks are tokens of their own. The blanks before the second one are not: with a full stop they make one.
        mark = form.behind.lstrip()
        blanks = form.behind[: len(form.behind) - len(mark)]
        return [*self.written_ids(form.before), *self.text_ids(reasoning + blanks), *self.written_ids(mark)]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of plain text, without special tokens; text that looks like one stays text."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return ids

    def _opening(self, messages: Messages) -> Opening:
        """What the template writes before the answer, or before the reasoning."""
        if self.reasoning or self.free:
            return Opening(messages, self.template.asking(messages), "")
        return self.template.opening(messages)

    def _reasoned_ids(self, opening: Opening, prompt: list[int], given: Answer) -> list[int]:
        """Token ids of reasoning and answer, after a look at the whole conversation.

        Raises:
            ValueError: they do not stand there like this.
        """
        answer, finished, reasoning = given.text, given.finished, given.reasoning
        if not answer:
            return []
        if not reasoning:
            raise ValueError("there is no reasoning before the answer")

        whole = self.written_ids(self._reasoned(opening, answer, reasoning))
        thought, text = self.reasoning_ids(reasoning), self.text_ids(answer)
        ids = [*thought, *text, *(self.ending if finished else ())]
        if whole[: len(prompt) + len(ids)] != prompt + ids and not self.decoded(whole).startswith(
            self.decoded(prompt + ids)
        ):
            raise ValueError("the tokenizer does not give back reasoning and answer as they stand in the conversation")
        return [*(masked(thought) if self.masks else thought), *ids[len(thought) :]]

    def _reasoned(self, opening: Opening, answer: str, reasoning: str) -> str:
        """What the template writes of a conversation with reasoning and answer.

        Raises:
            ValueError: it writes them in another way than they stand there.
        """
        form = self.reasoning
        assert form is not None  # Only chats with reasoning come here.
        text = opening.text + form.before + reasoning + form.behind + answer
        whole = self.template.text([*opening.messages, form.message(reasoning, answer)])
        if form.written and whole.startswith(text):
            return whole
        # A template that leaves the reasoning out writes all else, and no mark of it.
        bare = opening.text.removesuffix(form.opened) + answer
        if not form.written and whole.startswith(bare):
            return text + whole[len(bare) :]
        raise ValueError("the chat template leaves out or changes a part of the reasoning or the answer")

    def _answer_ids(self, opening: Opening, prompt: list[int], given: Answer) -> list[int]:
        """Token ids of an answer, after a look at the whole conversation.

        Raises:
            ValueError: it does not stand there like this.
        """
        answer, finished = given.text, given.finished
        if not answer:
            return []

        whole = self.written_ids(self.template.answered(opening, answer))
        alone = self.completion_ids(opening.blanks + answer, finished)
        if whole[: len(prompt) + len(alone)] == prompt + alone:
            return alone

        # The usual case is done; what follows are tokenizers for which text alone and text in place differ.
        # Tokenizers that put a blank before every text do so before an answer that stands alone, too.
        joined = self.written_ids(opening.text + opening.blanks + answer)
        within = [*joined[len(prompt) :], *(self.ending if finished else ())]
        plain = specials(self.tokenizer).keys().isdisjoint(joined[len(prompt) :])
        if plain and whole[: len(prompt) + len(within)] == prompt + within:
            return within

        # A line break that begins the answer makes one token with the one before it, and an answer may hold text that
        # looks like a special token: the text is the template's, and the ids are those that a model would write.
        if self.decoded(whole).startswith(self.decoded(prompt + alone)):
            return alone
        raise ValueError("the tokenizer does not give back the answer as it stands in the conversation")

    def _as_drawn(self, prompt: list[int], ids: list[int], answer: Answer) -> list[int]:
        """The ids of an answer, or those that it was drawn as: a model need not write a text as a tokenizer would.

        They are taken where they are the same text: blanks around an answer, for example, are not trained on.
        """
        ending = self.ending if answer.finished else ()
        text, drawn = ids[: len(ids) - len(ending)], list(answer.drawn)
        if not (ids and drawn) or self.decoded(prompt + drawn) != self.decoded(prompt + text):
            return ids
        return [*drawn, *ending]

    def decoded(self, ids: list[int]) -> str:
        """The text of token ids, special tokens with it."""
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def written_ids(self, text: str) -> list[int]:
        """Token ids of what the template wrote."""
        return template_ids(self.tokenizer, text)


def make_chat(
    tokenizer: PreTrainedTokenizerBase,
    stop_ids: list[int],
    name: str,
    day: date = TEMPLATE_DATE,
    arguments: Mapping[str, Any] | None = None,
    thinking: Thinking = "off",
) -> Chat:
    """Check a tokenizer and its chat template, and find the end of a turn.

    Args:
        tokenizer: the model's.
        stop_ids: the tokens that end generation, beside its EOS token.
        name: of the model, for messages.
        day: today, for templates that ask.
        arguments: further ones of the template's, such as `enable_thinking`.
        thinking: whether answers begin with reasoning, and whether that counts.

    Raises:
        InputError: it has no chat template that works, none that writes answers (and reasoning) where a model is asked
            for them, no such argument, or no EOS token.
    """
    if not tokenizer.chat_template:
        raise InputError(f"model {name}: the tokenizer has no chat template; use an instruction-tuned model")
    if tokenizer.eos_token_id is None:
        raise InputError(f"model {name}: the tokenizer has no EOS token, so no answer could end; set one")

    check_arguments(tokenizer, arguments or {}, f"model {name}: chat_template_kwargs")
    stops = tuple(dict.fromkeys([tokenizer.eos_token_id, *stop_ids]))
    template = Template(tokenizer, day, arguments or {})
    try:
        if thinking == "free":
            return _free_chat(template, stops)
        if thinking != "off":
            return _thinking_chat(template, stops, masks=thinking == "mask")
        opening = template.fit_opening()
        ending = _ending(tokenizer, template, stops)
    except Unfit as error:
        raise InputError(f"model {name}: its chat template does not fit: {error}. {_remedy(thinking)}") from None
    except ValueError as error:
        raise InputError(
            f"model {name}: its chat template fails on a conversation of plain text: {str(error)[:200]}; use another "
            "model, or save its tokenizer with a template for text"
        ) from None
    return Chat(tokenizer, template, ending[-1] if ending else tokenizer.eos_token_id, stops, ending, opening)


def _remedy(thinking: Thinking) -> str:
    """What helps where a template does not fit."""
    if thinking != "off":
        return 'Set synthesis.reasoning = "off", or save its tokenizer with a template that writes reasoning'
    return (
        "rdpo trains on answers without thoughts, where the template itself puts them: use another model, or save its "
        "tokenizer with a template that writes both alike; a model that thinks is trained with "
        'synthesis.reasoning = "keep"'
    )


def _thinking_chat(template: Template, stops: tuple[int, ...], masks: bool) -> Chat:
    """The chat of a model whose answers begin with reasoning.

    Raises:
        Unfit: its template has no place for that.
    """
    template, form = reasoning_template(template)
    ending = _ending(template.tokenizer, template, stops)
    end_id = ending[-1] if ending else template.tokenizer.eos_token_id
    return Chat(template.tokenizer, template, end_id, stops, ending, reasoning=form, masks=masks)


def _free_chat(template: Template, stops: tuple[int, ...]) -> Chat:
    """The chat of a model whose answers are only read; it thinks where its template has a place for that.

    Raises:
        ValueError: the template fails on plain text.
    """
    form = None
    if thinks(template):
        with suppress(Unfit):
            template, form = reasoning_template(template)
    template.asking([{"role": "user", "content": "x"}])
    end_id = template.tokenizer.eos_token_id
    return Chat(template.tokenizer, template, end_id, stops, reasoning=form, free=True)


def _ending(tokenizer: PreTrainedTokenizerBase, template: Template, stops: tuple[int, ...]) -> tuple[int, ...]:
    """What the template writes behind an answer up to the first token that stops generation; nothing if none does."""
    behind = list(tokenizer(template.ending(), add_special_tokens=False)["input_ids"])
    place = next((place for place, token in enumerate(behind) if token in stops), None)
    return () if place is None else tuple(behind[: place + 1])


@lru_cache(maxsize=8)
def load_chat(
    model: ModelRef,
    day: date = TEMPLATE_DATE,
    arguments: str = "{}",
    thinking: Thinking = "off",
) -> Chat:
    """The chat of a model, see `make_chat`, whose template gets `arguments` as JSON; loaded once in a process.

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
    return make_chat(tokenizer, stop_ids, model.name, day, json.loads(arguments), thinking)


def student_chat(job: Job) -> Chat:
    """The chat that the job's student is trained and evaluated with.

    Raises:
        InputError: there is none that works.
    """
    return chat_like_student(job, ModelRef.student(job))


def chat_like_student(job: Job, model: ModelRef) -> Chat:
    """The chat of a model that is read as the student is.

    Raises:
        InputError: there is none that works.
    """
    arguments, reasoning = json.dumps(job.student.chat_template_kwargs, sort_keys=True), job.synthesis.reasoning
    thinking: Thinking = "off" if reasoning == "strip" else reasoning
    return load_chat(model, job.date, arguments=arguments, thinking=thinking)


def teacher_chat(job: Job) -> Chat:
    """The chat that the job's teacher is asked with; where the student teaches itself, it has the student's arguments.

    Raises:
        InputError: there is none that works.
    """
    teacher = ModelRef.of(job, job.synthesis.teacher)
    arguments = json.dumps(teacher_arguments(job), sort_keys=True)
    # What is stripped is thought all the same.
    thinking: Thinking = "off" if job.synthesis.reasoning == "off" else "keep"
    return load_chat(teacher, job.date, arguments=arguments, thinking=thinking)


def teacher_arguments(job: Job) -> dict[str, Any]:
    """Further arguments of the teacher's chat template; unless given the student's, where that teaches itself."""
    given = job.synthesis.chat_template_kwargs
    return given if given or job.synthesis.teacher else job.student.chat_template_kwargs


def same_tokens(one: ModelRef, other: ModelRef) -> bool:
    """Whether two models have the same tokens under the same ids."""
    if one == other:
        return True
    first, second = (model.tokenizer().get_vocab() for model in (one, other))
    return bool(first == second)


def rendering_settings(chat: Chat) -> dict[str, Any]:
    """What a stage that renders with a chat depends on beside the model's files; nothing for most templates."""
    found: dict[str, Any] = {}
    if reads_date(chat.tokenizer):
        found["date"] = chat.template.day.isoformat()
    if chat.opening:
        found["opening"] = chat.opening
    if not chat.free and chat.ending != (chat.end_id,):
        found["ending"] = list(chat.ending)
    if chat.template.arguments:
        found["arguments"] = dict(chat.template.arguments)
    if chat.reasoning:
        found |= {"reasoning": asdict(chat.reasoning), "masks": chat.masks}
    return {"rendering": found} if found else {}
