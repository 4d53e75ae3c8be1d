"""Prompts that are made: what a job may say, what is written and dropped, what that depends on, how it is read."""

import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
from pydantic import ValidationError

from rdpo.config import Job, to_toml
from rdpo.config.files import job_of as job_of_table
from rdpo.config.files import to_table
from rdpo.errors import InputError
from rdpo.evaluation.publish import model_card
from rdpo.execution.keys import stage_key
from rdpo.execution.reader import JOB_FILE
from rdpo.experiments.comparison import load_comparison
from rdpo.experiments.rounds import job_of_round
from rdpo.files.folder import Folder
from rdpo.planning.costs import Rates, stage_costs
from rdpo.report.provenance import sources
from rdpo.report.report import write_report
from rdpo.stages.checks import check_named, check_other_sources, models_by_kind
from rdpo.stages.made import name_of, numbers, settings
from rdpo.stages.pools import pools_of
from rdpo.stages.prompts import settings as prompts_settings
from rdpo.stages.table import names_of, stages_of
from rdpo.synthesis.engine import EngineError, Generation
from rdpo.synthesis.made import (
    BROKEN,
    CUT_OFF,
    EMPTY,
    Writer,
    as_teacher,
    check_made,
    magpie_turn,
    raw_table,
    writer_named,
)
from rdpo.synthesis.prompts import prompt_row
from rdpo.synthesis.sources import RAW
from tests.support.crash_counts import NoCrashCounts
from tests.support.jobs import write_job, write_jsonl
from tests.support.made_up import commit
from tests.support.models import CHATML, byte_tokenizer, llama

ENDPOINT = {"url": "http://teacher:8000/v1", "model": "large"}


@pytest.fixture
def table(job_table):
    """The tables of a job whose prompts are made."""
    job_table["prompts"] = {"made": {"kind": "magpie", "count": 5}, "max_prompt_tokens": 128}
    return job_table


@pytest.fixture
def personas(table, tmp_path):
    """The same, of personas and topics."""
    write_jsonl(tmp_path / "who.jsonl", [{"who": name} for name in ("nurse", "pilot")])
    write_jsonl(tmp_path / "what.jsonl", [{"what": name} for name in ("rain", "bread", "debt")])
    table["prompts"]["made"] = {
        "kind": "personas",
        "count": 5,
        "template": "What may a {{ persona }} ask about {{ topic }}? ({{ number }})",
        "personas": {"source": str(tmp_path / "who.jsonl"), "column": "who"},
        "topics": {"source": str(tmp_path / "what.jsonl"), "column": "what"},
    }
    return table


def changed(table, **made):
    table = json.loads(json.dumps(table))
    table["prompts"]["made"] |= made
    return Job.model_validate(table)


def test_a_job_makes_its_prompts_first_and_says_so_again(table, job_table):
    job = job_of_table(table, "job.toml")
    assert names_of(job)[:3] == ("made", "prompts", "calibration")
    assert stages_of(job)[1].inputs == ("made",)
    assert job_of_table(to_table(job), "config.toml") == job


def test_other_jobs_say_nothing_of_it(job_table):
    job = Job.model_validate(job_table)
    assert "made" not in job.prompts.model_dump()
    assert names_of(job)[0] == "prompts"
    assert stages_of(job)[0].inputs == ()


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ({"source": "prompts.jsonl"}, "made: the prompts are written, and source names some"),
        ({"sources": [{"source": "prompts.jsonl"}]}, "made: the prompts are written, and sources names some"),
        ({"limit": 3}, "limit is that of a source"),
        ({"column": "question"}, "column is that of a source"),
        ({"dataset_split": "test"}, "dataset_split is that of a source"),
        ({"made": {"kind": "magpie", "count": 0}}, "greater than or equal to 1"),
        ({"made": {"kind": "magpie"}}, "count"),
        ({"made": {"kind": "magpie", "count": 1, "template": "x"}}, 'template: kind = "magpie" takes none'),
        ({"made": {"kind": "personas", "count": 1, "template": "x"}}, 'personas: kind = "personas" needs it'),
    ],
)
def test_what_does_not_go_together_is_refused(table, prompts, said):
    table["prompts"] |= prompts
    with pytest.raises(ValidationError, match=said):
        Job.model_validate(table)


def test_prompts_without_answers_and_a_teacher_that_is_a_server_are_refused(table):
    with pytest.raises(ValidationError, match=r"made writes prompts without answers; give synthesis.task"):
        Job.model_validate({**table, "synthesis": {}})
    table["synthesis"]["endpoint"] = ENDPOINT
    with pytest.raises(ValidationError, match=r"name the model that writes as prompts.made.model"):
        Job.model_validate(table)
    assert writer_named(changed(table, model="a/model")) == "a/model"


