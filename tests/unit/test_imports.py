"""What a reward function imports of the user's own is part of what it computes."""

import pytest

from rdpo.config import FunctionReward
from rdpo.preference.rewards.function import FunctionKind
from rdpo.preference.rewards.imports import helper_hash


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder on the path, and how to write modules into it."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**modules):
        for name, source in modules.items():
            path = tmp_path / f"{name.replace('__', '/').replace('INIT', '__init__')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(source)

    return write


@pytest.mark.parametrize(
    ("imported", "changed"),
    [
        ("from own_helper import SCALE", "own_helper"),
        ("import own_helper as h", "own_helper"),
        ("def score(*_):\n    from own_helper import SCALE\n    return SCALE", "own_helper"),
        ("import own_middle", "own_helper"),
        ("from own_package import scales", "own_package__scales"),
        ("import own_package.scales", "own_package__INIT"),
    ],
)
def test_a_change_in_what_is_imported_changes_the_hash(project, imported, changed):
    project(
        own_helper="SCALE = 1.0\n",
        own_middle="import own_helper\n",
        own_package__INIT="",
        own_package__scales="SCALE = 1.0\n",
        own_reward=f"import json, numpy, os.path\n{imported}\n",
    )
    before = helper_hash("own_reward")
    assert before == helper_hash("own_reward")
    project(**{changed: "SCALE = 2.0\n"})
    assert helper_hash("own_reward") != before


def test_relative_imports_are_followed_inside_their_package(project):
    project(
        own_pack__INIT="",
        own_pack__score="from . import scales\nfrom .deep.scale import SCALE\n",
        own_pack__scales="SCALE = 1.0\n",
        own_pack__deep__INIT="from ..scales import SCALE\n",
        own_pack__deep__scale="SCALE = 1.0\n",
    )
    before = helper_hash("own_pack.score")
    for changed in ("own_pack__scales", "own_pack__deep__scale", "own_pack__deep__INIT"):
        project(**{changed: "SCALE = 2.0\n"})
        assert helper_hash("own_pack.score") != before
        before = helper_hash("own_pack.score")


def test_nothing_is_imported_to_look_at_it(project):
    project(own_heavy="raise RuntimeError\n", own_light="def score(*_):\n    from own_heavy import x\n")
    assert helper_hash("own_light") is not None


def test_installed_packages_and_modules_that_are_not_there_are_no_helpers(project):
    project(own_plain="import json\nimport numpy.linalg\nimport not_there_at_all\n")
    assert helper_hash("own_plain") is None


def test_the_settings_of_a_function_hold_its_helpers_only_where_there_are_any(project, job_table):
    project(own_scale="SCALE = 1.0\n", own_with="import own_scale\ndef score(*_):\n    return own_scale.SCALE\n")
    project(own_without="def score(*_):\n    return 1.0\n")
    kinds = [
        FunctionKind(FunctionReward(kind="function", name="r", function=f"{module}:score"))
        for module in ("own_with", "own_without")
    ]
    assert ["imports" in kind.settings(None) for kind in kinds] == [True, False]


def test_modules_in_folders_without_init_files_are_found_before_any_of_them_is_imported(project):
    project(
        own_plain__deep__scores="from own_plain.deep import own_scale\n",
        own_plain__deep__own_scale="SCALE = 1.0\n",
    )
    before = helper_hash("own_plain.deep.scores")
    assert before is not None
    project(own_plain__deep__own_scale="SCALE = 2.0\n")
    assert helper_hash("own_plain.deep.scores") not in (None, before)
