"""What the serving experiments share: a profile, accuracy by ratio, batching, and who says so."""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared import accuracies, setup
from experiments.shared.checks import field, require
from flexiq_jax import models, serving
from flexiq_jax.deployment import Deployed, Runner, artifact
from flexiq_jax.runs import distributed
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import profile_files


@dataclasses.dataclass(frozen=True, kw_only=True)
class Inputs:
  """A serving config, checked, with what it reads.

  Attributes:
    config: the config.
    described: its model.
    profile: latencies, or None where they are measured when the run starts.
    batching: how batches are formed.
    accuracy: top-1 by 4-bit ratio, percent; empty where no run is named.
    int4: top-1 of uniform INT4 in the same run, None where it has none.
  """

  config: Any
  described: setup.Described
  profile: serving.Profile | None
  batching: serving.Batching
  accuracy: Mapping[float, float]
  int4: float | None


def prepare(config, section: str) -> Inputs:
  """Checks `config.serving` and opens what it names.

  Args:
    config: of the experiment.
    section: its own field, that has to be there, too.
  """
  check(config, section)
  part = config.serving
  profile = None
  if part.profile != "measure":
    with field("config.serving.profile"):
      profile = _given(config)
  else:
    require_artifact("config.serving.artifact", part.artifact)
  with field("config.serving.accuracy"):
    accuracy, int4 = accuracies.by_ratio(part.accuracy, part.method)
  with field("config.serving", part):
    batching = serving.Batching(size=part.size, delay=part.delay)
  return Inputs(
    config=config,
    described=setup.describe(config),
    profile=profile,
    batching=batching,
    accuracy=accuracy,
    int4=int4,
  )


def check(config, section: str) -> None:
  """Raises ValueError where the fields are missing or out of range."""
  for name in ("serving", section):
    require(config, name, f"configs/{section}.py")
  if distributed.several():
    raise ValueError(f"config.experiment: {section!r} in several processes; one is accepted")
  part = config.serving
  if not part.target > 0:
    raise ValueError(f"config.serving.target: {part.target}; positive seconds are accepted")
  if part.queue < part.size:
    raise ValueError(f"config.serving.queue: {part.queue}; at least size, {part.size}, is accepted")


def profile_of(inputs: Inputs, workdir: Workdir) -> serving.Profile:
  """The profile of a run, measured where it is to be; kept in the workdir."""
  path = workdir.path / "profile.json"
  if path.is_file():
    return profile_files.read(path)
  profile, part = inputs.profile, inputs.config.serving
  if profile is None:
    name = "config.serving.artifact"
    profile = measured(
      part.artifact, inputs.described, name, sizes=part.sizes, repeats=part.repeats
    )
  profile_files.write(path, profile)
  return profile


def capacity(inputs: Inputs, profile: serving.Profile) -> float:
  """What INT8 sustains, requests a second, in batches as the config allows them."""
  return profile.throughput(profile.ratios[0], inputs.batching.size)


def notes(inputs: Inputs, profile: serving.Profile) -> list[str]:
  """What the figures rest on, for a report."""
  part = inputs.config.serving
  lines = [f"Latency: {profile.describe()}."]
  if profile.source == "estimated":
    lines.append("The latencies are modelled, so all times here are; no device ran.")
  lines.append(
    "All runs are simulated on a virtual clock with the code that the engine decides by. INT4 is "
    "taken to be as fast as 100 %."
  )
  if inputs.accuracy:
    curve = ", ".join(f"{100 * r:g} %: {a:.2f}" for r, a in sorted(inputs.accuracy.items()))
    four = "" if inputs.int4 is None else f"; uniform INT4: {inputs.int4:.2f}"
    lines.append(
      f"Accuracy: rows `{part.method}` of `{part.accuracy}` ({curve}{four}), linear between ratios."
    )
  else:
    lines.append(
      "No run is named in `serving.accuracy`: the mean ratio stands for the accuracy that it costs."
    )
  return lines


def milliseconds(seconds: float) -> str:
  """A latency in a table."""
  return "∞" if seconds == math.inf else f"{1e3 * seconds:.1f}"


def require_artifact(name: str, folder: str) -> None:
  """Raises ValueError where a config's field names no folder."""
  if not folder or not Path(os.path.expandvars(folder)).is_dir():
    raise ValueError(
      f"{name}: {folder!r} is no folder; one that configs/deploy.py made is accepted"
    )


def load_artifact(folder: str | os.PathLike[str], module: Any, name: str) -> Deployed:
  """Reads an artifact for a model.

  Args:
    folder: of the artifact.
    module: the model, whose weights are not read.
    name: of the config's field that says which artifact.
  """
  apply, shapes = models.functional(module)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  with field(name):
    return artifact.load(folder, apply, shapes, x)


def _given(config) -> serving.Profile:
  """The profile of a file, or a modelled one."""
  part = config.serving
  if part.profile:
    return profile_files.read(os.path.expandvars(part.profile), config.model)
  return serving.modelled(int8=part.int8, gain=part.gain, fixed=part.fixed, sizes=tuple(part.sizes))


def measured(
  folder: str, described: setup.Described, name: str, *, sizes: Sequence[int], repeats: int
) -> serving.Profile:
  """Latencies of an artifact on this device.

  Args:
    folder: of the artifact.
    described: its model.
    name: of the config's field that says which artifact.
    sizes: of batches.
    repeats: batches of each size and ratio.
  """
  module = described.module
  deployed = load_artifact(os.path.expandvars(folder), module, name)
  run = serving.runner_function(Runner(deployed, sizes=tuple(sizes)))
  ratios = tuple(float(r) for r in np.asarray(deployed.levels))
  return serving.measure(
    *(run, np.zeros(module.input_shape, np.float32)),
    **{"sizes": sizes, "ratios": ratios, "repeats": repeats},
    model=described.config.model,
  )
