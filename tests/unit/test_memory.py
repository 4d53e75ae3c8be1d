"""Memory and arithmetic of a step, predicted: rehearsed on tensors without storage, counted by hand."""

import re
from functools import partial

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from rdpo.cluster.gpus import GPUS, Gpu, gpu_of
from rdpo.config import Job, Lora, Pairs
from rdpo.errors import InputError
from rdpo.modeling.flops import Arithmetic
from rdpo.modeling.model import ForwardSettings, Tuning, as_policy, load_policy
from rdpo.modeling.packing import PairSize
from rdpo.planning.communication import bytes_sent, sent
from rdpo.planning.memory import Memory, _step_peak, heaviest, rehearse, typical_size, worker_memory
from rdpo.planning.plan import plan
from rdpo.training.backend import backend_of
from rdpo.training.deepspeed import BUCKET, layer_elements
from tests.support.adapters import adapter_on
from tests.support.jobs import valid_job


def job_of(model, place, **training):
    table = valid_job(model, place)
    return Job.model_validate({**table, "training": {**table["training"], **training}})


def test_an_adapter_that_is_trained_further_is_rehearsed(tiny_model, tmp_path):
    adapter = adapter_on(tiny_model, tmp_path / "sft", ["q_proj", "v_proj"])
    job = job_of(tiny_model, tmp_path)
    student = {"adapter": adapter, "adapter_use": "continue"}
    further = rehearse(job.model_copy(update={"student": job.student.model_copy(update=student)}))
    lora = {"rank": 4, "target_modules": ["q_proj", "v_proj"]}
    fresh = rehearse(job_of(tiny_model, tmp_path, lora=lora))
    assert (further.weights, further.trained, further.activations) == (fresh.weights, fresh.trained, fresh.activations)


def test_memory_counts_what_is_held_and_not_what_is_gone():
    held = torch.ones(1000)
    with Memory([held]) as memory:
        seen = held.view(10, 100)
        first = torch.ones(500)
        del first
        second = torch.ones(250) + 1
        assert memory.now == 1000
        assert memory.peak == 2000
    assert seen.numel() + second.numel() == 1250


@pytest.mark.parametrize(("lora", "dtype"), [(None, "float32"), (Lora(rank=4), "float32"), (Lora(rank=4), "bfloat16")])
def test_rehearsal_on_fake_tensors_takes_as_much_as_the_real_step(tiny_model, tmp_path, lora, dtype):
    job = job_of(tiny_model, tmp_path, lora=lora)
    job = job.model_copy(update={"student": job.student.model_copy(update={"dtype": dtype})})
    rehearsal = rehearse(job)
    real = load_policy(tiny_model, ForwardSettings(dtype, job.training.logprob_chunk), Tuning(lora))
    assert rehearsal.weights == sum(weight.numel() for weight in real.parameters())
    assert rehearsal.trained == sum(weight.numel() for weight in real.parameters() if weight.requires_grad)
    peak = _step_peak(real, heaviest(job, [typical_size(job)] * 4, packed=True))
    assert rehearsal.activations == pytest.approx(peak, rel=0.02)


def test_a_gpu_keeps_less_of_its_attention_than_the_cpu(tiny_model, tmp_path):
    on_cpu, on_gpu = (rehearse(job_of(tiny_model, tmp_path, gpus_per_worker=gpus)) for gpus in (0, 1))
    assert on_gpu.weights == on_cpu.weights
    assert 0.5 * on_cpu.activations < on_gpu.activations < on_cpu.activations


def test_known_lengths_take_the_place_of_the_longest(tiny_model, tmp_path):
    job = job_of(tiny_model, tmp_path)
    short, long = PairSize(5, 5, 5), PairSize(50, 60, 70)
    assert rehearse(job, [short] * 8).activations < rehearse(job, [short] * 7 + [long]).activations
    assert max(pair.packed for pair in heaviest(job, [short] * 7 + [long], packed=True)) == long.packed


def test_checkpointing_needs_less(tiny_model, tmp_path):
    usual, lean = (
        rehearse(job_of(tiny_model, tmp_path, layout=layout, gradient_checkpointing=lean))
        for layout, lean in (("padded", False), ("padded", True))
    )
    assert lean.activations < usual.activations


def test_workers_share_what_zero_partitions(tiny_model, tmp_path):
    job = job_of(tiny_model, tmp_path, zero_stage=3)
    rehearsal = rehearse(job)
    one, four = (
        worker_memory(job_of(tiny_model, tmp_path, zero_stage=3, num_workers=workers), rehearsal) for workers in (1, 4)
    )
    assert one["optimizer state"] == 8 * rehearsal.trained
    assert four["optimizer state"] == pytest.approx(2 * rehearsal.trained, abs=8)
    assert four["weights"] == pytest.approx(one["weights"] / 4, abs=1)
    offloaded = worker_memory(job_of(tiny_model, tmp_path, offload="all", gpus_per_worker=1), rehearsal)
    assert not {"weights", "optimizer state"} & offloaded.keys()


