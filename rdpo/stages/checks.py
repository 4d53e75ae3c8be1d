"""Before any long work: whether everything that a job names can be used."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING

from rdpo.config import Job, smallest
from rdpo.errors import InputError
from rdpo.execution.lock import Say

if TYPE_CHECKING:
    from rdpo.cluster.placement import Nodes


def prepare(job: Job, say: Say) -> bool:
    """Try models, task and rewards, and start Ray, before any long work; whether its pools fit side by side.

    Says which pools wait for nodes that are not there yet.

    Raises:
        InputError: something the job names cannot be used.
    """
    from rdpo.cluster.connection import start_ray
    from rdpo.cluster.installed import check_cpu_engines, check_drivers, check_installed
    from rdpo.cluster.placement import Nodes, check_room, fit_side_by_side
    from rdpo.modeling.chat import student_chat
    from rdpo.modeling.student import check_architecture, check_student
    from rdpo.modeling.weights import ModelRef
    from rdpo.preference.rewards import check_rewards
    from rdpo.preference.selection import check_selection
    from rdpo.stages.pools import pools_of
    from rdpo.synthesis.made import check_made
    from rdpo.synthesis.prompts import check_templates

    check_templates(job.prompts)
    student = ModelRef.student(job)
    chat = student_chat(job)
    check_student(job, chat)
    check_architecture(job)
    if not chat.ending:
        say(f"{student.name}: its chat template ends an answer without a token that ends generation; no end is trained")

    pools = pools_of(job)
    check_cpu_engines(pools)
    if job.prompts.made:
        check_made(job)
    _check_teacher(job)
    if job.selection:
        check_selection(job)
    check_rewards(job)
    check_other_sources(job)

    # Last: whatever is wrong above is said within seconds, before workers start.
    ray = start_ray(job)
    check_installed(ray)
    check_drivers(ray, pools)
    nodes = Nodes.of(ray)
    check_heads(job, nodes)
    check_access(job, ray)
    for pool in check_room(pools, nodes):
        say(f"{pool.setting} waits until nodes are started: {smallest(pool.processes)} x {pool}")
    return fit_side_by_side(pools, job.cluster, nodes)


def check_other_sources(job: Job) -> None:
    """Look at the sources that are read only after long work, and of the prompts at what rewards will read.

    Raises:
        InputError: one cannot be read, or has not the columns that it must have.
    """
    from rdpo.evaluation.retention import text_source
    from rdpo.evaluation.suites.rows import check_suite
    from rdpo.preference.replay import ready_source
    from rdpo.preference.rewards import reward_columns
    from rdpo.synthesis.made import check_made_columns
    from rdpo.synthesis.mixture import alone
    from rdpo.synthesis.sources import check_source

    columns = reward_columns(job)
    if job.prompts.made:
        check_made_columns(job, columns)
    for part, reading in alone(job, columns) if columns and not job.prompts.made else ():
        check_source(part.prompts, reading)
    if job.replay:
        check_source(*ready_source(job, job.replay))
    if job.retention:
        check_source(*text_source(job, job.retention))
    for suite in job.suites:
        check_suite(job, suite)


def check_heads(job: Job, nodes: Nodes) -> None:
    """Whether the cards that train can read the student in the layout that the job wants.

    Where the job leaves the layout open, the reference's stage tries what its card can do, and training does the same.

    Raises:
        InputError: packed rows need more shared memory than such a card has.
    """
    import torch

    from rdpo.modeling.attention import card_fault
    from rdpo.modeling.student import student_dtype
    from rdpo.modeling.weights import ModelRef

    tried = job.training.layout == "auto" and job.reference.gpus > 0
    if not job.training.gpus_per_worker or tried or job.training.layout == "padded":
        return
    config, dtype = ModelRef.student(job).config(), getattr(torch, student_dtype(job))
    for card, gpu in nodes.cards(job.cluster.placement.trainer).items():
        if fault := card_fault(config, dtype, gpu.shared):
            raise InputError(
                f"training.layout = {job.training.layout!r}: packed rows of {job.student.model} on {card}: {fault}; "
                'set training.layout = "padded", or train on A100, H100 or larger'
            )


def check_access(job: Job, ray: ModuleType) -> None:
    """Whether the hub lets every node have the models that it will load.

    Raises:
        InputError: it refuses one to a node, which then lacks the token for a gated or private model.
    """
    from rdpo.cluster.installed import answers
    from rdpo.modeling.hub import unreadable

    wanted = models_by_kind(job)
    alive = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    # One machine has just read them all.
    if len(alive) < 2:
        return
    for kind, models in wanted.items():
        nodes = [node for node in alive if kind is None or kind in node["Resources"]]
        for name, refused in answers(ray, nodes, unreadable, sorted(models, key=str)).items():
            if refused:
                raise InputError(
                    f"node {name}: the hub does not let it have {refused[0]}; give every node the token of an account "
                    "that may (`hf auth login` there, or HF_TOKEN in its environment; cluster/README.md)"
                )


def models_by_kind(job: Job) -> dict[str | None, set[tuple[str, str | None]]]:
    """Names and revisions of the hub's models that a job loads, by the kind of node that loads them; None is any."""
    from rdpo.modeling.weights import ModelRef, is_on_hub
    from rdpo.synthesis.made import as_teacher
    from rdpo.synthesis.voices import speakers

    place, student = job.cluster.placement, ModelRef.student(job)
    found = [(place.trainer, student), (place.teacher, student)]
    engines = [as_teacher(job)] if job.prompts.made else []
    for seen in [*engines, *(speakers(job).values() if job.synthesis.task else ())]:
        if not seen.synthesis.endpoint:
            teacher = ModelRef.of(seen, seen.synthesis.teacher)
            found.append((place.teacher, teacher._replace(adapter=seen.synthesis.adapter or teacher.adapter)))
    if job.selection and job.selection.reference:
        found.append((place.trainer, ModelRef.of(job, job.selection.reference)))
    for reward in job.rewards:
        found += [(place.reward, ModelRef.of(job, name)) for name in reward.loads]

    # Adapters come from the hub too.
    found += [(kind, ModelRef(model.adapter)) for kind, model in found if model.adapter]
    models: dict[str | None, set[tuple[str, str | None]]] = {}
    for kind, model in found:
        # A folder of this machine may have a name like those of the hub.
        if is_on_hub(model.name):
            models.setdefault(kind, set()).add((model.name, model.revision))
    return models


