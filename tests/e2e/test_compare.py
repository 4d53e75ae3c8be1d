"""Two arms of one job through the command line: what they have in common is made once, and out comes a table."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tomli_w

from rdpo.files.stage_folder import StageFolder
from tests.support.jobs import valid_job, write_job, write_jsonl

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

SHARED = ("prompts", "synthesis", "rewards", "pairs", "reference")
ROOT = Path(__file__).parents[2]


def test_arms_share_what_they_have_in_common(wordy_models, tmp_path):
    job = valid_job(wordy_models[0], tmp_path)
    job["training"] |= {"max_steps": 1, "lora": {"rank": 4}}
    job["pairs"] = {"direction": "reward", "heldout_fraction": 0.3}
    write_job(tmp_path / "base.toml", job)
    arms = {"dpo": {"training": {"offset_coef": 0.0}}, "rdpo": {"training": {"offset_coef": 0.5}}}
    comparison = {"name": "two", "job": "base.toml", "baseline": "dpo", "arms": arms, "until": "training"}
    (tmp_path / "compare.toml").write_text(tomli_w.dumps(comparison))
    command = [sys.executable, "-m", "rdpo", "compare", str(tmp_path / "compare.toml")]
    ended = subprocess.run([*command, "--run-dir", str(tmp_path / "run")], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    printed = ended.stdout
    first, second = (tmp_path / "run" / "arms" / f"{arm}-0" for arm in arms)
    for stage in SHARED:
        one, other = (StageFolder(str(arm), stage).manifest() for arm in (first, second))
        assert (one.digest, one.created) == (other.digest, other.created)
        assert f"{stage:<12}as in dpo-0" in printed
    assert manifest_key(first, "training") != manifest_key(second, "training")
    part = StageFolder(str(first), "pairs").parts()[0]
    assert os.stat(first / "pairs" / part).st_ino == os.stat(second / "pairs" / part).st_ino
    heldout = StageFolder(str(first), "training").manifest().summary["heldout"]
    lines = list(csv.DictReader((tmp_path / "run" / "heldout.csv").open()))
    assert [line["arm"] for line in lines] == ["dpo", "rdpo"]
    assert float(lines[0]["accuracy"]) == pytest.approx(heldout["accuracy"], abs=1e-6)
    assert int(lines[0]["pairs"]) == heldout["pairs"] > 0
    pairs = StageFolder(str(first), "reference").table(columns=["heldout"])["heldout"].to_pylist()
    trained = StageFolder(str(first), "training").manifest().summary["pairs"]
    assert (pairs.count(True), pairs.count(False)) == (heldout["pairs"], trained)
    assert f"held-out pairs, {heldout['pairs']} pairs, 1 seeds" in printed
    page = (tmp_path / "run" / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "src=" not in page


def manifest_key(run_dir, stage):
    return json.loads((run_dir / stage / "manifest.json").read_text())["key"]


def test_rounds_are_made_and_measured_from_the_first_start(wordy_models, tmp_path):
    """Two arms that differ in what they are trained on; the samples of their first round are the same."""
    job = valid_job(wordy_models[0], tmp_path)
    job["synthesis"]["task"] = "best_of"
    job["pairs"] = {"chosen": "best", "rejected": "worst"}
    job["training"] |= {"max_steps": 1, "lora": {"rank": 4}, "reward_as": "none"}
    write_jsonl(tmp_path / "texts.jsonl", [{"prompt": f"other {n}", "answer": "a plain answer"} for n in range(4)])
    job["retention"] = {"source": str(tmp_path / "texts.jsonl"), "answer": "answer"}
    job["rounds"] = {"count": 2}
    write_job(tmp_path / "base.toml", job)
    arms = {"dpo": {}, "turned": {"pairs": {"chosen": "worst", "rejected": "best"}}}
    comparison = {"name": "two", "job": "base.toml", "baseline": "dpo", "arms": arms}
    (tmp_path / "compare.toml").write_text(tomli_w.dumps(comparison))
    command = [sys.executable, "-m", "rdpo", "compare", str(tmp_path / "compare.toml")]
    command += ["--run-dir", str(tmp_path / "run")]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "synthesis   as in 1" in ended.stdout

    rounds = {arm: [tmp_path / "run" / "arms" / f"{arm}-0" / "rounds" / number for number in "12"] for arm in arms}
    assert manifest_key(rounds["dpo"][0], "synthesis") == manifest_key(rounds["turned"][0], "synthesis")
    settings = json.loads((rounds["dpo"][1] / "reference" / "manifest.json").read_text())["settings"]
    assert settings["student"]["model"] == str(rounds["dpo"][0] / "model")

    lines = list(csv.DictReader((tmp_path / "run" / "comparison.csv").open()))
    assert [line["arm"] for line in lines] == [f"{arm}, round {number}" for arm in arms for number in (1, 2)]
    # Both rounds are measured from the start of the first.
    assert len({line["start_mean"] for line in lines}) == 1
    assert [line["kl"] != "nan" for line in lines] == [True, False, True, False]

    status = subprocess.run(
        [sys.executable, "-m", "rdpo", "status", str(rounds["dpo"][0].parents[1])],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert status.returncode == 0, status.stderr
    again = subprocess.run([*command, "--dry-run"], cwd=ROOT, capture_output=True, text=True)
    assert again.stdout.strip().endswith("4 runs; nothing is to be made")
