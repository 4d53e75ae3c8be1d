"""Several sources of prompts: whose a row is, what does not go together, and how many rows of each are drawn."""

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from rdpo.config import Job
from rdpo.config.files import job_of as job_of_table
from rdpo.config.files import to_table
from rdpo.errors import InputError
from rdpo.execution.keys import stage_key
from rdpo.files.stage_folder import StageFolder
from rdpo.records import ID_COLUMN
from rdpo.stages.prompts import settings as prompts_settings
from rdpo.stages.prompts import take_prompts
from rdpo.synthesis.columns import Needed
from rdpo.synthesis.mixture import alone, check_together, counts, not_drawn, places_of
from rdpo.synthesis.prompts import SCHEMA, check_templates, drop_duplicates, drop_not_drawn, prompt_row
from tests.support.jobs import write_jsonl


@pytest.fixture
def job_with(job_table, tmp_path):
    """A job over these sources; `task = None`: their pairs are ready."""

    def job_with(*sources, task="roleplay", **prompts):
        table = {name: value for name, value in job_table.items() if name != "prompts"}
        table["synthesis"] = {**table["synthesis"], "task": task} if task else {}
        table["prompts"] = {"sources": list(sources), "max_prompt_tokens": 128, **prompts}
        if not task:
            table["rewards"] = []
        return job_of_table(table, "job.toml")

    return job_with


@pytest.fixture
def files(tmp_path):
    """Three files of questions: 40, 20 and 10 of them."""
    found = {}
    for name, count in (("large", 40), ("small", 20), ("tiny", 10)):
        found[name] = str(tmp_path / f"{name}.jsonl")
        write_jsonl(found[name], [{"prompt": f"{name} question {number}"} for number in range(count)])
    return found


def folder_of(place, job, files):
    """The rows of the sources as the stage has them before it drops any, without Ray."""
    folder = StageFolder(str(place), "prompts")
    rows = []
    for part, _ in alone(job):
        name = part.prompts.source
        lines = Path(name).read_text(encoding="utf-8").splitlines()
        rows += [prompt_row(name, number, json.loads(line), part) for number, line in enumerate(lines, start=1)]

    folder.begin("key")
    folder.write_parts(pa.Table.from_pylist(rows, schema=SCHEMA), ID_COLUMN)
    return folder


def kept(folder):
    rows = folder.table().to_pylist()
    return Counter((row["source"].rsplit("/", 1)[1], row["split"]) for row in rows), {row[ID_COLUMN] for row in rows}


def drawn(place, job, files):
    folder = folder_of(place, job, files)
    drop_duplicates(folder)
    drop_not_drawn(folder, job, places_of(job.prompts))
    return folder


def test_rows_know_their_source_and_split_by_their_own_ids(job_with, files, tmp_path):
    one, other = {"source": files["large"]}, {"source": files["small"]}
    both = folder_of(tmp_path / "both", job_with(one, other), files)
    apart = [folder_of(tmp_path / str(n), job_with(only), files) for n, only in enumerate((one, other))]
    rows = {row[ID_COLUMN]: row for row in both.table().to_pylist()}
    assert rows == {row[ID_COLUMN]: row for folder in apart for row in folder.table().to_pylist()}
    found = counts(both, places_of(job_with(one, other).prompts))
    assert [sum(found[number].values()) for number in (0, 1)] == [40, 20]
    # Held out of each: as many as its own ids say.
    assert all(0 < found[number]["heldout"] < found[number]["train"] for number in (0, 1))


