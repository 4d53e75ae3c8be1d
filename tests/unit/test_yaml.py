"""A job in YAML is the job in TOML; what YAML would guess is refused or read as it stands."""

import tomllib
from pathlib import Path

import pytest
import yaml

from rdpo.cli import main
from rdpo.config import load_job
from rdpo.config.yaml_file import read_yaml
from rdpo.errors import InputError
from rdpo.experiments.comparison import load_comparison
from rdpo.synthesis.instructions import load_task

ROOT = Path(__file__).parents[2]
JOB = """\
# yaml-language-server: $schema=job.schema.json
name: mine
student: {model: org/model}
prompts:
  source: prompts.jsonl
training:
  learning_rate: 3e-4
  lora: {rank: 8}
rewards:
  - kind: function
    name: length
    function: tests.rewards:length
"""


def written(path, text):
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", ["quickstart", "delta_small", "pool", "safety_70b", "magpie_small"])
def test_a_job_in_yaml_is_the_job_in_toml(tmp_path, name):
    source = ROOT / "jobs" / f"{name}.toml"
    tables = tomllib.loads(source.read_text(encoding="utf-8"))
    path = written(tmp_path / "job.yaml", yaml.safe_dump(tables, sort_keys=False))
    assert load_job(path) == load_job(source)


def test_a_task_and_a_comparison_may_be_yaml_too(tmp_path):
    task = tomllib.loads((ROOT / "jobs/quickstart/task.toml").read_text(encoding="utf-8"))
    path = written(tmp_path / "task.yml", yaml.safe_dump(task))
    assert load_task(str(path)) == load_task(str(ROOT / "jobs/quickstart/task.toml"))

    written(tmp_path / "job.yaml", JOB)
    arms = "name: two\njob: job.yaml\nbaseline: a\narms:\n  a: {}\n  b: {training: {beta: 0.3}}\n"
    _, jobs = load_comparison(written(tmp_path / "compare.yaml", arms))
    assert [job.training.beta for job in jobs.values()] == [0.1, 0.3]


def test_words_and_numbers_are_what_they_look_like():
    read = read_yaml("a: 3e-4\nb: no\nc: 010\nd: 1:30\ne: 2024-07-26\nf: true\ng: -7\nh: .5\ni: '5'\nj: yes\nk: 1_000")
    expected = {"a": 3e-4, "b": "no", "c": "010", "d": "1:30", "e": "2024-07-26", "f": True, "g": -7, "h": 0.5}
    assert read == {**expected, "i": "5", "j": "yes", "k": "1_000"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (JOB + "name: again\n", "not valid YAML: line 13: name stands there twice"),
        (JOB + "seed:\n", "not valid YAML: line 13: seed has no value; leave it out"),
        (JOB.replace("{rank: 8}", "{rank: 8"), "not valid YAML: line "),
        ("a: &x [1]\nb: *x\n", r"not valid YAML: line 2: \*x: write it out"),
        ("a: !!python/object/apply:os.system [id]\n", "not valid YAML: line 1: could not determine a constructor"),
        ("- a\n- b\n", "not valid YAML: it holds no keys"),
        ("", "not valid YAML: it holds no keys"),
        ("a: \x01\n", "not valid YAML: .*special characters are not allowed"),
        (JOB.replace("rank", "ranks"), "training.lora.ranks: unknown key; .*did you mean `rank`"),
        (JOB.replace("3e-4", "no"), "training.learning_rate: "),
    ],
)
def test_what_is_wrong_is_said_with_its_place(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        load_job(written(tmp_path / "job.yaml", text))


def test_a_job_in_yaml_can_be_run(tmp_path, capsys):
    assert main(["run", str(written(tmp_path / "job.yaml", JOB)), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "learning_rate = 0.0003" in printed
    assert "# training    would run" in printed
