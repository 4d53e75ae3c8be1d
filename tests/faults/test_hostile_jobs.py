"""Two hundred job files that mean harm: each ends in a plan or in one message, never in a traceback."""

import copy
import random

import pytest
import tomli_w

from rdpo.cli import main
from rdpo.config import load_job
from rdpo.errors import InputError
from rdpo.stages.checks import prepare

FILES = 200
JUNK = [
    "",
    "\x00",
    "../../../../etc/passwd",
    "/etc/shadow",
    "file:///etc/passwd",
    "s3://bucket/../key",
    "hf:",
    "hf:../../x",
    "package:os/../../etc/passwd",
    "package:__main__/x",
    "a" * 100_000,
    "\u202eevil\u2066",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.environ }}",
    "{% for i in range(1000000000) %}x{% endfor %}",
    "{{",
    "$(touch /tmp/never)",
    "os:system",
    "rdpo.nothing:here",
    -1,
    0,
    2**63 - 1,
    10**30,
    float("nan"),
    float("inf"),
    -1e308,
    True,
    [],
    [[[[1]]]],
    {},
    {"a": {"b": {"c": []}}},
    ["x", 1],
]
RAW = [b"\xff\xfe", b"\x00", b"[[", b"a = ", b'"""', b"= 1\n", b"\r", b"[prompts]\n", b"x" * 5000, b"[a.b.c.d.e]\n"]


def leaves(table, path=()):
    """Paths of all values in a table."""
    items = table.items() if isinstance(table, dict) else enumerate(table)
    for key, value in items:
        yield (*path, key)
        if isinstance(value, dict | list):
            yield from leaves(value, (*path, key))


def changed(table, draw):
    """The table with one to three of its values replaced, removed or joined by others."""
    table = copy.deepcopy(table)
    for _ in range(draw.randint(1, 3)):
        *above, key = draw.choice(list(leaves(table)))
        place = table
        for part in above:
            place = place[part]
        how = draw.randrange(4)
        if how == 0 and isinstance(place, dict):
            del place[key]
        elif how == 1 and isinstance(place, dict):
            place[draw.choice(["__class__", "a.b", "tëst", "model_config", "limit", ""])] = junk(draw)
        else:
            place[key] = junk(draw)
    return table


def junk(draw):
    return copy.deepcopy(draw.choice(JUNK))


def hostile(table, draw):
    """The bytes of a hostile job file."""
    content = tomli_w.dumps(changed(table, draw)).encode("utf-8", "surrogatepass")
    if draw.random() < 0.3:
        cut = draw.randrange(len(content))
        content = content[:cut] + draw.choice(RAW) + content[cut + draw.randrange(40) :]
    return content


@pytest.fixture
def whole(job_table):
    """A job with most sections and kinds of reward."""
    job_table["rewards"] += [
        {"kind": "judge", "name": "judge", "rubric": "Rate {{ answer }}", "ratings": ["1", "5"]},
        {"kind": "implicit", "name": "own", "reference": job_table["student"]["model"]},
    ]
    job_table |= {
        "pairs": {"min_gap": 0.5, "drop_truncated": "any", "flip": 0.1},
        "rounds": {"count": 2, "watch": "judge"},
        "replay": {"source": job_table["prompts"]["source"]},
        "publish": {"license": "mit"},
    }
    job_table["prompts"]["templates"] = ["{{ prompt }}"]
    return job_table


@pytest.mark.parametrize("seed", range(0, FILES, 20))
def test_twenty_hostile_job_files_end_clearly(whole, tmp_path, capsys, seed):
    endings = []
    for number in range(seed, seed + 20):
        path = tmp_path / f"{number}.toml"
        path.write_bytes(hostile(whole, random.Random(number)))
        code = main(["run", str(path), "--dry-run", "--run-dir", str(tmp_path / "run")])
        said = capsys.readouterr()
        assert code in (0, 2), (number, said.err)
        assert "Traceback" not in said.err
        assert code == 0 or (said.err.startswith("rdpo: ") and len(said.err) < 5000), (number, said.err[:300])
        assert not (tmp_path / "run").exists()
        endings.append(code)
    assert 2 in endings


class AllChecksPassed(Exception):
    pass


def no_cluster(job):
    raise AllChecksPassed


@pytest.mark.parametrize("seed", range(0, FILES, 20))
def test_what_can_be_tried_before_a_cluster_starts_ends_clearly_too(whole, tmp_path, monkeypatch, seed):
    monkeypatch.setattr("rdpo.cluster.connection.start_ray", no_cluster)
    for number in range(seed, seed + 20):
        path = tmp_path / f"{number}.toml"
        path.write_bytes(hostile(whole, random.Random(number)))
        with pytest.raises((InputError, AllChecksPassed)) as ended:
            prepare(load_job(path), print)
        assert len(str(ended.value)) < 5000
