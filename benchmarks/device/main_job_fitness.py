"""Fitness of a finished run's recipe on the present backend, for `main_job.py`.

The weights, calibration images and recipe are those of the run; the masks are greedy's at three
levels and random ones.
"""

import argparse
import importlib
import json
import pathlib

import jax
import numpy as np

from experiments.shared import setup
from experiments.shared.stages import Stages
from flexiq_jax import orders
from flexiq_jax.adaptive import from_recipe
from flexiq_jax.orders import Schedule, recipes
from flexiq_jax.runs import process
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import Fitness


def fitness(name: str, argument: str, workdir: pathlib.Path) -> list[float]:
  """Mean distances of masks at a quarter, half and three quarters: the recipe's and random ones."""
  config = importlib.import_module(f"configs.{name}").get_config(argument or None)
  inputs = setup.prepare(config)
  stages = Stages(inputs, Workdir(workdir))
  network = stages.network  # reads the training back
  model = from_recipe(network, recipes.load(workdir / "recipe.json"))
  space = model.schedule.space
  images = np.concatenate(inputs.calibration_set[0])
  evaluate = Fitness(network, model.model, space, images, capacity=8)
  schedules = [model.schedule, *(Schedule(space, orders.random(space, s)) for s in range(3))]
  masks = np.stack([one.mask(ratio) for one in schedules for ratio in (0.25, 0.5, 0.75)])
  return [float(v) for v in evaluate(masks)]


def main() -> None:
  """Writes a JSON file."""
  parser = argparse.ArgumentParser(description="Fitness of a finished run's recipe.")
  parser.add_argument("--config", required=True, help="module below configs")
  parser.add_argument("--argument", default="")
  parser.add_argument("--workdir", type=pathlib.Path, required=True)
  parser.add_argument("--json", type=pathlib.Path, required=True)
  args = parser.parse_args()
  process.full_precision()  # as run.py does
  values = fitness(args.config, args.argument, args.workdir)
  found = {"backend": jax.default_backend(), "fitness": values, **process.describe()}
  args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
  main()
