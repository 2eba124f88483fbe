"""A model's layers as matrix products, for models of latency."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from experiments.shared.checks import field, require
from flexiq_jax import graph, models
from flexiq_jax.graph import tracing
from flexiq_jax.quant import selectable
from flexiq_jax.runs import distributed
from flexiq_jax.serving.npu import Work

Works = list[tuple[Work, bool]]


def of_name(name: str) -> Works:
  """Those of a registered model; its weights are not made."""
  module: Any = nnx.eval_shape(lambda: models.create(name))
  return of_module(module, None)


def of_module(module: Any, names: tuple[str, ...] | None) -> Works:
  """A model's layers, and whether each may have 4-bit channels.

  Depthwise layers run on other units and are left out, and so are products of activations.

  Args:
    module: the model, abstract.
    names: of the layers that may go to 4 bits; None for all but the first and the last.
  """
  apply, params = models.functional(module)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  traced = tracing.trace(apply, params, x)
  chosen = selectable(tuple(traced.layers.values())) if names is None else names
  found: Works = []
  for number, layer in traced.layers.items():
    if layer.kind == "depthwise":
      continue
    equation = traced.jaxpr.jaxpr.eqns[number]
    shape = graph.aval(equation.invars[1 - traced.sides[number]]).shape
    window = math.prod(layer.window)
    # Groups are products of their own, side by side in N.
    channels = layer.in_channels // layer.groups
    work = Work(
      name=layer.name,
      channels=channels,
      window=window,
      outputs=layer.out_channels,
      pixels=layer.macs // (channels * window * layer.out_channels),
      inputs=math.prod(shape),
    )
    found.append((work, layer.name in chosen and layer.groups == 1))
  return found


def boundary(work: Work, low: bool, ratio: float) -> int:
  """Channels in 4 bits at a ratio that is the share of each selectable layer's channels."""
  return round(ratio * work.channels) if low else 0


def check(config, section: str) -> None:
  """Checks what experiments on models of latency share; raises ValueError.

  Args:
    config: of the experiment.
    section: its own field; `models` and `batches` stand there.
  """
  require(config, section, f"configs/{section}.py")
  if distributed.several():
    raise ValueError(f"config.experiment: {section!r} in several processes; one is accepted")
  part = config[section]
  for name in part.models:
    with field(f"config.{section}.models"):
      models.get(name)
  if not part.batches or any(type(batch) is not int or batch < 1 for batch in part.batches):
    raise ValueError(
      f"config.{section}.batches: {tuple(part.batches)}; positive integers are accepted"
    )
  if 0.0 not in config.ratios:
    raise ValueError(f"config.ratios: {config.ratios}; 0 is needed, which gains are over")
