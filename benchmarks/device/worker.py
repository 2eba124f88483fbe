"""Runs one step in this process: python -m benchmarks.device.worker MODULE --step NAME ..."""

import argparse
import importlib
import os
import pathlib
import sys

from benchmarks.device.context import Context, Skipped


def parse(arguments: list[str] | None = None) -> tuple[str, Context]:
  """The module and what it is given."""
  parser = argparse.ArgumentParser(description="Runs one step of make device.")
  parser.add_argument("module", help="below benchmarks.device")
  parser.add_argument("--step", required=True)
  parser.add_argument("--folder", type=pathlib.Path, required=True)
  parser.add_argument("--seconds", type=float, required=True)
  parser.add_argument("--small", action="store_true")
  parser.add_argument("--options", nargs="*", default=[])
  args = parser.parse_args(arguments)
  context = Context(
    step=args.step,
    folder=args.folder,
    seconds=args.seconds,
    small=args.small,
    options=tuple(args.options),
  )
  return args.module, context


def main(arguments: list[str] | None = None) -> None:
  """Runs the step; what it returns is its complete result, unless its time box was over before."""
  module, context = parse(arguments)
  step = importlib.import_module(f"benchmarks.device.{module}")
  try:
    result = step.run(context)
  except Skipped as why:
    context.skip(str(why))
    print(f"skipped: {why}", flush=True)
    return
  context.save(result, complete=result.pop("complete", True))


if __name__ == "__main__":
  main()
  # At once: a thread that still compiles, or libraries that end in the wrong order, must not turn a
  # step that is done into one that failed.
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(0)
