"""Times of the mixed matmul and its peers on the present device (see `benchmarks/kernels.py`).

Every product runs in turn with its peers, `rounds` times; figures are medians and ratios are of
the same round. Peers:

* `xla_int8`, `xla_bfloat16`: the same shapes through `jnp.matmul`, with the same epilogue;
* `qwix_int8`, `qwix_int4`: `qwix.dot_general` of quantized arrays, where qwix is installed.
"""

import collections
import functools
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import kernels
from flexiq_jax.kernels import Activations, Epilogue, Weights, tile_files

Array = Any
LEVELS = (0, 25, 50, 75, 100)
INNER = 10  # calls one after another in a measurement: starting one takes microseconds


def measure(found, batches, rounds: int, implementation: str | None = None) -> list[dict]:
  """Times the different shapes of a model's products.

  Args:
    found: `kernel_products.Product`s.
    batches: examples in a batch.
    rounds: how often each function is timed.
    implementation: of the mixed matmul; None chooses.

  Returns:
    One row a shape and batch: seconds of each function, and its layers.
  """
  rows = []
  for batch in batches:
    shapes = collections.defaultdict(list)
    for product in (one.of_batch(batch) for one in found):
      key = (product.rows(batch), product.k, product.n, product.block, product.window)
      shapes[key].append(product)
    for (m, k, n, *_), same in shapes.items():
      functions = mixed(same[0], m, implementation)
      # Of a convolution: on patches that are there, which it makes itself.
      functions |= running(peers(m, k, n))
      seconds = in_turn(functions, rounds)
      row = {"batch": batch, "m": m, "k": k, "n": n, "layers": [p.name for p in same]}
      row |= {"seconds": seconds, "top1": "random weights"}
      rows.append(row)
      base = seconds["mixed 0 %"]
      shown = ", ".join(f"{name} {base / s:.2f}" for name, s in seconds.items())
      print(f"{m} x {k} x {n} (times {len(same)}): speed against 0 %: {shown}", flush=True)
  return rows


