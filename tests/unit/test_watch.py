"""The live page of a run over HTTP: what it shows while the run goes on, and to whom."""

import base64
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock

from rdpo.cli import main
from rdpo.config import Job, to_toml
from rdpo.execution.reader import round_dir
from rdpo.files.folder import Folder
from rdpo.files.stage_folder import StageFolder
from rdpo.inspection.diff import Side, results
from rdpo.records import table_of
from rdpo.report.live import Kept, LiveRun
from rdpo.report.server import WatchServer
from rdpo.report.site import Site, site_of
from tests.support.made_up import HOSTILE, made_up_run, message

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
STEP = {
    "loss": 0.7,
    "rewards/margins": 0.5,
    "rewards/accuracies": 1.0,
    "logps/chosen": -3.0,
    "offset/mean": 0.1,
    "seconds": 2.0,
}
PATIENCE_S = 120


@pytest.fixture
def begun(job_table, tmp_path):
    """A run that has its job and nothing else."""
    return write_job_file(tmp_path / "run", job_table)


@pytest.fixture
def made(job_table, tmp_path):
    """A run with pairs, training and evaluation."""
    run_dir = made_up_run(tmp_path / "made", job_table)
    train(run_dir, 3)
    return run_dir


def write_job_file(folder, table):
    Folder(str(folder)).write_bytes("config.toml", to_toml(Job.model_validate(table)).encode())
    return str(folder)


def train(run_dir, steps):
    lines = [json.dumps({"step": number, **STEP}) + "\n" for number in range(1, steps + 1)]
    StageFolder(run_dir, "training").write_bytes("metrics.jsonl", "".join(lines).encode())


def written(number, text="A plain answer.", **turns):
    row = {"prompt_id": f"{number:032x}", "prompt": message("user", f"question {number}")}
    for name, words in {"response": text, **turns}.items():
        row |= {name: words, f"{name}_finish_reason": "stop"}
    return row


def speak(run_dir, numbers, below="synthesis", **columns):
    """Store rows of an unfinished synthesis, which were begun if none were there."""
    if not Folder(run_dir).exists("synthesis/in_progress.json"):
        StageFolder(run_dir, "synthesis").begin("key")
    StageFolder(run_dir, below).write_parts(table_of([written(number, **columns) for number in numbers]), "prompt_id")


