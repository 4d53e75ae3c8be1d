"""From the trained policy to a Hugging Face model folder that is reloaded and compared before it counts.

The folder holds the (merged) weights as safetensors, configuration, tokenizer with its chat template,
a model card, and with LoRA the adapter in `adapter/`, unless it is for a
model that is not published.
"""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, PackageLoader

from rdpo.config import Job
from rdpo.modeling.chat import make_chat
from rdpo.modeling.model_files import ADAPTER_CONFIG
from rdpo.modeling.saving import copy_companions, copy_tokenizer, save_model
from rdpo.modeling.weights import is_on_hub, local_adapter
from rdpo.records import visible
from rdpo.synthesis.made import writer_named
from rdpo.synthesis.voices import models_named

if TYPE_CHECKING:
    from transformers import PreTrainedModel

QUESTION = [{"role": "user", "content": "Say hello."}]
ANSWER_TOKENS = 8
"""Of the answer to that question, by which a published folder is tried."""


class PublishError(RuntimeError):
    """The published folder does not give back what was trained."""


def publish(job: Job, exported: Path | None, merged: Path, target: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write the model folder and verify it.

    Args:
        job: the job.
        exported: folder with what training left, an adapter perhaps; None if it took no step.
        merged: folder of the whole model.
        target: folder to write.
        facts: what the model card tells (see `card.md.jinja`).

    Raises:
        PublishError: reloading gives other shapes, dtypes or log-probs, or no answer.
    """
    adapter = exported if exported and (exported / ADAPTER_CONFIG).is_file() else None
    if job.student.adapter and not job.student.continues:
        # It lies on the model that the student's own adapter was merged into, which nobody else has.
        adapter = None
    if adapter and not job.publish.merge:
        shutil.copytree(adapter, target, dirs_exist_ok=True)
        _copy_tokenizer(merged, target)
    else:
        _save_sharded(merged, target, job)
        if adapter:
            shutil.copytree(adapter, target / "adapter", dirs_exist_ok=True)
    if adapter:
        published = target / "adapter" if job.publish.merge else target
        _name_base(published, job)
        if job.student.adapter:
            copy_tokenizer(local_adapter(job.student.adapter), published)
    copy_companions(merged, target, code=job.student.trust_remote_code)

    checks = verify(merged, target, adapter is not None, job.student.trust_remote_code)
    card = target / "README.md"
    card.write_text(model_card(job, facts), encoding="utf-8")
    for file in target.rglob("*.safetensors"):
        # safetensors lets nobody else read what it wrote, and an engine may run as another user.
        file.chmod(card.stat().st_mode)
    return checks


def _name_base(adapter: Path, job: Job) -> None:
    """Let an adapter name its model as others find it: on the hub, where the model is there."""
    if not is_on_hub(job.student.model):
        return
    file = adapter / ADAPTER_CONFIG
    named = {"base_model_name_or_path": job.student.model, "revision": job.student.revision}
    table = json.loads(file.read_text(encoding="utf-8")) | named
    file.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _save_sharded(source: Path, target: Path, job: Job) -> None:
    model = _load(source, job.student.trust_remote_code)
    save_model(model, target, max_shard_size=f"{job.publish.max_shard_gb}GB")
    _copy_tokenizer(source, target)


def _copy_tokenizer(source: Path, target: Path) -> None:
    for file in source.iterdir():
        weights = file.suffix == ".safetensors" or file.name.endswith(".index.json")
        if file.is_file() and not weights and file.name not in ("config.json", "manifest.json"):
            shutil.copy(file, target / file.name)


def verify(trained: Path, published: Path, is_adapter: bool, trust: bool = False) -> dict[str, Any]:
    """Reload the published folder and compare it with the trained model: tensors, a forward, an answer.

    Raises:
        PublishError: they differ.
    """
    import torch
    from transformers import AutoTokenizer, GenerationConfig

    # Nothing is trained on what it answers here: a template that is made for models that think will do.
    tokenizer = AutoTokenizer.from_pretrained(published, trust_remote_code=trust)
    chat = make_chat(tokenizer, [], str(published), thinking="free")
    ids = torch.tensor([chat.prompt_ids(QUESTION)])
    expected, actual = _load(trained, trust), _load_published(published, trust)
    _compare_tensors(expected, actual)

    # The folder's own settings are for its users: some are such that transformers refuses to answer by them.
    actual.generation_config = GenerationConfig(eos_token_id=list(chat.stop_ids), pad_token_id=chat.end_id)
    with torch.inference_mode():
        difference = float((expected(ids).logits - actual(ids).logits).abs().max())
        answer = actual.generate(ids, max_new_tokens=ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :]
    if not difference < 1e-3:
        raise PublishError(f"the published model's logits differ by {difference} from the trained one's")

    checks = {
        "logit_difference": difference,
        "answer": chat.tokenizer.decode(answer, skip_special_tokens=True),
    }
    if is_adapter and (published / "adapter").is_dir():
        checks["adapter_parameters"] = _adapter_size(published / "adapter")
    return checks


def _load(folder: Path, trust: bool) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", use_safetensors=True, trust_remote_code=trust
    ).eval()


def _load_published(folder: Path, trust: bool) -> PreTrainedModel:
    if not (folder / ADAPTER_CONFIG).is_file():
        return _load(folder, trust)
    from peft import AutoPeftModelForCausalLM

    model = AutoPeftModelForCausalLM.from_pretrained(str(folder), trust_remote_code=trust)
    return model.merge_and_unload().eval()


def _compare_tensors(expected: PreTrainedModel, actual: PreTrainedModel) -> None:
    before, after = expected.state_dict(), actual.state_dict()
    if before.keys() != after.keys():
        raise PublishError(f"tensors are missing or new: {sorted(before.keys() ^ after.keys())[:5]}")
    for name, tensor in before.items():
        if tensor.shape != after[name].shape or tensor.dtype != after[name].dtype:
            raise PublishError(f"{name}: {after[name].shape} {after[name].dtype}, trained as {tensor.shape}")


def _adapter_size(folder: Path) -> int:
    from safetensors import safe_open

    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = sum(map(math.prod, sizes))
    if not total:
        raise PublishError("the adapter holds no weights")
    return total


def _code(text: str) -> str:
    """Text as Markdown code on one line, whatever stands in it."""
    line = visible(text.replace("\n", " ")).replace("|", "\\|")
    # Longer than any run of backticks in it, so that the text cannot end the code.
    fence = "`" * (1 + max((len(run) for run in re.findall("`+", line)), default=0))
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def model_card(job: Job, facts: dict[str, Any]) -> str:
    """The folder's README.md, with the metadata block of the Hugging Face hub."""
    return rendered_card("card.md.jinja", job=job, speakers=models_named(job), writer=writer_named(job), **facts)


def rendered_card(template: str, **facts: Any) -> str:
    """A card as Markdown; the filter `code` makes any text harmless in it."""
    # Markdown, where HTML's escapes would be read as they stand; the filter makes text harmless.
    environment = Environment(loader=PackageLoader("rdpo.evaluation"), autoescape=False, trim_blocks=True)
    environment.filters["code"] = _code
    return environment.get_template(template).render(json=json, **facts)
