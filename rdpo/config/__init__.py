"""The whole configuration of a run: a TOML job file becomes one validated `Job`.

The sections are named after the stages. Unknown keys are refused, and relations between fields are checked here,
before any model is loaded.
"""

from rdpo.config.annotators import Annotators
from rdpo.config.evaluation import Evaluation, Publish, Retention, Rounds
from rdpo.config.files import (
    check_kind,
    explained,
    job_of,
    load_job,
    read_tables,
    tables_of,
    to_table,
    to_toml,
    with_changes,
)
from rdpo.config.job import RESOURCES, TEMPLATE_DATE, Cluster, Job, Placement
from rdpo.config.made import Made, Texts
from rdpo.config.models import MEMORY_OPTIONS, Endpoint, Engine, Sampling, Server, Student
from rdpo.config.pairs import BEST, REST, WORST, Defect, Pairs, Reference, Replay, Sides
from rdpo.config.prompts import Prompts, Synthesis
from rdpo.config.rewards import (
    Calibration,
    ClassifierReward,
    Criterion,
    EndpointReward,
    FunctionReward,
    ImplicitReward,
    JudgeReward,
    Reward,
    TargetReward,
)
from rdpo.config.section import MEMORY, PLACEMENT, Concurrency, Dtype, Layout, Section, largest, smallest
from rdpo.config.selection import Selection
from rdpo.config.suites import SUITE_KINDS, Suite
from rdpo.config.tracking import Tracking
from rdpo.config.training import LOSS_OPTIONS, Lora, Loss, TokenWeights, Training
from rdpo.config.voices import Voice
