"""The short way from an adaptive model to what runs elsewhere: artifacts, runners, StableHLO.

`deploy(model, directory)` packs it, `load_runner(directory, net, x=x)` reads that again,
`export(model, directory)` writes programs that need nothing but JAX.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from flexiq_jax import deployment, inputs
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.deployment import Runner, artifact
from flexiq_jax.deployment import export as stablehlo
from flexiq_jax.orders import LEVELS
from flexiq_jax.runs.interruption import quiet

_GRANULES = {"cpu": 2, "gpu": 64, "tpu": 128}


@quiet
def deploy(
  model: AdaptiveModel,
  directory: str | os.PathLike | None = None,
  *,
  levels: Sequence[float] = LEVELS,
  granule: int | None = None,
  sizes: Sequence[int] = deployment.SIZES,
) -> Runner:
  """Packs a model for the mixed matmul, and has it run.

  Args:
    model: the model.
    directory: where an artifact is written (see `load_runner`); a folder that does not exist yet,
      or is empty. None writes nothing.
    levels: ratios at which it is to run, ascending.
    granule: rows that a shift block is a multiple of (see `deployment.deploy`); None takes that of
      JAX's default backend.
    sizes: batch sizes that are compiled (see `Runner`).

  Raises:
    ValueError: the folder holds something, or levels, granule or sizes are wrong.
  """
  granule = granule or _GRANULES[model.network.platform]
  made = deployment.deploy(model, model.network.example, levels=levels, granule=granule)
  runner = Runner(made, sizes=sizes)
  if directory is not None:
    artifact.save(directory, made, name=Path(directory).resolve().name)
  return runner


@quiet
def load_runner(
  directory: str | os.PathLike,
  net: Any,
  params: Any = None,
  *,
  x: Any,
  sizes: Sequence[int] = deployment.SIZES,
) -> Runner:
  """Reads what `deploy` wrote.

  Args:
    directory: of the artifact.
    net: the float model, as for `quantize`.
    params: its parameters; their shapes are enough.
    x: an example input `[B, ...]`, array or shape.
    sizes: batch sizes that are compiled.

  Raises:
    FileNotFoundError: there is no such artifact.
    ValueError: it is damaged, or of another model.
  """
  return Runner(artifact.load(directory, *inputs.as_function(net, params), x), sizes=sizes)


@quiet
def export(
  model: AdaptiveModel,
  directory: str | os.PathLike,
  *,
  batch_size: int = 8,
  levels: Sequence[float] = LEVELS,
  platforms: Sequence[str] = stablehlo.PLATFORMS,
) -> Path:
  """Writes a model as StableHLO, which JAX alone runs (see `deployment.export`).

  Args:
    model: the model.
    directory: made if missing.
    batch_size: of the batches it will take.
    levels: ratios at which it is to run, ascending.
    platforms: of `cpu`, `cuda` and `tpu`.

  Returns:
    The folder.
  """
  example = model.network.example
  x = jax.ShapeDtypeStruct((batch_size, *example.shape[1:]), example.dtype)
  made = deployment.deploy(model, example, levels=levels)
  return stablehlo.save(directory, made, x, platforms=platforms)
