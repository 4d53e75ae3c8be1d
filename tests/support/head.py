"""A real Ray head with its token, begun as a person begins one."""

import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import ExitStack

import psutil

RAY = [sys.executable, "-m", "ray.scripts.scripts"]
BEGINS_WITHIN_S = 120
STORE_BYTES = 200 << 20


def free_ports(count):
    with ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


class Head:
    """`ray start --head` with token authentication, until `end`."""

    def __init__(self, place, *options, **environment):
        token = place / "token"
        token.write_text(secrets.token_hex(32))
        token.chmod(0o600)
        self.environ = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)} | environment
        self.port, self.dashboard_port, client = free_ports(3)
        self.log = place / "head.log"
        ports = [f"--port={self.port}", f"--dashboard-port={self.dashboard_port}", f"--ray-client-server-port={client}"]
        where = ["--node-ip-address=127.0.0.1", "--dashboard-host=127.0.0.1", f"--object-store-memory={STORE_BYTES}"]
        with open(self.log, "w") as log:
            command = [*RAY, "start", "--head", "--block", "--disable-usage-stats", *ports, *where, *options]
            self.process = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, start_new_session=True)
        self._await()

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    @property
    def dashboard(self):
        return f"http://127.0.0.1:{self.dashboard_port}"

    def job(self, *arguments, **options):
        """Run `ray job …` against this head."""
        command, *rest = arguments
        line = [*RAY, "job", command, "--address", self.dashboard, *map(str, rest)]
        return subprocess.run(line, env=self.environ, capture_output=True, text=True, **options)

    def end(self):
        own = psutil.Process(self.process.pid).children(recursive=True)
        self.process.terminate()
        _, alive = psutil.wait_procs([*own, psutil.Process(self.process.pid)], timeout=30)
        for process in alive:
            process.kill()

    def _await(self):
        deadline = time.monotonic() + BEGINS_WITHIN_S
        while self.job("list").returncode:
            assert self.process.poll() is None and time.monotonic() < deadline, self.log.read_text()
            time.sleep(1)
