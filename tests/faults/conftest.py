"""What the table of faults and stages is made of."""

import pytest

SURVIVED = "survived"


@pytest.fixture
def survived(record_property):
    """Notes how a stage survived a fault."""

    def note(fault, stage, how):
        record_property(SURVIVED, (fault, stage, how))

    return note