def test_shares_are_kept_without_taking_a_prompt_twice(job_with, files, tmp_path):
    shares = ({"source": files["large"], "share": 3}, {"source": files["small"], "share": 1})
    folder = drawn(tmp_path / "run", job_with(*shares), files)
    places = places_of(job_with(*shares).prompts)
    found = counts(folder, places)
    whole = counts(folder_of(tmp_path / "all", job_with(*shares), files), places)
    # Of the source that is scarcest for its share all are taken.
    assert found[0]["train"] == whole[0]["train"]
    assert found[1]["train"] == whole[0]["train"] // 3
    measure = found[1]["train"] / whole[1]["train"]
    assert found[1]["heldout"] == -(-measure * whole[1]["heldout"] // 1)
    assert found[1]["dropped"] == 20 - found[1]["train"] - found[1]["heldout"]
    assert folder.reasons() == {"not drawn: there are more prompts of its source than its share": found[1]["dropped"]}


def test_who_is_drawn_depends_on_ids_alone(job_with, files, tmp_path):
    shares = [{"source": files["large"], "share": 1}, {"source": files["tiny"], "share": 1}]
    first, again = (kept(drawn(tmp_path / name, job_with(*shares), files)) for name in ("first", "again"))
    backwards = kept(drawn(tmp_path / "backwards", job_with(*reversed(shares)), files))
    thousands = [{**one, "share": 1000} for one in shares]
    assert first == again == backwards == kept(drawn(tmp_path / "large", job_with(*thousands), files))
    # More of a source are the same ones and others.
    more = kept(drawn(tmp_path / "more", job_with({**shares[0], "share": 2}, shares[1]), files))
    assert first[1] < more[1]


def test_a_share_of_nothing_is_refused(job_with, files, tmp_path):
    heldout = str(tmp_path / "heldout.jsonl")
    write_jsonl(heldout, [{"prompt": f"held {number}", "split": "test"} for number in range(5)])
    job = job_with({"source": files["large"], "share": 1}, {"source": heldout, "share": 1})
    with pytest.raises(InputError, match=rf"prompts\.sources\.1: no usable prompt in the train split of {heldout}"):
        drawn(tmp_path / "none", job, files)
    job = job_with({"source": files["large"], "share": 1000}, {"source": files["tiny"], "share": 1})
    with pytest.raises(InputError, match=r"prompts\.sources\.1: its share is less than one prompt"):
        drawn(tmp_path / "less", job, files)


def test_a_duplicate_in_another_source_is_dropped_once(job_with, files, tmp_path):
    copy = str(tmp_path / "copy.jsonl")
    write_jsonl(copy, [{"prompt": "large question 3"}, {"prompt": "LARGE question 4"}, {"prompt": "new"}])
    job = job_with({"source": files["large"]}, {"source": copy})
    folder = folder_of(tmp_path / "run", job, files)
    drop_duplicates(folder)
    assert folder.count() == 41
    assert sum(folder.reasons().values()) == 2
    found = counts(folder, places_of(job.prompts))
    assert sum(one.get("dropped", 0) for one in found.values()) == 2


def test_each_source_has_its_own_form(job_with, tmp_path):
    asked, told = str(tmp_path / "asked.jsonl"), str(tmp_path / "told.jsonl")
    write_jsonl(asked, [{"question": "why?", "tone": "sly"}])
    write_jsonl(told, [{"prompt": "how?"}])
    own = {"column": "question", "system": "Be brief.", "templates": ["({{ tone }}) {{ prompt }}"]}
    job = job_with(
        {"source": asked, **own}, {"source": told}, system="Be kind.", heldout_templates=["Now {{ prompt }}"]
    )
    first, second = (part.prompts for part, _ in alone(job))
    assert (first.column, first.system, first.heldout_templates) == ("question", "Be brief.", [])
    assert (second.column, second.system, second.templates) == ("prompt", "Be kind.", [])
    assert second.heldout_templates == ["Now {{ prompt }}"]
    check_together(job)
    [row] = folder_of(tmp_path / "run", job_with({"source": asked, **own}), {}).table().to_pylist()
    assert [message["content"] for message in row["prompt"]] == ["Be brief.", "(sly) why?"]
    assert Job.model_validate(to_table(job)) == job


READY = {"prompt": "q", "chosen": "a", "rejected": "b"}
SCORED = {**READY, "score_chosen": 1.0, "score_rejected": 0.0}


@pytest.mark.parametrize(
    ("rows", "task", "message"),
    [
        ((READY, {"prompt": "q"}), None, r"prompts\.sources\.1: \S+1\.jsonl has no column `chosen`.*synthesis\.task"),
        ((SCORED, READY), None, r"sources\.1: \S+1\.jsonl has no column `score_chosen`, and \S+0\.jsonl has"),
        ((READY, SCORED), None, r"sources\.0: \S+0\.jsonl has no column `score_chosen`, and \S+1\.jsonl has"),
        (
            ({"prompt": "q"}, {"text": "q"}),
            "roleplay",
            r"sources\.1\.column: \S+1\.jsonl has no column `prompt`",
        ),
        ((READY, READY), None, None),
        ((SCORED, SCORED), None, None),
        ((SCORED, {"prompt": "q"}), "roleplay", None),
    ],
)
def test_sources_whose_forms_clash_are_refused(rows, task, message, job_with, tmp_path):
    places = [str(tmp_path / f"{number}.jsonl") for number in range(len(rows))]
    for place, row in zip(places, rows, strict=True):
        write_jsonl(place, [row])
    job = job_with(*({"source": place} for place in places), task=task)
    if message is None:
        check_together(job)
        return
    with pytest.raises(InputError, match=message):
        check_together(job)


def test_a_column_that_a_reward_reads_is_looked_for_in_each_source(job_with, files, tmp_path):
    other = str(tmp_path / "other.jsonl")
    write_jsonl(other, [{"prompt": "q", "criteria": ["short"]}])
    needed = [Needed(("criteria",), "rewards.own.column")]
    check_together(job_with({"source": other}), needed)
    with pytest.raises(InputError, match=r"rewards\.own\.column: \S+tiny\.jsonl has no column `criteria`"):
        check_together(job_with({"source": other}, {"source": files["tiny"]}), needed)


def test_a_source_that_is_missing_is_named(job_with, files):
    with pytest.raises(InputError, match=r"prompts\.sources\.1: .*nowhere\.jsonl does not exist"):
        check_together(job_with({"source": files["large"]}, {"source": "nowhere.jsonl"}))


def test_a_file_is_read_by_one_source(job_with, files, tmp_path):
    with pytest.raises(InputError, match=r"sources\.1: \S+small\.jsonl is read by prompts\.sources\.0 too"):
        check_together(job_with({"source": str(tmp_path)}, {"source": files["small"]}))


def test_parts_of_one_data_set_of_the_hub_are_told_apart(job_with):
    parts = [{"source": "hf:a/b"}, {"source": "hf:a/b", "dataset_split": "test"}, {"source": "hf:a/b", "subset": "x"}]
    job = job_with(*parts, {"source": "hf:c/d@v1"})
    assert places_of(job.prompts) == {"hf:a/b train": 0, "hf:a/b test": 1, "hf:a/b x train": 2, "hf:c/d@v1": 3}
    assert [reading.place for _, reading in alone(job)] == list(places_of(job.prompts))


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({}, r"prompts: give either source, or a table \[\[prompts.sources\]\] for each of several"),
        ({"source": "a.jsonl", "sources": [{"source": "b.jsonl"}]}, "give either source, or a table"),
        ({"sources": [{"source": "a.jsonl"}], "limit": 5}, r"limit is that of one source: write it into its table"),
        ({"sources": [{"source": "a.jsonl"}], "dataset_split": "test"}, "dataset_split is that of one source"),
        ({"sources": [{"source": "a.jsonl"}, {"source": "a.jsonl"}]}, r"sources: a\.jsonl is named twice"),
        (
            {"sources": [{"source": "a.jsonl", "share": 1}, {"source": "b.jsonl"}]},
            r"sources\.1: has no share, and others have; give all of them one, or none",
        ),
        (
            {"sources": [{"source": "a.jsonl", "share": 0}]},
            r"prompts\.sources\.0\.share: Input should be greater",
        ),
        ({"sources": [{"source": "a.jsonl", "wait": 1}]}, r"prompts\.sources\.0\.wait: unknown key"),
        ({"sources": [{"source": "https://me:secret@host/a.jsonl"}]}, r"prompts\.sources\.0\.source: an address"),
    ],
)
def test_tables_that_say_too_little_or_too_much_are_refused(prompts, message, job_table):
    with pytest.raises(InputError, match=message):
        job_of_table({**job_table, "prompts": prompts}, "job.toml")


