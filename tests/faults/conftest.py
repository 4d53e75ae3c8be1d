"""The table of faults and stages that the run of these tests prints."""

import pytest

SURVIVED = pytest.StashKey()


@pytest.fixture
def survived(request):
    """Notes how a stage survived a fault."""
    table = request.config.stash.setdefault(SURVIVED, {})

    def note(fault, stage, how):
        table[fault, stage] = how

    return note


def pytest_terminal_summary(terminalreporter, config):
    table = config.stash.get(SURVIVED, {})
    if not table:
        return
    stages = list(dict.fromkeys(stage for _, stage in table))
    terminalreporter.write_line("")
    terminalreporter.write_line("| fault | " + " | ".join(stages) + " |")
    terminalreporter.write_line("|---|" + "---|" * len(stages))
    for fault in dict.fromkeys(fault for fault, _ in table):
        cells = (table.get((fault, stage), "") for stage in stages)
        terminalreporter.write_line(f"| {fault} | " + " | ".join(cells) + " |")
