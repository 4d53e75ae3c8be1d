"""One way to speak all turns of a task, alone in its process; prints a JSON object as its last line.

    python jobs/bench/speaker.py rdpo|raw|inline|barriers|raydata [--rows 96] [--max-tokens 96] ...

`rdpo` is the synthesis stage; `raw` is vLLM's offline `LLM.generate`, turn by turn, with the processes that vLLM
chooses; `inline` the same without any process beside its own, which no program that serves can do; `barriers` is
rdpo's engine without Ray, turn by turn; `raydata` is a chain of `ray.data.llm` processors, one for each turn.
Weights, prompts, sampling, engine arguments, sequences in flight of an engine, and memory for all key-value caches
together are the same. The time to start engines does not count. `--gpus 1` runs on a GPU, without the comparison with
`raydata`.
"""

import argparse
import asyncio
import json
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rdpo.cluster.connection import start_ray
from rdpo.config import Engine as EngineSettings
from rdpo.config import Job, load_job
from rdpo.config.task import Task, Turn
from rdpo.modeling.chat import Chat, load_chat
from rdpo.modeling.weights import ModelRef, local_model
from rdpo.records import Messages, Row, draw_seed, prompt_id
from rdpo.synthesis.engine import Engine, engine_arguments, engine_environment
from rdpo.synthesis.instructions import check_prefills, load_task, template_values, turn_messages
from rdpo.synthesis.teacher import synthesize, turn_sampling

if TYPE_CHECKING:
    import ray.data

ROOT = Path(__file__).parents[2]
ENGINES_START_S = 600
WARM_UP: Messages = [{"role": "user", "content": "Say hello."}]
EXECUTOR = "distributed_executor_backend"
# Ray counts cores, it does not bind to them: small shares let every actor of the chain of processors be placed.
SHARE = 0.1


@dataclass
class Spoken:
    """Rows with the columns that the synthesis stage adds, when they were begun and ended, and the warm-up."""

    rows: list[Row]
    began: float
    ended: float
    warm_up: float | None = None


