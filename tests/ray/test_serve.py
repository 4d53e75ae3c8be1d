"""A real vLLM server on loopback as the teacher: three turns of each row, as transformers would speak them."""

import pytest

from rdpo.config import Job
from rdpo.synthesis.teacher import synthesize
from tests.support.vllm_server import serving

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def server(wordy_models, tmp_path_factory):
    """Base URL of a server for the first wordy model."""
    with serving(wordy_models[0], tmp_path_factory.mktemp("server"), name="wordy") as address:
        yield f"{address}/v1"


def greedy(model, tokenizer, messages, max_tokens):
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[0, ids["input_ids"].shape[1] :]
    return tokenizer.decode(answer, skip_special_tokens=True).rstrip("\ufffd").strip(), ids["input_ids"].shape[1]


def test_rows_are_carried_through_all_turns_by_a_server(ray_cluster, server, wordy_models, tokenizer, job_table):
    import ray
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(wordy_models[0], dtype=torch.float32)
    sampling = {"temperature": 0.0, "max_tokens": 6}
    job_table["synthesis"] |= {"sampling": sampling, "endpoint": {"url": server, "model": "wordy", "concurrency": 4}}
    job = Job.model_validate(job_table)
    prompts = {f"p{index}": [{"role": "user", "content": f"question {index}"}] for index in range(6)}
    prompts["long"] = [{"role": "user", "content": "x" * 2000}]
    rows = ray.data.from_items([{"prompt_id": name, "prompt": prompt} for name, prompt in prompts.items()])
    written = {row["prompt_id"]: row for row in synthesize(rows, job).take_all()}
    assert written.keys() == prompts.keys()
    assert "refuses it (400)" in written.pop("long")["dropped"]
    for name, row in written.items():
        expected, length = greedy(model, tokenizer, prompts[name], 6)
        assert row["dropped"] is None
        assert (row["response"].rstrip("\ufffd").strip(), row["response_prompt_length"]) == (expected, length)
        assert row["critique"] and row["revision"]
        assert row["revision_prompt_length"] > row["critique_prompt_length"] > length
