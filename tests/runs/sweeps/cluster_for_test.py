"""SLURM on this machine alone: its own munged, slurmctld and slurmd in a scratch folder.

Needs the programs of Debian's `slurm-wlm` and `munge`; nothing of the system's own configuration is
read or written, and what was started is stopped. Only for root, or one user for all of it.
"""

import contextlib
import os
import pathlib
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol")
_PATH = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
_CONF = """\
ClusterName=one
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
JobRequeue=1
KillWait=5
SchedulerParameters=sched_interval=2,sched_min_interval=0
NodeName={host} NodeAddr=127.0.0.1 CPUs={cpus} RealMemory={memory} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""


def missing() -> str:
  """Which programs are not here, and how to get them; empty where all are."""
  absent = [name for name in PROGRAMS if not shutil.which(name, path=_PATH)]
  if not absent:
    return ""
  return f"no {', '.join(absent)}: apt-get install slurm-wlm munge"


@contextlib.contextmanager
def cluster(folder: pathlib.Path) -> Iterator[dict[str, str]]:
  """Starts a cluster of this machine; gives the environment in which its commands work."""
  for name in ("munge", "state", "spool"):
    (folder / name).mkdir(parents=True)
  os.chmod(folder, 0o755)
  key = folder / "munge" / "key"
  key.touch(mode=0o600)
  key.write_bytes(os.urandom(1024))
  os.chmod(key, 0o400)
  host = socket.gethostname().partition(".")[0]
  user = subprocess.check_output(["id", "-un"], text=True).strip()
  ports = dict(zip(("controller", "daemon"), _free_ports(), strict=True))
  conf = folder / "slurm.conf"
  conf.write_text(
    _CONF.format(
      **{"host": host, "user": user, "folder": folder, "cpus": os.cpu_count() or 1},
      memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2**20,
      **ports,
    )
  )
  environment = {**os.environ, "SLURM_CONF": str(conf), "PATH": _PATH}
  commands = (
    [
      *("munged", "--foreground", "--force", f"--key-file={key}"),
      *(f"--{n}={folder}/munge/{n.partition('-')[0]}" for n in ("socket", "pid-file", "log-file")),
      f"--seed-file={folder}/munge/seed",
    ],
    ["slurmctld", "-D", "-c"],
    ["slurmd", "-D", "-c", "-N", host],
  )
  started: list[subprocess.Popen] = []
  try:
    for command in commands:
      with (folder / f"{command[0]}.out").open("w") as out:
        process = subprocess.Popen(
          command, env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
        )
      started.append(process)
      time.sleep(0.5)
    _until_idle(environment, folder, started)
    yield environment
  finally:
    subprocess.run(
      ["scancel", "--user", user], env=environment, check=False, capture_output=True, timeout=20
    )
    time.sleep(1.0)
    for process in reversed(started):
      process.terminate()
    for process in reversed(started):
      try:
        process.wait(10)
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _until_idle(environment, folder: pathlib.Path, started) -> None:
  for _ in range(60):
    for process in started:
      if process.poll() is not None:
        name = process.args[0]
        said = (folder / f"{name}.out").read_text()[-1500:]
        raise RuntimeError(f"{name} ended with status {process.returncode}: {said}")
    said = subprocess.run(
      ["sinfo", "--noheader", "--format=%T"], env=environment, capture_output=True, text=True
    )
    if said.stdout.strip() in ("idle", "mixed"):
      return
    time.sleep(0.5)
  logs = "".join(p.read_text()[-1500:] for p in folder.glob("slurm*.log"))
  raise RuntimeError(f"the node does not come up: {said.stdout}{said.stderr}\n{logs}")


def _free_ports() -> list[int]:
  sockets = [socket.socket() for _ in range(2)]
  for one in sockets:
    one.bind(("127.0.0.1", 0))
  ports = [one.getsockname()[1] for one in sockets]
  for one in sockets:
    one.close()
  return ports
