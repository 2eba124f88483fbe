"""Every way of an exact int8 convolution at ResNet-50's shapes: is it exact, and how fast.

Exactness is checked on one image with NumPy's integer sums, codes over the whole range. The results
that are timed stay on the device; weights change with every call of a chain, images do not.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.device import conv_ways, present, shapes, timing
from benchmarks.device.context import Context, claim
from benchmarks.device.shapes import Convolution

BATCHES = (128, 8)
TINY = (
  Convolution(side=6, channels=16, outputs=8, window=3, stride=1),
  Convolution(side=7, channels=8, outputs=8, window=1, stride=2),
)


def run(context: Context) -> dict[str, Any]:
  """Measures shape after shape until the time box is over."""
  platform = present.device(context).platform
  result: dict[str, Any] = {"rows": []}
  work = [(shape, batch) for batch in BATCHES for shape in shapes.CONVOLUTIONS]
  if context.small:
    work = [(shape, 2) for shape in TINY]
  for number, (shape, batch) in enumerate(work):
    each = (context.seconds - context.left()) / number if number else 0.0
    if context.left() < 1 + each:
      return finished(result) | {"complete": False, "left_out": len(work) - number}
    row: dict[str, Any]
    try:
      row = measure(shape, batch, platform, context.small)
    except Exception as error:
      row = {"times": {}, "exact": {}, "refused": {"all": timing.reason(error)}}
    row |= {"batch": batch, "shape": str(shape), **dataclasses.asdict(shape)}
    result["rows"].append(row)
    context.save(finished(result))
    told = ", ".join(
      f"{name} {t['us']:.0f} us{'' if row['exact'].get(name) is True else ' (not exact)'}"
      for name, t in row["times"].items()
    )
    print(f"{shape}, batch {batch}: {told}; refused: {row['refused']}", flush=True)
  return finished(result)


def measure(shape: Convolution, batch: int, platform: str, small: bool) -> dict[str, Any]:
  """Times and checks one shape."""
  rng = np.random.default_rng(0)
  size = (shape.window, shape.window, shape.channels, shape.outputs)
  x = jnp.asarray(rng.integers(-128, 128, (batch, shape.side, shape.side, shape.channels), np.int8))
  w = rng.integers(-127, 128, size, np.int8)
  expected = oracle(shape, np.asarray(x[:1]), w)
  weights = jnp.asarray(w)
  copies = 2 if small else timing.copies_for(w.nbytes, 4 * batch * expected.size)
  compiled = {n: jax.jit(way) for n, way in conv_ways.ways(shape, platform, w).items()}
  copied = [weights, *(jnp.array(weights, copy=True) for _ in range(min(4, copies) - 1))]
  runs = {name: timing.Alone(f, [(x, each) for each in copied]) for name, f in compiled.items()}
  ready, refused = timing.warm_all(runs)
  exact: dict[str, bool | str] = {}
  for name in ready:
    # The timed program's own result: of another batch the library may take another algorithm.
    exact[name] = bool(np.array_equal(np.asarray(runs[name].first()[:1]), expected))
  base = next(iter(ready), None)
  span = 2e-4 if small else 3e-3
  times = timing.measure(ready, 0.4, base=base, span=span, rounds=(3, 7)) if ready else {}
  return {
    "times": {name: dataclasses.asdict(t) for name, t in times.items()},
    "exact": exact,
    "refused": refused,
  }


def oracle(shape: Convolution, x: np.ndarray, w: np.ndarray) -> np.ndarray:
  """int64 sums; float64 counts them exactly and is quick at it."""
  edge, s = (shape.window - 1) // 2, shape.stride
  padded = np.pad(x.astype(np.float64), ((0, 0), (edge, edge), (edge, edge), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (shape.window,) * 2, axis=(1, 2))
  rows = windows[:, ::s, ::s].transpose(0, 1, 2, 4, 5, 3)
  batch, height, width = rows.shape[:3]
  y = rows.reshape(batch * height * width, -1) @ w.astype(np.float64).reshape(-1, shape.outputs)
  return y.reshape(batch, height, width, -1).astype(np.int64)


def finished(result: dict[str, Any]) -> dict[str, Any]:
  """The result with its claims: the fastest exact way of each shape."""
  claims = []
  for row in result["rows"]:
    exact = {n: t["us"] for n, t in row["times"].items() if row["exact"].get(n) is True}
    if not exact:
      told = "no way that is exact ran"
    else:
      best = min(exact, key=lambda name: exact[name])
      told = f"{best}, {exact[best]:.1f} us"
    claims.append(
      claim(f"fastest exact int8 convolution: {row['shape']}, batch {row['batch']}", told)
    )
  return result | {"claims": claims}
