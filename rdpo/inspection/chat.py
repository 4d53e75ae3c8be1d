"""A run's start model and its trained model, asked side by side: in a terminal, or by a file of questions.

Both have the run's system prompt, the student's chat template and the sampling of the evaluation, and draw with the
same seeds; each continues with its own answers. transformers generates, so that no engine has to start.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rdpo.cluster.hardware import compute_dtype, take_device
from rdpo.config import Job, Sampling
from rdpo.errors import InputError, did_you_mean
from rdpo.execution.reader import RunReader
from rdpo.modeling.chat import Chat, student_chat
from rdpo.modeling.model_files import ADAPTER_CONFIG
from rdpo.modeling.reasoning import Unended
from rdpo.modeling.student import weights_of_start
from rdpo.modeling.weights import ModelRef
from rdpo.records import Messages, clean, draw_seed, shown

if TYPE_CHECKING:
    import torch
    from transformers import GenerationConfig, PreTrainedModel

COMMANDS = {"/reset": "forget the conversation", "/seed N": "draw with another seed", "/quit": "end"}


class Said(NamedTuple):
    """An answer, whether it came to an end by itself, and what was thought before it."""

    text: str
    ended: bool
    reasoning: str = ""


class Speaker:
    """A model with its conversation so far."""

    def __init__(self, name: str, model: PreTrainedModel, chat: Chat, sampling: Sampling, system: str | None):
        self.name, self.model, self.chat, self.sampling = name, model, chat, sampling
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.begin: Messages = [{"role": "system", "content": system}] if system else []
        self.messages = self.begin

    def reset(self) -> None:
        """Forget the conversation."""
        self.messages = self.begin

    def asked(self, question: str) -> Messages:
        """The conversation with one question more.

        Raises:
            InputError: it leaves no room for an answer, or the chat template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        try:
            length = len(self.chat.prompt_ids(messages))
        except ValueError as error:
            raise InputError(f"the chat template refuses it: {error}") from None
        if self.context and length >= self.context:
            raise InputError(f"{length} tokens fill the context of {self.context}; /reset begins anew")
        return messages

    def answer(self, messages: Messages, seed: int) -> Said:
        """The answer to a conversation, which it then holds."""
        import torch

        ids = torch.tensor([self.chat.prompt_ids(messages)], device=self.model.device)
        # The same for both models: what differs is then the weights alone.
        torch.manual_seed(seed)
        with torch.inference_mode():
            spoken = self.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                generation_config=self._generation(ids.shape[1]),
                tokenizer=self.chat.tokenizer,
            )[0, ids.shape[1] :]
        said = self._read(spoken.tolist())
        # What was thought is not said again, as templates do.
        self.messages = [*messages, {"role": "assistant", "content": said.text}]
        return said

    def _read(self, spoken: list[int]) -> Said:
        """What the tokens of an answer say."""
        ended, reasoning = spoken[-1] in self.chat.stop_ids, ""
        text = self.chat.tokenizer.decode(spoken, skip_special_tokens=True)
        if form := self.chat.reasoning:
            # The marks around the reasoning may be special tokens.
            marked = self.chat.tokenizer.decode(spoken[:-1] if ended else spoken)
            try:
                reasoning, text = form.split(marked)
            except Unended:
                return Said("", False, marked)
        ends = [text.find(stop) for stop in self.sampling.stop if stop in text]
        return Said(text[: min(ends, default=len(text))].strip(), bool(ends) or ended, reasoning)

    def _generation(self, length: int) -> GenerationConfig:
        from transformers import GenerationConfig

        # By itself transformers draws among the 50 likeliest tokens alone; vLLM, which evaluates, among all.
        sampling, used = self.sampling, self.sampling.used
        drawn = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
        drawn |= {"min_p": sampling.min_p} if sampling.min_p else {}
        always = {name: used[name] for name in ("repetition_penalty",) if name in used}
        always |= {"stop_strings": sampling.stop} if sampling.stop else {}
        most = sampling.max_tokens + (sampling.max_reasoning_tokens if self.chat.reasoning else 0)
        room = self.context - length if self.context else most
        return GenerationConfig(
            do_sample=self.sampling.temperature > 0,
            **(drawn if sampling.temperature else {}),
            **always,
            max_new_tokens=min(most, room),
            eos_token_id=list(self.chat.stop_ids),
            pad_token_id=self.chat.end_id,
        )


