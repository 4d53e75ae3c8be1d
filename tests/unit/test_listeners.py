"""Trackers of a run: what they are given, and that none of them ends a run."""

import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from rdpo.config import Job
from rdpo.errors import InputError
from rdpo.files.manifest import Manifest
from rdpo.tracking.console import Console, Listener
from rdpo.tracking.listeners import listening
from rdpo.tracking.listeners.figures import stage_figures, step_figures

STEPS = [{"step": number, "loss": 0.7 - 0.1 * number, "rewards/margins": 0.1 * number} for number in (1, 2)]


def evaluation():
    rate = {"mean": 0.75, "low": 0.6, "high": 0.9}
    summary = {"prompts": 8, "rewards": [{"reward": "length", "weight": 1.0, "win_rate": rate}], "kl": rate}
    manifest = Manifest("evaluation", "key", {}, {}, summary=summary, seconds=3.0)
    manifest.rows_in, manifest.rows_out, manifest.dropped = 10, 8, {"too long": 2}
    return manifest


@pytest.fixture
def console():
    return Console(io.StringIO())


@pytest.fixture
def tracked(job_table, tmp_path, console):
    """Tell the trackers that a job names what a run tells."""

    def tell(*trackers):
        job = Job.model_validate(job_table | {"tracking": {"to": list(trackers), "project": "mine"}})
        with listening(job, str(tmp_path / "run"), console):
            for metrics in STEPS:
                console.step(metrics)
            console.made(evaluation())
        return tmp_path / "run" / "logs"

    return tell


def test_figures_are_named_by_stage_and_reward():
    assert step_figures(STEPS[1]) == {"train/loss": pytest.approx(0.5), "train/rewards/margins": 0.2}
    assert stage_figures(evaluation()) == {
        "evaluation/seconds": 3.0,
        "evaluation/rows": 8.0,
        "evaluation/dropped": 2.0,
        "evaluation/prompts": 8.0,
        "evaluation/length/weight": 1.0,
        "evaluation/length/win_rate": 0.75,
        "evaluation/kl": 0.75,
    }


class Broken(Listener):
    def __init__(self):
        self.calls = 0

    def step(self, metrics):
        self.calls += 1
        raise ConnectionError("gone")


def test_a_listener_that_fails_hears_no_more_and_the_others_do(console):
    class Steady(Broken):
        def step(self, metrics):
            self.calls += 1

    broken, steady = Broken(), Steady()
    console.listeners = [broken, steady]
    for metrics in STEPS:
        console.step(metrics)
    assert (broken.calls, steady.calls) == (1, 2)
    assert console.stream.getvalue().count("warning: Broken hears no more of the run: ConnectionError: gone") == 1


def test_a_tracker_that_is_not_installed_is_said_at_once(tracked, monkeypatch):
    monkeypatch.setattr("rdpo.tracking.listeners.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"tracking\.to: wandb is not installed; pip install wandb"):
        tracked("wandb")


def test_a_tracker_that_does_not_begin_is_left_out(tracked, monkeypatch, console):
    monkeypatch.setattr("rdpo.tracking.listeners.find_spec", lambda name: True)
    monkeypatch.setattr("rdpo.tracking.listeners._maker", lambda name: lambda *_: 1 / 0)
    tracked("mlflow")
    assert "tracking.to: mlflow does not begin, the run goes on without it" in console.stream.getvalue()


def test_a_run_in_which_all_is_done_begins_no_tracker(job_table, tmp_path, console, monkeypatch):
    begun = []
    monkeypatch.setattr("rdpo.tracking.listeners.find_spec", lambda name: True)
    monkeypatch.setattr("rdpo.tracking.listeners._maker", lambda name: lambda *_: begun.append(name) or Listener())
    job = Job.model_validate(job_table | {"tracking": {"to": ["mlflow", "wandb"]}})
    with listening(job, str(tmp_path / "run"), console):
        console.say("prompts     up to date")
        assert not begun
        with console.stage("pairs", 1):
            assert begun == ["mlflow", "wandb"]
        console.made(evaluation())
    assert begun == ["mlflow", "wandb"]


def test_a_tracker_that_fails_is_called_by_its_name(tracked, monkeypatch, console):
    monkeypatch.setattr("rdpo.tracking.listeners.find_spec", lambda name: True)
    monkeypatch.setattr("rdpo.tracking.listeners._maker", lambda name: lambda *_: Broken())
    tracked("mlflow")
    assert console.stream.getvalue().count("warning: mlflow hears no more of the run: ConnectionError: gone") == 1


def test_tensorboard_has_the_curves(tracked):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tracked("tensorboard") / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (1, pytest.approx(0.6)),
        (2, pytest.approx(0.5)),
    ]
    assert events.Scalars("evaluation/length/win_rate")[0].value == 0.75