def test_templates_of_a_source_are_looked_at(job_with, files):
    job = job_with({"source": files["large"], "templates": ["no place"]})
    with pytest.raises(InputError, match=r"prompts\.sources\.0\.templates: 'no place' has no place for the prompt"):
        check_templates(job.prompts)


def test_the_key_goes_by_what_the_sources_hold(job_with, files, tmp_path):
    def key(*sources, **prompts):
        return stage_key("prompts", prompts_settings(job_with(*sources, **prompts)), {})

    one, other = {"source": files["large"]}, {"source": files["small"]}
    first = key(one, other)
    moved = str(tmp_path / "moved.jsonl")
    write_jsonl(moved, [{"prompt": f"small question {number}"} for number in range(20)])
    assert key(one, {"source": moved}) == first
    write_jsonl(moved, [{"prompt": "another"}])
    others = [
        key(one, {"source": moved}),
        key(one),
        key(one, {**other, "limit": 5}),
        key(one, other, system="Be kind."),
    ]
    shared = [{**one, "share": 1}, {**other, "share": 1}]
    assert len({first, *others, key(*shared), key({**one, "share": 2}, shared[1])}) == 7


def test_a_share_of_one_source_only_thins_nothing(job_with, files, tmp_path):
    job = job_with({"source": files["tiny"], "share": 0.2})
    folder = folder_of(tmp_path / "run", job, files)
    lost = not_drawn(folder, job.prompts, places_of(job.prompts), "train", 0)
    assert not any(lost(folder.table()))