def in_turn(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
  """Median seconds of each function; one turn of each compiles."""
  for function in functions.values():
    jax.block_until_ready(function())
  times = collections.defaultdict(list)
  for _ in range(rounds):
    for name, function in functions.items():
      start = time.perf_counter()
      results = [function() for _ in range(INNER)]
      jax.block_until_ready(results)
      times[name].append((time.perf_counter() - start) / INNER)
  return {name: statistics.median(values) for name, values in times.items()}


def mixed(
  product,
  m: int,
  implementation: str | None,
  tuned: Mapping[tile_files.Shape, tile_files.Tiles] | None = None,
) -> dict[str, Callable[[], Any]]:
  """The mixed matmul of a product with m rows at each level; one executable.

  Args:
    product: a `kernel_products.Product`.
    m: rows.
    implementation: of the mixed matmul; None chooses.
    tuned: measured tiles (see `kernels.mixed_matmul`).
  """
  rng = np.random.default_rng(0)
  k, n, block, columns = product.k, product.n, product.block, product.places
  codes = lambda lo, hi, *shape: jnp.asarray(rng.integers(lo, hi, shape, np.int8))
  w = Weights(
    w8=codes(-127, 128, k, n),
    w4=jax.jit(kernels.pack)(codes(-8, 8, k, n)),
    x_shift=jnp.full(k // block, 2, jnp.int32),
    w_shift=jnp.full((k // block, n), 2, jnp.int32),
    block=block,
    taps=1 if product.window is None else product.taps,
    copies=product.copies,
  )
  x8, x4 = codes(-127, 128, m, columns), codes(-8, 8, m, columns)
  epilogue = Epilogue(
    scale=jnp.full(n, 1e-5, jnp.float32),
    correction=jnp.zeros(n, jnp.int32),
    bias=jnp.zeros(n, jnp.float32),
    out="bfloat16",
  )
  name = implementation or kernels.choose_implementation(w)
  laid_out: Any = w
  if name == "gpu":
    from flexiq_jax.kernels import gpu

    laid_out = jax.jit(gpu.prepare)(w)  # once, as `deployment.place` does
  run = jax.jit(
    lambda x, w, e: kernels.mixed_matmul(
      x, w, e, window=product.window, implementation=name, tuned=tuned
    )
  )

  @jax.jit
  def split(x8, x4, boundary):
    low = jnp.arange(columns) < boundary
    return Activations(
      x8=jnp.where(low[None], 0, x8).astype(jnp.int8),
      x4=jnp.where(low[None], x4, 0).astype(jnp.int4),
      boundary=boundary,
    )

  functions: dict[str, Callable[[], Any]] = {}
  for percent, boundary in zip(LEVELS, product.boundaries, strict=True):
    x = split(x8, x4, jnp.int32(boundary))
    functions[f"mixed {percent} %"] = functools.partial(run, x, laid_out, epilogue)
  return functions


def peers(m: int, k: int, n: int) -> dict[str, tuple[Callable[..., Any], Callable[[], tuple]]]:
  """The same product by other means: name -> (jitted function, what makes its arguments)."""

  def operands():
    rng = np.random.default_rng(1)
    x, w = (jnp.asarray(rng.integers(-127, 128, s), jnp.int8) for s in ((m, k), (k, n)))
    return x, w, jnp.full((1, n), 1e-5, jnp.float32), jnp.zeros((1, n), jnp.float32)

  def halves():
    x, w, *rest = operands()
    return x.astype(jnp.bfloat16), w.astype(jnp.bfloat16), *rest

  @jax.jit
  def product(x, w, scale, bias):
    kind = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
    y = jnp.matmul(x, w, preferred_element_type=kind)
    return (y.astype(jnp.float32) * scale + bias).astype(jnp.bfloat16)

  found: dict[str, tuple[Callable[..., Any], Callable[[], tuple]]] = {
    "xla_int8": (product, operands),
    "xla_bfloat16": (product, halves),
  }
  if importlib.util.find_spec("qwix") is None:
    return found
  import qwix

  @jax.jit
  def quantized(x, w, bias):
    y = qwix.dot_general(x, w, (((1,), (0,)), ((), ())))
    return (y + bias).astype(jnp.bfloat16)

  def quantize(kind):
    x, w, _, bias = halves()
    each = lambda a, axis: qwix.quantize(a, kind, channelwise_axes=[axis])
    return each(x, 0), each(w, 1), bias

  for kind in ("int8", "int4"):
    found[f"qwix_{kind}"] = (quantized, functools.partial(quantize, kind))
  return found


def convolution(side: int, channels: int, outputs: int, batch: int):
  """XLA's own int8 convolution of 3 x 3 on codes that become codes: (function, arguments)."""

  def operands():
    x = jnp.zeros((batch, side, side, channels), jnp.int8)
    w = jnp.zeros((3, 3, channels, outputs), jnp.int8)
    return x, w, jnp.zeros(outputs), jnp.zeros(outputs)

  @jax.jit
  def run(x, w, scale, bias):
    kinds = ("NHWC", "HWIO", "NHWC")
    y = jax.lax.conv_general_dilated(
      x, w, (1, 1), "SAME", dimension_numbers=kinds, preferred_element_type=jnp.int32
    )
    y = jnp.maximum(y.astype(jnp.float32) * scale + bias, 0)
    return jnp.round(jnp.clip(y, 0, 127)).astype(jnp.int8)

  return run, operands


def running(found: dict[str, tuple[Callable[..., Any], Callable[[], tuple]]]):
  """Peers with their arguments; those that the present backend cannot run are named and left."""
  functions: dict[str, Callable[[], Any]] = {}
  for name, (function, arguments) in found.items():
    call = functools.partial(function, *arguments())
    try:
      jax.block_until_ready(call())
    except jax.errors.JaxRuntimeError as error:  # not every backend multiplies int4
      print(f"{name}: not here ({str(error).splitlines()[0]})", flush=True)
      continue
    functions[name] = call
  return functions