def chat_with(run_dir: str) -> None:
    """Talk to both models of a finished run, until the questions end.

    Raises:
        InputError: there is no run here, it has no published model yet, or its start model cannot be had.
    """
    run, console = RunReader(run_dir), Console()
    job, speakers = run.job_of("model"), load_speakers(run)
    sampling = job.evaluation.sampling
    drawn = f"temperature {sampling.temperature:g}, top_p {sampling.top_p:g}, at most {sampling.max_tokens} tokens"
    console.print(Text(shown(f"start    {job.student.described}\ntrained  {run_dir}")))
    if ignored := [name for name in ("presence_penalty", "frequency_penalty") if name in sampling.used]:
        drawn += f", without {' and '.join(ignored)}, which is the engines' alone"
    console.print(Text(f"{drawn}, on {speakers[0].model.device}; " + ", ".join(map(" to ".join, COMMANDS.items()))))

    seed = job.seed
    for line in _lines(console):
        if line == "/quit":
            break
        if not line.startswith("/"):
            _exchange(line, speakers, seed, console)
        elif line == "/reset":
            for speaker in speakers:
                speaker.reset()
        else:
            seed = _seed(line, seed, console)


def _seed(line: str, seed: int, console: Console) -> int:
    """The seed that a command sets; of any other line nothing comes but a remark."""
    command, _, number = line.partition(" ")
    if command == "/seed" and number.isascii() and number.isdigit() and int(number) < 2**32:
        return int(number)
    known = [name.split()[0] for name in COMMANDS]
    meant = "" if command == "/seed" else did_you_mean(command, known)
    console.print(Text(shown(f"{line}: no such command{meant}; there are {', '.join(COMMANDS)}")))
    return seed


def _exchange(question: str, speakers: list[Speaker], seed: int, console: Console) -> None:
    try:
        asked = [speaker.asked(question) for speaker in speakers]
    except InputError as error:
        console.print(Text(shown(str(error))))
        return

    turn = sum(message["role"] == "user" for message in asked[0])
    table = Table(box=box.SIMPLE, expand=True, show_edge=False)
    cells = []

    for speaker, messages in zip(speakers, asked, strict=True):
        said = speaker.answer(messages, draw_seed(seed, str(turn), "chat"))
        table.add_column(speaker.name, ratio=1, overflow="fold")
        thought = Text(f"{shown(said.reasoning)}\n\n" if said.reasoning else "", style="dim italic")
        cells.append(thought + Text(shown(said.text)) + Text("" if said.ended else " […]", style="dim"))

    table.add_row(*cells)
    console.print(table)


def _lines(console: Console) -> Iterator[str]:
    """What is typed, line by line, or what comes from a file or pipe; those are printed too, for a transcript."""
    if sys.stdin.isatty():
        # Its import gives `input` a history and keys to edit a line with.
        import readline  # noqa: F401

        yield from _typed()
        return
    for content in sys.stdin.buffer:
        line = clean(content.decode("utf-8", "replace")).strip()
        if line:
            console.print(Text(shown(f"> {line}"), style="bold"))
            yield line


def _typed() -> Iterator[str]:
    while True:
        try:
            line = clean(input("> ")).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line:
            yield line


def load_speakers(run: RunReader) -> list[Speaker]:
    """The start model and the published one.

    Raises:
        InputError: one of them cannot be had.
    """
    import torch
    from transformers.utils import logging

    run.require("model")
    job, folder = run.job_of("model"), run.folder("model")
    student = ModelRef.student(job)
    logging.disable_progress_bar()
    gpu = torch.cuda.is_available()
    device, dtype = take_device(gpu), getattr(torch, compute_dtype(job.evaluation.engine.dtype, gpu))
    chat, base = student_chat(job), weights_of_start(job).folder()
    models = {"start": _load(student.folder(), dtype, job)}
    models["trained"] = _published(Path(folder.local()), base, dtype, job)
    return [
        Speaker(name, model.eval().to(device), chat, job.evaluation.sampling, job.prompts.system)
        for name, model in models.items()
    ]


def _published(folder: Path, base: Path, dtype: torch.dtype, job: Job) -> PreTrainedModel:
    if not (folder / ADAPTER_CONFIG).is_file():
        return _load(folder, dtype, job)
    from peft import PeftModel

    # Not by the base that the adapter's configuration names: that is a path on the machine that trained it.
    return PeftModel.from_pretrained(_load(base, dtype, job), str(folder)).merge_and_unload()


def _load(folder: Path, dtype: torch.dtype, job: Job) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM, GenerationConfig

    trust = job.student.trust_remote_code
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, use_safetensors=True, trust_remote_code=trust)
    # What a model's folder says of sampling would stand in for what the run's settings leave open.
    model.generation_config = GenerationConfig()
    return model
