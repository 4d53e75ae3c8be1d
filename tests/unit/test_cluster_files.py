"""The files for clusters: valid by Ray's, Kubernetes's and the linters' own schemas, and of one mind about nodes."""

import json
import os
import tomllib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rdpo.config import Job
from tests.support.linters import linted

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
KINDS = {"teacher", "reward", "trainer"}
CLOUDS = ("aws", "gcp")
KUBERNETES = "1.34"
# Fields of ray.io/v1 as KubeRay 1.5.1's API reference lists them (its CRDs are not in any package); pods are checked
# against Kubernetes's own schema.
RAY_JOB = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
RAY_CLUSTER = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
HEAD_GROUP = {"resources", "labels", "rayStartParams", "template"}
WORKER_GROUP = HEAD_GROUP | {"groupName", "replicas", "minReplicas", "maxReplicas"}


@pytest.fixture(params=CLOUDS)
def cloud(request):
    return yaml.safe_load((CLUSTER / f"{request.param}.yaml").read_text(encoding="utf-8"))


def test_ray_takes_the_files_for_ray_up(cloud):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(cloud)
    validate_config(prepared)
    assert prepared["docker"]["container_name"]
    with pytest.raises(Exception, match="node_typo"):
        validate_config({**prepared, "node_typo": {}})


def test_nodes_of_each_kind_declare_it_and_scale_as_they_should(cloud):
    types = cloud["available_node_types"]
    assert {name: KINDS & set(node["resources"]) for name, node in types.items()} == {
        "head": set(),
        **{kind: {kind} for kind in KINDS},
    }
    sizes = {kind: (types[kind]["min_workers"], types[kind]["max_workers"]) for kind in KINDS}
    assert (sizes["teacher"][0], sizes["reward"][0]) == (0, 0)
    assert sizes["trainer"][0] == sizes["trainer"][1] > 0
    assert cloud["max_workers"] == sum(largest for _, largest in sizes.values())


def image_of(node):
    disks = node.get("disks", [{}])
    return node.get("ImageId") or disks[0].get("initializeParams", {}).get("sourceImage")


def test_every_machine_names_its_image(cloud):
    """Ray's own choice for AWS is of 2023, with a driver that torch 2.13 does not run on."""
    types = cloud["available_node_types"]
    assert all(image_of(node["node_config"]) for node in types.values())


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_a_token_for_gated_models_has_its_line(name):
    text = (CLUSTER / f"{name}.yaml").read_text(encoding="utf-8")
    assert "# /home/ray/.cache/huggingface/token: ~/.cache/huggingface/token" in text


def test_no_two_packages_of_the_gpu_lock_hold_the_same_files():
    """cuda-python below 13 brings the files of cuda-bindings, of its own version."""
    lock = (CLUSTER / "locks" / "gpu.lock").read_text(encoding="utf-8").split()
    versions = dict(line.split("==") for line in lock if "==" in line)
    assert int(versions["cuda-python"].split(".")[0]) >= 13
    assert versions["cuda-python"].split(".")[:2] == versions["cuda-bindings"].split(".")[:2]


def test_the_gpu_lock_has_all_that_its_packages_need():
    """It is installed without dependencies, so one that is not named is missing; optional ones aside."""
    lock = (CLUSTER / "locks" / "gpu.lock").read_text(encoding="utf-8").split()
    locked = {canonicalize_name(line.split("==")[0].split("[")[0]) for line in lock if "==" in line}
    missing = set()
    for name in locked:
        # What is made for GPUs alone is not installed where this runs.
        with suppress(PackageNotFoundError):
            needed = [Requirement(line) for line in requires(name) or []]
            plain = [one for one in needed if not one.marker or one.marker.evaluate({"extra": ""})]
            wanted = {canonicalize_name(one.name) for one in plain}
            missing |= {(name, other) for other in wanted - locked}
    assert not missing
    project = tomllib.loads((CLUSTER.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    assert own <= locked


def is_spot(node):
    asked = {key: value for entry in node.get("scheduling", []) for key, value in entry.items()}
    return node.get("InstanceMarketOptions", {}).get("MarketType") == "spot" or bool(asked.get("preemptible"))


def test_only_teachers_are_spot(cloud):
    types = cloud["available_node_types"]
    assert {name for name, node in types.items() if is_spot(node["node_config"])} == {"teacher"}


def test_the_token_is_asked_for_and_the_dashboard_stays_on_loopback(cloud):
    assert cloud["file_mounts"] == {"/home/ray/.ray/auth_token": "~/.ray/auth_token"}
    head, worker = (cloud[f"{role}_start_ray_commands"][-1] for role in ("head", "worker"))
    assert "RAY_AUTH_MODE=token ray start --head" in head
    assert "--dashboard-host=127.0.0.1" in head
    assert "RAY_AUTH_MODE=token ray start --address=$RAY_HEAD_IP" in worker


def manifest(name):
    return yaml.safe_load((CLUSTER / "kuberay" / f"{name}.yaml").read_text(encoding="utf-8"))


@pytest.fixture(params=["raycluster", "rayjob"])
def ray_cluster_spec(request):
    table = manifest(request.param)
    assert table["apiVersion"] == "ray.io/v1"
    if request.param == "rayjob":
        assert set(table["spec"]) <= RAY_JOB
        return table["spec"]["rayClusterSpec"]
    return table["spec"]


def test_kuberay_fields_are_known(ray_cluster_spec):
    assert set(ray_cluster_spec) <= RAY_CLUSTER
    assert set(ray_cluster_spec["headGroupSpec"]) <= HEAD_GROUP
    for group in ray_cluster_spec["workerGroupSpecs"]:
        assert set(group) <= WORKER_GROUP
    assert ray_cluster_spec["authOptions"] == {"mode": "token"}
    assert ray_cluster_spec["enableInTreeAutoscaling"]


def test_pods_have_room_for_models_and_the_token_for_gated_ones(ray_cluster_spec):
    for group in (ray_cluster_spec["headGroupSpec"], *ray_cluster_spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        assert {"name": "cache", "mountPath": "/home/ray/.cache"} in container["volumeMounts"]
        (claim,) = [volume["ephemeral"] for volume in pod["volumes"] if volume["name"] == "cache"]
        assert claim["volumeClaimTemplate"]["spec"]["resources"]["requests"]["storage"] == "500Gi"
        (token,) = container["env"]
        assert token["name"] == "HF_TOKEN" and token["valueFrom"]["secretKeyRef"]["optional"]


def test_pods_are_valid(ray_cluster_spec):
    for group in (ray_cluster_spec["headGroupSpec"], *ray_cluster_spec["workerGroupSpecs"]):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, **group["template"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)


def test_ray_reads_the_kinds_out_of_the_kuberay_manifests(ray_cluster_spec):
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    derived = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "rdpo", "namespace": "default"}, "spec": ray_cluster_spec}
    )
    types = derived["available_node_types"]
    assert types["headgroup"]["resources"]["CPU"] == 8
    for kind in KINDS:
        assert types[kind]["resources"][kind] == 1
        assert types[kind]["resources"]["GPU"] in (4, 8)
    assert (types["teacher"]["min_workers"], types["reward"]["min_workers"]) == (0, 0)
    assert types["trainer"]["min_workers"] == types["trainer"]["max_workers"] == 2


