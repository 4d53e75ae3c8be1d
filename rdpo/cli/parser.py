"""What can be typed after `rdpo`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from rdpo import __version__
from rdpo.cli import commands as does
from rdpo.config.suites import SUITE_KINDS
from rdpo.errors import InputError, did_you_mean
from rdpo.stages.table import COMMANDS, NAMES, known_stage

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]

# What a shell offers in an argument's place, as shtab names it.
FILE, DIRECTORY = "file", "directory"


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options of a command line, with `function`, the command to call with them.

    Raises:
        InputError: there is no such command or stage.
        SystemExit: an option is wrong, or asks for help.
    """
    parser, commands = build()
    # argparse would list all commands in one line, and propose none.
    first = next(iter(arguments), "-")
    if not first.startswith("-") and first not in commands.choices:
        raise InputError(f"no command {first}{did_you_mean(first, commands.choices)}; `rdpo --help` lists them")
    return parser.parse_args(arguments)


def build() -> tuple[argparse.ArgumentParser, Commands]:
    """The parser, and its commands by name."""
    parser = argparse.ArgumentParser(
        prog="rdpo",
        description="Refined Direct Preference Optimization: prompts, a student, a teacher and a reward in, "
        "an aligned model out.",
    )
    parser.add_argument("--version", action="version", version=f"rdpo {__version__}")

    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_run(commands)
    _add_direct(commands)
    _add_submit(commands)
    _add_compare(commands)

    for name, stage in COMMANDS.items():
        one = commands.add_parser(name, help=f"bring the {stage} stage of an existing run up to date")
        if name == "score":
            _add_score(one)
        else:
            _add_place(one, "run_dir", "RUN_DIR", DIRECTORY)
        one.set_defaults(function=does.score if name == "score" else does.stage, stage=stage)

    _add_prove(commands)
    _add_looking(commands)
    _add_harness(commands)
    _add_export(commands)
    _add_review(commands)
    _add_push(commands)
    _add_plan(commands)

    schema = commands.add_parser("schema", help="the JSON schema of a job file, for editors")
    schema.add_argument("kind", nargs="?", choices=("job", "comparison", "task"), default="job", help="(default: job)")
    schema.set_defaults(function=does.schema)

    completion = commands.add_parser("completion", help='completion for a shell: eval "$(rdpo completion bash)"')
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(function=does.completion, parser=parser)

    env = commands.add_parser("env", help="versions and devices, for bug reports")
    env.set_defaults(function=does.env)
    return parser, commands


def _add_place(parser: argparse._ActionsContainer, name: str, metavar: str, kind: str, help: str | None = None) -> None:
    action = parser.add_argument(name, metavar=metavar, help=help)
    # By this attribute shtab knows what to offer.
    action.complete = kind  # type: ignore[attr-defined]


def _add_init(commands: Commands) -> None:
    init = commands.add_parser("init", help="write a first job file out of a few answers")
    init.add_argument("file", metavar="FILE", nargs="?", default="job.toml", help="the file to write (job.toml)")
    init.add_argument("--prompts", metavar="SOURCE", help="file, folder or hf:DATASET")
    init.add_argument("--column", metavar="NAME", help="column with the prompt")
    init.add_argument("--pairs", choices=("yes", "no"), help="train on the source's own pairs, where it has some")
    init.add_argument("--student", metavar="MODEL", help="the model to align")
    init.add_argument("--task", metavar="TASK", help="safety, sycophancy, roleplay, or a task file")
    init.add_argument("--teacher", metavar="MODEL", help="a model, or `same`")
    init.add_argument("--reward", metavar="REWARD", help="a reward model, module:name, or `judge`")
    init.add_argument("--gpus", metavar="N", help="how many")
    init.add_argument("--yes", action="store_true", help="ask nothing: take the defaults of what is not given")
    init.set_defaults(function=does.init)


