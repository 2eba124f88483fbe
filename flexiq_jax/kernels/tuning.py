"""Tile sizes of the mixed matmul: chosen by rule for each kind of device, or measured and kept.

`heuristic` answers at once, on any machine. `autotune` measures candidates on the present device
and keeps the fastest of each shape in `FOLDER/DEVICE.json` (see `tile_files`). Nothing is kept
anywhere that the caller has not named.

A measurement takes the boundary in the middle of K: tiles must serve every ratio, since the ratio
changes at run time and the executable does not.
"""

import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp

from flexiq_jax.kernels import gpu, packing, tile_files, tpu
from flexiq_jax.kernels.operands import Activations, Epilogue, Weights
from flexiq_jax.kernels.tile_files import Shape, Tiles, Tuned, implementation
from flexiq_jax.runs import files


def heuristic(kind: str, shape: Shape) -> Tiles | None:
  """Tiles by rule; None for a device that runs the reference.

  Raises:
    NotImplementedError: a shape that the device's kernel does not take.
  """
  match implementation(kind):
    case "tpu":
      return tpu.choose_tiles(shape.m, shape.k, shape.n, shape.block, kind)
    case "gpu":
      return gpu.choose_tiles(shape.m, tpu.up(shape.n, gpu.STRIP))
  return None


def candidates(kind: str, shape: Shape) -> list[Tiles]:
  """Tiles worth measuring, the heuristic's first; empty where there are none to choose."""
  first = heuristic(kind, shape)
  if first is None:
    return []
  options = _tpu_options(shape) if isinstance(first, tpu.Tiles) else _gpu_options(shape)
  return [first, *(tiles for tiles in options if tiles != first)]


def _gpu_options(shape: Shape) -> Iterable[Tiles]:
  n = tpu.up(shape.n, gpu.STRIP)
  for rows, strip, groups in itertools.product((64, 128, 256), (64, 128, 256), (1, 2)):
    if n % (strip * groups) or rows * strip > 128 * 128 or rows >= shape.m + 64:
      continue
    for buffers in (2, 3, 4, 6):
      tiles = gpu.Tiles(m=rows, n=strip * groups, groups=groups, buffers=buffers)
      if tiles.shared_bytes <= gpu.SHARED:
        yield tiles


def _tpu_options(shape: Shape) -> Iterable[Tiles]:
  outputs = tpu.up(shape.n, tpu.LANES)
  rows = [m for m in (256, 512, 1024, 2048) if m < shape.m + tpu.ROWS]
  columns = [n for n in (128, 256, 384, 512, 768, 1024) if outputs % n == 0]
  for m, n, k in itertools.product(rows, columns, (128, 256, 384, 512, 768, 1024)):
    tiles = tpu.Tiles(m=m, n=n, k=k)
    with contextlib.suppress(NotImplementedError):
      tpu.check_tiles(tiles, shape.k, shape.block)
      yield tiles


def autotune(
  shapes: Iterable[Shape],
  folder: str | Path,
  *,
  kind: str | None = None,
  seconds: Callable[[Shape, Tiles], float] | None = None,
  progress: Callable[[str], None] = lambda line: None,
) -> dict[Shape, Tuned]:
  """Measures the candidates of each shape and keeps the fastest, file and result alike.

  Args:
    shapes: what to tune. Results of other shapes in the file are kept.
    folder: where `DEVICE.json` lies or is made; written after every shape.
    kind: device kind; None is the present device.
    seconds: measures tiles on a shape; None measures on the present device.
    progress: called with one line of text for each shape.

  Returns:
    Everything that the file now holds.

  Raises:
    NotImplementedError: a device without a kernel to tune, or a shape that it does not take.
    ValueError: a damaged file, or a shape for which no candidate ran.
  """
  kind = kind or tile_files.present()
  if implementation(kind) == "reference":
    raise NotImplementedError(
      f"device {kind!r} runs the reference, which has no tiles; a TPU from v5e on or a Hopper GPU "
      "can be tuned"
    )
  seconds = seconds or measure
  path = tile_files.file_of(folder, kind)
  found = tile_files.load(folder, kind)
  path.parent.mkdir(parents=True, exist_ok=True)
  for shape in shapes:
    times, refused = {}, None
    options = candidates(kind, shape)
    for tiles in options:
      try:
        times[tiles] = seconds(shape, tiles)
      except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        refused = error  # more memory than there is, most often
    if not times:
      raise ValueError(f"{shape}: none of the candidates ran on {kind!r}") from refused
    best = min(times, key=lambda tiles: times[tiles])
    first = times.get(options[0])
    found[shape] = Tuned(tiles=best, seconds=times[best], heuristic_seconds=first)
    files.write_text(path, tile_files.encode(kind, found))
    gain = f", {first / times[best]:.2f}x the heuristic's speed" if first else ""
    progress(f"{shape}: {best} of {len(times)} that ran{gain}")
  return found


def measure(shape: Shape, tiles: Tiles, repeats: int = 20) -> float:
  """Median seconds of a product with bfloat16 results on the present device."""
  x, w, epilogue = example(shape)
  if isinstance(tiles, gpu.Tiles):
    laid_out = jax.jit(gpu.prepare)(w)
    run = jax.jit(lambda x, w, e: gpu.mixed_matmul(x, w, e, tiles=tiles))
  else:
    laid_out = w
    run = jax.jit(lambda x, w, e: tpu.mixed_matmul(x, w, e, tiles=tiles))
  jax.block_until_ready(run(x, laid_out, epilogue))
  times = []
  for _ in range(repeats):
    start = time.perf_counter()
    jax.block_until_ready(run(x, laid_out, epilogue))
    times.append(time.perf_counter() - start)
  return statistics.median(times)


def example(shape: Shape) -> tuple[Activations, Weights, Epilogue]:
  """Operands of a shape with random codes, half of K in 4 bits."""
  keys = jax.random.split(jax.random.key(0), 4)
  boundary = shape.k // shape.block // 2 * shape.block
  low = jnp.arange(shape.k, dtype=jnp.int32)[None] < boundary
  code = lambda key, size, top: jax.random.randint(key, size, -top, top, jnp.int32)
  blocks = shape.k // shape.block
  x = Activations(
    x8=jnp.where(low, 0, code(keys[0], (shape.m, shape.k), 128)).astype(jnp.int8),
    x4=jnp.where(low, code(keys[1], (shape.m, shape.k), 8), 0).astype(jnp.int8).astype(jnp.int4),
    boundary=jnp.int32(boundary),
  )
  w = Weights(
    w8=code(keys[2], (shape.k, shape.n), 128).astype(jnp.int8),
    w4=packing.pack(code(keys[3], (shape.k, shape.n), 8)),
    x_shift=jnp.full(blocks, 2, jnp.int32),
    w_shift=jnp.full((blocks, shape.n), 2, jnp.int32),
    block=shape.block,
  )
  zero = jnp.zeros(shape.n, jnp.int32)
  return x, w, Epilogue(scale=jnp.ones(shape.n), correction=zero, out="bfloat16")
