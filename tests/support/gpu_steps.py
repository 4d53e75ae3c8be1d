"""All steps of a job whose reference stage is done, in this process; prints their losses as a list.

python -m tests.support.gpu_steps JOB_AS_JSON RUN_DIR DEVICE
"""

import json
import sys

import torch

from rdpo.config import Job
from rdpo.training.loop import PairTable, Trainer, step_pairs


def main():
    table, run_dir, device = sys.argv[1:]
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
    job, data = Job.model_validate_json(table), PairTable.load(run_dir)
    trainer, steps = Trainer(job, data, torch.device(device)), list(step_pairs(len(data), job))
    print(json.dumps([trainer.step(index, len(steps), pairs)["loss"] for index, pairs in enumerate(steps)]))


if __name__ == "__main__":
    main()
