"""What a worker gets of a machine."""

from rdpo.cluster import hardware
from rdpo.config import Training


def test_cores_of_a_worker_are_its_share_unless_the_job_says_so(monkeypatch):
    monkeypatch.setattr(hardware, "available_cores", lambda: list(range(8)))
    cores = [hardware.worker_cores(Training(**settings)) for settings in ({}, {"num_workers": 3}, {"num_workers": 16})]
    assert cores == [8, 2, 1]
    assert hardware.worker_cores(Training(gpus_per_worker=1)) == 1
    assert hardware.worker_cores(Training(gpus_per_worker=1, cpus_per_worker=4)) == 4
