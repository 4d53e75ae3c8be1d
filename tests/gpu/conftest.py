"""A failure is printed when it happens: a run that is cut off later has said it all the same."""

import sys


def pytest_runtest_logreport(report):
    if report.failed:
        print(f"\n{report.nodeid} ({report.when})\n{report.longreprtext}", file=sys.__stderr__, flush=True)