def job_of(options: argparse.Namespace) -> Job:
    """The job file with the options over it."""
    engine = {
        "gpus": options.gpus,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "kv_cache_gib": options.kv_gib,
        "batch_rows": options.batch_rows,
        "batches_in_flight": 2 * -(-options.in_flight // options.batch_rows),
        "options.max_num_seqs": options.in_flight,
    }
    if options.gpus and options.default_engine:
        for name in ("batch_rows", "batches_in_flight", "options.max_num_seqs"):
            del engine[name]
    sampling = {"temperature": options.temperature, "max_tokens": options.max_tokens}
    overrides = {"task": options.task}
    overrides |= {f"engine.{key}": value for key, value in engine.items()}
    overrides |= {f"sampling.{key}": value for key, value in sampling.items()}
    return load_job(options.job, [f"synthesis.{key}={value}" for key, value in overrides.items()])


def read_rows(path: str, limit: int) -> list[Row]:
    """The first rows of the file, as the prompts stage leaves them."""
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file]

    # A small file is read again and again, with other seeds: each repetition is another row.
    return [prompt_row(dict(raw), index // len(lines)) for index, raw in enumerate(islice(cycle(lines), limit))]


def prompt_row(raw: dict[str, Any], repetition: int) -> Row:
    """One row of the file as the prompts stage leaves it."""
    messages = [{"role": "user", "content": raw.pop("prompt")}]
    return {"prompt_id": f"{prompt_id(messages)}-{repetition}", "prompt": messages, "extra": json.dumps(raw)}


def conversation(task: Task, turn: Turn, row: Row) -> Messages:
    """What a turn answers, from the prompt and the answers of earlier turns in the row."""
    values = template_values(row, {})
    conversations: dict[str, Messages] = {}
    for earlier in task.turns:
        messages = turn_messages(earlier, row, values, conversations)
        if earlier == turn:
            break
        values[earlier.name] = row[earlier.name]
        conversations[earlier.name] = [*messages, {"role": "assistant", "content": row[earlier.name]}]
    return messages


def note(row: Row, turn: Turn, text: str, tokens: int, prompt: int, cached: int | None) -> None:
    """Write an answer into its row, under the stage's column names."""
    row[turn.name] = text.strip()
    row[f"{turn.name}_tokens"] = tokens
    row[f"{turn.name}_prompt_length"] = prompt
    row[f"{turn.name}_prompt_cached"] = cached


def arguments_of(job: Job) -> dict[str, Any]:
    """What rdpo's engine gives to vLLM, for those who call vLLM by themselves and leave its processes to it."""
    settings = job.synthesis.engine
    arguments = engine_arguments(str(local_model(job.synthesis.teacher or job.student.model)), settings, job.seed)
    arguments.pop(EXECUTOR, None)
    return {**arguments, **settings.options}


def environment_of(settings: EngineSettings) -> dict[str, str]:
    """The environment of such an engine."""
    return engine_environment(settings.model_copy(update={"options": {EXECUTOR: "mp"}}))


def sampling_arguments(job: Job, turn: Turn, row: Row, chat: Chat) -> dict[str, Any]:
    """What rdpo's engine samples a turn with."""
    sampling = turn_sampling(turn, job.synthesis.sampling)
    return {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "max_tokens": sampling.max_tokens,
        "seed": draw_seed(job.seed, row["prompt_id"], turn.name),
        "stop_token_ids": list(chat.stop_ids),
    }


def speak_raw(job: Job, task: Task, rows: list[Row]) -> Spoken:
    """All rows through one turn after the other by vLLM's offline class."""
    return _speak_offline(job, task, rows, environment_of(job.synthesis.engine))


def speak_inline(job: Job, task: Task, rows: list[Row]) -> Spoken:
    """The same in one process."""
    environment = engine_environment(job.synthesis.engine)
    return _speak_offline(job, task, rows, {**environment, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"})


def _speak_offline(job: Job, task: Task, rows: list[Row], environment: dict[str, str]) -> Spoken:
    os.environ.update(environment)
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    model = job.synthesis.teacher or job.student.model
    chat, llm = load_chat(ModelRef(model)), LLM(**arguments_of(job))

    def say(turn: Turn, spoken: list[Row], conversations: list[Messages]) -> None:
        prompts = [TokensPrompt(prompt_token_ids=chat.prompt_ids(messages)) for messages in conversations]
        final = {"output_kind": RequestOutputKind.FINAL_ONLY}
        parameters = [SamplingParams(**sampling_arguments(job, turn, row, chat), **final) for row in spoken]
        for row, output in zip(spoken, llm.generate(prompts, parameters, use_tqdm=False), strict=True):
            answer, prompt = output.outputs[0], len(output.prompt_token_ids)
            note(row, turn, answer.text, len(answer.token_ids), prompt, output.num_cached_tokens)

    cold = time.time()
    say(task.turns[0], [{"prompt_id": ""}], [WARM_UP])
    began = time.time()
    for turn in task.turns:
        say(turn, rows, [conversation(task, turn, row) for row in rows])
    return Spoken(rows, began, time.time(), began - cold)


def speak_barriers(job: Job, task: Task, rows: list[Row]) -> Spoken:
    """All rows through one turn after the other by rdpo's engine, in this process."""
    return asyncio.run(_speak_barriers(job, task, rows))


async def _speak_barriers(job: Job, task: Task, rows: list[Row]) -> Spoken:
    model = job.synthesis.teacher or job.student.model
    chat, engine = load_chat(ModelRef(model)), Engine(str(local_model(model)), job.synthesis.engine, job.seed)

    async def say(turn: Turn, row: Row, messages: Messages) -> None:
        seed = draw_seed(job.seed, row["prompt_id"], turn.name)
        sampling = turn_sampling(turn, job.synthesis.sampling)
        answer = await engine.generate(chat.prompt_ids(messages), sampling, seed, chat.stop_ids)
        note(row, turn, answer.text, answer.tokens, answer.prompt_tokens, answer.cached_tokens)

    cold = time.time()
    await say(task.turns[0], {"prompt_id": ""}, WARM_UP)
    began = time.time()
    for turn in task.turns:
        await asyncio.gather(*(say(turn, row, conversation(task, turn, row)) for row in rows))
    ended = time.time()
    engine.shutdown()
    return Spoken(rows, began, ended, began - cold)


def speak_rdpo(job: Job, task: Task, rows: list[Row]) -> Spoken:
    """The stage itself."""
    return collected(synthesize(entering(job, rows), job))


def speak_raydata(job: Job, task: Task, rows: list[Row]) -> Spoken:
    """A chain of processors, each with its own engine and its share of the key-value cache.

    A row travels as JSON, because the processors give their own meaning to a column `prompt`.
    """
    settings = job.synthesis.engine
    share = {"kv_cache_gib": settings.kv_cache_gib / len(task.turns), "concurrency": len(task.turns)}
    environment = environment_of(settings.model_copy(update=share))
    os.environ.update({"VLLM_CPU_OMP_THREADS_BIND": "nobind", **environment, **os.environ})
    dataset = entering(job, [{"row": json.dumps(row)} for row in rows])
    dataset = dataset.repartition(target_num_rows_per_block=settings.rows_in_block)
    for turn in task.turns:
        dataset = turn_processor(job, task, turn)(dataset)
    spoken = collected(dataset)
    spoken.rows = [json.loads(row["row"]) for row in spoken.rows]
    return spoken


def turn_processor(job: Job, task: Task, turn: Turn) -> Callable[["ray.data.Dataset"], "ray.data.Dataset"]:
    """The processor of one turn; the engine itself turns text into ids and ids into text."""
    from ray.data.llm import build_processor, vLLMEngineProcessorConfig

    model, settings = (job.synthesis.teacher or job.student.model), job.synthesis.engine
    chat = load_chat(ModelRef(model))

    def ask(data: Row) -> Row:
        row = json.loads(data["row"])
        sampling = sampling_arguments(job, turn, row, chat)
        return {"messages": conversation(task, turn, row), "sampling_params": sampling}

    def keep(data: Row) -> Row:
        row = json.loads(data["row"])
        counts = (data[name] for name in ("num_generated_tokens", "num_input_tokens", "prompt_cached"))
        note(row, turn, data["generated_text"], *map(int, counts))
        return {"row": json.dumps(row), "began": data["began"]}

    config = vLLMEngineProcessorConfig(
        model_source=str(local_model(model)),
        engine_kwargs={name: value for name, value in arguments_of(job).items() if name != "model"},
        batch_size=settings.rows_in_block,
        max_concurrent_batches=settings.batches_in_flight,
        concurrency=1,
        chat_template_stage={"num_cpus": SHARE},
        tokenize_stage=False,
        detokenize_stage=False,
        placement_group_config={"bundles": [{"CPU": SHARE}]},
        log_engine_metrics=False,
    )
    shares = {"num_cpus": SHARE}
    processor = build_processor(config, ask, keep, preprocess_map_kwargs=shares, postprocess_map_kwargs=shares)
    stage = processor.get_stage_by_name("vLLMEngineStage")
    # A plain assignment would have the stage checked again, by then without its bundles, and it would ask for a GPU.
    object.__setattr__(stage, "fn", counting(stage.fn))
    return processor


def counting(stage: type) -> type:
    """The stage's actor, which does not tell of the prefix cache, made to tell."""

    class Counting(stage):
        def __init__(self, *arguments: Any, **settings: Any):
            super().__init__(*arguments, **settings)
            self.cached: dict[int, int] = {}
            self.generate, self.llm._generate_async = self.llm._generate_async, self.counted

        async def counted(self, request: Any) -> Any:
            output = await self.generate(request)
            self.cached[request.request_id] = output.num_cached_tokens
            return output

        async def _generate_with_error_handling(self, *arguments: Any) -> Row:
            answer = await super()._generate_with_error_handling(*arguments)
            return {**answer, "prompt_cached": self.cached.pop(answer["request_id"])}

    return Counting


def entering(job: Job, rows: list[Row]) -> "ray.data.Dataset":
    """The rows as a data set of a local cluster; each says when it came in, which is after all engines are up."""
    import pyarrow as pa

    ray = start_ray(job)
    ray.data.DataContext.get_current().wait_for_min_actors_s = ENGINES_START_S
    rows_in = ray.data.from_arrow(pa.Table.from_pylist(rows))
    return rows_in.map(lambda row: {**row, "began": time.time()}, num_cpus=SHARE)


def collected(dataset: "ray.data.Dataset") -> Spoken:
    """All rows of a data set, and when the first came in and the last came out."""
    rows, ended = [], 0.0
    for block in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        rows += block.to_pylist()
        ended = time.time()
    return Spoken(rows, min(row["began"] for row in rows), ended)


def figures(task: Task, spoken: Spoken) -> dict[str, Any]:
    """Tokens, seconds, the share of each turn's prompt tokens that was cached, and the last turn's texts."""
    whole = [row for row in spoken.rows if not row.get("dropped")]
    tokens = sum(row.get(f"{turn.name}_tokens") or 0 for row in spoken.rows for turn in task.turns)
    seconds = spoken.ended - spoken.began
    return {
        "rows": len(whole),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "warm_up_seconds": spoken.warm_up,
        "prefix_hits": {turn.name: prefix_hits(turn, whole) for turn in task.turns},
        "texts": {row["prompt_id"]: row[task.turns[-1].name] for row in whole},
    }


def prefix_hits(turn: Turn, rows: Iterable[Row]) -> float | None:
    """Share of a turn's prompt tokens that came from the prefix cache; None where nobody counted."""
    counts = [(row.get(f"{turn.name}_prompt_cached"), row[f"{turn.name}_prompt_length"]) for row in rows]
    known = [cached for cached, _ in counts if cached is not None]
    if not counts or len(known) < len(counts):
        return None
    return sum(known) / sum(length for _, length in counts)


SPEAKERS = {
    "raw": speak_raw,
    "inline": speak_inline,
    "barriers": speak_barriers,
    "rdpo": speak_rdpo,
    "raydata": speak_raydata,
}


def options_from(arguments: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("speaker", choices=list(SPEAKERS))
    parser.add_argument("--job", default=str(ROOT / "jobs/quickstart.toml"), help="the model and the seed")
    parser.add_argument("--prompts", default=str(ROOT / "jobs/quickstart/prompts.jsonl"), help="JSON lines with prompt")
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--task", default="roleplay")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--in-flight", type=int, default=64, help="vLLM's max_num_seqs")
    parser.add_argument("--batch-rows", type=int, default=8, help="rows of one block, where there are blocks")
    parser.add_argument("--max-model-len", type=int, default=1024)
    parser.add_argument("--kv-gib", type=float, default=3.0, help="key-value cache of all engines together")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs of the engine; 0 is the CPU")
    parser.add_argument("--default-engine", action="store_true", help="rdpo's own choice of rows in flight (on GPUs)")
    return parser.parse_args(arguments)


def main() -> None:
    """Speak the turns and print the figures."""
    options = options_from(sys.argv[1:])
    os.environ.update({"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"})
    job, task = job_of(options), load_task(options.task)
    check_prefills(task.turns)
    spoken = SPEAKERS[options.speaker](job, task, read_rows(options.prompts, options.rows))
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()
    print(json.dumps({"speaker": options.speaker, **figures(task, spoken)}), flush=True)


if __name__ == "__main__":
    main()
