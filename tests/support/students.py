"""Jobs over a student, and what is looked at before it works."""

from rdpo.config import Job
from rdpo.modeling.chat import load_chat
from rdpo.modeling.student import check_student
from rdpo.modeling.weights import ModelRef
from tests.support.jobs import valid_job


def job_of(model, place, **tables):
    """A valid job over this student, some of its sections changed."""
    table = valid_job(model, place)
    for section, own in tables.items():
        table[section] = {**table.get(section, {}), **own}
    return Job.model_validate(table)


def checked(job):
    """Look at the student of a job as before a run."""
    check_student(job, load_chat(ModelRef.student(job)))