def test_weights_in_four_bits_are_counted_so(tiny_model, tmp_path):
    lora = {"lora": {"rank": 4}, "zero_stage": 1}
    plain = job_of(tiny_model, tmp_path, **lora)
    four = plain.model_copy(update={"student": plain.student.model_copy(update={"quantization": "nf4"})})
    rehearsal = rehearse(plain)
    saved = worker_memory(plain, rehearsal)["weights"] - worker_memory(four, rehearsal)["weights"]
    assert saved == pytest.approx(rehearsal.arithmetic.layers * (4 - 4.127 / 8), abs=1)


def test_arithmetic_by_hand(tiny_model):
    """Hidden 64, inner 128, two layers of two heads of 32 with one key head, 258 words."""
    layers = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 64 * 128 * 3)
    whole = Arithmetic.of(load_policy(tiny_model, ForwardSettings("float32", 64)))
    assert (whole.layers, whole.head, whole.attention, whole.frozen) == (layers, 258 * 64, 2 * 2 * 32, False)
    pair = PairSize(10, 4, 6)
    seen = 50 + 4 * 12 + 6 * 13
    assert whole.flops([pair], packed=True) == 6 * (layers * 20 + 258 * 64 * 10) + 12 * 128 * seen
    assert whole.flops([pair], packed=False) == 6 * (layers * 30 + 258 * 64 * 10) + 12 * 128 * (seen + 50)


