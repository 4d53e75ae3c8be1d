"""Requests to stop: SIGTERM, as clouds and schedulers send before they take a machine away, ends a run like Ctrl-C."""

from __future__ import annotations

import signal
import threading
from types import FrameType


def heed_sigterm() -> None:
    """Turn SIGTERM into a KeyboardInterrupt of the main thread."""
    # Python takes handlers of signals from the main thread alone.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt
