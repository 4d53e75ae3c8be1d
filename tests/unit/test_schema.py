"""The schemas by which editors complete and check files: current, and of the same mind as the loader."""

import datetime
import json
import tomllib
from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from rdpo.cli import main
from rdpo.config.schema import KINDS, schema_of, schema_text

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "jobs").glob("*.toml"), *(ROOT / "jobs").glob("*/*.toml")]


def tables_of(text):
    """As an editor has them: a date is a text there."""
    return json.loads(json.dumps(tomllib.loads(text), default=datetime.date.isoformat))


def faults(kind, tables):
    return [error.message for error in Draft202012Validator(schema_of(kind)).iter_errors(tables)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_file_names_its_schema_and_is_valid_by_it(path):
    text = path.read_text(encoding="utf-8")
    named = path.parent / text.partition("\n")[0].removeprefix("#:schema ")
    assert named.exists()
    assert faults(named.name.partition(".")[0], tables_of(text)) == []


@pytest.mark.parametrize("kind", KINDS)
def test_the_schemas_beside_the_jobs_are_current(kind):
    assert (ROOT / "jobs" / f"{kind}.schema.json").read_text(encoding="utf-8") == schema_text(kind), "run `make docs`"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("training.lerning_rate = 1e-5", "'lerning_rate' was unexpected"),
        ('training.loss = "dppo"', "'dppo' is not one of"),
        ("training.beta = 0", "0 is less than or equal to the minimum of 0"),
        ("pairs.others = 3", "3 is not valid under any of the given schemas"),
    ],
)
def test_what_the_loader_refuses_an_editor_marks(line, said):
    job = 'name = "x"\nstudent.model = "m"\nprompts.source = "p.jsonl"\n'
    assert faults("job", tables_of(job)) == []
    assert any(said in fault for fault in faults("job", tables_of(f"{job}{line}\n"))), line


def test_the_command_prints_a_schema_with_meanings(capsys):
    assert main(["schema"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == schema_of("job")
    assert "Nucleus sampling" in printed["$defs"]["Sampling"]["properties"]["top_p"]["description"]
