"""What each kind of reward says of itself and does: the interface that the files beside this one fill."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Generic, TypeVar

from rdpo.config.rewards import RewardSection
from rdpo.files.manifest import Settings

if TYPE_CHECKING:
    import ray.data

    from rdpo.cluster.pools import Pool
    from rdpo.config import Job
    from rdpo.synthesis.columns import Needed

R = TypeVar("R", bound=RewardSection)


class RewardKind(ABC, Generic[R]):
    """One `[[rewards]]` table of a job, by what its kind can do. Making one loads nothing."""

    seeded: ClassVar[bool] = False
    """Whether its scores depend on the job's seed."""

    def __init__(self, reward: R):
        self.reward = reward

    @property
    def where(self) -> str:
        """The table's name in messages."""
        return f"rewards.{self.reward.name}"

    def check_named(self, job: Job) -> None:
        """Try what can be tried in a moment, without a model.

        Raises:
            InputError: something that the table names cannot be used.
        """

    @abstractmethod
    def check(self, job: Job) -> None:
        """Try everything that can be tried before the long work; on the driver, without a GPU.

        Raises:
            InputError: the reward cannot be had.
        """

    @abstractmethod
    def settings(self, job: Job) -> Settings:
        """What its scores depend on, as a part of a stage's key: its fields, and what its models and files hold."""

    def pools(self, job: Job) -> list[Pool]:
        """The pools of actors that hold its models, none by default."""
        return []

    @abstractmethod
    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """The rows with this reward's score of every answer column; a row that gets none is dropped with the reason."""

    def needs_trial(self, job: Job) -> bool:
        """Whether it is tried on two plain pairs where the user gives none: it loads a model of its own."""
        return True

    def in_trial(self) -> R:
        """The table for two plain pairs, which have no other columns; by default the same."""
        return self.reward

    def columns(self) -> list[Needed]:
        """The columns of the source of the prompts that it reads beside the prompt; none by default."""
        return []

    def against(self, start: str, adapter: str | None = None) -> R:
        """The table for a round that begins where a model trained from `start` ended; by default the same.

        `adapter`: the one on `start`, if that has one.
        """
        return self.reward
