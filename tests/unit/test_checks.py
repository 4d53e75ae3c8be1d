"""What is asked of nodes before models load: whether their cards and their tokens will do."""

import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled, RepositoryNotFoundError
from transformers import AutoConfig

from rdpo.cluster.placement import Nodes
from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.modeling import hub
from rdpo.stages.checks import check_access, check_heads, models_by_kind
from tests.support.asked import Cluster

PLACEMENT = {"teacher": "a", "reward": "b", "trainer": "c"}


@pytest.fixture
def job_of(job_table):
    def job_of(layout="auto", dtype="float32", reference=0, gpus=1, **changes):
        table = {**job_table, **changes}
        table["student"] = {**table["student"], "dtype": dtype}
        table["training"] = {**table["training"], "layout": layout, "gpus_per_worker": gpus}
        table["reference"] = {**table["reference"], "gpus": reference}
        return Job.model_validate(table)

    return job_of


@pytest.fixture
def wide_heads(monkeypatch):
    """The student's configuration has heads of 256."""
    load = AutoConfig.from_pretrained

    def loaded(*given, **options):
        config = load(*given, **options)
        config.head_dim = 256
        return config

    monkeypatch.setattr(AutoConfig, "from_pretrained", loaded)


def cards(*names, kind="c"):
    return Nodes([{"CPU": 8.0, "GPU": 1.0, kind: 1.0, f"accelerator_type:{name}": 1.0} for name in names])


def test_cards_are_known_by_rays_names_for_them():
    shared = {name: gpu.shared >> 10 for name, gpu in cards("A10G", "A100-40G", "H100", "V100", "L40S").cards().items()}
    assert shared == {"A10G": 99, "A100-40G": 163, "H100": 227, "L40S": 99}
    assert cards("H100").cards("b") == {} and list(cards("H100").cards("c")) == ["H100"]


def test_heads_too_wide_for_the_cards_that_train_are_refused_before_models_load(job_of, wide_heads):
    said = r"training\.layout = 'packed': .* on L4: heads of 256 in float32 .* 99 KiB .*layout = .padded."
    with pytest.raises(InputError, match=said):
        check_heads(job_of("packed"), cards("H100", "L4"))
    # A reference on the CPU does not find out what the cards can do.
    with pytest.raises(InputError, match="'auto'"):
        check_heads(job_of("auto"), cards("L4"))
    for job in (job_of("padded"), job_of("auto", reference=1), job_of("packed", gpus=0)):
        check_heads(job, cards("L4"))
    check_heads(job_of("packed"), cards("H100", "A100-80G", "V100"))
    placed = job_of("packed", cluster={"placement": PLACEMENT})
    check_heads(placed, cards("L4", kind="a"))
    with pytest.raises(InputError, match="on L4"):
        check_heads(placed, cards("L4", kind="c"))


def test_models_by_the_nodes_that_load_them(job_of, job_table):
    rewards = [
        {"kind": "classifier", "name": "rm", "model": "own/rm@v2"},
        {"kind": "judge", "name": "judge", "rubric": "{{ answer }}"},
        *job_table["rewards"],
    ]
    synthesis = {**job_table["synthesis"], "teacher": "own/teacher"}
    job_table["student"]["model"] = "own/student"
    job = job_of(rewards=rewards, synthesis=synthesis, cluster={"placement": PLACEMENT})
    names = {kind: {name.split("@")[0] for name, _ in models} for kind, models in models_by_kind(job).items()}
    assert names == {"c": {"own/student"}, "a": {"own/student", "own/teacher"}, "b": {"own/rm"}}
    assert set(models_by_kind(job_of())) == {None}


def test_a_folder_that_is_named_like_a_model_of_the_hub_is_not_asked_for(job_of, job_table, tmp_path, monkeypatch):
    (tmp_path / "models" / "own").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    job_table["student"]["model"] = "models/own"
    assert models_by_kind(job_of()) == {}


def test_a_node_that_the_hub_refuses_a_model_is_named(job_of, job_table, monkeypatch):
    asked = []
    monkeypatch.setattr(hub, "unreadable", lambda models: asked.append(models) or ["meta/gated"] * (len(asked) == 1))
    job_table["student"]["model"] = "meta/gated"
    job = job_of(cluster={"placement": PLACEMENT})
    check_access(job, Cluster(a=1))
    assert not asked
    with pytest.raises(InputError, match=r"node c, cccccccc: the hub does not let it have meta/gated; .*HF_TOKEN"):
        check_access(job, Cluster(a=1, b=1, c=1))


def test_what_the_hub_refuses_and_what_it_does_not_say(monkeypatch, tiny_model):
    class Answer:
        headers, request, status_code = {}, None, 403

    errors = {
        "own/gated": lambda: GatedRepoError("gated", response=Answer()),
        "own/hidden": lambda: RepositoryNotFoundError("hidden", response=Answer()),
        "own/offline": lambda: OfflineModeIsEnabled("offline"),
        "own/away": lambda: ConnectionError("away"),
    }

    def auth_check(self, name, **options):
        if name in errors:
            raise errors[name]()

    monkeypatch.setattr(HfApi, "auth_check", auth_check)
    models = [(name, None) for name in (*errors, "own/open", tiny_model)]
    assert hub.unreadable(models) == ["own/gated", "own/hidden"]
    monkeypatch.setattr(hub, "_cached", lambda *given: {"model.safetensors": "x"})
    assert hub.unreadable(models) == []


def test_the_student_of_the_tests_has_heads_that_any_card_takes(job_of):
    check_heads(job_of("packed", dtype="bfloat16"), cards("L4"))
    assert torch.bfloat16.itemsize == 2