def test_both_kuberay_manifests_describe_one_cluster():
    assert manifest("rayjob")["spec"]["rayClusterSpec"] == manifest("raycluster")["spec"]


def test_the_job_for_several_nodes_fits_the_nodes_that_the_files_start(cloud, ray_cluster_spec):
    from rdpo.cluster.placement import Nodes, check_room
    from rdpo.stages.pools import pools_of

    table = tomllib.loads((ROOT / "jobs" / "safety_nodes.toml").read_text(encoding="utf-8"))
    job = Job.model_validate(table)
    assert set(job.cluster.placement.model_dump().values()) == KINDS
    started = [
        node["resources"] for node in cloud["available_node_types"].values() for _ in range(node.get("max_workers", 1))
    ]
    check_room(pools_of(job), Nodes(started))


def test_shell_scripts_are_clean():
    linted("shellcheck", str(CLUSTER / "local.sh"), str(CLUSTER / "slurm.sbatch"))
    assert os.access(CLUSTER / "local.sh", os.X_OK)


@pytest.mark.parametrize("machine", ["cpu", "gpu"], ids=["for CPUs", "for GPUs"])
def test_dockerfiles_are_clean_and_of_the_locked_ray(machine):
    dockerfile = CLUSTER / f"{machine}.Dockerfile"
    linted("hadolint", str(dockerfile))
    lines = (CLUSTER / "locks" / f"{machine}.lock").read_text(encoding="utf-8").splitlines()
    version = next(line for line in lines if line.startswith("ray==")).removeprefix("ray==")
    assert f"FROM rayproject/ray:{version}-py311-{machine}" in dockerfile.read_text(encoding="utf-8")
    assert manifest("raycluster")["spec"]["rayVersion"] == version


def test_what_is_submitted_is_code_alone(tmp_path):
    from ray._private.runtime_env.packaging import create_package

    environment = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text(encoding="utf-8"))
    for name in ("rdpo/cli.py", "jobs/safety.toml", ".venv/lib/big.so", "runs/x/model/w.safetensors", ".git/objects/1"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_text(name)
    package = tmp_path / "package.zip"
    create_package(str(tmp_path / "tree"), package, include_gitignore=False, excludes=environment["excludes"])
    files = [name for name in zip_names(package) if not name.endswith("/")]
    assert sorted(files) == ["jobs/safety.toml", "rdpo/cli.py"]


def zip_names(path):
    from zipfile import ZipFile

    with ZipFile(path) as package:
        return package.namelist()


def test_grafanas_own_model_knows_every_field_of_the_dashboard():
    from grafana_foundation_sdk.cog.encoder import JSONEncoder
    from grafana_foundation_sdk.models.dashboard import Dashboard

    written = json.loads((CLUSTER / "observe" / "grafana.json").read_text(encoding="utf-8"))

    def read(dashboard):
        return json.loads(JSONEncoder().encode(Dashboard.from_json(dashboard)))

    assert holds(read(written), written)
    assert not holds(read({**written, "gauges": []}), {**written, "gauges": []})


def holds(whole, part):
    """Whether all of `part` is in `whole`, which may have defaults besides."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(name in whole and holds(whole[name], part[name]) for name in part)
    if isinstance(part, list):
        return len(whole) == len(part) and all(map(holds, whole, part))
    return whole == part
