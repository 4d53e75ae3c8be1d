"""Training steps of several jobs on every rank of one process group, ZeRO-3 with every weight partitioned.

torchrun --nproc-per-node 2 -m tests.support.partitioned_steps FOLDER, with `settings.json` in it: a list of the keyword
arguments of `steps`, or of `{"read": MODEL}` for a model that is read only. Rank 0 writes the results beside it, in
their order, as `results.json`.
"""

import json
import sys
from pathlib import Path

import torch

import rdpo.training.deepspeed
from rdpo.modeling.model import ForwardSettings
from rdpo.modeling.packing import PairSize
from rdpo.modeling.readers import FrozenModel, forward
from rdpo.modeling.weights import ModelRef
from rdpo.training.loop import PairTable
from tests.support.pairs import pairs, trainer_of

STEPS = 3
UNEVEN = (1, 5, 2, 9, 3, 3)
READ = [[[10, 20, 30], [40, 50]], [[60], [70, 80, 90]], [[11, 12], [13]]]
"""Two prompts, and two answers to each."""


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


def read(model):
    """Log-probs of a model that is read only, its layout, and how many weights this rank holds whole before."""
    frozen = FrozenModel(ModelRef(model), ForwardSettings("float32", 8), "a model")
    engine = rdpo.training.deepspeed.DeepSpeedBackend.read_only(frozen.load, "float32", torch.device("cpu"))
    whole, read_as = sum(bool(weight.numel()) for weight in engine.policy.parameters()), frozen.settle(engine.policy)
    return {"whole": whole, "layout": read_as.layout, "logps": forward(engine.policy, engine.policy.batch(*READ))}


def main():
    """Run the settings one after the other."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    rdpo.training.deepspeed.PERSISTENT = 0
    place = folder / f"rank{torch.distributed.get_rank()}"
    place.mkdir()
    settings = json.loads((folder / "settings.json").read_text())
    results = [read(one["read"]) if "read" in one else steps(place=place, **one) for one in settings]
    if torch.distributed.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
