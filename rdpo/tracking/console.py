"""What a person watches: one live line per stage in a terminal, plain lines in a log file.

While a run is in progress the output of the libraries underneath (vLLM, DeepSpeed, Ray) goes to
the run's log file; only the console writes to the terminal.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from rdpo.files.stores import cache_dir, is_remote
from rdpo.records import visible
from rdpo.tracking.event_log import FILE as EVENTS
from rdpo.tracking.event_log import EventLog, event_line
from rdpo.tracking.pace import Pace

if TYPE_CHECKING:
    from rdpo.files.manifest import Manifest

PLAIN_EVERY = 15.0
LAST_WORDS_S = 2.0


class Listener:
    """Hears of a run what a person watches; what it does not override, it does not listen to."""

    name = ""
    """What warnings call it, where that is not its class."""

    def progress(self, meter: Meter) -> None:
        """A stage has come further."""

    def step(self, metrics: Mapping[str, float]) -> None:
        """Training has taken an optimizer step: its metrics, and `step`, which counts from 1."""

    def made(self, manifest: Manifest) -> None:
        """A stage is finished."""

    def close(self) -> None:
        """Nothing more comes."""


class Meter:
    """Progress of one stage: units done of a total, tokens, and the time that is left, once something tells it."""

    def __init__(self, console: Console, stage: str, total: int | None, unit: str):
        self.console, self.stage, self.total, self.unit = console, stage, total, unit
        self.done = self.tokens = 0
        self.note = ""
        self.began = time.monotonic()
        self._printed = self.began
        self._pace = Pace()
        self.label = ""

    def begin(self, done: int, at_once: int, label: str = "") -> None:
        """Another part of the stage: `done` units are there already, and `at_once` are worked on at the same time."""
        self.done, self.label, self._pace = done, label, Pace(at_once)
        self.console.show(self)

    def advance(self, units: int, tokens: int = 0, note: str = "") -> None:
        """Count finished units and tokens; `note` stands at the end of the line."""
        self.done += units
        self.tokens += tokens
        self._pace.count(units, time.monotonic())
        self.note = note or self.note
        self.console.show(self)
        if self.done != self.total and time.monotonic() - self._printed > PLAIN_EVERY:
            self._printed = time.monotonic()
            self.console.log(self.line())

    @property
    def seconds(self) -> float:
        """Seconds since the stage began."""
        return time.monotonic() - self.began

    def line(self) -> str:
        """The state as one line of text."""
        of = f"/{self.total}" if self.total else ""
        parts = [f"{self.stage:<11} {self.done}{of} {self.unit}{self.label and f', {self.label}'}"]
        if self.tokens:
            parts.append(f"{self.tokens / max(self.seconds, 1e-9):,.0f} tokens/s")
        if self.total and self.done < self.total:
            left = self._pace.seconds_for(self.total - self.done, time.monotonic())
            parts += [] if left is None else [f"{left:.0f} s left"]
        parts.append(f"{self.seconds:.0f} s")
        return "  ".join(parts + ([self.note] if self.note else []))


class Console:
    """Writes to the person: a live line where there is a terminal, plain lines where there is none."""

    def __init__(self, stream: IO[str], log_file: Path | None = None):
        self.stream = stream
        self.live = stream.isatty()
        self.listeners: list[Listener] = []
        self._log = logging.getLogger("rdpo.run")
        self._log.propagate = False
        self._log.setLevel(logging.INFO)
        # Python keeps a logger as long as the process lives: the next run must not write into this one's file too.
        self._log.handlers = [logging.FileHandler(log_file)] if log_file else [logging.NullHandler()]
        self._log.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        self.events = EventLog(log_file and log_file.with_name(EVENTS))

    def say(self, text: str) -> None:
        """A lasting line, on the terminal and in the logs."""
        self._note(text)
        self._print(text)

    def warn(self, text: str) -> None:
        """A warning, beside the stage that it is about."""
        self._note(text, "warning")
        self._print(f"{'':<12}warning: {text}")

    def conclude(self, text: str) -> None:
        """A line of what came of the run."""
        self.say(text)

    def tell(self, event: str, **facts: object) -> None:
        """A fact for a machine that listens; people hear of it by `say`."""
        self.events.write((event, facts))

    def _note(self, text: str, level: str = "info") -> None:
        if text.strip():
            self.events.write(("message", {"text": text.strip()}), level=level)

    def step(self, metrics: Mapping[str, float]) -> None:
        """The metrics of an optimizer step, for who listens."""
        self._notify(lambda listener: listener.step(metrics))

    def made(self, manifest: Manifest) -> None:
        """A finished stage, for who listens."""
        self._notify(lambda listener: listener.made(manifest))

    def close_listeners(self, but: Sequence[Listener] = ()) -> None:
        """Nothing more comes for the listeners, but for some."""
        kept = [listener for listener in self.listeners if listener in but]
        self.listeners = [listener for listener in self.listeners if listener not in but]
        self._notify(lambda listener: listener.close())
        self.listeners = kept

    def _notify(self, event: Callable[[Listener], None]) -> None:
        """Tell all listeners; one that fails hears no more, and the run continues."""
        for listener in list(self.listeners):
            try:
                event(listener)
            except Exception as error:
                self.listeners.remove(listener)
                name = listener.name or type(listener).__name__
                self.warn(f"{name} hears no more of the run: {type(error).__name__}: {error}")

    def log(self, text: str) -> None:
        """A line for the log file, and for the terminal if that is not live."""
        if self.live:
            self._log.info(visible(text))
        else:
            self._print(text)

    def _print(self, text: str) -> None:
        text = visible(text)
        self._wipe()
        print(text, file=self.stream, flush=True)
        self._log.info(text)

    def show(self, meter: Meter) -> None:
        """Redraw the live line."""
        self._notify(lambda listener: listener.progress(meter))
        if self.live:
            # A line that wraps could not be wiped.
            width = os.get_terminal_size(self.stream.fileno()).columns
            self.stream.write("\r\x1b[2K" + meter.line()[: width - 1])
            self.stream.flush()

    def _wipe(self) -> None:
        if self.live:
            self.stream.write("\r\x1b[2K")

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str = "rows") -> Iterator[Meter]:
        """Watch one stage; its last state stays on the screen as a line."""
        meter = Meter(self, name, total, unit)
        self.show(meter)
        self.events.stage = name
        try:
            yield meter
            self.say(meter.line())
        finally:
            self.events.stage = None


class QuietConsole(Console):
    """Writes warnings and what came of the run; all else is in the log alone."""

    def __init__(self, stream: IO[str], log_file: Path | None = None):
        super().__init__(stream, log_file)
        self.live = False

    def say(self, text: str) -> None:
        """A line for the logs."""
        self._note(text)
        self._log.info(visible(text))

    def log(self, text: str) -> None:
        """A line for the log."""
        self._log.info(visible(text))

    def warn(self, text: str) -> None:
        """A warning."""
        self._note(text, "warning")
        self._print(f"warning: {text}")

    def conclude(self, text: str) -> None:
        """A line of what came of the run."""
        self._note(text)
        self._print(text)


class JsonConsole(QuietConsole):
    """Writes for machines, one JSON object on a line: `event`, `time` (UTC) and the event's facts.

    The events are `stage_begin`, `stage_end`, `round_begin`, `round_end`, `em_step`, `warning` and, last, `result`.
    """

    def warn(self, text: str) -> None:
        """A warning, as an event."""
        self._note(text, "warning")
        self._log.info(visible(f"warning: {text}"))
        self._speak("warning", text=text)

    def conclude(self, text: str) -> None:
        """A line for the logs; the `result` event has its facts."""
        self.say(text)

    def tell(self, event: str, **facts: object) -> None:
        """One event."""
        super().tell(event, **facts)
        self._speak(event, **facts)

    def _speak(self, event: str, **facts: object) -> None:
        print(event_line(event, **facts), file=self.stream, flush=True)


def log_dir(run_dir: str) -> Path:
    """Where a run's logs are: with the run, or, as they are written line by line, beside it if that is a store's."""
    if not is_remote(run_dir):
        return Path(run_dir) / "logs"
    return cache_dir() / "logs" / run_dir.rstrip("/").replace("://", "/")


@contextmanager
def quiet_console(log_dir: Path, console_class: type[Console] = Console) -> Iterator[Console]:
    """Send everything that libraries print to `log_dir/libraries.log`; the console keeps the screen.

    What a full disk does not take of it is lost, and breaks nothing.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    logging.raiseExceptions = False

    # By file descriptors, not by `sys.stdout`: vLLM, NCCL and Ray's daemons write from C++ and from other processes.
    _flush()
    screen, errors = os.dup(1), os.dup(2)
    stream = os.fdopen(os.dup(screen), "w", buffering=1, encoding="utf-8", errors="replace")
    read_end, write_end = os.pipe()
    keeper = threading.Thread(target=_keep, args=(read_end, log_dir / "libraries.log"), daemon=True)
    keeper.start()
    os.dup2(write_end, 1)
    os.dup2(write_end, 2)
    os.close(write_end)

    try:
        yield console_class(stream, log_dir / "run.log")
    finally:
        _flush()
        os.dup2(screen, 1)
        os.dup2(errors, 2)
        # A process that a library leaves behind may hold the other end for longer.
        keeper.join(LAST_WORDS_S)
        stream.close()
        os.close(screen)
        os.close(errors)


def _flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()


def _keep(read_end: int, path: Path) -> None:
    """Append to a file what comes out of a pipe, as far as the disk takes it."""
    with open(read_end, "rb", buffering=0) as pipe:
        while block := pipe.read(1 << 16):
            with contextlib.suppress(OSError), open(path, "ab") as file:
                file.write(block)


@contextmanager
def run_console(run_dir: str, console_class: type[Console] = Console) -> Iterator[Console]:
    """The console of a run; says where the logs are if they are not with it."""
    with quiet_console(log_dir(run_dir), console_class) as console:
        if is_remote(run_dir):
            console.say(f"logs        {log_dir(run_dir)}")
        yield console
