"""What is asked of DeepSpeed, torch and Ray for GPUs, as far as a machine without one can see it."""

from types import SimpleNamespace

import pytest

from rdpo.cluster.hardware import ALLOCATOR
from rdpo.config import Job, Training
from rdpo.modeling import attention
from rdpo.preference.reference import reference_pool
from rdpo.preference.rewards.function import without_gpus
from rdpo.training.deepspeed import zero_config
from rdpo.training.trainer import GROUP_PATIENCE_S, _torch_trainer


@pytest.mark.parametrize(("resources", "hidden"), [({"CPU": 2.0, "GPU": 1.0}, True), ({"CPU": 2.0}, False)])
def test_a_reward_function_sees_no_gpu_that_others_have(monkeypatch, resources, hidden):
    monkeypatch.setattr("ray.is_initialized", lambda: True)
    monkeypatch.setattr("ray.cluster_resources", lambda: resources)
    environment = without_gpus().get("runtime_env", {}).get("env_vars", {})
    assert environment == ({"CUDA_VISIBLE_DEVICES": ""} if hidden else {})


@pytest.mark.parametrize(("gpus", "fused"), [(1, True), (0, None)])
def test_adamw_is_one_kernel_on_gpus(gpus, fused):
    parameters = zero_config(Training(gpus_per_worker=gpus), "bfloat16")["optimizer"]["params"]
    assert parameters.get("fused") is fused


@pytest.mark.parametrize(
    ("stage", "dtype", "summed"), [(3, "bfloat16", "fp32"), (2, "bfloat16", None), (3, "float32", None)]
)
def test_small_gradients_are_summed_in_float32_where_the_checkpoint_stays_the_same(stage, dtype, summed):
    config = zero_config(Training(zero_stage=stage), dtype)
    assert config.get("data_types", {}).get("grad_accum_dtype") == summed


def test_attention_that_is_compiled_too_often_fails_and_does_not_go_on_uncompiled():
    import torch._dynamo

    compiled = torch.compile(lambda value: value + 1, backend="eager", dynamic=False)
    with attention._compiled_or_refused(), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        for length in range(1, attention.SHAPES_COMPILED + 3):
            compiled(torch.ones(length))
    torch._dynamo.reset()


def test_the_watchdog_speaks_before_the_process_group_ends(job_table, tmp_path, monkeypatch):
    monkeypatch.setattr("ray.nodes", lambda: [{}])
    job_table["training"] |= {"hang_after_s": 7200, "gpus_per_worker": 1}
    folder = SimpleNamespace(root=str(tmp_path), on_disk=True)
    trainer = _torch_trainer(Job.model_validate(job_table), str(tmp_path), folder, None)
    assert trainer.backend_config.timeout_s == 7200 + GROUP_PATIENCE_S
    assert trainer.backend_config.backend == "nccl"
    assert trainer.run_config.worker_runtime_env["env_vars"][ALLOCATOR] == "expandable_segments:True"


def test_blocks_of_a_gpus_memory_grow_in_place(job_table, monkeypatch):
    monkeypatch.delenv(ALLOCATOR, raising=False)
    job_table["reference"] |= {"gpus": 1}
    assert reference_pool(Job.model_validate(job_table)).environment == {ALLOCATOR: "expandable_segments:True"}
    job_table["reference"] |= {"gpus": 0}
    assert reference_pool(Job.model_validate(job_table)).environment == {}
