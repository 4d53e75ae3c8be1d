"""A real vLLM server on loopback."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager

PATIENCE = 240


@contextmanager
def serving(folder, logs, name, *more):
    """Address of a server for a model in fp32, known by a name; `more`: flags of vLLM's."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    arguments = {"--model": folder, "--served-model-name": name, "--host": "127.0.0.1", "--port": port}
    limits = {"--max-model-len": "1024", "--dtype": "float32", "--generation-config": "vllm"}
    flags = [part for pair in {**arguments, **limits}.items() for part in pair]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags, "--enforce-eager", *more]
    log = logs / "log"
    with log.open("w") as file:
        environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
        process = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
    try:
        wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def wait_until_healthy(url, process, log):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(log.read_text()[-3000:])
