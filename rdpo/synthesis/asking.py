"""An engine asked for an answer, with the reasoning before it where the chat has any.

Reasoning and answer are two requests with a budget each. The second continues the first, token by token, and finds it
in the engine's prefix cache.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from rdpo.config import Sampling
from rdpo.modeling.chat import Chat
from rdpo.modeling.reasoning import Unended
from rdpo.records import Messages
from rdpo.synthesis.engine import Engine, Generation

if TYPE_CHECKING:
    from rdpo.modeling.reasoning import ReasoningForm


async def ask(
    engine: Engine, chat: Chat, messages: Messages, sampling: Sampling, seed: int, prefill: str = ""
) -> Generation:
    """The answer to a conversation, behind its first words `prefill`.

    Raises:
        Unended: it ends inside its reasoning.
        ValueError: the engine refuses the request, or the chat template the conversation.
    """
    if chat.reasoning is None:
        return await engine.generate(chat.prompt_ids(messages, prefill), sampling, seed, chat.stop_ids)

    asked = chat.prompt_ids(messages)
    thought = await _think(engine, chat, chat.reasoning, asked, sampling, seed)
    reasoning, begun = chat.reasoning.split(thought.text)
    closed = chat.reasoning.closing in thought.text
    room = sampling.max_tokens if closed else sampling.max_tokens - thought.tokens
    # A model need not think: it may have come to the end of its answer, or of the answer's budget.
    if not closed and (thought.finish_reason == "stop" or room < 1):
        return replace(thought, text=begun)

    continued = [*asked, *thought.token_ids, *(chat.text_ids(prefill) if prefill else ())]
    limited = sampling.model_copy(update={"max_tokens": room})
    # Drawn with another seed, else the first tokens would be drawn like the reasoning's.
    answer = await engine.generate(continued, limited, (seed + 1) & 0x7FFFFFFF, chat.stop_ids)
    return replace(
        answer,
        text=begun + answer.text,
        reasoning=reasoning,
        tokens=thought.tokens + answer.tokens,
        prompt_tokens=thought.prompt_tokens,
        cached_tokens=thought.cached_tokens,
        token_ids=(*thought.token_ids, *answer.token_ids),
    )


async def _think(
    engine: Engine, chat: Chat, form: ReasoningForm, asked: list[int], sampling: Sampling, seed: int
) -> Generation:
    """What the model writes up to the mark that ends its reasoning; or an answer without any, perhaps its beginning.

    Raises:
        Unended: the reasoning does not end, or not within its budget.
    """
    limited = sampling.model_copy(update={"max_tokens": sampling.max_reasoning_tokens, "stop": [form.closing]})
    # The marks may be special tokens.
    marks = {"include_stop_str_in_output": True, "skip_special_tokens": False}
    thought = await engine.generate(asked, limited, seed, chat.stop_ids, **marks)
    if thought.token_ids and thought.token_ids[-1] in chat.stop_ids:
        end = chat.tokenizer.decode([thought.token_ids[-1]])
        thought = replace(thought, text=thought.text.removesuffix(end))
    try:
        form.split(thought.text)
    except Unended:
        if thought.finish_reason == "length":
            raise Unended(f"its reasoning was cut off after {thought.tokens} tokens") from None
        raise
    return thought
