"""What in a run's figures calls for a second look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rdpo.files.manifest import Manifest, Summary
from rdpo.preference.scores import PART
from rdpo.report.columns import PairColumns
from rdpo.stages.table import STAGES

LOGPS_FALL = 10.0
LENGTH_GROWS = 1.5
FEW_PROMPTS = 20
FEW_STEPS = 5
STOPS_FALL = 0.1
GAP_FOLLOWS_LENGTH = 0.5


def alerts(manifests: Mapping[str, Manifest], pairs: PairColumns | None) -> list[str]:
    """Warnings, in the order of the data; of the stages by name."""
    summaries = {name: manifest.summary for name, manifest in manifests.items()}
    return [
        *_of_lineage(manifests),
        *_of_pairs(summaries.get("pairs", {}), pairs),
        *_of_training(summaries.get("training", {})),
        *_of_evaluation(summaries.get("evaluation", {})),
    ]


def _of_lineage(manifests: Mapping[str, Manifest]) -> Iterator[str]:
    for stage in STAGES:
        manifest = manifests.get(stage.name)
        if manifest and (changed := stage.outdated_inputs(manifest, manifests)):
            yield f"{stage.name} was made from other {', '.join(changed)} than are here now; `rdpo run` makes it again."


def _of_pairs(summary: Summary, pairs: PairColumns | None) -> Iterator[str]:
    for reward, sides in summary.get("agreement", {}).items():
        if sides["constant"]:
            yield f"{reward} gives every answer the same score; it tells nothing here."
        elif sides["preferred"] < 0.5 and PART not in reward:
            # A part of a score may count against an answer.
            yield f"{reward} prefers the side to be rejected in most pairs; look at some before training on all."
    correlation = pairs.gap_follows_length if pairs else None
    if correlation is not None and abs(correlation) > GAP_FOLLOWS_LENGTH:
        way = "longer" if correlation > 0 else "shorter"
        yield f"The {way} the chosen answer, the larger the reward gap: the reward may be one for length."


def _of_training(summary: Summary) -> Iterator[str]:
    if not summary.get("steps"):
        return
    if summary["steps"] < FEW_STEPS:
        more = "where little has moved, lower training.batch_size, or raise training.epochs or training.learning_rate"
        yield f"Optimizer steps of training: {summary['steps']}, which are few; {more}."
    first, last = summary["first"], summary["last"]
    if last["logps/chosen"] < first["logps/chosen"] - LOGPS_FALL:
        yield "The log-probs of the chosen answers fell in training; an SFT term (training.sft_coef) holds them."
    if last["rewards/accuracies"] < 0.5 and summary["steps"] >= FEW_STEPS:
        yield "At the end of training the policy still prefers the rejected side of most pairs."


def _of_evaluation(summary: Summary) -> Iterator[str]:
    if not summary.get("prompts"):
        return
    if summary["prompts"] < FEW_PROMPTS:
        more = "hold out more by prompts.heldout_fraction, or raise evaluation.limit"
        yield f"Only {summary['prompts']} held-out prompts were compared, so what they show is little; {more}."

    length, stops = _means(summary["length"]), _means(summary["stop_rate"])
    if length["trained"] > LENGTH_GROWS * length["start"]:
        yield "Answers grew by more than half; compare rewards at equal length before believing the win rate."
    if stops["trained"] < stops["start"] - STOPS_FALL and summary["prompts"] >= FEW_PROMPTS:
        yield "The trained model stops by itself less often than the start model."

    rose = [reward["reward"] for reward in summary["rewards"] if reward["weight"] and reward["difference"]["low"] > 0]
    fell = [
        reward["reward"] for reward in summary["rewards"] if not reward["weight"] and reward["difference"]["high"] < 0
    ]
    if rose and fell:
        yield f"{', '.join(rose)} rose while {', '.join(fell)}, not optimised, fell: the reward may be gamed."


def _means(estimates: dict[str, dict[str, float]]) -> dict[str, float]:
    """The means of both models."""
    return {model: estimate["mean"] for model, estimate in estimates.items()}