def test_adapters_make_no_gradients_of_the_weights_under_them(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    adapted = Arithmetic.of(as_policy(model, ForwardSettings("float32", 64), Tuning(Lora(rank=2))))
    assert adapted.frozen
    assert adapted.flops([PairSize(10, 4, 6)], True) < Arithmetic.of(
        load_policy(tiny_model, ForwardSettings("float32", 64))
    ).flops([PairSize(10, 4, 6)], True)


def test_plan_says_what_does_not_fit(tiny_model, tmp_path, monkeypatch):
    job = job_of(tiny_model, tmp_path, batch_size=8)
    assert "tokens/s" not in "\n".join(plan(job, "H100", 8))
    job = job.model_copy(update={"student": job.student.model_copy(update={"dtype": "auto"})})
    lines = "\n".join(plan(job, "H100", 8))
    assert "8 x H100" in lines
    assert "tokens/s" in lines
    assert "does not fit" not in lines
    monkeypatch.setitem(GPUS, "H100", Gpu(1e12, 0.5))
    assert "does not fit" in "\n".join(plan(job, "H100", 8))
    with pytest.raises(InputError, match="--workers 9: each needs a pair"):
        list(plan(job, "H100", 9))


def test_a_plan_of_groups_counts_their_prompt_once(tiny_model, tmp_path):
    """A prompt of 600 tokens with eight answers of 100, and the seven pairs that these would make."""
    job = job_of(tiny_model, tmp_path)
    group, pairs = PairSize(600, 100, 100, (100,) * 6), [PairSize(600, 100, 100)] * 7
    assert "1,000 groups of 8 answers of 5,600 tokens" in "\n".join(plan(job, None, None, [group]))
    assert "1,000 pairs of 1,400 tokens" in "\n".join(plan(job, None, None, pairs))
    assert "1,000 groups of 2 to 8 answers" in "\n".join(plan(job, None, None, [group, *pairs]))

    arithmetic = rehearse(job).arithmetic
    assert arithmetic.flops(pairs, packed=True) > 3 * arithmetic.flops([group], packed=True)


def test_the_memory_of_a_group_is_that_of_all_its_answers(tiny_model, tmp_path):
    job = job_of(tiny_model, tmp_path)
    group, pair = PairSize(60, 30, 30, (30, 30)), PairSize(60, 30, 30)
    real = load_policy(tiny_model, ForwardSettings("float32", job.training.logprob_chunk))
    rehearsed = rehearse(job, [group]).activations
    assert rehearsed == pytest.approx(_step_peak(real, [group]), rel=0.02)
    assert rehearsed > 1.3 * rehearse(job, [pair]).activations


def test_a_plan_takes_the_number_of_answers_from_the_task(tiny_model, tmp_path):
    job = job_of(tiny_model, tmp_path)
    task = tmp_path / "four.toml"
    task.write_text('name = "four"\n\n[[turns]]\nname = "response"\nsamples = 4\n', encoding="utf-8")
    grouped = {
        "synthesis": job.synthesis.model_copy(update={"task": str(task)}),
        "pairs": Pairs(chosen="best", rejected="worst", others="rest"),
    }
    assert len(typical_size(job.model_copy(update=grouped)).answers) == 4
    assert len(typical_size(job).answers) == 2


def test_a_gpu_is_known_by_the_name_its_driver_gives_it():
    assert gpu_of("NVIDIA H100 80GB HBM3") is GPUS["H100"]
    assert gpu_of("NVIDIA A100-SXM4-40GB") is GPUS["A100"]
    assert gpu_of("NVIDIA L40S") is GPUS["L40S"]
    assert gpu_of("NVIDIA GeForce RTX 4090") is GPUS["RTX4090"]
    assert gpu_of("NVIDIA GeForce GTX 1080") is None


def test_zero_3_sends_three_times_the_weights_where_all_are_trained(tiny_model, tmp_path):
    billion, job = 10**9, job_of(tiny_model, tmp_path, zero_stage=3)
    elements = partial(backend_of(job).elements_sent, job)
    assert elements(8 * billion, 8 * billion) == 24 * billion
    assert elements(8 * billion, 0) == 16 * billion
    # A model that may stay gathered from forward to backward is sent once.
    assert elements(billion, 0) == billion
    assert bytes_sent(24 * billion, 8) == 2 * 24 * billion * 7 / 8


def test_stages_below_3_send_nothing_in_a_micro_batch(tiny_model, tmp_path):
    for stage in (0, 1, 2):
        job = job_of(tiny_model, tmp_path, zero_stage=stage)
        assert backend_of(job).elements_sent(job, 10**9, 10**9) == 0


def test_messages_take_what_the_slowest_link_lets_through():
    h100 = GPUS["H100"]
    within, beyond = (sent(1e15, 2 * 10**10, workers, h100, 5e14) for workers in (8, 16))
    assert within.products == beyond.products == 2.0
    assert within.messages == pytest.approx(4e10 * 7 / 8 / (0.8 * 450e9))
    assert beyond.messages == pytest.approx(4e10 * 15 / 16 / (0.8 * 400e9))
    assert beyond.range == (2.0, 2.0 + beyond.messages)


def test_the_plan_says_what_is_sent(tiny_model, tmp_path):
    job = job_of(tiny_model, tmp_path, zero_stage=3, batch_size=16)
    (sending,) = [line for line in plan(job, "H100", 4) if line.startswith("ZeRO-3 sends each worker")]
    assert "s of products" in sending
    assert not [line for line in plan(job, "H100", 1) if "sends" in line]


def sixteen(job, network=None):
    """What the plan says of messages on sixteen H100, as shares of the rate: the least and the most."""
    lines = list(plan(job, "H100", 16, network=network))
    (sending,) = [line for line in lines if "sends each worker" in line]
    worst, best = re.search(r"(\d+)% to (\d+)% of that rate", sending).groups()
    return int(worst), int(best), next(line for line in lines if line.startswith("between nodes"))


def test_a_slow_network_leaves_less_of_the_rate(tiny_model, tmp_path):
    """By hand: 400 GB/s reach a node of eight H100 at 3,200 Gb/s, 12.5 GB/s at 100."""
    h100 = GPUS["H100"]
    assert h100.node_gbits == pytest.approx(3200)
    assert h100.on_network(100).arriving(16) == pytest.approx(12.5e9)
    assert h100.on_network(100).arriving(8) == h100.link
    slow = sent(1e15, 2 * 10**10, 16, h100.on_network(100), 5e14)
    assert slow.messages == pytest.approx(4e10 * 15 / 16 / (0.8 * 12.5e9))
    assert slow.range == (slow.messages, 2.0 + slow.messages)

    job = job_of(tiny_model, tmp_path, zero_stage=3, batch_size=16)
    fast, tcp, slower = (sixteen(job, network) for network in (None, 100, 10))
    assert "3,200 Gb/s" in fast[2] and "100 Gb/s" in tcp[2] and "--network" in fast[2]
    assert fast[0] > tcp[0] >= slower[0] and fast[1] > slower[1]
    # Within a node it does not matter.
    eight = [list(plan(job, "H100", 8, network=network)) for network in (None, 10)]
    assert eight[0] == eight[1] and not [line for line in eight[0] if line.startswith("between nodes")]


@pytest.mark.parametrize("network", [0.0, -3.0, float("nan"), float("inf")])
def test_a_network_without_a_rate_is_refused(tiny_model, tmp_path, network):
    job = job_of(tiny_model, tmp_path, batch_size=16)
    with pytest.raises(InputError, match="gigabits a second that a node takes in"):
        list(plan(job, "H100", 16, network=network))
    with pytest.raises(InputError, match="--network: of what GPUs"):
        list(plan(job, None, None, network=10.0))


def test_a_whole_layer_is_fetched_ahead(tiny_model, tmp_path):
    """An 8B's layer has 218 million elements: a bucket of fifty is less than a quarter."""
    config = LlamaConfig(hidden_size=4096, intermediate_size=14336, num_hidden_layers=2, num_key_value_heads=8)
    with torch.device("meta"):
        large = as_policy(AutoModelForCausalLM.from_config(config), ForwardSettings("bfloat16", 64))
    assert layer_elements(large) == 4096 * (4096 * 2 + 1024 * 2 + 14336 * 3 + 2) == 218_112_000
    assert layer_elements(load_policy(tiny_model, ForwardSettings("float32", 64))) == BUCKET
    for weight in large.parameters():
        # As ZeRO-3 leaves a weight that it has partitioned.
        weight.ds_numel, weight.data = weight.numel(), torch.empty(0, device="meta")
    assert layer_elements(large) == 218_112_000
