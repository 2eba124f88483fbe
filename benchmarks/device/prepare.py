"""Deployed models with random weights, made on the CPU while the accelerator measures other things.

    FOLDER/models/NAME/     the artifact (flexiq_jax.deployment.artifact)
    FOLDER/models/NAME.json written when it is complete

Calibrated on noise and ordered at random: what is measured on them is time, which depends on
neither.
"""

import os
import pathlib
import time
from typing import Any

import numpy as np

from benchmarks.device import records, shapes
from benchmarks.device.context import Context
from flexiq_jax import deployment, models, orders
from flexiq_jax.calibrated import calibrate
from flexiq_jax.deployment import artifact
from flexiq_jax.network import Network
from flexiq_jax.quant import LowSettings, selectable


def run(context: Context) -> dict[str, Any]:
  """Makes all models, one after the other, on one half of the cores."""
  platform, kind = (*context.options, "", "")[:2]
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[len(cores) // 2 :])
  result: dict[str, Any] = {"seconds": {}}
  for name in shapes.NAMES:
    start = time.monotonic()
    deployed = build(name, platform, kind, context.small)
    artifact.save(folder_of(context.folder, name), deployed, name=name)
    result["seconds"][name] = time.monotonic() - start
    records.write(context.folder / "models" / f"{name}.json", {"complete": True})
    context.save(result)
  return result


def folder_of(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Where a model's artifact lies."""
  return folder / "models" / name


def build(name: str, platform: str, kind: str = "", small: bool = False) -> deployment.Deployed:
  """A deployed model with random weights.

  Args:
    name: of the model.
    platform: cpu, gpu or tpu, where it is to run.
    kind: of the device.
    small: its small form.
  """
  module: Any = models.create(name, **shapes.overrides(name, small))
  apply, params = models.functional(module)
  x = np.random.default_rng(0).normal(size=(1, *module.input_shape)).astype(np.float32)
  network = Network(apply, params, x)
  size = shapes.group_size(name, platform, kind)
  settings = LowSettings(group_size=size, shift_block=size, whole_heads=True)
  grouped = calibrate(network, [x]).group(selectable(network.layers), settings)
  model = grouped.ordered(orders.random(grouped.space, 0))
  return deployment.deploy(model, x, levels=shapes.LEVELS, granule=shapes.granule(platform))