def check_named(job: Job) -> None:
    """Try what can be tried in a moment: templates, task, and what rewards name; no model, no Ray.

    Raises:
        InputError: one of them cannot be used.
    """
    from rdpo.preference.pairs import scored_answers
    from rdpo.preference.rewards import check_named_rewards
    from rdpo.preference.selection import sampled_turn
    from rdpo.synthesis.instructions import check_words, load_task
    from rdpo.synthesis.made import check_made_named
    from rdpo.synthesis.prompts import check_templates
    from rdpo.synthesis.voices import check_voices

    check_templates(job.prompts)
    if job.prompts.made:
        check_made_named(job)
    if job.synthesis.task:
        check_words(load_task(job.synthesis.task), job.synthesis.values)
        check_voices(job)
    scored_answers(job)
    if job.selection:
        sampled_turn(job)
    check_named_rewards(job)


def _check_teacher(job: Job) -> None:
    from rdpo.preference.pairs import scored_answers
    from rdpo.synthesis.instructions import beginning, check_spoken_alone, check_words, load_task
    from rdpo.synthesis.voices import check_voices, speakers

    scored_answers(job)
    task = load_task(job.synthesis.task) if job.synthesis.task else None
    if task:
        check_words(task, job.synthesis.values)
        check_voices(job)
    if task and job.synthesis.reasoning != "off":
        check_spoken_alone(task)
    for section, condition in (("pairs", job.pairs.condition), ("evaluation", job.evaluation.condition)):
        if condition:
            beginning(load_task(job.synthesis.task or ""), condition, f"{section}.condition")
    answers = task.answers if job.evaluation.refine and task else []
    if job.evaluation.refine and job.pairs.chosen not in answers:
        raise InputError(f"evaluation.refine: pairs.chosen = {job.pairs.chosen!r} is no turn; name one of {answers}")
    for voice, seen in speakers(job).items() if task else ():
        _check_speaker(seen, voice)


def _check_speaker(job: Job, voice: str | None) -> None:
    """Try the teacher of a job, who is one of its voices perhaps.

    Raises:
        InputError: it cannot speak its turns.
    """
    from rdpo.modeling.chat import teacher_chat
    from rdpo.modeling.weights import local_adapter
    from rdpo.synthesis.endpoint import check_endpoint
    from rdpo.synthesis.instructions import check_prefills, load_task
    from rdpo.synthesis.teacher import check_conversations
    from rdpo.synthesis.voices import table_of_voice, turns_of

    task = load_task(job.synthesis.task or "")
    if job.synthesis.endpoint:
        check_endpoint(job.synthesis.endpoint, f"{table_of_voice(voice)}.endpoint")
        check_prefills(turns_of(task, voice))
        return
    chat = teacher_chat(job)
    for system in dict.fromkeys(one.system for one in job.prompts.each()):
        check_conversations(task, chat, system, voice)
    if job.synthesis.adapter:
        local_adapter(job.synthesis.adapter)