def test_the_model_that_writes_is_the_teacher_unless_another_is_named(table):
    table["synthesis"] |= {"teacher": "a/teacher", "adapter": "an/adapter", "sampling": {"temperature": 0.5}}
    seen = as_teacher(changed(table)).synthesis
    assert (seen.teacher, seen.adapter, seen.sampling.temperature) == ("a/teacher", "an/adapter", 0.5)
    other = as_teacher(changed(table, model="a/writer", sampling={"temperature": 1.0}, engine={"gpus": 2})).synthesis
    assert (other.teacher, other.adapter, other.sampling.temperature, other.engine.gpus) == ("a/writer", None, 1.0, 2)


class Drawn:
    """An engine that writes what its prompt's number says."""

    def __init__(self, job):
        self.asked = []

    async def generate(self, ids, sampling, seed, stop_ids, **extra):
        self.asked.append(SimpleNamespace(ids=ids, sampling=sampling, seed=seed, stop_ids=stop_ids))
        return await self.say(seed)

    async def say(self, seed):
        return Generation(f" Why {seed}? ", "stop", 4, token_ids=(70, 71, 1))

    def shutdown(self):
        pass


def written(job, rows, say=None):
    """The rows after the writer, and what its engine was asked."""
    writer = Writer(job, NoCrashCounts, Drawn)
    if say:
        writer.engine.say = say

    async def blocks():
        return [block async for block in writer(pa.Table.from_pylist(rows))]

    [found] = asyncio.run(blocks())
    return found, writer.engine.asked


def rows_of(*names, **more):
    return [{"prompt_id": name_of(number), "number": number, **more} for number in names]


def test_magpie_is_asked_with_what_stands_before_a_users_message(table, tokenizer):
    job = changed(table, sampling={"temperature": 1.0, "max_tokens": 9})
    found, asked = written(job, rows_of(1, 2))
    assert tokenizer.decode(asked[0].ids) == "<|im_start|>user\n"
    assert asked[0].stop_ids == (tokenizer.eos_token_id,)
    assert (asked[0].sampling.max_tokens, asked[0].sampling.stop) == (9, [])
    row = found.to_pylist()[0]
    assert row["prompt"] == [{"role": "user", "content": f"Why {asked[0].seed}?"}]
    assert (row["made_finish_reason"], row["made_tokens"], row["dropped"]) == ("stop", 4, None)

    _, asked = written(changed(table, system="Cook."), rows_of(1))
    assert tokenizer.decode(asked[0].ids) == "<|im_start|>system\nCook.<|im_end|>\n<|im_start|>user\n"


def test_a_message_that_ends_with_words_ends_before_them(table, tmp_path):
    plain = "{% for m in messages %}### {{ m['role'] }}:\n{{ m['content'] }}\n\n{% endfor %}"
    template = plain + "{% if add_generation_prompt %}### assistant:\n{% endif %}"
    table["student"]["model"] = llama(tmp_path / "plain", byte_tokenizer(template))
    _, asked = written(changed(table, sampling={"stop": ["STOP"]}), rows_of(1))
    assert asked[0].sampling.stop == ["STOP", "\n\n### assistant:"]


@pytest.mark.parametrize(
    ("drawn", "reason"),
    [
        (Generation("Why is", "length", 3), CUT_OFF),
        (Generation(" \n", "stop", 1), EMPTY),
        (Generation("Why?user Why?", "stop", 3, token_ids=(70, 0, 71, 1)), BROKEN),
    ],
)
def test_what_is_no_whole_prompt_is_dropped_with_its_reason(table, drawn, reason):
    async def say(seed):
        return drawn

    found, _ = written(changed(table), rows_of(1), say)
    assert found["dropped"].to_pylist() == [reason]


def test_a_prompt_that_cannot_be_asked_for_is_dropped_and_its_block_has_all_columns(table):
    async def say(seed):
        raise EngineError("the engine refuses it")

    lost, _ = written(changed(table), rows_of(1), say)
    kept, _ = written(changed(table), rows_of(2))
    assert lost["dropped"].to_pylist() == ["the engine refuses it"]
    assert {field.name: field.type for field in lost.schema} == {field.name: field.type for field in kept.schema}