class Heard:
    """A run, its console and its meter, for what the stage asks of them."""

    def __init__(self, job):
        self.job, self.console, self.said, self.done = job, self, [], 0

    def say(self, line):
        self.said.append(line.strip())

    def advance(self, count):
        self.done += count


@pytest.mark.ray
def test_the_stage_takes_all_sources_and_says_what_came_of_each(ray_cluster, job_with, files, tmp_path):
    table = tmp_path / "table.csv"
    table.write_text("question,tone\n" + "".join(f"table question {n},dry\n" for n in range(30)) + ",dry\n")
    other = {"source": str(table), "column": "question", "templates": ["({{ tone }}) {{ prompt }}"]}
    heard = Heard(job_with({"source": files["small"], "share": 1}, {**other, "share": 1}))
    folder = StageFolder(str(tmp_path / "run"), "prompts")
    folder.begin("key")
    summary = take_prompts(heard, folder, heard)

    assert summary["rows_in"] == 51 == folder.count() + sum(folder.reasons().values())
    small, dry = (one["rows"] for one in summary["sources"])
    assert small["train"] == dry["train"]
    assert sum(small.values()) == 20 and sum(dry.values()) == 31
    assert summary["splits"] == {split: small[split] + dry[split] for split in ("heldout", "train")}
    assert f"{table}: {dry['dropped']} dropped, {dry['heldout']} heldout, {dry['train']} train" in heard.said
    rows = folder.table().to_pylist()
    assert {row["prompt"][0]["content"][:6] for row in rows if row["source"] == str(table)} == {"(dry) "}
    assert {row["source"] for row in rows} == {files["small"], str(table)}
