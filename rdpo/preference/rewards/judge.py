"""A language model as judge: it rates each answer by a rubric, or compares two at a time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rdpo.cluster.pools import Pool, engine_pool
from rdpo.config import Endpoint, Job, JudgeReward, Sampling
from rdpo.files.manifest import Settings
from rdpo.modeling.chat import Chat, Thinking, load_chat, rendering_settings
from rdpo.modeling.reasoning import Unended
from rdpo.modeling.weights import ModelRef
from rdpo.preference.ratings import certain_rating, check_rubric, rating_values
from rdpo.preference.rewards.judge_endpoint import ServedJudge, check_served
from rdpo.preference.rewards.judging import Judging, Question, reasons_first
from rdpo.preference.rewards.kind import RewardKind
from rdpo.records import Messages
from rdpo.synthesis.asking import ask
from rdpo.synthesis.columns import Needed
from rdpo.synthesis.crashes import open_crash_counts
from rdpo.synthesis.engine import Engine, Generation, engine_settings
from rdpo.synthesis.server import check_server, endpoint_key
from rdpo.synthesis.teacher import client_pool
from rdpo.synthesis.voices import engine_models

if TYPE_CHECKING:
    import ray.data
    from ray.actor import ActorHandle

PLAIN_CRITERION = {"name": "helpful", "text": "The answer is helpful.", "weight": 1.0}


class JudgeKind(RewardKind[JudgeReward]):
    """A pool of engines with a model that judges, or the client of a server with one."""

    seeded = True

    def check_named(self, job: Job) -> None:
        """Look at the names that the rubric uses.

        Raises:
            InputError: it is no template, or uses another name.
        """
        check_rubric(self.reward)

    def check(self, job: Job) -> None:
        """Load the judge's chat, and find the tokens of its ratings; ask a server one small question.

        Raises:
            InputError: the model has no chat, a rating is not one token, the key is missing, or the server cannot be
                asked like this.
        """
        if self.reward.endpoint:
            check_server(self.reward.endpoint, f"{self.where}.endpoint")
            check_served(self.reward, job)
            return
        chat = judge_chat(self.reward, job)
        if self.reward.score == "expected":
            rating_values(chat, self.reward)

    def settings(self, job: Job) -> Settings:
        """Its fields, and the judge's weights; of a server which one it is, and not how it is asked."""
        reward = self.reward
        found = reward.model_dump(exclude={"top_logprobs"})
        if reward.score != "expected" and reward.sampling.temperature > 0:
            found["judge_seed"] = job.seed
        if endpoint := reward.endpoint:
            asked = {"endpoint": {"url": endpoint.url, "model": endpoint.model}, "engine": None, "weights": None}
            return {**found, **asked}

        model = ModelRef.of(job, reward.model)
        rendering = rendering_settings(judge_chat(reward, job))
        engine = engine_settings(reward.engine, model)
        return {**found, "weights": model.fingerprint(), **rendering, "engine": engine}

    def pools(self, job: Job) -> list[Pool]:
        """One pool of engines; none where a server judges, whose client holds no model and waits most of the time."""
        return [] if self.reward.endpoint else [self._pool(job)]

    def score(self, rows: ray.data.Dataset, job: Job, answers: list[str]) -> ray.data.Dataset:
        """Score by the judge's ratings."""
        arguments: dict[str, Any] = {"reward": self.reward, "answers": answers, "job": job}
        arguments["crash_counts"] = open_crash_counts()
        if self.reward.endpoint:
            # The key goes along: a worker on another machine does not have the driver's environment.
            key = endpoint_key(self.reward.endpoint)
            return self._client(self.reward.endpoint).map(rows, ServedJudge, **arguments, key=key)
        return self._pool(job).map(rows, Judge, **arguments)

    def needs_trial(self, job: Job) -> bool:
        """Not where the judge is a model that writes the answers, which is loaded anyway."""
        if self.reward.endpoint:
            return True
        return (self.reward.model or job.student.model) not in engine_models(job)

    def in_trial(self) -> JudgeReward:
        """With one plain criterion in place of those of a column, which the plain pairs do not have."""
        if self.reward.criteria_column is None:
            return self.reward
        plain = {"criteria_column": None, "criteria": [PLAIN_CRITERION]}
        return JudgeReward.model_validate({**self.reward.model_dump(exclude_unset=True), **plain})

    def columns(self) -> list[Needed]:
        """The column with each prompt's criteria."""
        column = self.reward.criteria_column
        return [] if column is None else [Needed((column,), f"{self.where}.criteria_column")]

    def _pool(self, job: Job) -> Pool:
        nodes, judge = job.cluster.placement.reward, ModelRef.of(job, self.reward.model)
        return engine_pool("rewards", f"{self.where}.engine", self.reward.engine, nodes, judge)

    def _client(self, endpoint: Endpoint) -> Pool:
        return engine_pool("rewards", f"{self.where}.endpoint", client_pool(self.reward.engine, endpoint), None)


class Judge(Judging):
    """The judge is the model of a vLLM engine of this process."""

    def __init__(self, reward: JudgeReward, answers: list[str], job: Job, crash_counts: ActorHandle):
        super().__init__(reward, answers, job, crash_counts)
        self.chat = judge_chat(reward, job)
        self.values = rating_values(self.chat, reward) if reward.score == "expected" else {}
        self.engine = Engine(str(ModelRef.of(job, reward.model).folder()), reward.engine, job.seed)

    async def expected(self, question: Question) -> float:
        """The expected rating by the engine's probabilities."""
        ids = list(self.values)
        # What is read are the probabilities of that token, not the token.
        one = Sampling(temperature=0.0, top_p=1.0, max_tokens=1)
        reply = await self._reply(question, one, (), logprobs=len(ids), logprob_token_ids=ids)
        return certain_rating(self.values, reply.logprobs or {})

    async def written(self, question: Question) -> str:
        """A reply of the engine; of one that thinks first, what it comes to."""
        if reasons_first(self.reward):
            try:
                reply = await ask(self.engine, self.chat, _messages(question), self.reward.sampling, question.seed)
            except Unended:
                # No rating, as in any other reply without one: further votes may have some.
                return ""
            return reply.text
        held: dict[str, Any] = {}
        if self.reward.score == "json":
            from vllm.sampling_params import StructuredOutputsParams

            held["structured_outputs"] = StructuredOutputsParams(json=self.reward.reply_schema)
        return (await self._reply(question, self.reward.sampling, self.chat.stop_ids, **held)).text

    async def _reply(
        self, question: Question, sampling: Sampling, stop_ids: tuple[int, ...], **extra: Any
    ) -> Generation:
        prompt_ids = self.chat.prompt_ids(_messages(question), self.reward.prefill)
        return await self.engine.generate(prompt_ids, sampling, question.seed, stop_ids, **extra)

    def __del__(self) -> None:
        # Ray ends an actor without another word; the processes of its engine would outlive it.
        if hasattr(self, "engine"):
            self.engine.shutdown()


def judge_chat(reward: JudgeReward, job: Job) -> Chat:
    """The judge's chat.

    Raises:
        InputError: the model has none that the judge can be asked with.
    """
    given = reward.chat_template_kwargs
    if not (given or reward.model):
        given = job.student.chat_template_kwargs
    arguments = json.dumps(given, sort_keys=True)
    thinking: Thinking = "free" if reasons_first(reward) else "off"
    return load_chat(ModelRef.of(job, reward.model), job.date, arguments, thinking)


def _messages(question: Question) -> Messages:
    return [{"role": "user", "content": question.text}]
