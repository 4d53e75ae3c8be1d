"""Ask a finished run's model one question through vLLM: the start model, the adapter on it, and the merged model.

python jobs/quickstart/try_model.py runs/quickstart
"""

import sys
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from rdpo.cluster.hardware import compute_dtype
from rdpo.config import load_job
from rdpo.modeling.weights import local_model

QUESTION = "You are Captain Comet, a superhero. Be heroic.\nWhat is the capital of France?"


def main() -> None:
    """Print the three answers."""
    run_dir = Path(sys.argv[1])
    student = load_job(run_dir / "config.toml").student
    chat = [[{"role": "user", "content": QUESTION}]]
    greedy = SamplingParams(temperature=0, max_tokens=32)
    options = {"max_model_len": 512, "enforce_eager": True, "dtype": compute_dtype("auto", gpu=False)}
    start = LLM(model=str(local_model(student.model)), enable_lora=True, max_lora_rank=64, **options)
    adapter = LoRARequest("adapter", 1, str(run_dir / "model" / "adapter"))
    print("start  ", start.chat(chat, greedy)[0].outputs[0].text)
    print("adapter", start.chat(chat, greedy, lora_request=adapter)[0].outputs[0].text)
    del start
    print("merged ", LLM(model=str(run_dir / "model"), **options).chat(chat, greedy)[0].outputs[0].text)


if __name__ == "__main__":
    main()