def test_a_prompt_depends_on_the_seed_and_its_number_alone(table):
    job = changed(table)
    together, _ = written(job, rows_of(1, 2, 3))
    alone, _ = written(job, rows_of(2))
    assert together.to_pylist()[1] == alone.to_pylist()[0]
    other, _ = written(Job.model_validate({**table, "seed": 5}), rows_of(2))
    assert other["prompt"].to_pylist() != alone["prompt"].to_pylist()
    fixed, again = (written(changed({**table, "seed": seed}, seed=9), rows_of(2))[0] for seed in (1, 2))
    assert fixed["prompt"].to_pylist() == again["prompt"].to_pylist()


def test_personas_are_asked_for_in_the_words_of_the_template(personas, tokenizer):
    rows = rows_of(7, persona="nurse", topic="rain")
    found, asked = written(changed(personas, system="Write one."), rows)
    assert tokenizer.decode(asked[0].ids) == (
        "<|im_start|>system\nWrite one.<|im_end|>\n<|im_start|>user\nWhat may a nurse ask about rain? (7)<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    row = found.to_pylist()[0]
    assert (row["persona"], row["topic"]) == ("nurse", "rain")
    assert row["prompt"][0]["content"].startswith("Why ")


def test_a_template_that_reaches_for_more_than_words_drops_its_prompts(personas):
    job = changed(personas, template="{{ persona.__class__.__mro__ }} {{ topic }}")
    found, asked = written(job, rows_of(7, persona="nurse", topic="rain"))
    assert not asked
    assert found["dropped"][0].as_py().startswith("template: access to attribute '__class__'")


def test_the_numbers_of_a_run_are_known_without_writing_any(table):
    source = numbers(SimpleNamespace(job=changed(table, count=3)))
    assert source.count == 3
    assert source.ids().to_pylist() == ["made:0000001", "made:0000002", "made:0000003"]


def test_prompts_that_were_made_are_read_as_those_of_a_source(personas):
    made = pa.Table.from_pylist(
        [
            {
                "prompt_id": name_of(number),
                "number": number,
                "persona": "nurse",
                "topic": "rain",
                "prompt": [{"role": "user", "content": text}],
                "made_tokens": 3,
            }
            for number, text in ((1, "Why?"), (2, '[{"role": "user", "content": "no message"}]'))
        ]
    )
    raw = raw_table(made)
    assert raw.schema == RAW
    rows = [
        prompt_row(one["source"], one["line"], json.loads(one["raw"]), changed(personas)) for one in raw.to_pylist()
    ]
    assert [row["prompt"][0]["content"] for row in rows] == ["Why?", '[{"role": "user", "content": "no message"}]']
    assert [row.get("dropped") for row in rows] == [None, None]
    assert json.loads(rows[0]["extra"]) == {"persona": "nurse", "topic": "rain"}
    assert (rows[1]["source"], rows[1]["line"]) == ("made", 2)


def key(job):
    return stage_key("made", settings(job), {})


def test_what_prompts_are_made_of_counts_and_where_does_not(table, tiny_model):
    plain = key(changed(table))
    assert key(changed(table, model=tiny_model)) == plain
    assert key(changed(table, engine={**table["synthesis"]["engine"], "concurrency": 3})) == plain
    assert key(changed({**table, "seed": 4}, seed=0)) == plain
    others = [{"count": 6}, {"seed": 1}, {"system": "Cook."}, {"sampling": {"temperature": 0.3}}]
    found = [key(changed(table, **other)) for other in others]
    assert len({plain, *found}) == 1 + len(others)
    # How they are split and measured is the next stage's.
    table["prompts"] |= {"heldout_fraction": 0.4, "max_prompt_tokens": 99}
    assert key(Job.model_validate(table)) == plain


def test_prompts_depend_on_what_was_made_and_not_on_how(table):
    one, other = (stage_key("prompts", prompts_settings(changed(table, count=count)), {}) for count in (5, 6))
    assert one == other


def test_personas_count_by_what_they_say(personas, tmp_path):
    plain = key(changed(personas))
    (tmp_path / "moved.jsonl").write_bytes((tmp_path / "who.jsonl").read_bytes())
    moved = {"source": str(tmp_path / "moved.jsonl"), "column": "who"}
    assert key(changed(personas, personas=moved)) == plain
    assert key(changed(personas, template="{{ persona }}: {{ topic }}?")) != plain
    write_jsonl(tmp_path / "moved.jsonl", [{"who": "poet"}])
    assert key(changed(personas, personas=moved)) != plain


def test_the_lineage_names_the_model_and_the_lists(personas):
    job = changed(personas)
    found = sources({"made": SimpleNamespace(settings=settings(job))}, job.student.model)
    made = job.prompts.made
    assert [one.name for one in found] == [job.student.model, made.personas.source, made.topics.source]


def test_the_engines_that_write_are_a_pool_and_their_model_is_looked_for(table):
    job = changed(table, model="a/writer", engine={"gpus": 2, "options": {"trust_remote_code": True}})
    first = pools_of(job)[0]
    assert (first.stage, first.setting, first.gpus) == ("made", "prompts.made.engine", 2)
    assert ("a/writer", None) in models_by_kind(job)[None]
    assert job.trusted_code == ["prompts.made.engine.options"]


def test_hours_are_counted_for_as_many_as_are_made(table):
    job = changed(table, count=7200)
    rates = Rates("r", dict.fromkeys(("made", "synthesis", "reference", "training", "evaluation"), 1.0))
    assert stage_costs(job, 10, rates, {})[0].hours == 2


def test_a_template_without_a_place_for_a_user_is_refused_before_work(table, tmp_path):
    check_made(changed(table))
    bare = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    table["student"]["model"] = llama(tmp_path / "bare", byte_tokenizer(bare))
    with pytest.raises(InputError, match=r"prompts.made: the chat template of .*nothing before a user's message"):
        check_made(changed(table))
    thinking = CHATML.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
    table["student"]["model"] = llama(tmp_path / "thinking", byte_tokenizer(thinking))
    # It could not be trained on as it is, and may write prompts all the same.
    assert magpie_turn(as_teacher(changed(table))).before == "<|im_start|>user\n"


def test_what_personas_name_is_looked_at_before_work(personas, tmp_path):
    check_made(changed(personas))
    with pytest.raises(InputError, match=r"prompts.made.topics.column: .* has no column `who`; it has 'what'"):
        check_made(changed(personas, topics={"source": str(tmp_path / "what.jsonl"), "column": "who"}))
    with pytest.raises(InputError, match=r"prompts.made.template: has no place for the topic"):
        check_named(changed(personas, template="{{ persona }}"))


def test_a_reward_that_reads_a_column_is_refused_where_none_is_made(table, personas):
    judge = {"kind": "judge", "name": "judge", "rubric": "{{ criterion }} {{ answer }}", "criteria_column": "persona"}
    personas["rewards"] = [judge]
    check_other_sources(changed(personas))
    personas["rewards"] = [{**judge, "criteria_column": "rubric"}]
    with pytest.raises(
        InputError, match=r"rewards.judge.criteria_column: prompts that are made have no column `rubric`"
    ):
        check_other_sources(changed(personas))


def test_later_rounds_have_the_prompts_of_the_first(table):
    job = Job.model_validate({**table, "rounds": {"count": 3}})
    starts = [job.student.model, "runs/rounds/1/model", "runs/rounds/2/model"]
    rounds = [job_of_round(job, number, starts) for number in (1, 2, 3)]
    assert rounds[0].prompts == job.prompts
    assert [(one.prompts.source, one.prompts.made) for one in rounds[1:]] == [("runs/rounds/1/made", None)] * 2
    assert Job.model_validate(to_table(rounds[1])) == rounds[1]


def test_seeds_are_compared_on_the_same_prompts(table, tmp_path):
    write_job(tmp_path / "job.toml", table)
    comparison = {"job": "job.toml", "seeds": [0, 1], "baseline": "dpo", "arms": {"dpo": {}, "other": {}}}
    write_job(tmp_path / "compare.toml", {"name": "c", **comparison})
    with pytest.raises(InputError, match=r"every seed would make prompts of its own.*give prompts.made.seed"):
        load_comparison(tmp_path / "compare.toml")
    table["prompts"]["made"]["seed"] = 3
    write_job(tmp_path / "job.toml", table)
    _, jobs = load_comparison(tmp_path / "compare.toml")
    assert len({key(job) for job in jobs.values()}) == 1


def test_the_report_and_the_card_say_who_wrote_the_prompts(table, tmp_path):
    run_dir = str(tmp_path / "run")
    Folder(run_dir).write_bytes(JOB_FILE, to_toml(changed(table)).encode())
    commit(run_dir, "prompts", [{"prompt_id": "a", "prompt_length": 5}], {"splits": {"train": 1}, "near_duplicates": 0})
    page = Path(write_report(run_dir)).read_text(encoding="utf-8")
    assert f"1 prompts of 5 that {table['student']['model']} wrote (magpie): 1 train" in page
    facts = {"version": "1", "evaluation": {"prompts": 0, "rewards": []}, "pairs": 1, "lineage": {}}
    assert f"`{table['student']['model']}` wrote the prompts." in model_card(changed(table), facts)
