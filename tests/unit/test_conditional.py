"""Credentials of objects that are written on a condition: what cannot be read here is said, not left out."""

import sys

import pytest

from rdpo.errors import InputError
from rdpo.files.conditional import _other_credentials

KEYS = "[default]\naws_access_key_id = a\naws_secret_access_key = b\n"


@pytest.fixture
def without_boto3(monkeypatch, tmp_path):
    """An empty home, no boto3 and no variable of Amazon's."""
    for variable in ("PROFILE", "DEFAULT_PROFILE", "SHARED_CREDENTIALS_FILE", "CONFIG_FILE"):
        monkeypatch.delenv(f"AWS_{variable}", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "boto3", None)
    (tmp_path / ".aws").mkdir()
    return tmp_path / ".aws"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("credentials", KEYS),
        ("config", "[profile work]\nsso_session = work\nsso_account_id = 1\n"),
        ("config", "[profile work]\nregion = eu-central-1\nrole_arn = arn:aws:iam::1:role/r\nsource_profile = x\n"),
        ("config", "[profile work]\ncredential_process = keys\n"),
        ("config", "no profile"),
    ],
)
def test_credentials_of_a_profile_without_boto3_are_refused_with_the_file_and_what_to_install(
    without_boto3, name, content
):
    (without_boto3 / name).write_text(content)
    with pytest.raises(InputError, match=rf"AWS profile \(.*{name}\) are read by the package boto3.*pip install boto3"):
        _other_credentials()


@pytest.mark.parametrize("variable", ["AWS_PROFILE", "AWS_DEFAULT_PROFILE"])
def test_a_profile_that_the_environment_names_is_refused_by_that_name(without_boto3, monkeypatch, variable):
    monkeypatch.setenv(variable, "work")
    with pytest.raises(InputError, match=rf"AWS profile \({variable}\)"):
        _other_credentials()


def test_a_file_elsewhere_is_found_by_its_variable(without_boto3, monkeypatch, tmp_path):
    (tmp_path / "keys").write_text(KEYS)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "keys"))
    with pytest.raises(InputError, match="keys"):
        _other_credentials()


def test_a_machine_whose_files_name_a_region_alone_has_the_credentials_of_the_machine(without_boto3):
    (without_boto3 / "config").write_text("[default]\nregion = eu-central-1\noutput = json\n")
    assert _other_credentials() == {}
