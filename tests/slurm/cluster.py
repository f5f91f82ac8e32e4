"""A private Slurm on this host: two virtual nodes of two tasks each, in one folder, on ports of its own.

Nothing outside the folder is touched, no service of the host is used, and only the processes started here are ended.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = {"slurmctld": "/usr/sbin/slurmctld", "slurmd": "/usr/sbin/slurmd", "munged": "/usr/sbin/munged", "srun": "/usr/bin/srun"}
DEBIAN = ("slurmctld", "slurmd", "slurm-client", "munge")
SECOND_NODE = "zz-second"
START_S, STOP_S = 60.0, 20.0

_CONF = """
ClusterName=rpptest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SchedulerType=sched/builtin
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 State=UNKNOWN
NodeName={second} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A running Slurm. env: what its commands need to find it."""

    folder: Path
    env: dict[str, str]

    def call(self, *command: str, timeout_s: float = 60.0, cwd: Path | None = None) -> str:
        """Standard output of a Slurm command; a failure shows both outputs."""
        result = subprocess.run(command, env=self.env, cwd=cwd or self.folder, capture_output=True, text=True, timeout=timeout_s)
        assert result.returncode == 0, f"{' '.join(command)}: exit {result.returncode}\n{result.stdout}\n{result.stderr}"
        return result.stdout

    def wait_for_state(self, job: str, *states: str, timeout_s: float) -> str:
        deadline = time.monotonic() + timeout_s
        while (state := self._state(job)) not in states:
            assert time.monotonic() < deadline, f"job {job} is {state} after {timeout_s} s, expected {' or '.join(states)}"
            time.sleep(0.5)
        return state

    def _state(self, job: str) -> str:
        line = self.call("scontrol", "--oneliner", "show", "job", job)
        return line.partition("JobState=")[2].split()[0]


def install() -> str | None:
    """Why there can be no Slurm here, or None when its programs are in place; installs them where that is possible."""
    if all(Path(path).exists() for path in PROGRAMS.values()):
        return None
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return f"Slurm is not installed, and only root on Debian can have it done: apt-get install {' '.join(DEBIAN)}"
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *DEBIAN]):
        result = subprocess.run(["apt-get", *command], env=env, capture_output=True, text=True, timeout=400)
        if result.returncode != 0:
            return f"apt-get {command[0]} failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}"
    return None


@contextlib.contextmanager
def start(folder: Path) -> Iterator[Cluster]:
    """Start munge, the controller and two node daemons; end them, and no other process, when the block is left."""
    host = socket.gethostname().partition(".")[0]
    for name in ("munge", "state"):
        (folder / name).mkdir(mode=0o755)
    key = folder / "munge" / "key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o400)
    conf = folder / "slurm.conf"
    conf.write_text(_CONF.format(folder=folder, host=host, second=SECOND_NODE, ports=_free_ports(3)))
    cluster = Cluster(folder, {**os.environ, "SLURM_CONF": str(conf)})
    munge = {name: f"--{name}={folder / 'munge' / name}" for name in ("socket", "pid-file", "log-file", "seed-file")}
    daemons: list[subprocess.Popen[bytes]] = []
    try:
        daemons.append(_daemon(cluster, "munged", "--foreground", f"--key-file={key}", *munge.values()))
        _wait(lambda: (folder / "munge" / "socket").exists(), "munge's socket", cluster)
        daemons.append(_daemon(cluster, "slurmctld", "-D", "-i"))
        daemons += [_daemon(cluster, "slurmd", "-D", "-N", node) for node in (host, SECOND_NODE)]
        _wait(lambda: _idle_nodes(cluster) == 2, "two idle nodes", cluster)
        yield cluster
        subprocess.run(["scancel", "--user=root"], env=cluster.env, capture_output=True, timeout=STOP_S)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
        for daemon in reversed(daemons):
            try:
                daemon.wait(STOP_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def _daemon(cluster: Cluster, name: str, *arguments: str) -> subprocess.Popen[bytes]:
    with open(cluster.folder / f"{name}.out", "ab") as output:
        return subprocess.Popen([PROGRAMS[name], *arguments], env=cluster.env, stdout=output, stderr=output, stdin=subprocess.DEVNULL)


def _idle_nodes(cluster: Cluster) -> int:
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--format=%N"]
    result = subprocess.run(command, env=cluster.env, capture_output=True, text=True, timeout=START_S)
    return len(result.stdout.split())


def _wait(condition, what: str, cluster: Cluster) -> None:
    deadline = time.monotonic() + START_S
    while not condition():
        if time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}: {path.read_text()[-2000:]}" for path in sorted(cluster.folder.glob("*.log")))
            raise AssertionError(f"no {what} within {START_S:.0f} s\n{logs}")
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
