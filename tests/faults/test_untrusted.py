"""Models, data, names and servers that mean harm: nothing of theirs is run, followed or printed as it stands."""

import ast
import asyncio
import io
import json
import os
import pickle
import shutil
import threading
import tomllib
from contextlib import redirect_stdout
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from aiohttp import web

from rdpo.cli import main
from rdpo.config import ClassifierReward, Job, Student, load_job
from rdpo.errors import InputError
from rdpo.evaluation.publish import model_card
from rdpo.execution.pipeline import locked, run_stages
from rdpo.execution.reader import JOB_FILE
from rdpo.execution.run import Run
from rdpo.execution.stage import Stage
from rdpo.experiments.comparison import load_comparison
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.inspection.show import show_rows
from rdpo.modeling.chat import load_chat
from rdpo.modeling.model import ForwardSettings, load_policy
from rdpo.modeling.weights import ModelRef, _model_of_name, local_adapter, local_model, model_config
from rdpo.preference.rewards.classifier_input import checked_classifier
from rdpo.preference.rewards.function import load_function
from rdpo.report.report import write_report
from rdpo.stages.checks import prepare
from rdpo.stages.table import stages_of
from rdpo.synthesis.instructions import render
from rdpo.synthesis.prompts import prompt_row
from rdpo.tracking.console import Console, quiet_console
from tests.support.chat_server import Server, ask, completion
from tests.support.jobs import write_job

HOSTILE = (
    '"><script>alert(1)</script><img src=x onerror=alert(2)>\x1b[31m\x9b2J\u202egnp.exe\x00'
    " `{{ 7 * 7 }}` [x](javascript:0)"
)


class Trap:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (os.mkdir, (self.path,))


@pytest.fixture
def sprung(tmp_path):
    return tmp_path / "sprung"


