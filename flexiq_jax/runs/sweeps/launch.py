"""Starts a command that ends with its parent: `python launch.py PARENT CORES COMMAND...`.

A script of the standard library alone, so that it costs no imports. The process becomes the
command. `CORES` is a list of core numbers as 0,1, or empty.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(parent: int, cores: str, command: list[str]) -> None:
  """Binds to the parent and the cores, then becomes the command."""
  if sys.platform == "linux":
    # SIGTERM lets a run end in order; it is for the case that the parent was killed.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
  for number in (signal.SIGUSR1, signal.SIGUSR2):
    # A scheduler sends one to all processes of a job; the parent answers it.
    signal.signal(number, signal.SIG_IGN)
  if os.getppid() != parent:
    sys.exit(143)  # it died meanwhile
  if cores and hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
  os.execvp(command[0], command)


if __name__ == "__main__":
  main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