def _add_run(commands: Commands) -> None:
    run = commands.add_parser("run", help="run a job file from prompts to the published model; resumes by itself")
    _add_place(run, "job", "JOB", FILE, "a job file, TOML or YAML")
    run.add_argument("--set", metavar="section.key=value", action="append", default=[], dest="overrides")
    _add_place(run, "--run-dir", "DIR", DIRECTORY, "where the run lives (default: runs/NAME)")
    _add_extent(run)
    where = "leave logs/trace.json with the run: where its time goes, for https://ui.perfetto.dev"
    run.add_argument("--trace", action="store_true", help=where)
    output = run.add_mutually_exclusive_group()
    output.add_argument("--dry-run", action="store_true", help="print the resolved job and what would run")
    output.add_argument("--quiet", action="store_true", help="print warnings, errors and the result alone")
    output.add_argument("--json", action="store_true", help="print a line of JSON for each stage's beginning and end")
    run.set_defaults(function=does.run)


def _add_direct(commands: Commands) -> None:
    """Commands that need no job file."""
    dpo = commands.add_parser("dpo", help="train on a preference data set, without a job file; prints the job")
    dpo.add_argument("--dataset", metavar="SOURCE", required=True, help="pairs: a file, a folder or hf:DATASET")
    dpo.add_argument("--loss", metavar="LOSS", default="dpo", help="as training.loss of a job (default: dpo)")
    synth = commands.add_parser("synth", help="answers, critiques and revisions of prompts, without a job file")
    synth.add_argument("--prompts", metavar="SOURCE", required=True, help="a file, a folder or hf:DATASET")
    synth.add_argument("--task", metavar="TASK", help="safety, sycophancy, roleplay, or a task file")
    synth.add_argument("--teacher", metavar="MODEL", help="a model (default: the student itself)")
    for parser, function, name in ((dpo, does.dpo, "dpo"), (synth, does.synth, "synth")):
        what = "the student: a hub id, folder or .gguf file"
        parser.add_argument("--model", metavar="MODEL", required=True, help=what)
        _add_place(parser, "--run-dir", "DIR", DIRECTORY, "where the run lives (default: runs/NAME)")
        _add_without_file(parser, name)
        parser.set_defaults(function=function)


def _add_score(score: argparse.ArgumentParser) -> None:
    """The one stage that can also be made of a data set, without a job file."""
    where = "an existing run; with --dataset, where the new one lives (default: runs/NAME)"
    run_dir = score.add_argument("run_dir", metavar="RUN_DIR", nargs="?", help=where)
    run_dir.complete = DIRECTORY  # type: ignore[attr-defined]
    score.add_argument("--dataset", metavar="SOURCE", help="pairs to score: a file, a folder or hf:DATASET")
    score.add_argument("--reward", metavar="REWARD", help="a reward model, module:name, or `judge` (--model itself)")
    score.add_argument("--model", metavar="MODEL", help="a model whose chat template measures the prompts")
    _add_without_file(score, "score")


def _add_without_file(parser: argparse.ArgumentParser, name: str) -> None:
    """What every command takes that makes its job out of options."""
    parser.add_argument("--column", metavar="NAME", help="column with the prompt")
    parser.add_argument("--gpus", metavar="N", help="how many (default: those that are there)")
    parser.add_argument("--name", default=name, help=f"of the job; its run is runs/NAME (default: {name})")
    parser.add_argument("--set", metavar="section.key=value", action="append", default=[], dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="print the job alone")


def _add_extent(parser: argparse.ArgumentParser) -> None:
    """How much of a run is made, and whether anew."""
    parser.add_argument("--until", metavar="STAGE", type=known_stage, choices=NAMES, help="stop after this stage")
    parser.add_argument("--fresh", action="store_true", help="start over: remove the run directory first")