@contextmanager
def served(*run_dirs, site=None, host="127.0.0.1"):
    with WatchServer(site or site_of(run_dirs), host, 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def asked(server, path="/", method="GET", **headers):
    """The status, headers and content of an answer."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=PATIENCE_S)
    connection.request(method, path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    content = response.read().decode()
    connection.close()
    return response.status, response.headers, content


def state_of(server, place="/"):
    status, _, content = asked(server, f"{place}state")
    assert status == 200, content
    return json.loads(content)


def version_in(page):
    return re.search(r'<main data-version="(\w+)">', page)[1]


def page_once(server, holds):
    """The page as soon as it holds a text."""
    until = time.monotonic() + PATIENCE_S
    while time.monotonic() < until:
        status, _, page = asked(server)
        if status == 200 and holds in page:
            return page
        time.sleep(0.3)
    raise AssertionError(f"no {holds} in the page:\n{page}")


def test_a_run_that_has_just_begun(begun):
    with served(begun) as server:
        status, headers, page = asked(server)
        state = state_of(server)
    assert status == 200
    assert "<h1>tiny</h1>" in page
    assert "0 of 10 stages done; nobody works in it" in page
    assert [stage["state"] for stage in state["runs"][0]["stages"]] == ["not begun"] * 10
    assert state["version"] == version_in(page)
    (script,) = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    for policy in (headers["Content-Security-Policy"], re.search(r'Security-Policy" content="(.*?)"', page)[1]):
        assert policy.startswith("default-src 'none'; base-uri 'none'; form-action 'none'")
        assert f"script-src 'sha256-{known}'; connect-src 'self'" in policy


def test_what_a_viewer_has_is_not_sent_again(made):
    with served(made) as server:
        for path in ("/", "/state"):
            status, headers, content = asked(server, path)
            assert (status, int(headers["Content-Length"])) == (200, len(content.encode()))
            assert asked(server, path, If_None_Match=headers["ETag"])[::2] == (304, "")
            assert asked(server, path, If_None_Match='"another"')[0] == 200
            status, of_head, content = asked(server, path, method="HEAD")
            assert (status, content, of_head["ETag"]) == (200, "", headers["ETag"])


def test_several_viewers_have_the_page_made_once_and_again_when_the_run_has_grown(made, monkeypatch):
    times = []
    body = LiveRun.body

    def counted(self):
        times.append(time.monotonic())
        return body(self)

    monkeypatch.setattr(LiveRun, "body", counted)
    with served(made) as server:
        viewers = [threading.Thread(target=asked, args=(server,)) for _ in range(4)]
        for viewer in viewers:
            viewer.start()
        for viewer in viewers:
            viewer.join()
        page, state = asked(server)[2], state_of(server)
        assert len(times) == 1
        assert state["version"] == version_in(page)

        train(made, 5)
        grown = page_once(server, "Under way: 5 steps so far")
        assert len(times) == 2
        assert version_in(grown) != version_in(page)
        assert state_of(server)["version"] == version_in(grown)


def test_what_takes_long_is_not_made_again_at_once_and_what_fails_leaves_what_was():
    kept = Kept(pause=1000.0)

    def made(value, takes=0.0):
        time.sleep(takes)
        return value

    assert kept.get("a", lambda: made(1, takes=0.02)) == ("a", 1)
    assert kept.get("b", lambda: made(2)) == ("a", 1)
    assert kept.key_for("b") == "a"

    quick = Kept(pause=0.0)
    assert quick.get("a", lambda: 1) == ("a", 1)
    with pytest.raises(ZeroDivisionError):
        quick.get("b", lambda: 1 // 0)
    assert (quick.get("a", lambda: 2), quick.key_for("b")) == (("a", 1), "b")


def test_a_run_at_work_tells_its_progress(made):
    with FileLock(f"{made}/.lock"), served(made) as server:
        StageFolder(made, "training").remove("manifest.json")
        StageFolder(made, "training").write_json("in_progress.json", {"key": "k", "began": time.time() - 60})
        first = state_of(server)
        time.sleep(1.2)
        later = state_of(server)
    stages = {stage["stage"]: stage for stage in first["runs"][0]["stages"]}
    assert stages["training"]["state"] == "in progress"
    assert "training in progress: 3 steps, loss 0.7000, margin 0.500, begun 60 s ago" in first["now"]
    assert "begun 61 s ago" in later["now"]
    assert "<td>3 steps · loss 0.7000 · margin 0.500 · begun 60 s ago</td>" in first["progress"]


def test_the_newest_rows_are_shown_as_they_come_and_are_text(begun):
    speak(begun, range(3))
    with served(begun) as server:
        assert asked(server)[2].count('<details class="sample"') == 3
        time.sleep(0.05)
        speak(begun, range(3, 12), text=HOSTILE, revision="better")
        page = page_once(server, "alert(1)")
    assert "Newest rows of synthesis" in page
    newest = re.findall(r"<code>(\w{8})</code>", page)
    assert newest == ["00000000"] * 5
    assert re.findall(r'<span class="text">question (\d+)', page) == ["11", "10", "9", "8", "7"]
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\u202e" in page
    assert page.count("<script>") == 1


def test_of_a_row_that_several_steps_have_stored_the_last_is_shown_and_dropped_ones_are_not(begun):
    rows = [written(1), written(2) | {"dropped": "refused"}]
    StageFolder(begun, "synthesis").begin("key")
    StageFolder(begun, "synthesis/step-1").write_rows_below(table_of(rows), "prompt_id", "")
    time.sleep(0.05)
    speak(begun, [1], critique="Too plain.")
    with served(begun) as server:
        page = asked(server)[2]
    assert re.findall(r'<span class="text">question (\d+)', page) == ["1"]
    assert "Too plain." in page


def test_nothing_is_written(made):
    def seen():
        return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in Path(made).rglob("*")}

    before = seen()
    with served(made) as server:
        assert asked(server)[0] == asked(server, "/state")[0] == 200
    assert seen() == before


def test_a_run_that_cannot_be_read_at_the_moment_is_asked_for_later(made):
    with served(made) as server:
        assert asked(server)[0] == 200
        os.rename(f"{made}/config.toml", f"{made}/away.toml")
        time.sleep(1.1)
        status, headers, said = asked(server)
        assert (status, headers["Refresh"]) == (503, "3")
        assert said.startswith("not to be read at the moment: InputError:") and "no run here" in said
        os.rename(f"{made}/away.toml", f"{made}/config.toml")
        page_once(server, "3 steps")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8640", "127.0.0.1.evil.example", "", "[", "localhost@e.x"]
)
def test_another_name_of_loopback_is_refused(begun, host):
    with served(begun) as server:
        status, _, said = asked(server, Host=host)
    assert status == 403
    assert "by the address that `rdpo watch` printed" in said and "tiny" not in said


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:8640", "[::1]:8640"])
def test_the_names_of_loopback_are_known_at_any_port(begun, host):
    with served(begun) as server:
        assert asked(server, Host=host)[0] == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_the_page_is_only_to_be_read(begun, method):
    with served(begun) as server:
        status, headers, _ = asked(server, method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/config.toml",
            "/../config.toml",
            "/%2e%2e/config.toml",
            "//config.toml",
            "/run/",
            "/state/",
            "/report.html",
        ),
        *("/rounds/1/", "/arms/../", "/synthesis/in_progress.json", "/..", "/favicon.ico", "/state/state"),
    ],
)
def test_nothing_else_is_served(begun, path):
    Path(begun, "report.html").write_text("a report")
    with served(begun) as server:
        assert asked(server, path)[0] == 404


def test_on_another_address_the_token_is_demanded(begun):
    with served(begun, host="0.0.0.0") as server:
        assert len(server.token) > 30 and server.url.endswith(f":{server.server_port}/?token={server.token}")
        for path in ("/", "/?token=", "/?token=wrong", "/?token=%c3%a9", f"/?token={server.token[:-1]}", "/state"):
            status, headers, said = asked(server, path)
            assert (status, headers["Set-Cookie"]) == (403, None)
            assert "with its token" in said and "tiny" not in said
        assert asked(server, Cookie=f"rdpo-watch-{server.server_port}=wrong")[0] == 403

        status, headers, page = asked(server, f"/?token={server.token}")
        assert status == 200 and server.token not in page
        assert "HttpOnly; SameSite=Strict" in headers["Set-Cookie"]
        assert asked(server, "/state", Cookie=headers["Set-Cookie"].partition(";")[0])[0] == 200
    with served(begun, host="0.0.0.0") as another:
        assert another.token != server.token
    with served(begun, host="localhost") as on_loopback:
        assert on_loopback.token is None and "token" not in on_loopback.url


def test_bad_input_is_one_message(begun, job_table, tmp_path, capsys):
    job_table["rounds"] = {"count": 2}
    rounds = write_job_file(tmp_path / "rounds", job_table)

    def said(*arguments):
        assert main(["watch", *arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    with served(begun) as server:
        taken = str(server.server_port)
        assert f"--port {taken}: another program listens there" in said(begun, "--port", taken)
    assert "no run here (no config.toml)" in said(str(tmp_path / "none"))
    assert "no run here (no config.toml)" in said(begun, str(tmp_path))
    assert "holds several runs; name one of them, as in" in said(begun, rounds)
    assert "3 run directories; give one, or two" in said(begun, begun, begun)
    assert "--host no.such.host.invalid: no such machine" in said(begun, "--host", "no.such.host.invalid")
    assert "is no address of this machine" in said(begun, "--host", "192.0.2.1", "--port", "0")
    with pytest.raises(SystemExit) as ended:
        main(["watch", begun, "--port", "70000"])
    assert ended.value.code == 2


def test_rounds_have_a_page_each_as_they_begin(job_table, tmp_path):
    job_table["rounds"] = {"count": 2}
    run_dir = write_job_file(tmp_path / "run", job_table)
    job_table["rounds"] = {"count": 1}
    with served(run_dir) as server:
        assert "None of them has begun." in asked(server)[2]
        write_job_file(round_dir(run_dir, 1), job_table)
        page = page_once(server, "rounds/1")
        assert '<a href="rounds/1/">rounds/1</a> 0 of 10 stages done' in page
        status, headers, _ = asked(server, "/rounds/1")
        assert (status, headers["Location"]) == (301, "1/")
        assert "<h1>tiny</h1>" in asked(server, "/rounds/1/")[2]
        assert state_of(server, "/rounds/1/")["runs"][0]["run_dir"] == round_dir(run_dir, 1)
        for path in ("/rounds/2/", "/rounds/", "/rounds/1/rounds/1/", "/rounds/1/config.toml"):
            assert asked(server, path)[0] == 404


def test_a_comparison_shows_its_arms_and_its_report(job_table, tmp_path):
    write_job_file(tmp_path / "arms" / "one-0", job_table)
    train(made_up_run(tmp_path / "arms" / "two?&<0", job_table), 3)
    (tmp_path / "arms" / "empty").mkdir()
    with served(str(tmp_path)) as server:
        page = asked(server)[2]
        assert re.findall(r'<a href="(.*?)"', page) == ["arms/one-0/", "arms/two%3F%26%3C0/"]
        assert "3 of 10 stages done" in page and "2 runs, none of them at work" in page
        assert asked(server, "/report.html")[0] == 404
        assert asked(server, "/arms/two%3F%26%3C0/")[0] == 200

        (tmp_path / "report.html").write_text("<p>held against each other")
        status, headers, content = asked(server, "/report.html")
        assert (status, content) == (200, "<p>held against each other")
        assert "script-src" not in headers["Content-Security-Policy"]
        assert asked(server, "/arms/one-0/report.html")[0] == 404


def test_two_runs_side_by_side(made, begun, job_table, tmp_path):
    job_table["training"]["beta"] = 0.7
    other = made_up_run(tmp_path / "other", job_table)
    train(other, 5)
    with served(made, other) as server:
        page, state = asked(server)[2], state_of(server)
    assert f"A  {made}" in page and f"B  {other}" in page
    assert len(state["runs"]) == 2
    assert re.search(r"training\.beta\s+0\.1\s+0\.7", page)
    lines = results(Side(made), Side(other))
    assert not lines or lines[-1] in page
    loss = page.split("<figcaption>loss</figcaption>")[1].split("</figure>")[0]
    assert {">A</text>", ">B</text>"} <= set(re.findall(r">[AB]</text>", loss))
    assert page.count('<details class="sample"') == 3
    assert re.findall(r'class="label">([AB] · trained)', page) == ["A · trained", "B · trained"] * 3

    with served(made, begun) as server:
        page = asked(server)[2]
    assert "no evaluation in B yet" in page and 'id="training"' in page and 'id="answers"' not in page


def test_of_two_runs_that_have_only_begun_to_answer_the_answers_stand_side_by_side(begun, job_table, tmp_path):
    other = write_job_file(tmp_path / "other", job_table)
    speak(begun, range(4), revision="One way.")
    speak(other, range(2, 6), text=HOSTILE, revision="Another way.")
    with served(begun, other) as server:
        page = asked(server)[2]
    assert re.findall(r'<span class="text">question (\d+)', page) == ["2", "3"]
    assert re.findall(r'class="label">(.*?)</div>', page)[:4] == [
        "A · response",
        "B · response",
        "A · revision",
        "B · revision",
    ]
    assert "&lt;script&gt;alert(1)" in page and page.count("<script>") == 1


def test_a_run_in_an_object_store(bucket, job_table):
    run_dir = write_job_file(f"s3://{bucket}/run", job_table)
    with served(run_dir) as server:
        assert "0 of 10 stages done" in asked(server)[2]
        speak(run_dir, range(3))
        page = page_once(server, "Newest rows of synthesis")
    assert page.count('<details class="sample"') == 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_is_ended_quietly(begun, number):
    command = [sys.executable, "-m", "rdpo", "watch", begun, "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        url, _, rest = process.stdout.readline().partition(" ")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", url) and "Ctrl-C ends it" in rest
        process.send_signal(number)
        printed, said = process.communicate(timeout=PATIENCE_S)
    assert (process.returncode, printed, said) == (0, "", "")


class Growing(Site):
    """A site whose run grows as soon as the page asks for news; `driver` is what a reader does, as a script."""

    def __init__(self, view, grow, driver=""):
        super().__init__(view)
        self.grow, self.driver, self.asked = grow, driver, []

    def answer(self, path):
        self.asked.append(path)
        if path == "/state":
            # A browser's own time stands still meanwhile, and would else be over before anything is made again.
            time.sleep(0.5)
        if path == "/state" and self.grow:
            self.grow, grow = None, self.grow
            grow()
        found = super().answer(path)
        if not self.driver or path != "/":
            return found
        # A script of the test's own runs only where the policy is put aside.
        page = re.sub(r'<meta http-equiv="Content-Security-Policy".*?>', "", found.content.decode())
        page = page.replace("</body>", f"<script>{self.driver}</script></body>")
        policy = "default-src 'self' 'unsafe-inline'"
        return replace(found, content=page.encode(), policy=policy)


def in_browser(url, profile, seconds=60):
    """What a browser makes of a page within so many seconds of its own time, as text."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"]
    options += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
    command = [BROWSER, *options, "--window-size=800,600", f"--virtual-time-budget={1000 * seconds}", "--dump-dom", url]
    return subprocess.run(command, capture_output=True, timeout=300, check=True).stdout.decode()


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome")
def test_in_a_browser_the_page_grows_with_the_run(begun, tmp_path):
    speak(begun, range(2), text=HOSTILE)
    site = Growing(LiveRun(begun), lambda: (speak(begun, range(2, 5)), train(begun, 4)))
    with served(site=site) as server:
        page = in_browser(server.url, tmp_path / "profile")
    assert site.asked.count("/state") > 1 and site.asked.count("/") > 1
    assert "<title>tiny · rdpo watch</title>" in page
    assert page.count('class="sample"') == 5 and ">5 of 5</output>" in page
    assert '<section id="training">' in page and "synthesis interrupted: 5 rows" in page
    assert page.index('id="progress"') < page.index('id="newest-synthesis"') < page.index('id="training"')
    assert '<p id="trouble" class="bad" role="status"></p>' in page


