"""The least that the training loop needs of an engine: plain torch in one process, without DeepSpeed."""

import math

import torch

from rdpo.modeling.student import student_forward


class PlainBackend:
    """A policy and AdamW, see `rdpo.training.backend.Backend`; a checkpoint is one file."""

    def __init__(self, policy, training=None):
        self.policy = policy
        if training is None:
            return
        self.limit = training.max_grad_norm
        self.trained = [weight for weight in policy.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=training.weight_decay)

    @classmethod
    def build(cls, job, device, converted=False):
        return cls(student_forward(job, to_train=True).to(device).train(), job.training)

    @classmethod
    def read_only(cls, load, dtype, device):
        return cls(load().to(device))

    def forward(self, batch):
        return self.policy(batch)

    def backward(self, loss, last):
        loss.backward()

    def step(self):
        norm = float(torch.nn.utils.clip_grad_norm_(self.trained, self.limit or math.inf))
        if math.isfinite(norm):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return norm if math.isfinite(norm) else math.inf

    def set_lr(self, rate):
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def set_training(self, active):
        self.policy.train(active)

    def save(self, folder, state):
        own = {"policy": self.policy.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save({**own, "state": dict(state)}, folder / "plain.pt")

    def load(self, folder):
        saved = torch.load(folder / "plain.pt")
        self.policy.load_state_dict(saved["policy"])
        self.optimizer.load_state_dict(saved["optimizer"])
        return saved["state"]

    @staticmethod
    def fits(folder, workers):
        return workers == 1

    @staticmethod
    def convert(source, target):
        raise RuntimeError("one process has nothing to convert")

    def gathered_state(self):
        named = self.policy.model.named_parameters()
        return {
            name: weight.detach().clone() for name, weight in named if weight.requires_grad or not self.policy.adapted
        }

    @staticmethod
    def name_of(job):
        return "plain"

    @staticmethod
    def elements_sent(job, weights, trained):
        return 0

    @staticmethod
    def memory_parts(job, weights):
        return {"weights": weights.size, "optimizer state": 8 * weights.trained, "gradients": 4 * weights.trained}

    @staticmethod
    def offloaded_parts(job, weights):
        return {}
