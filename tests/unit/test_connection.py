"""Connecting to Ray: the token that lets code run on a cluster is its owner's alone."""

import stat

import pytest

from rdpo.cluster.connection import keep_token_private


@pytest.fixture
def token(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path / ".ray" / "auth_token"


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_token_is_readable_by_its_owner_alone(token):
    keep_token_private()
    assert (mode(token), mode(token.parent)) == (0o600, 0o700)
    assert len(token.read_text()) == 64
    assert list(token.parent.iterdir()) == [token]


@pytest.mark.parametrize("named", [False, True])
def test_a_token_that_all_can_read_is_closed_and_stays_the_same(token, monkeypatch, tmp_path, named):
    path = tmp_path / "own" if named else token
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
    path.parent.mkdir(exist_ok=True)
    path.write_text("known")
    path.chmod(0o644)
    keep_token_private()
    assert (mode(path), path.read_text()) == (0o600, "known")
    assert token.exists() == (not named)


@pytest.mark.parametrize(("name", "value"), [("RAY_AUTH_TOKEN", "given"), ("RAY_AUTH_MODE", "disabled")])
def test_no_token_is_written_where_none_is_read(token, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    keep_token_private()
    assert not token.exists()
