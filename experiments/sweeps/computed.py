"""Columns of a sweep's rows that follow from a run's config, without running it.

| column | what it is |
|---|---|
| `kernel_rows` | rows of K that the TPU kernel multiplies, relative to the layers' own |
| `kernel_bytes` | bytes of weights that it keeps, relative to 8 bits |
"""

import functools
import json
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import config_dict

from experiments.shared import setup
from flexiq_jax import models
from flexiq_jax.runs import files

COLUMNS = ("kernel_rows", "kernel_bytes")


def columns(names: Collection[str], run: Any) -> dict[str, float]:
  """Column -> value, of those that are asked for.

  Args:
    names: of columns.
    run: the config.

  Raises:
    ValueError: there is no such column.
  """
  for name in names:
    if name not in COLUMNS:
      raise ValueError(f"{name!r} is not one of {', '.join(COLUMNS)}")
  if not names:
    return {}
  from flexiq_jax import deployment  # with its kernels, which few sweeps ask about

  plain = files.to_plain(run.to_dict())
  size, block = plain["groups"]["group_size"], plain["groups"]["shift_block"]
  plain["groups"] |= {"group_size": 1, "shift_block": 0}  # one trace for all sizes
  traced, selectable = _traced(json.dumps(plain, sort_keys=True))
  found = deployment.padded(traced, selectable, group_size=size, shift_block=block)
  values = {"kernel_rows": round(found.rows, 3), "kernel_bytes": round(found.bytes, 3)}
  return {name: values[name] for name in names}


@functools.lru_cache
def _traced(config: str) -> tuple[Any, tuple[str, ...]]:
  """A config's model, folded and traced without weights, and its layers that may be in 4 bits."""
  from flexiq_jax import deployment
  from flexiq_jax.graph import tracing

  described = setup.describe(config_dict.ConfigDict(json.loads(config)))
  apply, params = models.functional(described.module)
  x = jax.ShapeDtypeStruct((1, *described.module.input_shape), jnp.float32)
  folded, shapes = deployment.fold_shapes(apply, params, x)
  return tracing.trace(folded, shapes, x), tuple(described.groups)
