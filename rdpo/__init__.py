"""rdpo: a Ray-distributed trainer for refined Direct Preference Optimization (arXiv 2402.08005).

Importing this package loads neither torch, ray, vllm nor deepspeed; the rooms that need them
import them when they are used. The names in `__all__` are for other programs to use, see docs/python.md.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rdpo.api import RunView, load_run, run
    from rdpo.config import Job, Loss, load_job
    from rdpo.errors import InputError
    from rdpo.training.losses import PairLogps, RewardTerms, preference_loss, reward_terms

__version__ = "0.1.0"

__all__ = [
    "InputError",
    "Job",
    "Loss",
    "PairLogps",
    "RewardTerms",
    "RunView",
    "load_job",
    "load_run",
    "preference_loss",
    "reward_terms",
    "run",
]

_HOMES = {
    "rdpo.config": ("Job", "Loss", "load_job"),
    "rdpo.errors": ("InputError",),
    "rdpo.training.losses": ("PairLogps", "RewardTerms", "preference_loss", "reward_terms"),
    "rdpo.api": ("RunView", "load_run", "run"),
}


if not TYPE_CHECKING:
    # A type checker that saw this function would take any name for one of ours.
    def __getattr__(name: str) -> Any:
        from importlib import import_module

        home = next((home for home, names in _HOMES.items() if name in names), None)
        if home is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(home), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
