"""python -m benchmarks.device: see the head of the package; `make device` calls it."""

import argparse
import math
import pathlib
import shlex
import signal
import sys
from collections.abc import Sequence

from benchmarks.device import driver, steps


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description="Measures the present device, step by step.")
  parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("build/device"))
  parser.add_argument("--steps", default="", help="comma-separated; all without")
  parser.add_argument("--small", action="store_true", help="sizes of a trial, as on a CPU")
  parser.add_argument(
    "--budget", type=float, help=f"seconds of all steps; {driver.BUDGET:.0f}, small: 0, no limit"
  )
  args = parser.parse_args(arguments)
  try:
    args.steps = steps.named([name for name in args.steps.split(",") if name])
  except ValueError as error:
    parser.error(str(error))
  if args.budget is not None and not 0 <= args.budget < math.inf:
    parser.error(f"--budget: {args.budget}; 0 or more is accepted")
  try:
    args.out.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    parser.error(f"--out: {args.out}: {error.strerror}; a folder that can be made is accepted")
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs the steps; the exit status tells of the driver alone, the summary of the steps."""
  args = parse(arguments)
  # The step that runs is then ended, too.
  signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
  given = sys.argv[1:] if arguments is None else arguments
  command = shlex.join(["python", "-m", "benchmarks.device", *given])
  budget = args.budget
  if budget is None:
    budget = 0.0 if args.small else driver.BUDGET
  job = driver.Job(
    steps=args.steps, folder=args.out, small=args.small, budget=budget, command=command
  )
  driver.run(job, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
  main()
