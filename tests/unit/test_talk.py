"""Start model and trained model of a run side by side."""

import io
import shutil
import sys

import pytest

from rdpo.cli import main
from rdpo.config import Job, to_toml
from rdpo.errors import InputError
from rdpo.execution.reader import RunReader
from rdpo.files.manifest import Manifest
from rdpo.files.stage_folder import StageFolder
from rdpo.inspection.chat import load_speakers
from tests.support.adapters import adapter_on


@pytest.fixture
def job(job_table):
    job_table["prompts"]["system"] = "Be kind."
    job_table["evaluation"]["sampling"] = {"max_tokens": 8, "temperature": 1.0}
    job_table["evaluation"]["engine"] = {"dtype": "float32"}
    return Job.model_validate(job_table)


@pytest.fixture
def run_dir(job, tiny_model, tmp_path):
    """A run whose published model is the start model itself."""
    folder = tmp_path / "run"
    shutil.copytree(tiny_model, folder / "model")
    (folder / "config.toml").write_text(to_toml(job), encoding="utf-8")
    StageFolder(str(folder), "model").commit(Manifest("model", "k", {}, {}))
    return str(folder)


def test_equal_models_say_the_same_by_one_seed_and_something_else_by_another(run_dir, job):
    start, trained = load_speakers(RunReader(run_dir, job))
    said = [speaker.answer(speaker.asked("hello"), 1) for speaker in (start, trained)]
    assert said[0] == said[1]
    start.reset()
    assert start.messages == [{"role": "system", "content": "Be kind."}]
    assert start.answer(start.asked("hello"), 2) != said[0]
    roles = [message["role"] for message in trained.asked("and now?")]
    assert roles == ["system", "user", "assistant", "user"]


def test_an_answer_ends_at_the_text_that_evaluation_ends_it_at(run_dir, job):
    whole, *_ = load_speakers(RunReader(run_dir, job))[0].answer([{"role": "user", "content": "hello"}], 1)
    sampling = job.evaluation.sampling.model_copy(update={"stop": [whole[2:4]]})
    job = job.model_copy(update={"evaluation": job.evaluation.model_copy(update={"sampling": sampling})})
    said = load_speakers(RunReader(run_dir, job))[0].answer([{"role": "user", "content": "hello"}], 1)
    assert said == (whole[: whole.index(whole[2:4])].strip(), True, "")


def test_a_bare_adapter_is_put_on_the_start_model(run_dir, job, tiny_model):
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(5)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    folder = StageFolder(run_dir, "model")
    folder.clear()
    adapted.peft_config["default"].base_model_name_or_path = "/not/on/this/machine"
    adapted.save_pretrained(folder.path)
    folder.commit(Manifest("model", "k", {}, {}))
    start, trained = load_speakers(RunReader(run_dir, job))
    merged, ids = adapted.merge_and_unload(), torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.allclose(trained.model(ids).logits, merged(ids).logits, atol=1e-5)
        assert not torch.allclose(start.model(ids).logits, merged(ids).logits, atol=1e-2)


def test_the_start_has_its_adapter_and_a_bare_one_that_was_trained_further_replaces_it(
    run_dir, job, tiny_model, tmp_path, monkeypatch
):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("RDPO_CACHE", str(tmp_path / "cache"))
    student = {"adapter": adapter_on(tiny_model, tmp_path / "sft"), "adapter_use": "continue"}
    job = job.model_copy(update={"student": job.student.model_copy(update=student)})
    folder = StageFolder(run_dir, "model")
    folder.clear()
    adapter_on(tiny_model, folder.path, ["q_proj", "down_proj"], rank=2)
    folder.commit(Manifest("model", "k", {}, {}))
    for speaker, adapter in zip(load_speakers(RunReader(run_dir, job)), (tmp_path / "sft", folder.path), strict=True):
        expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), adapter)
        ids = torch.tensor([[5, 6, 7]])
        with torch.inference_mode():
            assert torch.allclose(speaker.model(ids).logits, expected(ids).logits, atol=1e-4)


def test_a_full_context_is_said_and_nothing_is_forgotten(run_dir, job):
    start, _ = load_speakers(RunReader(run_dir, job))
    with pytest.raises(InputError, match=r"fill the context of 1024; /reset"):
        start.asked("x" * 2000)
    start.answer(start.asked("y" * 980), 1)
    assert start.messages[-1]["role"] == "assistant"


def test_questions_come_from_a_pipe_and_stand_in_the_transcript(run_dir, monkeypatch, capsys):
    asked = b"hello \x1b[31mred\n\n/rese\n/seed x\n/seed 3\n/reset\nbye \xff\n/quit\nunseen\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(asked)))
    assert main(["chat", run_dir]) == 0
    output = capsys.readouterr().out
    assert "> hello \\u001b[31mred\n" in output and "\x1b" not in output
    assert "/rese: no such command (did you mean `/reset`?)" in output
    assert "/seed x: no such command; there are" in output
    assert output.count("trained") == 1 + 2
    assert "unseen" not in output


def test_a_model_that_is_not_published_yet_is_one_message(run_dir, capsys):
    StageFolder(run_dir, "model").clear()
    assert main(["chat", run_dir]) == 2
    assert "the model stage is not finished" in capsys.readouterr().err
