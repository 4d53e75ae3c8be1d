"""Every command of rdpo that a document names is one that the command line takes, options and all."""

import re
import shlex
from pathlib import Path

import pytest

from rdpo.cli.parser import build, parse

ROOT = Path(__file__).parents[2]
PAGES = ["README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "jobs/README.md", "jobs/bench/RESULTS.md"]
PAGES += ["cluster/README.md", "cluster/locks/README.md"]
PAGES += [str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))]
MISTAKEN = {"rdpo show runs/quickstart trainnig"}
"""Shown for its message."""
COMMANDS = sorted(build()[1].choices)
LINE = re.compile(rf"^\s*(?:\$ )?(rdpo (?:{'|'.join(COMMANDS)})\b.*)$", re.MULTILINE)
INLINE = re.compile(rf"`(rdpo (?:{'|'.join(COMMANDS)}) [^`]+)`")
FENCED = re.compile(r"```\w*\n(.*?)```", re.DOTALL)
SHORTENED = re.compile(r"…|\.\.\.")
COLUMNS = re.compile(r"\s{2,}\S.*$")


def commands_of(page):
    """The command lines in a page's blocks, each as one line."""
    for block in FENCED.findall((ROOT / page).read_text(encoding="utf-8")):
        yield from LINE.findall(block.replace("\\\n", " "))


def mentions_of(page):
    """The commands in a page's sentences: often only the option that is spoken of."""
    text = FENCED.sub("", (ROOT / page).read_text(encoding="utf-8"))
    return [command.split() for command in INLINE.findall(text)]


def words_of(command):
    """A command line as a shell takes it apart; without what is piped into it, or said beside it."""
    # Beside a command, behind blanks, some pages say what it does.
    command = COLUMNS.sub("", command.partition(" #")[0])
    words = shlex.split(command, comments=True)
    ends = [place for place, word in enumerate(words) if word in ("<", ">", "|", "&&", ";")]
    return words[1 : ends[0] if ends else None]


def parsed(command):
    """Whether the command line takes it."""
    try:
        parse(words_of(command))
    except SystemExit as ended:
        return ended.code == 0
    return True


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_are_taken_as_they_stand(page, capsys):
    wrong = []
    for command in commands_of(page):
        if not SHORTENED.search(command) and command not in MISTAKEN and not parsed(command):
            wrong.append((command, capsys.readouterr().err.splitlines()[-1]))
    assert not wrong


@pytest.mark.parametrize("page", PAGES)
def test_options_that_a_page_speaks_of_are_those_of_the_command(page):
    commands, unknown = build()[1].choices, []
    for _, command, *words in mentions_of(page):
        options = {word.partition("=")[0] for word in words if word.startswith("--")}
        unknown += [(command, option) for option in options - {*commands[command]._option_string_actions}]
    assert not unknown


def test_commands_are_found_at_all():
    assert len(list(commands_of("README.md"))) > 5
    assert sum(len(mentions_of(page)) for page in PAGES) > 40
    assert "rdpo prove runs/quickstart --suite refusals # one of them" in list(commands_of("docs/compare.md"))


@pytest.mark.parametrize(
    ("command", "taken"),
    [
        ("rdpo run mine.toml --dry-run   # what would run", True),
        ("rdpo chat runs/x < questions.txt", True),
        ("rdpo run mine.toml --no-such-option", False),
        ("rdpo plan mine.toml --workers many", False),
    ],
)
def test_a_wrong_option_is_seen(command, taken):
    assert parsed(command) is taken