@pytest.fixture
def model(tiny_model, tmp_path):
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# (a) models


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin"])
def test_pickled_weights_are_not_loaded_even_beside_others(model, sprung, name):
    (model / "model.safetensors").unlink()
    (model / name).write_bytes(pickle.dumps(Trap(sprung)))
    with pytest.raises(InputError, match="pickled weights are not loaded"):
        local_model(str(model))
    (model / "decoy.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    _model_of_name.cache_clear()
    with pytest.raises(OSError):
        load_policy(local_model(str(model)), ForwardSettings("float32", 16))
    assert not sprung.exists()


def test_pickled_weights_of_an_adapter_are_not_loaded(tmp_path, sprung):
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text('{"r": 4}')
    torch.save({"w": Trap(sprung)}, folder / "adapter_model.bin")
    (folder / "decoy.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"adapter_model\.safetensors"):
        local_adapter(str(folder))
    assert not sprung.exists()


def test_an_adapter_of_safetensors_is_found(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 4}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    assert local_adapter(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="no adapter_config"):
        local_adapter(str(tmp_path / "nothing"))


def test_a_model_folder_cannot_name_another_model(model):
    (model / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "someone/else"}')
    with pytest.raises(InputError, match="merge it into its model first"):
        local_model(str(model))


def with_code(model, sprung):
    """The model folder with code of its own, under a type that transformers does not know."""
    auto = {"AutoConfig": "code.Own", "AutoModelForCausalLM": "code.Own", "AutoTokenizer": ["code.Own", None]}
    edit(model / "config.json", model_type="own", auto_map=auto, architectures=["OwnForSequenceClassification"])
    edit(model / "tokenizer_config.json", auto_map=auto, tokenizer_class="Own")
    (model / "code.py").write_text(f"import os\nos.mkdir({str(sprung)!r})\n")
    return str(model)


def test_code_that_ships_with_a_model_is_neither_run_nor_asked_about(model, sprung, monkeypatch):
    name = with_code(model, sprung)
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    for attempt in (
        lambda: model_config(name),
        lambda: load_chat(ModelRef(name)),
        lambda: checked_classifier(ClassifierReward(kind="classifier", name="r", model=name)),
    ):
        with pytest.raises(InputError, match=r"needs Python code that ships with it; student\.trust_remote_code"):
            attempt()
    with pytest.raises(ValueError, match="trust_remote_code"):
        load_policy(name, ForwardSettings("float32", 16))
    assert not sprung.exists()


def is_open(call):
    """Whether a call leaves it to transformers to ask whether code may be run; these two never run any."""
    loads = isinstance(call.func, ast.Attribute) and call.func.attr == "from_pretrained"
    says = {keyword.arg for keyword in call.keywords} & {"trust_remote_code", None}
    return loads and not says and ast.unparse(call.func.value) not in ("GenerationConfig", "PeftModel")


def test_no_module_of_ours_leaves_the_question_of_trust_to_transformers():
    """Left out, transformers asks on the terminal, and runs the code on `y`."""
    for path in (Path(__file__).parents[2] / "rdpo").rglob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        assert [(path.name, call.lineno) for call in calls if is_open(call)] == []


def test_trust_and_revision_are_the_students_alone(job_table):
    job_table["student"] |= {"trust_remote_code": True, "revision": "abc"}
    job = Job.model_validate(job_table)
    assert job.model_or_student(None) == ModelRef.student(job) == (job.student.model, "abc", True, None)
    assert job.model_or_student("other/model") == ModelRef.of(job, "other/model") == ("other/model", None, False, None)
    assert Student(model="x").trust_remote_code is False


def test_trust_is_reported_on_the_console_once(job_table, tmp_path):
    job_table["student"]["trust_remote_code"] = True
    job_table["evaluation"]["engine"]["options"] = {"trust_remote_code": True}
    stream = io.StringIO()
    run = Run(Job.model_validate(job_table), str(tmp_path), Console(stream), lambda *_: False)
    stages = [
        Stage(name, (), lambda job: {}, lambda run, folder, meter: {}, id_column=None)
        for name in ("training", "policy")
    ]
    run_stages(run, stages)
    assert run.prepared and not run.streams
    lines = [line for line in stream.getvalue().splitlines() if "warning" in line]
    warned = [line.strip().split(":")[:2] for line in lines]
    assert warned == [
        ["warning", f" {key}"] for key in ("student.trust_remote_code", "evaluation.engine.options.trust_remote_code")
    ]


# (b) templates


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ prompt.format.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(prompt) }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ ().__class__.__base__.__subclasses__() }}",
    "{{ prompt|attr('__class__') }}",
    "{% set x = [].append(1) %}",
    "{{ range(10 ** 7)|list }}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("template", ESCAPES)
def test_no_template_of_a_task_leaves_the_sandbox(template):
    try:
        text = render(template, {"prompt": "p"})
    except ValueError:
        return
    assert text in ("", "None")


@pytest.mark.parametrize("template", ESCAPES)
def test_no_chat_template_of_a_model_leaves_the_sandbox(model, template):
    (model / "chat_template.jinja").write_text(template.replace("prompt", "messages[0]['content']"))
    edit(model / "tokenizer_config.json", chat_template=template)
    try:
        chat = load_chat(ModelRef(str(model)))
    except InputError as refusal:
        assert "its chat template fails" in str(refusal)
    else:
        assert chat.tokenizer.decode(chat.prompt_ids([{"role": "user", "content": "p"}])) in ("", "None")


# (c) pages, cards and terminals