def test_mlflow_finds_a_run_that_resumes(tracked, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked("mlflow")
    tracked("mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.data.metrics["train/loss"] == pytest.approx(0.5)
    assert run.data.params["tracking.project"] == "mine"
    assert run.info.status == "FINISHED"


def test_wandb_keeps_a_run_for_later_where_it_is_offline(tracked, monkeypatch, console):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logs = tracked("wandb")
    assert list(logs.glob("wandb/offline-run-*/*.wandb"))
    assert "does not begin" not in console.stream.getvalue()


def test_trackio_finds_a_run_that_resumes(tracked, tmp_path, monkeypatch, console):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    tracked("trackio")
    tracked("trackio")
    assert "warning" not in console.stream.getvalue()
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("mine")
    assert name.startswith("tiny-")
    logs = SQLiteStorage.get_logs("mine", name)
    losses = [(row["step"], row["train/loss"]) for row in logs if "train/loss" in row]
    assert losses == 2 * [(1, pytest.approx(0.6)), (2, pytest.approx(0.5))]
    assert [row["evaluation/length/win_rate"] for row in logs if "evaluation/rows" in row] == [0.75, 0.75]


@pytest.fixture
def collector(monkeypatch):
    """The spans that a collector of OpenTelemetry on loopback has been sent."""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["content-length"])))
            for of_resource in body.resource_spans:
                (service,) = (
                    one.value.string_value for one in of_resource.resource.attributes if one.key == "service.name"
                )
                spans.extend((service, span) for scope in of_resource.scope_spans for span in scope.spans)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    yield spans
    server.shutdown()
    server.server_close()


TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def test_a_run_is_a_trace_with_a_span_for_each_stage(job_table, tmp_path, console, collector, monkeypatch):
    monkeypatch.setenv("TRACEPARENT", f"00-{TRACE}-{CALLER}-01")
    job = Job.model_validate(job_table | {"tracking": {"to": ["opentelemetry"], "project": "mine"}})
    with listening(job, str(tmp_path / "run"), console):
        with console.stage("synthesis+rewards", 4):
            pass
        console.made(Manifest("synthesis", "key", {}, {}, seconds=5.0))
        console.made(Manifest("rewards", "key", {}, {}, seconds=5.0))
        with console.stage("training", 8):
            pass
        # Training fails; the evaluation, which nobody watched, is told of when it is finished.
        console.made(evaluation())

    assert {service for service, _ in collector} == {"mine"}
    spans = {span.name: span for _, span in collector}
    assert set(spans) == {"rdpo tiny", *(f"rdpo {name}" for name in ("synthesis", "rewards", "training", "evaluation"))}
    run = spans.pop("rdpo tiny")
    assert (run.trace_id.hex(), run.parent_span_id.hex()) == (TRACE, CALLER)
    assert {span.parent_span_id for span in spans.values()} == {run.span_id}
    failed = [name for name, span in spans.items() if span.status.code == span.status.STATUS_CODE_ERROR]
    assert failed == ["rdpo training"]

    told = spans["rdpo evaluation"]
    assert told.end_time_unix_nano - told.start_time_unix_nano == pytest.approx(3e9, rel=0.1)
    values = {one.key: one.value.double_value for one in told.attributes}
    assert (values["rdpo.evaluation.length.win_rate"], values["rdpo.evaluation.dropped"]) == (0.75, 2.0)


def test_what_opentelemetry_lacks_is_named_by_its_package(tracked, monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr("rdpo.tracking.listeners.find_spec", absent)
    with pytest.raises(InputError, match="pip install opentelemetry-exporter-otlp-proto-http"):
        tracked("opentelemetry")
