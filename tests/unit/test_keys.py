"""The stage keys of the jobs in jobs/ are what they were: no change to the code makes a finished run again.

A key hashes a stage's settings, among them what models, files and functions hold. Those are stood in for here by what
they are asked of, so that no model has to be on this machine and a comment in a reward changes nothing. Where one of
these keys changes, finished runs are made again: write the file anew only where that is right
(`RDPO_WRITE_KEYS=1 pytest tests/unit/test_keys.py`). The keys of earlier versions, by which their runs are known, never
change.
"""

import json
import os
import sys
from pathlib import Path

import pytest

from rdpo.cluster import hardware
from rdpo.config import load_job, read_tables
from rdpo.execution.keys import former_key, stage_key
from rdpo.experiments.comparison import load_comparison
from rdpo.modeling import chat, reading, template
from rdpo.modeling import weights as models
from rdpo.preference.rewards import function, imports
from rdpo.preference.rewards.function import source_hash
from rdpo.stages.table import stages_of
from rdpo.synthesis import sources
from rdpo.synthesis.sources import content_hash

ROOT = Path(__file__).parents[2]
GOLDEN, FORMER = (Path(__file__).with_name(name) for name in ("stage_keys.json", "former_stage_keys.json"))
FORMER_INPUTS = {"pairs": ("rewards",)}
FORMER_SETTINGS = {"safety_1gpu.toml": ["training.zero_stage=3"]}
"""What job files of the repository said when earlier versions made those keys, where they say something else now."""
FILES = sorted((ROOT / "jobs").glob("*.toml"))
FILE_HASH = "0fc1b032ebd7e1ace23650a94a45471e"
SOURCE_HASH = "49adb748ce62aa9643a6b3221bb1d606"

# Tables and settings that no job in jobs/ has, as overrides.
VARIANTS = {
    "merged adapter": ['student.adapter="an/adapter"'],
    "continued adapter": ['student.adapter="an/adapter"', 'student.adapter_use="continue"'],
    "all": [
        'synthesis.adapter="an/adapter"',
        'replay.source="hf:ready/pairs"',
        'retention.source="hf:other/texts"',
        "evaluation.refine=true",
        "pairs.flip=0.1",
        "pairs.heldout_fraction=0.1",
        'training.select="best"',
    ],
    "endpoint": [
        'synthesis.endpoint={url="http://teacher:8000/v1", model="large", key_variable="TEACHER_KEY"}',
        'synthesis.values={gpus="a word named like a setting"}',
        'rewards=[{kind="judge", name="judge", model="a/judge", rubric="Rate {answer} to {prompt}."}, '
        '{kind="implicit", name="implicit", model="a/policy", reference="a/start"}]',
    ],
    "personas and a target": [
        'prompts={made={kind="personas", count=100, model="a/writer", template="{{ persona }}, {{ topic }}", '
        'personas={source="who.jsonl", column="who"}, topics={source="hf:some/topics", column="topic"}}}',
        'rewards=[{kind="target", name="fails", model="a/target", samples=2, '
        'reward={kind="classifier", name="right", model="a/reward"}}]',
    ],
}


def stand_in(name):
    def of(*arguments):
        return f"{name} of {', '.join(Path(str(argument)).name for argument in arguments)}"

    return of


def plain(*arguments):
    """Of a chat template that reads no date and puts nothing before an answer."""
    return {}


REPLACED = {
    chat.rendering_settings: plain,
    chat.load_chat: plain,
    chat.student_chat: plain,
    chat.teacher_chat: plain,
    chat.chat_like_student: plain,
    template.date_settings: plain,
    reading.cap_settings: plain,
    models.fingerprint: stand_in("weights"),
    models.tokenizer_fingerprint: stand_in("tokenizer"),
    models.adapter_fingerprint: stand_in("adapter"),
    models.adapter_tokenizer_fingerprint: stand_in("tokenizer beside"),
    hardware.compute_dtype: stand_in("precision"),
    sources.content_hash: stand_in("content"),
    function.source_hash: stand_in("source"),
    imports.helper_hash: stand_in("helpers"),
}


@pytest.fixture
def stand_ins(monkeypatch):
    """Everywhere in the package, what reads models, files and functions only names them."""
    monkeypatch.chdir(ROOT)
    for module in [module for name, module in sys.modules.items() if name.partition(".")[0] == "rdpo"]:
        for name, value in list(vars(module).items()):
            if callable(value) and getattr(value, "__hash__", None) and value in REPLACED:
                monkeypatch.setattr(module, name, REPLACED[value])


def keys_of(job):
    return {
        stage.name: stage_key(stage.name, stage.settings(job), dict.fromkeys(stage.inputs, "made"))
        for stage in stages_of(job)
    }


def former_keys_of(job):
    return {
        stage.name: former_key(
            stage.name, stage.settings(job), dict.fromkeys(FORMER_INPUTS.get(stage.name, stage.inputs), "made")
        )
        for stage in stages_of(job)
    }


def all_jobs():
    for path in FILES:
        if "baseline" in read_tables(path):
            comparison, jobs = load_comparison(path)
            arms = {arm: job for (arm, seed), job in jobs.items() if seed == comparison.seeds[0]}
            yield from ((f"{path.name}, {arm}", job) for arm, job in arms.items())
        else:
            yield path.name, load_job(path)
    for name, overrides in VARIANTS.items():
        yield f"quickstart.toml, {name}", load_job(ROOT / "jobs" / "quickstart.toml", overrides)


def test_the_stage_keys_of_all_jobs_are_what_they_were(stand_ins):
    found = {name: keys_of(job) for name, job in all_jobs()}
    if os.environ.get("RDPO_WRITE_KEYS"):
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert found == golden

    assert {stage for keys in golden.values() for stage in keys} >= {"replay", "retention", "model"}


def test_runs_of_earlier_versions_are_known_by_their_keys(stand_ins):
    former = json.loads(FORMER.read_text(encoding="utf-8"))
    jobs = {name: job for name, job in all_jobs() if name in former}
    jobs |= {name: load_job(ROOT / "jobs" / name, settings) for name, settings in FORMER_SETTINGS.items()}
    found = {name: former_keys_of(job) for name, job in jobs.items()}
    assert found == former


def test_what_a_file_and_a_function_hold_is_hashed_as_it_was(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a"}\n')
    assert content_hash(str(tmp_path / "rows.jsonl")) == FILE_HASH

    (tmp_path / "held_reward.py").write_text("def score(prompt, answer, row):\n    return 1.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert source_hash("held_reward:score") == SOURCE_HASH