def _add_submit(commands: Commands) -> None:
    submit = commands.add_parser("submit", help="send a job and the working directory to a Ray cluster")
    _add_place(submit, "job", "JOB", FILE, "a job file, TOML or YAML")
    seen = "where all nodes see it: s3://… or a shared disk"
    submit.add_argument("--run-dir", metavar="DIR", required=True, help=seen)
    submit.add_argument("--set", metavar="section.key=value", action="append", default=[], dest="overrides")
    _add_extent(submit)
    where = "the cluster's dashboard (http://127.0.0.1:8265)"
    submit.add_argument("--address", metavar="URL", default="http://127.0.0.1:8265", help=where)
    submit.add_argument("--id", metavar="ID", help="the Ray job's id (by default the job's name and the time)")
    left_out = "YAML of what goes along (jobs/runtime_env.yaml)"
    _add_place(submit, "--runtime-env", "FILE", FILE, left_out)
    submit.set_defaults(function=does.submit)


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="run arms and seeds of a job and compare them")
    _add_place(compare, "comparison", "COMPARISON", FILE, "a comparison file, TOML or YAML")
    _add_place(compare, "--run-dir", "DIR", DIRECTORY, "where the arms live (default: runs/NAME)")
    some = "only this arm and the baseline (repeatable)"
    compare.add_argument("--arm", metavar="NAME", action="append", default=[], dest="arms", help=some)
    some = "only this value of the setting that varies (repeatable)"
    compare.add_argument("--value", metavar="X", type=float, action="append", default=[], dest="values", help=some)
    last = "the last stage, in place of the file's `until`"
    compare.add_argument("--until", choices=["training", "evaluation"], help=last)
    one = "only the arms of this seed, and no table: several commands can share a comparison (repeatable)"
    compare.add_argument("--seed", metavar="N", type=int, action="append", dest="seeds", help=one)
    compare.add_argument("--dry-run", action="store_true", help="print what each arm would make and take of others")
    compare.set_defaults(function=does.compare)


def _add_plan(commands: Commands) -> None:
    plan = commands.add_parser("plan", help="placement, memory and speed of a job, and its cost, before anything runs")
    _add_place(plan, "job", "JOB", FILE, "a job file, TOML or YAML")
    plan.add_argument("--set", metavar="section.key=value", action="append", default=[], dest="overrides")
    plan.add_argument("--gpu", metavar="TYPE", help="a GPU type, for example H100")
    lengths = plan.add_argument(
        "--run-dir",
        metavar="DIR",
        dest="lengths_from",
        help="a run whose reference stage is done: its pairs' lengths count",
    )
    lengths.complete = DIRECTORY  # type: ignore[attr-defined]
    plan.add_argument("--workers", type=int, help="how many (default: training.num_workers, of two the smallest)")
    network = "Gb/s that a node with eight GPUs takes in from others, where it is not what clouds give for training"
    plan.add_argument("--network", type=float, metavar="GBITS", help=network)
    rates = "for hours: a finished smaller run of the job, or rows a second by stage in TOML"
    _add_place(plan, "--rates", "PATH", DIRECTORY, rates)
    _add_place(plan, "--prices", "TOML", FILE, "for dollars: prices by kind of node; needs --rates")
    plan.add_argument(
        "--prompts", type=int, metavar="N", help="how many the teacher answers (default: synthesis.limit)"
    )
    effect = "print alone how many held-out prompts a win rate needs that is so much above one half, as 0.1"
    plan.add_argument("--power", type=float, metavar="EFFECT", help=effect)
    plan.set_defaults(function=does.plan)


def _add_prove(commands: Commands) -> None:
    prove = commands.add_parser("prove", help="measure both models of a finished run on other prompts, without a judge")
    _add_place(prove, "run_dir", "RUN_DIR", DIRECTORY)
    kinds = "only this kind, on the prompts that come with rdpo (repeatable; default: the job's [[suites]], else all)"
    prove.add_argument("--suite", metavar="KIND", choices=SUITE_KINDS, action="append", dest="kinds", help=kinds)
    prove.set_defaults(function=does.prove)


def _add_looking(commands: Commands) -> None:
    """The commands that look at a run and change nothing in it but its report."""
    status = _looks(commands, "status", does.status, "how far each stage has come, and who works in the run")
    _add_place(status, "run_dir", "RUN_DIR", DIRECTORY)
    status.add_argument("--json", action="store_true", help="as one JSON object (of rounds, one for each, on a line)")
    diff = _looks(commands, "diff", does.diff, "what differs between two runs: settings, stages, rows, results")
    runs = diff.add_argument("run_dirs", metavar="RUN_DIR", nargs=2)
    runs.complete = DIRECTORY  # type: ignore[attr-defined]
    chat = _looks(commands, "chat", does.chat, "talk to the start model and the trained model side by side")
    _add_place(chat, "run_dir", "RUN_DIR", DIRECTORY)
    report = _looks(commands, "report", does.report, "write RUN_DIR/report.html")
    _add_place(report, "run_dir", "RUN_DIR", DIRECTORY)
    _add_watch(commands)
    show = _looks(commands, "show", does.show, "look at the rows of a stage")
    _add_place(show, "run_dir", "RUN_DIR", DIRECTORY)
    show.add_argument("stage", metavar="STAGE", type=known_stage, choices=NAMES)
    show.add_argument("--row", metavar="ID", help="one row, by (the beginning of) its id")
    show.add_argument("--limit", type=at_least_one, default=3, help="how many rows (default 3)")
    show.add_argument("--dropped", action="store_true", help="the dropped rows, with their reasons")
    show.add_argument(
        "--logps", action="store_true", help="of the reference stage: each token's log-prob, before and after"
    )