READER = """
const first = document.querySelector('.sample:not([open])');
first.open = true;
const search = document.querySelector('[data-filters]');
search.value = 'question 1';
search.dispatchEvent(new Event('input', {bubbles: true}));
document.body.style.paddingBottom = '100vh';
window.scrollTo(0, document.querySelector('#lineage').offsetTop - 20);
const where = () => Math.round(document.querySelector('#lineage').getBoundingClientRect().top);
const before = where();
new MutationObserver(() => document.body.setAttribute('data-moved', where() - before))
  .observe(document.querySelector('main'), {attributes: true});
"""


@pytest.mark.skipif(BROWSER is None, reason="no chromium or google-chrome")
def test_what_a_reader_opened_typed_and_looks_at_stays(begun, tmp_path):
    speak(begun, range(2))
    site = Growing(LiveRun(begun), lambda: (speak(begun, range(10, 13)), train(begun, 4)), READER)
    with served(site=site) as server:
        page = in_browser(server.url, tmp_path / "profile")
    assert 'data-moved="0"' in page
    sample = r'<details class="sample"( open="")?( hidden="")?>\s*<summary><code>\w+</code> <span class="text">(.*?)<'
    shown = re.findall(sample, page)
    assert [text for _, _, text in shown] == [f"question {number}" for number in (12, 11, 10, 1, 0)]
    assert [text for _, hidden, text in shown if hidden] == ["question 0"]
    assert [text for is_open, _, text in shown if is_open] == ["question 12", "question 1", "question 0"]
    assert ">4 of 5</output>" in page
