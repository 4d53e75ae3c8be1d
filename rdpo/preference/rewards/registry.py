"""Which class does the work of which `[[rewards]]` table."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, get_args

from rdpo.config.rewards import (
    ClassifierReward,
    EndpointReward,
    FunctionReward,
    ImplicitReward,
    JudgeReward,
    Reward,
    RewardSection,
    TargetReward,
)
from rdpo.preference.rewards.classifier import ClassifierKind
from rdpo.preference.rewards.endpoint import EndpointKind
from rdpo.preference.rewards.function import FunctionKind
from rdpo.preference.rewards.implicit import ImplicitKind
from rdpo.preference.rewards.judge import JudgeKind
from rdpo.preference.rewards.kind import RewardKind
from rdpo.preference.rewards.target import TargetKind

Kinds = Mapping[type[RewardSection], type[RewardKind[Any]]]

KINDS: Kinds = {
    ClassifierReward: ClassifierKind,
    JudgeReward: JudgeKind,
    ImplicitReward: ImplicitKind,
    EndpointReward: EndpointKind,
    FunctionReward: FunctionKind,
    TargetReward: TargetKind,
}


def check_registry(kinds: Kinds, sections: Iterable[type[RewardSection]]) -> None:
    """Compare the kinds that a job file may name with those that there is code for.

    Raises:
        TypeError: they differ.
    """
    differing = set(kinds) ^ set(sections)
    if differing:
        names = ", ".join(sorted(section.__name__ for section in differing))
        raise TypeError(
            f"{names}: in the union of config/rewards.py or in KINDS of preference/rewards, but not in both"
        )


# As soon as it is imported: a kind that a job may name must not be missing after hours of synthesis.
check_registry(KINDS, get_args(get_args(Reward)[0]))


def kind_of(reward: RewardSection) -> RewardKind[Any]:
    """A table of a job as what does its work."""
    return KINDS[type(reward)](reward)
