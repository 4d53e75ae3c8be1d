"""The table of faults and stages that the run of these tests prints."""

import pytest

SURVIVED = "survived"


@pytest.fixture
def survived(record_property):
    """Notes how a stage survived a fault."""

    def note(fault, stage, how):
        record_property(SURVIVED, (fault, stage, how))

    return note


def pytest_terminal_summary(terminalreporter):
    # Properties, because they come with a report also out of another process.
    noted = [dict(report.user_properties).get(SURVIVED) for report in terminalreporter.getreports("passed")]
    table = {(fault, stage): how for fault, stage, how in filter(None, noted)}
    if not table:
        return
    stages = list(dict.fromkeys(stage for _, stage in table))
    terminalreporter.write_line("")
    terminalreporter.write_line("| fault | " + " | ".join(stages) + " |")
    terminalreporter.write_line("|---|" + "---|" * len(stages))
    for fault in dict.fromkeys(fault for fault, _ in table):
        cells = (table.get((fault, stage), "") for stage in stages)
        terminalreporter.write_line(f"| {fault} | " + " | ".join(cells) + " |")
