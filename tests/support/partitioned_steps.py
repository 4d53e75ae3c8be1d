"""Training steps of several jobs on every rank of one process group, ZeRO-3 with every weight partitioned.

torchrun --nproc-per-node 2 -m tests.support.partitioned_steps FOLDER, with `settings.json` in it: a list of the keyword
arguments of `steps`. Rank 0 writes the results beside it, in their order, as `results.json`.
"""

import json
import sys
from pathlib import Path

import torch

import rdpo.training.deepspeed
from rdpo.modeling.packing import PairSize
from rdpo.training.loop import PairTable
from tests.support.pairs import pairs, trainer_of

STEPS = 3
UNEVEN = (1, 5, 2, 9, 3, 3)


def uneven_pairs():
    """Six pairs whose completions differ in length, so that the ranks have other numbers of micro-batches."""
    table = pairs(count=len(UNEVEN)).table
    rows = table.to_pylist()
    for row, length in zip(rows, UNEVEN, strict=True):
        row["rejected_ids"] = [70 + length] * (2 * length)
    sizes = [PairSize(3, 2, 2 * length) for length in UNEVEN]
    return PairTable(table.from_pylist(rows, schema=table.schema), sizes)


def steps(model, place, backend=None, heldout=False, **settings):
    """Losses and gradient norms of some uneven steps, held-out margins, and sums of the weights that leave.

    `whole` is how many weights this rank holds whole between two steps.
    """
    trainer = trainer_of(model, place, uneven_pairs(), backend, tokens_per_batch=128, **settings)
    history, margins, whole = [], {}, 0
    for index in range(STEPS):
        history.append(trainer.step(index, STEPS, list(range(len(UNEVEN)))))
        # Before a forward that no backward follows: it may leave weights gathered.
        whole = max(whole, sum(bool(weight.numel()) for weight in trainer.policy.parameters()))
        if heldout:
            margins = {row["prompt_id"]: row["margin"] for row in trainer.margins(pairs(count=3))}
    left = {name: float(tensor.double().abs().sum()) for name, tensor in trainer.engine.gathered_state().items()}
    return {
        "losses": [step["loss"] for step in history],
        "norms": [step["grad_norm"] for step in history],
        "margins": margins,
        "left": left,
        "whole": whole,
    }


def main():
    """Run the settings one after the other."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rdpo.training.deepspeed.PERSISTENT = 0
    place = folder / f"rank{torch.distributed.get_rank()}"
    place.mkdir()
    results = [steps(place=place, **one) for one in json.loads((folder / "settings.json").read_text())]
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
