"""Cells that take a fraction of a second: workdirs as runs have them, without models.

`python stubs_for_test.py run WORKDIR SEED [WAY]` is such a run, and
`python stubs_for_test.py sweep FOLDER COUNT [WAY]` a sweep over them, to be killed.
"""

import pathlib
import sys
import time

ROOT = pathlib.Path(__file__).parents[3]
STEPS = 4


def cell(folder: pathlib.Path, seed: int, way: str = "", **fields):
  """A stub's cell; WAY is fail or slow."""
  from flexiq_jax.runs.sweeps.cells import Cell

  name = f"stub-seed{seed}"
  workdir = folder / name
  command = ("python", str(pathlib.Path(__file__)), "run", str(workdir), str(seed), way)
  labels = {"base": "stub", "seed": seed}
  return Cell(
    **{"name": name, "workdir": workdir, "command": command, "folder": ROOT, "labels": labels}
    | fields
  )


def _run(path: str, seed: int, way: str) -> None:
  sys.path.insert(0, str(ROOT))
  from flexiq_jax.runs import interruption
  from flexiq_jax.runs.workdir import Workdir

  with interruption.interruptible():
    workdir = Workdir(path)
    workdir.config({"seed": seed})
    with workdir.held():
      workdir.event("start", device_kind="stub", python="3")
      for step in range(STEPS):
        if way == "fail" and step == 2:
          sys.exit("error: config.seed: the stub fails\nas it was told")
        if not workdir.has("float", step / STEPS, seed):
          time.sleep(30.0 if way == "slow" else 0.03)
          workdir.row("float", step / STEPS, seed, top1=90.0 + seed + step)
        print(f"step {step + 1}/{STEPS}", flush=True)
      workdir.event("done", peak_memory={"host": 2**30})
      workdir.finish()
      # After it: a run that is killed in between is not done again, so no line is there twice.
      with (pathlib.Path(path).parent / "finishes").open("a") as file:
        file.write(f"{seed}\n")


def _sweep(folder: str, count: int, way: str = "") -> None:
  sys.path.insert(0, str(ROOT))
  from flexiq_jax.runs import interruption
  from flexiq_jax.runs.sweeps import collect, executors, states
  from flexiq_jax.runs.sweeps.board import Board

  path = pathlib.Path(folder)
  cells = [cell(path, seed, way) for seed in range(count)]
  local = executors.executor("local")
  with interruption.interruptible():
    todo = [c for c in cells if states.state(c).status not in states.ENDED]
    with Board(cells) as board:
      local.run(todo, local.Settings(processes=2), board)
    (path / "results.csv").write_text(collect.to_csv(collect.collect(cells)))


if __name__ == "__main__":
  if sys.argv[1] == "run":
    _run(sys.argv[2], int(sys.argv[3]), sys.argv[4])
  else:
    _sweep(sys.argv[2], int(sys.argv[3]), *sys.argv[4:])
