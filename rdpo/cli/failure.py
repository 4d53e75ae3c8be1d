"""What is said of an error that no command expected."""

from __future__ import annotations

import re
import sys
import traceback
from argparse import Namespace
from pathlib import Path

from rdpo.errors import input_error_within
from rdpo.records import visible

OUT_OF_MEMORY = "out of memory"
DISK_FULL = "No space left on device"
ENGINE_FAILED = "Engine core initialization failed"
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception): ")


def report_failure(error: Exception, options: Namespace) -> int:
    """Say what broke in one line, keep the details in a file of the run, and return the exit code."""
    run_dir = getattr(options, "run_dir", None)
    # Ray wraps what a worker raised; wrong input is that wherever it was noticed.
    cause = input_error_within(error)
    if cause:
        print(f"rdpo: {visible(str(cause))}", file=sys.stderr)
        return 2
    from rdpo.files.stores import store_trouble
    from rdpo.tracking.console import log_dir

    trouble = store_trouble(error)
    print(f"rdpo: {visible(trouble or in_one_line(error))}", file=sys.stderr)
    if run_dir and log_dir(run_dir).is_dir():
        details = _written(log_dir(run_dir) / "error.log", error)
        print(f"rdpo: {how_to_resume(options)}{details}", file=sys.stderr)
    elif not trouble:
        print(visible("".join(traceback.format_exception(error))), file=sys.stderr)
    return 1


def how_to_resume(options: Namespace) -> str:
    """What resumes where a command stopped."""
    again = "the same command without --fresh" if getattr(options, "fresh", False) else "the same command"
    return f"{again} resumes where it stopped"


def _written(path: Path, error: Exception) -> str:
    """Write the details of an error; where they are, unless the disk does not take them."""
    try:
        path.write_text("".join(traceback.format_exception(error)), encoding="utf-8")
    except OSError:
        return ""
    return f"; details in {path}"


def in_one_line(error: Exception) -> str:
    """What an error says, with the remedy where one is known."""
    # The exception is of the process that waited for the engine; why it failed is in what the engine printed.
    if ENGINE_FAILED in str(error):
        return "a vLLM engine did not start; what it said is in libraries.log, beside the details"
    if DISK_FULL in str(error):
        return f"{DISK_FULL}: free some space on the disk of the run directory, of the temporary files or of Ray"
    if OUT_OF_MEMORY in str(error).lower():
        what = "a GPU" if "cuda out of memory" in str(error).lower() else "a worker was killed: its machine"
        return (
            f"{what} ran out of memory; lower tokens_per_batch (reference, training), "
            "logprob_chunk or engine.kv_cache_gib, or set training.gradient_checkpointing; `rdpo plan` says what takes "
            "how much"
        )

    lines = [line for line in str(error).splitlines() if line.strip()]
    # What a worker raised comes with its traceback: the first error named there is the cause of the others.
    named = next((line for line in lines if ERROR_LINE.match(line)), None)
    return named or f"{type(error).__name__}: {lines[-1].strip() if lines else ''}"