def _add_watch(commands: Commands) -> None:
    watch = _looks(commands, "watch", does.watch, "the report of a run as a live page, or of two side by side")
    runs = watch.add_argument(
        "run_dirs", metavar="RUN_DIR", nargs="+", help="a run, its rounds, a comparison; or two runs"
    )
    runs.complete = DIRECTORY  # type: ignore[attr-defined]
    watch.add_argument(
        "--port", type=port, default=8640, help="where to serve it; 0 for any that is free (default 8640)"
    )
    where = "an address of this machine; any but loopback demands the token that is printed (default 127.0.0.1)"
    watch.add_argument("--host", default="127.0.0.1", help=where)


def port(text: str) -> int:
    """A port, as a person gives it."""
    number = int(text)
    if not 0 <= number < 1 << 16:
        raise argparse.ArgumentTypeError(f"{number} is no port; give one from 0 to 65535")
    return number


def at_least_one(text: str) -> int:
    """A number of rows, as a person gives it."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is too few; give at least 1")
    return number


def _add_export(commands: Commands) -> None:
    export = _looks(commands, "export", does.export, "write a run's pairs or answers for other programs")
    _add_place(export, "run_dir", "RUN_DIR", DIRECTORY)
    what = "a preference data set, groups of answers with their scores, or AlpacaEval's outputs"
    export.add_argument("what", choices=["pairs", "groups", "answers"], help=what)
    _add_place(export, "target", "FOLDER", DIRECTORY)


def _add_review(commands: Commands) -> None:
    review = _looks(commands, "review", does.review, "write a run's pairs for people to judge, in Argilla")
    _add_place(review, "run_dir", "RUN_DIR", DIRECTORY)
    _add_place(review, "target", "FOLDER", DIRECTORY)
    review.add_argument("--limit", type=at_least_one, metavar="N", help="so many, drawn at random (default: all)")
    review.add_argument("--question", metavar="TEXT", help="what people are asked (default: which answer is better)")

    reviewed = _looks(
        commands, "reviewed", does.reviewed, "what people said of a run's pairs, as a preference data set"
    )
    _add_place(reviewed, "run_dir", "RUN_DIR", DIRECTORY)
    _add_place(reviewed, "records", "RECORDS.json", FILE)
    _add_place(reviewed, "target", "PAIRS.jsonl", FILE)


def _add_harness(commands: Commands) -> None:
    harness = _looks(commands, "harness", does.harness, "tasks of lm-evaluation-harness, before and after training")
    _add_place(harness, "run_dir", "RUN_DIR", DIRECTORY)
    harness.add_argument("tasks", metavar="TASK", nargs="+", help="a task, group or tag of the harness, or a pattern")
    _add_place(harness, "--include", "DIR", DIRECTORY, "a folder with tasks of your own")
    harness.add_argument("--limit", type=at_least_one, metavar="N", help="documents of each task (default: all)")
    harness.add_argument("--chat", action="store_true", help="ask in the model's chat template")


def _add_push(commands: Commands) -> None:
    push = _looks(commands, "push", does.push, "put a run's model or pairs on the Hugging Face hub")
    _add_place(push, "run_dir", "RUN_DIR", DIRECTORY)
    push.add_argument("what", choices=["model", "pairs"], help="the published model, or the pairs as a data set")
    push.add_argument("repository", metavar="OWNER/NAME")
    push.add_argument("--public", action="store_true", help="a new repository is for everybody (default: private)")


def _looks(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], help: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=help)
    parser.set_defaults(function=function)
    return parser
