"""Each way of computing an exact int8 convolution: the one place that knows them.

The ways of `flexiq_jax.quant.exact` for the platform, and the plain ones beside them, exact or not:

| way | what |
|---|---|
| `plain int32` | XLA's int8 convolution with an int32 result |
| `plain float32 result` | the same, converted to float32 at once, which is what cuDNN has |
| `plain float32 sums` | XLA's int8 convolution asked for float32 |
| `plain patches` | im2col and one int8 product |
| `plain bfloat16` | bfloat16 operands, float32 result |
| `plain float32` | float32 operands at highest precision |
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device.shapes import Convolution
from flexiq_jax import graph
from flexiq_jax.quant import exact

Array = Any
KINDS = ("NHWC", "HWIO", "NHWC")


def ways(
  shape: Convolution, platform: str, w: np.ndarray
) -> dict[str, Callable[[Array, Array], Array]]:
  """Name -> codes int8 `[B, H, W, C]` and weights int8 `[h, w, C, N]` to int32 `[B, H', W', N]`.

  Args:
    shape: of the convolution.
    platform: cpu, gpu or tpu.
    w: the weights that it will be run with; how many parts a way needs is read off them.
  """
  found: dict[str, Callable[[Array, Array], Array]] = {
    "plain int32": lambda x, w: _convolution(shape, x, w, jnp.int32),
    "plain float32 result": lambda x, w: (
      _convolution(shape, x, w, jnp.int32).astype(jnp.float32).astype(jnp.int32)
    ),
    "plain float32 sums": lambda x, w: _convolution(shape, x, w, jnp.float32).astype(jnp.int32),
    "plain patches": functools.partial(_patches, shape),
    "plain bfloat16": lambda x, w: _convolution(
      shape, x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), jnp.float32
    ).astype(jnp.int32),
    "plain float32": lambda x, w: _convolution(
      shape, x.astype(jnp.float32), w.astype(jnp.float32), jnp.float32, jax.lax.Precision.HIGHEST
    ).astype(jnp.int32),
  }
  return found | _of_the_project(shape, platform, w)


def _of_the_project(shape: Convolution, platform: str, w: np.ndarray) -> dict[str, Callable]:
  """The ways of `flexiq_jax.quant.exact`, which takes a layer and its contraction of a trace."""

  def apply(params, x):
    return _convolution(shape, x, params["kernel"], None)

  size = (shape.window, shape.window, shape.channels, shape.outputs)
  params = {"kernel": jax.ShapeDtypeStruct(size, jnp.float32)}
  x = jax.ShapeDtypeStruct((1, shape.side, shape.side, shape.channels), jnp.float32)
  names: list[str] = []
  parts: list[int] = []

  def look(layer, codes, kernel, contract):
    parts.append(exact.parts(layer, w))
    names.extend(exact.ways(layer, contract, platform, parts=parts[0]))
    return contract(codes, kernel, jnp.float32)

  jax.eval_shape(graph.with_rule(apply, look), params, x)

  def run(way: str, x: Array, w: Array) -> Array:
    sums = []

    def rule(layer, real, kernel, contract):
      options = {"signed": True, "parts": parts[0], "platform": platform, "way": way}
      sums.append(exact.product(layer, x, w, contract, **options))
      return contract(real, kernel, jnp.float32)  # nobody reads it, so it is not computed

    graph.with_rule(apply, rule)({"kernel": w.astype(jnp.float32)}, x.astype(jnp.float32))
    return sums[0]

  return {f"exact {name}": functools.partial(run, name) for name in dict.fromkeys(names)}


def _convolution(
  shape: Convolution, x: Array, w: Array, result: Any, precision: Any = None
) -> Array:
  """The convolution of operands as they are, padded to keep the image before its stride."""
  before = (shape.window - 1) // 2
  return jax.lax.conv_general_dilated(
    x,
    w,
    (shape.stride, shape.stride),
    [(before, before)] * 2,
    dimension_numbers=KINDS,
    preferred_element_type=result,
    precision=precision,
  )


def _patches(shape: Convolution, x: Array, w: Array) -> Array:
  """Window positions beside each other, and one int8 product."""
  batch, side, edge = x.shape[0], shape.side, (shape.window - 1) // 2
  out = (side + 2 * edge - shape.window) // shape.stride + 1
  padded = jnp.pad(x, ((0, 0), (edge, edge), (edge, edge), (0, 0)))
  reach = (out - 1) * shape.stride + 1
  taps = [
    padded[:, i : i + reach : shape.stride, j : j + reach : shape.stride]
    for i in range(shape.window)
    for j in range(shape.window)
  ]
  rows = jnp.concatenate(taps, axis=-1).reshape(batch * out * out, -1)
  y = jnp.matmul(rows, w.reshape(-1, shape.outputs), preferred_element_type=jnp.int32)
  return y.reshape(batch, out, out, shape.outputs)
