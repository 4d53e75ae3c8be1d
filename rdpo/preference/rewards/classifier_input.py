"""A reward model with a classification head: what is known of it before it is loaded, and what it reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.config import TEMPLATE_DATE, ClassifierReward, EndpointReward
from rdpo.errors import InputError
from rdpo.messages import is_plain, template_form, tools_of
from rdpo.modeling.loading import architecture_outline, check_loaded, check_token_ids, outline, positions_of
from rdpo.modeling.model_files import CONFIG
from rdpo.modeling.template import check_arguments, check_written
from rdpo.modeling.weights import load_tokenizer, local_model, model_config
from rdpo.preference.rewards.outputs import Outputs, outputs_of
from rdpo.records import Messages, text_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

LABELS = ("num_labels", "id2label")
LIMITS = ("truncation", "max_length")
Encoded = dict[str, list[int]]


@dataclass(frozen=True)
class Conversations:
    """Conversations as a reward model reads them: its tokenizer, most tokens, and whether it sees the answer alone.

    They are rendered with the reward model's own chat template if it has one, else as the text pair (prompt, answer).
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    answer_only: bool
    day: date
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further ones of the chat template."""

    def input_ids(self, prompt: Messages, answer: str) -> Encoded:
        """What the model reads of one answer: the last tokens of a conversation that is too long.

        Raises:
            ValueError: the chat template refuses the conversation.
        """
        limit: dict[str, Any] = dict(zip(LIMITS, (True, self.max_length), strict=True))
        if self.answer_only:
            return dict(self.tokenizer(answer, **limit))
        if self.tokenizer.chat_template:
            messages = [*prompt, {"role": "assistant", "content": answer}]
            return _rendered(self.tokenizer, messages, self.day, {**self.arguments, **limit})
        return dict(self.tokenizer(text_of(prompt), answer, **limit))


def scores_last_token(model: type[PreTrainedModel]) -> bool:
    """Whether an architecture's head stands on the last token that is not padding, as decoders' do."""
    from transformers.modeling_layers import GenericForSequenceClassification

    return model.forward is GenericForSequenceClassification.forward


def last_token(ids: list[int], pad_id: int | None) -> int:
    """The place that such a model, alone, reads its score from: the last that is not its own pad token."""
    places = (place for place in reversed(range(len(ids))) if ids[place] != pad_id)
    return next(places, 0)


def read_alone(conversations: Conversations, pad_id: int | None, prompt: Messages, answer: str) -> list[int]:
    """What an engine is given, which reads its last token whatever it is: the ids up to where a decoder's head stands.

    Raises:
        ValueError: the chat template refuses the conversation.
    """
    ids = conversations.input_ids(prompt, answer)["input_ids"]
    return ids[: last_token(ids, pad_id) + 1]


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: Messages, day: date, arguments: dict[str, Any]) -> Encoded:
    form, passed = template_form(messages), {"strftime_now": day.strftime, **arguments}
    if tools := tools_of(messages):
        passed["tools"] = tools
    try:
        if not is_plain(messages):
            # Many templates leave tools and their calls out without a word.
            whole = {name: value for name, value in passed.items() if name not in LIMITS}
            check_written(messages, str(tokenizer.apply_chat_template(form, tokenize=False, **whole)))
        encoded = tokenizer.apply_chat_template(form, tokenize=True, return_dict=True, **passed)
    except Exception as error:
        # A template may raise whatever its author chose.
        raise ValueError(f"chat template refuses the conversation: {error}") from None
    return {key: list(value) for key, value in encoded.items()}


@dataclass(frozen=True)
class CheckedClassifier:
    """A reward model that can be used: where it lies, its configuration, and how it reads conversations.

    `scores_last`: its head stands on the last token that is not `pad_id`. `outputs`: which of its outputs count.
    """

    where: str
    folder: str
    config: PretrainedConfig
    conversations: Conversations
    scores_last: bool
    pad_id: int | None
    outputs: Outputs


def checked_classifier(
    reward: ClassifierReward, system: str | None = None, day: date = TEMPLATE_DATE
) -> CheckedClassifier:
    """A reward model, after a look at its configuration, the names and shapes of its tensors, and its tokenizer.

    No weights are read. `system`: the system message that every prompt will have; `day`: today, for templates that ask.

    Raises:
        InputError: it has no classification head, several outputs of which none is named, tensors that do not fit,
            token ids beyond its embedding, or a chat template that refuses every prompt; or an engine is to read it
            and cannot.
    """
    from transformers import AutoModelForSequenceClassification

    folder, config = str(local_model(reward.model)), model_config(reward.model)
    where = f"rewards.{reward.name}: {reward.model}"
    if not any("SequenceClassification" in name for name in config.architectures or []):
        raise InputError(f"{where} has no classification head ({config.architectures}); use kind = 'judge'")
    model, info = outline(where, AutoModelForSequenceClassification, folder, config=config)
    stored = _stored_outputs(info)
    if not _says_labels(folder) and (stored == {1} or (len(stored) == 1 and reward.outputs)):
        # transformers takes two outputs where a configuration says nothing; the weights know better.
        config.num_labels = stored.pop()
        model, info = outline(where, AutoModelForSequenceClassification, folder, config=config)
    fits = not (info["missing_keys"] or info["mismatched_keys"])
    outputs = outputs_of(where, reward.outputs, config) if fits else Outputs({}, {})
    check_loaded(where, model, info, other_head=True)

    conversations = _conversations(model, reward.model, reward.max_length, reward.answer_only, day)
    tokenizer = conversations.tokenizer
    _check_arguments(reward, tokenizer)
    conversations = replace(conversations, arguments=reward.chat_template_kwargs)
    check_token_ids(where, model, tokenizer)
    if system and tokenizer.chat_template and not reward.answer_only:
        _check_system(where, tokenizer, system, day)

    scores_last = scores_last_token(type(model))
    if reward.engine and not scores_last:
        raise InputError(
            f"{where}: engines read decoders whose head stands on the last token, and {type(model).__name__} is none; "
            "remove engine"
        )
    pad_id = config.get_text_config().pad_token_id
    return CheckedClassifier(where, folder, config, conversations, scores_last, pad_id, outputs)


def served_conversations(
    where: str, reward: EndpointReward, system: str | None = None, day: date = TEMPLATE_DATE
) -> tuple[Conversations, int | None]:
    """How a reward model that a server holds reads conversations, and its pad token; no weights are there.

    Raises:
        InputError: there is no such tokenizer, it is none of a decoder's, or its template refuses every prompt.
    """
    from transformers import AutoModelForSequenceClassification

    name = reward.tokenizer or ""
    config = model_config(name)
    model = architecture_outline(f"{where}.tokenizer: {name}", AutoModelForSequenceClassification, config)
    if not scores_last_token(type(model)):
        raise InputError(
            f"{where}.tokenizer: {name} is a {type(model).__name__}, which does not read token ids alone; remove "
            'tokenizer, so that the server renders, or give api = "score"'
        )
    conversations = _conversations(model, name, reward.max_length, reward.answer_only, day)
    if system and conversations.tokenizer.chat_template and not reward.answer_only:
        _check_system(f"{where}.tokenizer: {name}", conversations.tokenizer, system, day)
    return conversations, config.get_text_config().pad_token_id


def _conversations(model: PreTrainedModel, name: str, max_length: int, answer_only: bool, day: date) -> Conversations:
    tokenizer = load_tokenizer(name)
    # Of a conversation that is too long the answer stays: it is what is scored.
    tokenizer.truncation_side = "left"
    most = min(max_length, positions_of(model) or max_length)
    return Conversations(tokenizer, most, answer_only, day)


def _check_arguments(reward: ClassifierReward, tokenizer: PreTrainedTokenizerBase) -> None:
    given, where = reward.chat_template_kwargs, f"rewards.{reward.name}.chat_template_kwargs"
    if given and (reward.answer_only or not tokenizer.chat_template):
        raise InputError(f"{where}: no chat template renders what {reward.model} reads; remove it")
    if given:
        check_arguments(tokenizer, given, where)


def _says_labels(folder: str) -> bool:
    """Whether the configuration itself says how many outputs there are."""
    written = json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))
    return any(name in written for name in LABELS)


def _stored_outputs(info: Mapping[str, Any]) -> set[int]:
    """Outputs of those stored tensors whose shape is another than the configuration's."""
    return {stored[0] for _, stored, _ in info["mismatched_keys"]}


def _check_system(where: str, tokenizer: PreTrainedTokenizerBase, system: str, day: date) -> None:
    turns = (("system", system), ("user", "x"), ("assistant", "x"))
    try:
        _rendered(tokenizer, [{"role": role, "content": content} for role, content in turns], day, {})
    except ValueError as error:
        raise InputError(f"{where}: its {error}; every prompt has the system message of prompts.system") from None
