"""A real Slurm of several nodes on this machine: munged, slurmctld and one slurmd a node, all on loopback."""

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time

import psutil

from tests.support.head import free_ports

DAEMONS = ("munged", "slurmctld", "slurmd")
COMMANDS = ("sbatch", "scontrol", "scancel", "sinfo", "squeue", "srun")
BEGINS_WITHIN_S = 60
CONFIG = """\
ClusterName=rdpo
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={control}
SlurmUser={user}
SlurmdUser={user}
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
CredType=cred/munge
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool-%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd-%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=60
MailProg=/bin/true
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} State=UNKNOWN\n"


def path_of(name):
    """Where a command of Slurm is installed; None if it is not."""
    return shutil.which(name, path=os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/usr/local/sbin"]))


def missing():
    """The commands and daemons of Slurm that are not installed here."""
    return [name for name in (*DAEMONS, *COMMANDS) if path_of(name) is None]


class Slurm:
    """Two nodes of so many CPUs, `one` and `two`, until `end`."""

    def __init__(self, place, cpus):
        self.place, self.daemons = place, []
        self.environ = os.environ | {"SLURM_CONF": str(place / "slurm.conf")}
        (place / "state").mkdir()
        (place / "munge.key").write_bytes(secrets.token_bytes(1024))
        (place / "munge.key").chmod(0o600)

        host = socket.gethostname().split(".")[0]
        control, *ports = free_ports(3)
        text = CONFIG.format(host=host, control=control, user=getpass.getuser(), place=place)
        for name, port in zip(("one", "two"), ports, strict=True):
            text += NODE.format(name=name, host=host, port=port, cpus=cpus)
        (place / "slurm.conf").write_text(text)

        try:
            self._start()
        except BaseException:
            self.end()
            raise

    def _start(self):
        own = {"socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed", "key-file": "munge.key"}
        options = [f"--{name}={self.place / file}" for name, file in own.items()]
        # The test's directory is its user's alone, which munged says of a socket.
        self._daemon("munged", "--foreground", "--force", f"--log-file={self.place / 'munge.log'}", *options)
        self._await(lambda: (self.place / "munge.socket").exists())
        self._daemon("slurmctld", "-D")
        for name in ("one", "two"):
            self._daemon("slurmd", "-D", "-N", name)
        self._await(lambda: self.command("sinfo", "-h", "-N", "-o", "%T").split() == ["idle", "idle"])

    def _daemon(self, name, *arguments):
        with open(self.place / f"output-{len(self.daemons)}.log", "w") as log:
            command = [path_of(name), *arguments]
            daemon = subprocess.Popen(command, env=self.environ, stdout=log, stderr=log, start_new_session=True)
        self.daemons.append(daemon)

    def _await(self, condition):
        deadline = time.monotonic() + BEGINS_WITHIN_S
        while not condition():
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not ended and time.monotonic() < deadline, (ended, self.said())
            time.sleep(0.2)

    def said(self):
        """The ends of all daemons' logs."""
        return "\n".join(path.read_text(errors="replace")[-1500:] for path in sorted(self.place.glob("*.log")))

    def command(self, name, *arguments, cwd=None, **environment):
        """Run a command of Slurm; what it printed."""
        line = [path_of(name), *map(str, arguments)]
        done = subprocess.run(line, env=self.environ | environment, cwd=cwd, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 or name == "sinfo", (line, done.stdout, done.stderr)
        return done.stdout

    def job(self, number):
        """What Slurm says of a job, by field."""
        words = self.command("scontrol", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def processes(self, number):
        """All processes of a job, with the name of the node that each is on."""
        found = []
        for process in psutil.process_iter():
            try:
                environ = process.environ()
            except psutil.Error:
                continue
            if environ.get("SLURM_JOB_ID") == str(number) and environ.get("SLURM_CONF") == self.environ["SLURM_CONF"]:
                found.append((environ.get("SLURMD_NODENAME"), process))
        return found

    def end(self):
        """End the daemons, the last first, and what is left of their jobs."""
        for daemon in reversed(self.daemons):
            daemon.terminate()
            try:
                daemon.wait(20)
            except subprocess.TimeoutExpired:
                daemon.kill()
