"""The reward that comes with rdpo: IFEval's instructions, verified by lm-eval's own code, and what is refused."""

import json
import sys
from pathlib import Path

import pyarrow as pa
import pytest

from rdpo import rewards
from rdpo.config import FunctionReward, Job
from rdpo.errors import InputError
from rdpo.preference.rewards.function import FunctionKind, score_by_function
from rdpo.preference.rewards.imports import _imports
from rdpo.rewards import _verifiers, instructions
from rdpo.stages.checks import check_other_sources
from tests.support.jobs import write_jsonl

PROMPT = [{"role": "user", "content": "Say it without a comma, in at least five words, with dogs."}]
NAMES = ["punctuation:no_comma", "length_constraints:number_words", "keywords:existence"]
KWARGS = [
    {"num_words": None, "relation": None, "keywords": None},
    {"num_words": 5, "relation": "at least", "keywords": None},
    {"num_words": None, "relation": None, "keywords": ["dogs"]},
]
REWARD = FunctionReward(kind="function", name="kept", function="rdpo.rewards:instructions")


@pytest.fixture
def verifiers():
    for needed in ("langdetect", "immutabledict", "lm_eval.tasks.ifeval.utils"):
        pytest.importorskip(needed, reason="lm-eval's IFEval is not installed")


def row_of(names=NAMES, kwargs=KWARGS):
    return {"extra": json.dumps({"instruction_id_list": names, "kwargs": kwargs})}


@pytest.mark.parametrize(
    ("answer", "kept"),
    [
        ("There are many dogs in town", 3),
        ("Well, there are many dogs in town", 2),
        ("Well, cats", 0),
        ("dogs", 2),
        ("", 0),
    ],
)
def test_the_score_is_the_share_of_instructions_that_are_kept(verifiers, answer, kept):
    instructions.check()
    assert instructions(PROMPT, answer, row_of()) == pytest.approx(kept / 3)


def test_columns_of_text_hold_json(verifiers):
    columns = {"instruction_id_list": json.dumps(NAMES), "kwargs": json.dumps(KWARGS)}
    assert instructions(PROMPT, "dogs", {"extra": json.dumps(columns)}) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "instruction_id_list is not a list"),
        (row_of([], []), "instruction_id_list is not a list of names"),
        (row_of("[broken"), "instruction_id_list is not a list"),
        (row_of(NAMES, None), "kwargs is not a list"),
        (row_of(NAMES, [1, 2, 3]), "kwargs is not a list of tables"),
        (row_of(NAMES, KWARGS[:2]), "kwargs has 2 entries for 3 instructions"),
        (row_of(["punctuation:no_dots"], [{}]), "punctuation:no_dots is no instruction of IFEval"),
        (row_of(NAMES[1:2], [{"num_words": 5}]), "length_constraints:number_words lacks relation in kwargs"),
        (row_of(NAMES[:1], [{"num_words": 5}]), "punctuation:no_comma does not take num_words"),
    ],
)
def test_what_cannot_be_verified_drops_its_row_with_the_reason(verifiers, row, reason):
    table = pa.Table.from_pylist([{"prompt_id": "p", "prompt": PROMPT, "a": "dogs", "extra": None, **row}])
    [scored] = score_by_function(table, REWARD, ["a"], ".").to_pylist()
    assert scored["dropped"] == f"reward kept: ValueError: {reason}"


def test_without_the_verifiers_it_is_refused_before_the_work(monkeypatch, job_table):
    monkeypatch.setitem(sys.modules, "langdetect", None)
    _verifiers.cache_clear()
    with pytest.raises(InputError, match=r'rewards.kept: .*verified by lm-eval; pip install "rdpo\[harness\]"'):
        FunctionKind(REWARD).check_named(Job.model_validate(job_table))


def test_prompts_without_its_columns_are_refused_before_the_work(job_table, tmp_path):
    job = Job.model_validate({**job_table, "rewards": [REWARD.model_dump()]})
    with pytest.raises(InputError, match=r"rewards.kept.function: .* has no column `instruction_id_list`; it has"):
        check_other_sources(job)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "q", "instruction_id_list": [], "kwargs": []}])
    check_other_sources(job)


def test_its_scores_do_not_depend_on_the_rest_of_rdpo():
    modules = _imports("rdpo.rewards", Path(rewards.__file__).read_text(encoding="utf-8"))
    assert not [name for name in modules if name.partition(".")[0] == "rdpo"]


def test_a_function_that_looks_for_what_it_needs_is_heard_before_the_work(job_table, tmp_path, monkeypatch):
    text = "def score(prompt, answer, row):\n    return 1.0\n\n\ndef look():\n    raise OSError('no word list')\n\n\n"
    (tmp_path / "looking_reward.py").write_text(f"{text}score.check = look\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    reward = FunctionReward(kind="function", name="f", function="looking_reward:score")
    with pytest.raises(InputError, match=r"rewards.f: reward function looking_reward:score: OSError: no word list"):
        FunctionKind(reward).check_named(Job.model_validate(job_table))