class Tags(HTMLParser):
    """The tags and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def handle_starttag(self, tag, attributes):
        self.found |= {tag, *(name for name, _ in attributes)}


@pytest.fixture
def hostile_run(job_table, tmp_path):
    """A run whose every text means harm, as far as the pairs."""
    folder = tmp_path / "run"
    folder.mkdir()
    job_table["student"]["model"] = HOSTILE.replace("\x00", "")
    write_job(folder / JOB_FILE, job_table)
    row = {"prompt_id": f"[red]{HOSTILE}[/red][link=http://x]", "prompt": [{"role": "user", "content": HOSTILE}]}
    texts = {"response": HOSTILE, "response_finish_reason": "stop", "extra": json.dumps({"x": HOSTILE})}
    rows = [{**row, **texts, "dropped": None}, {**row, "prompt_id": "long", **texts, "response": "x" * 1_000_000}]
    rows += [{**row, "prompt_id": f"lost {number}", "dropped": f"{number} {HOSTILE}"} for number in range(300)]
    stage = StageFolder(str(folder), "synthesis")
    stage.begin("k")
    for row in rows:
        stage.write_parts(pa.Table.from_pylist([{"dropped": None, **row}]), "prompt_id")
    stage.commit(Manifest("synthesis", "k", {}, {}, versions={"v": HOSTILE}), "prompt_id")
    return str(folder)


def test_a_report_of_hostile_texts_is_a_page_of_text(hostile_run):
    page = Path(write_report(hostile_run)).read_text()
    tags = Tags()
    tags.feed(page)
    assert not {"img", "onerror", "src", "iframe", "object", "form"} & tags.found
    assert page.count("<script") == 1
    assert not any(character in page for character in "\x1b\x9b\u202e\x00")
    assert "&lt;script&gt;" in page and "49" not in page.split("<body>")[1].split("</h1>")[0]
    assert "default-src 'none'" in page
    assert "200 other reasons" in page
    assert len(page) < 400_000


@pytest.mark.parametrize("dropped", [True, False])
def test_rows_in_the_terminal_cannot_write_to_it(hostile_run, dropped, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")
    stream = io.StringIO()
    with redirect_stdout(stream):
        show_rows(hostile_run, "synthesis", None, 3, dropped)
    output = stream.getvalue()
    assert not any(character in output for character in "\x1b\x9b\u202e\x00\r")
    assert "\\u001b[31m" in output and "\\u202e" in output
    assert dropped or "[link=http://x]" in output


def test_console_and_log_cannot_be_written_to_by_a_reason(tmp_path):
    with quiet_console(tmp_path / "logs") as console:
        console.stream = io.StringIO()
        console.say(f"dropped 1: {HOSTILE}")
        console.log(HOSTILE)
        output = console.stream.getvalue() + (tmp_path / "logs" / "run.log").read_text()
    assert not any(character in output for character in "\x1b\x9b\u202e\x00")


@pytest.mark.parametrize("override", [f"{HOSTILE}=1", f"name={HOSTILE}", f"training.{HOSTILE}=1", "a=\udc9b"])
def test_messages_cannot_write_to_the_terminal(job_table, tmp_path, capsys, override):
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--dry-run", "--set", override]) == 2
    output = capsys.readouterr().err
    assert not any(character in output for character in "\x1b\x9b\u202e\x00\udc9b")


def test_a_resolved_job_on_the_screen_cannot_write_to_it_and_stays_one(job_table, tmp_path, capsys):
    job_table["prompts"]["system"] = HOSTILE
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 0
    output = capsys.readouterr().out
    assert not any(character in output for character in "\x1b\x9b\u202e\x00")
    assert Job.model_validate(tomllib.loads(output)).prompts.system == HOSTILE


def test_a_model_card_holds_hostile_names_as_code(job_table):
    name = "x`</code>\n\n# Free money\n<script>alert(1)</script> | [x](javascript:0) ``"
    job_table["student"]["model"] = job_table["prompts"]["source"] = name
    job_table["publish"] = {"license": 'mit"\nother: x'}
    job_table["synthesis"]["endpoint"] = {"url": "http://t/v1", "model": f"served {name}"}
    evaluation = {"prompts": 1, "rewards": [], "kl": None}
    card = model_card(
        Job.model_validate(job_table), {"version": "1", "evaluation": evaluation, "pairs": 1, "lineage": {}}
    )
    front, body = card.split("---\n")[1:3]
    assert "other: x" not in front.splitlines()
    assert "# Free money" not in body.splitlines()
    # Three back ticks are more than any that stand in the name.
    assert f"``` {name}".replace("\n", " ").replace("|", "\\|") in body
    assert "served x" in body


# (d) names


def test_no_name_in_a_job_leads_out_of_the_run(job_table, tmp_path, capsys):
    path = write_job(tmp_path / "job.toml", job_table)
    for override in ("name=../x", "name=a/b", "rewards.0.name=../x", "rewards.0.name='a b'", 'name="x\\n"'):
        with pytest.raises(InputError, match="name"):
            load_job(path, [override])
    assert main(["run", path, "--dry-run", "--until", "../../x"]) == 2
    assert main(["show", str(tmp_path), "../tmp"]) == 2


@pytest.mark.parametrize("arm", ["../x", "a/b", "", ".", "a\nb"])
def test_no_arm_leads_out_of_the_comparison(job_table, tmp_path, arm):
    write_job(tmp_path / "job.toml", job_table)
    table = {"name": "c", "job": "job.toml", "baseline": arm, "arms": {arm: {}}}
    with pytest.raises(InputError, match="a name has letters"):
        load_comparison(write_job(tmp_path / "c.toml", table))


@pytest.mark.parametrize("inside", ["../../x", "/etc/passwd", "link/passwd", "..", "a/../../os.py"])
def test_no_model_in_a_package_is_outside_of_it(tmp_path, monkeypatch, inside):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package" / "__init__.py").write_text("")
    (tmp_path / "own_package" / "link").symlink_to("/etc")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="the package has no"):
        local_model(f"package:own_package/{inside}")


def test_ids_of_rows_are_made_here_and_never_taken_from_the_data(job_table):
    raw = {"prompt": "hi", "prompt_id": "../../evil", "dropped": "x", "source": "/etc/passwd", "line": -1}
    row = prompt_row("prompts.jsonl", 3, raw, Job.model_validate(job_table))
    assert (row["source"], row["line"], row.get("dropped")) == ("prompts.jsonl", 3, None)
    assert row["prompt_id"].isalnum() and len(row["prompt_id"]) == 32


def test_files_of_a_stage_are_named_by_hashes(tmp_path):
    folder = StageFolder(str(tmp_path), "stage")
    folder.begin("k")
    folder.write_parts(pa.Table.from_pylist([{"prompt_id": "../../../evil", "dropped": None}]), "prompt_id")
    assert [path.parent.name for path in tmp_path.rglob("*.parquet")] == ["stage"]


# (e) code and environment


def test_the_environment_is_not_read_by_a_job_file(job_table, tmp_path, monkeypatch):
    monkeypatch.setenv("MARKED", "geheim")
    for text in ("$MARKED", "${MARKED}", "%MARKED%", "~MARKED", "{{ env.MARKED }}"):
        job_table["prompts"]["system"] = job_table["student"]["model"] = text
        job = load_job(write_job(tmp_path / "job.toml", job_table))
        assert (job.prompts.system, job.student.model) == (text, text)
        with pytest.raises(InputError) as refusal:
            local_model(text)
        assert "geheim" not in str(refusal.value)


@pytest.mark.parametrize(
    "name", ["os:system", "builtins:exec", "math:exp", "os:environ", "os:nothing", "no.such:thing"]
)
def test_a_reward_is_a_function_written_in_python(name):
    with pytest.raises(InputError, match=f"reward function {name}"):
        load_function(name)


@pytest.mark.parametrize("name", ["os.system", "a b:c", "os:system('id')", "x:__import__('os')", "../x:y", "a;b:c"])
def test_the_name_of_a_reward_is_a_name(job_table, tmp_path, name):
    job_table["rewards"][0]["function"] = name
    with pytest.raises(InputError, match=r"rewards\.0\.function"):
        load_job(write_job(tmp_path / "job.toml", job_table))


def test_a_reward_whose_module_fails_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "broken_rewards.py").write_text("1 / 0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="broken_rewards:f: ZeroDivisionError"):
        load_function("broken_rewards:f", str(tmp_path))


# (f) secrets


SECRET = "sk-Geheim0123456789"


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("prompts.source", f"s3://me:{SECRET}@bucket/prompts.jsonl"),
        ("prompts.source", f"https://{SECRET}@host/prompts.jsonl"),
        ("prompts.source", f"https://host/prompts.jsonl?X-Amz-Signature={SECRET}"),
        ("replay.source", f"https://host/prompts.jsonl?a=1&api_key={SECRET}"),
        ("retention.source", f"hf://me:{SECRET}@datasets/x"),
        ("calibration.source", f"https://user:{SECRET}@host/x"),
        ("prompts.source", f"https://host/prompts.jsonl?auth={SECRET}"),
        ("student.model", f"https://host/model?token={SECRET}"),
        ("student.model", f"hf://me:{SECRET}@models/x"),
        ("synthesis.teacher", f"https://{SECRET}@host/model"),
        ("synthesis.adapter", f"s3://bucket/adapter?key={SECRET}"),
        ("cluster.address", f"ray://me:{SECRET}@head:10001"),
        ("synthesis.endpoint", f"https://user:{SECRET}@host/v1"),
        ("synthesis.endpoint.key_variable", SECRET),
        ("synthesis.endpoint.key_variable", "hf_Geheim0123456789"),
        ("synthesis.endpoint.api_key", SECRET),
        ("synthesis.engine.options.hf_token", SECRET),
    ],
)
def test_a_key_in_a_job_file_is_refused_and_not_repeated(job_table, tmp_path, capsys, section, value):
    if section.startswith("synthesis.endpoint."):
        job_table["synthesis"]["endpoint"] = {"url": "http://t/v1", "model": "m"}
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--dry-run", "--run-dir", str(tmp_path / "run"), "--set", f"{section}='{value}'"]) == 2
    output = capsys.readouterr()
    assert section.rsplit(".", 1)[0] in output.err
    assert "Geheim" not in output.err + output.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("field", ["model", "reference"])
def test_a_key_in_the_address_of_a_reward_is_refused_and_not_repeated(job_table, tmp_path, capsys, field):
    job_table["rewards"] = [{"kind": "implicit", "name": "own", field: f"https://host/model?token={SECRET}"}]
    path = write_job(tmp_path / "job.toml", job_table)
    assert main(["run", path, "--dry-run", "--run-dir", str(tmp_path / "run")]) == 2
    output = capsys.readouterr()
    assert f"rewards.0.implicit.{field}" in output.err
    assert "Geheim" not in output.err + output.out


@pytest.mark.parametrize(
    "source",
    ["s3://bucket/a@b/x.jsonl", "abfss://container@account/x", "hdfs://me@host/x", "runs/a/pairs", "hf:a/b", "x?y=1"],
)
def test_an_address_without_a_key_is_taken(job_table, source):
    job_table["prompts"]["source"] = source
    assert Job.model_validate(job_table).prompts.source == source


@pytest.mark.parametrize("status", [400, 401, 404, 500])
def test_a_server_that_repeats_the_key_in_an_error_does_not_get_it_into_ours(status):
    class Echo(Server):
        async def answer(self, request):
            text = str(request.headers["Authorization"]) + "x" * 200 + str(request.headers["Authorization"])
            return web.json_response({"error": {"message": text}}, status=status)

    (error,) = ask(Echo(), key_variable="TEACHER_KEY")
    assert "Bearer [key]" in str(error) and "geh" not in str(error)


def test_a_server_that_repeats_the_key_in_its_answer_does_not_get_it_into_the_data():
    (answer,) = ask(Server(completion("your key is geheim, keep it")), key_variable="TEACHER_KEY")
    assert answer.text == "your key is [key], keep it"
    (answer,) = ask(Server(completion("none of it")))
    assert answer.text == "none of it"


def test_a_server_that_sends_us_elsewhere_does_not_send_the_key_along():
    keys = []

    async def elsewhere(request):
        keys.append(request.headers.get("Authorization"))
        return web.json_response(completion())

    async def sent_on():
        app = web.Application()
        app.router.add_post("/v1/chat/completions", elsewhere)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port = site._server.sockets[0].getsockname()[1]
        first = Redirecting(f"http://127.0.0.1:{port}/v1/chat/completions")
        try:
            return await first.ask("hi", key_variable="TEACHER_KEY")
        finally:
            await runner.cleanup()

    (answer,) = asyncio.run(sent_on())
    assert answer.text == "fine"
    assert keys == [None]


class Redirecting(Server):
    """A server that sends every request to another place."""

    def __init__(self, place):
        super().__init__()
        self.place = place

    async def answer(self, request):
        raise web.HTTPTemporaryRedirect(self.place)


class Talker(BaseHTTPRequestHandler):
    """A server that repeats the key wherever it can: in answers, and in errors for every third prompt."""

    def do_POST(self):
        asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
        key = self.headers["Authorization"].removeprefix("Bearer ")
        refuses = "question 7" in asked
        content = {"error": {"message": f"{key} may not ask this"}} if refuses else completion(f"an answer, {key}")
        body = json.dumps(content).encode()
        self.send_response(400 if refuses else 200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def talker():
    """Base URL of a server that repeats the key."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Talker) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()
        thread.join()


def holds(folder, secret):
    """The files below a folder that hold the secret, Parquet unpacked."""
    found = []
    for path in Path(folder).rglob("*"):
        if path.is_file() and not path.is_symlink():
            packed = path.suffix == ".parquet"
            content = str(pq.read_table(path).to_pylist()).encode() if packed else path.read_bytes()
            found += [str(path)] if secret.encode() in content else []
    return found


@pytest.mark.ray
def test_a_key_is_nowhere_in_a_run(job_table, tmp_path, ray_cluster, talker, monkeypatch, capfd):
    from ray.util.state import list_actors, list_tasks

    monkeypatch.setenv("TEACHER_KEY", SECRET)
    monkeypatch.setenv("HF_TOKEN", "hf_" + SECRET)
    job_table["synthesis"]["endpoint"] = {"url": talker, "model": "m", "key_variable": "TEACHER_KEY"}
    job, folder = Job.model_validate(job_table), tmp_path / "run"
    stages = [stage for stage in stages_of(job) if stage.name in ("prompts", "synthesis")]
    with locked(job, str(folder)), quiet_console(folder / "logs") as console:
        run_stages(Run(job, str(folder), console, prepare), stages)
    write_report(str(folder))
    with redirect_stdout(io.StringIO()) as shown_rows:
        show_rows(str(folder), "synthesis", None, 9, False)
    manifest = StageFolder(str(folder), "synthesis").manifest()
    assert manifest.rows_out == 8
    assert any("[key] may not ask this" in reason for reason in manifest.dropped)
    assert "an answer, [key]" in shown_rows.getvalue()
    assert holds(folder, SECRET) == []
    # What Ray tells of its work, and what the workers' command lines are.
    address = ray_cluster.address_info["gcs_address"]
    listed = [list_tasks(address=address, detail=True), list_actors(address=address, detail=True)]
    assert listed[0] and SECRET not in str(listed)
    assert holds(ray_cluster.address_info["session_dir"], SECRET) == []
    lines = [process.cmdline() for process in psutil.Process().children(recursive=True)]
    assert lines and SECRET not in str(lines)
    assert SECRET not in str(capfd.readouterr())
