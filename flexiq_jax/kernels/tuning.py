"""Tile sizes of the mixed matmul: chosen by rule for each kind of device, or measured and kept.

`heuristic` answers at once, on any machine. `autotune` measures candidates on the present device
and keeps the fastest of each shape in `FOLDER/DEVICE.json`; `load` reads such a file back. Nothing
is kept anywhere that the caller has not named.

A measurement takes the boundary in the middle of K: tiles must serve every ratio, since the ratio
changes at run time and the executable does not.
"""

import contextlib
import dataclasses
import itertools
import json
import re
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from flexiq_jax import files
from flexiq_jax.kernels import gpu, gpu_tiles, packing, tpu, tpu_tiles
from flexiq_jax.kernels.operands import Activations, Epilogue, Weights

VERSION = 1
Tiles = gpu_tiles.Tiles | tpu_tiles.Tiles

# Device kinds as JAX names them -> kernel. The first pattern found in the name rules.
DEVICES: tuple[tuple[str, str], ...] = (
  (r"TPU v5", "tpu"),  # "TPU v5 lite" is a v5e, "TPU v5" and "TPU v5p" are v5p
  (r"TPU v6", "tpu"),
  (r"TPU ?v?7", "tpu"),
  (r"H100|H200|H800|GH200", "gpu"),
)
_CLASSES = {"tpu": tpu_tiles.Tiles, "gpu": gpu_tiles.Tiles}


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Shape:
  """What tiles are chosen for.

  Attributes:
    m, k, n: rows of x, rows of w, outputs.
    block: rows of K in a shift block.
  """

  m: int
  k: int
  n: int
  block: int

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      if type(value) is not int or value < 1:
        raise ValueError(f"shape.{field.name}: {value!r}; a positive integer is accepted")
    if self.k % self.block:
      raise ValueError(f"shape.block: {self.block}; a divisor of k = {self.k} is accepted")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuned:
  """The fastest tiles of a shape, and what they gain.

  Attributes:
    tiles: block sizes.
    seconds: median time of the product.
    heuristic_seconds: the same with the heuristic's tiles, measured beside it; None where those did
      not run.
  """

  tiles: Tiles
  seconds: float
  heuristic_seconds: float | None


def implementation(kind: str) -> str:
  """The kernel for a kind of device: tpu, gpu, or reference (which has no tiles)."""
  for pattern, name in DEVICES:
    if re.search(pattern, kind):
      return name
  return "reference"


def heuristic(kind: str, shape: Shape) -> Tiles | None:
  """Tiles by rule; None for a device that runs the reference.

  Raises:
    NotImplementedError: a shape that the device's kernel does not take.
  """
  match implementation(kind):
    case "tpu":
      return tpu_tiles.choose_tiles(shape.m, shape.k, shape.n, shape.block, kind)
    case "gpu":
      return gpu_tiles.choose_tiles(shape.m, tpu_tiles.up(shape.n, gpu_tiles.STRIP))
  return None


def candidates(kind: str, shape: Shape) -> list[Tiles]:
  """Tiles worth measuring, the heuristic's first; empty where there are none to choose."""
  first = heuristic(kind, shape)
  if first is None:
    return []
  options = _tpu_options(shape) if isinstance(first, tpu_tiles.Tiles) else _gpu_options(shape)
  return [first, *(tiles for tiles in options if tiles != first)]


def _gpu_options(shape: Shape) -> Iterable[Tiles]:
  n = tpu_tiles.up(shape.n, gpu_tiles.STRIP)
  for rows, strip, groups in itertools.product((64, 128, 256), (64, 128, 256), (1, 2)):
    if n % (strip * groups) or rows * strip > 128 * 128 or rows >= shape.m + 64:
      continue
    for buffers in (2, 3, 4, 6):
      tiles = gpu_tiles.Tiles(m=rows, n=strip * groups, groups=groups, buffers=buffers)
      if tiles.shared_bytes <= gpu_tiles.SHARED:
        yield tiles


def _tpu_options(shape: Shape) -> Iterable[Tiles]:
  outputs = tpu_tiles.up(shape.n, tpu_tiles.LANES)
  rows = [m for m in (256, 512, 1024, 2048) if m < shape.m + tpu_tiles.ROWS]
  columns = [n for n in (128, 256, 384, 512, 768, 1024) if outputs % n == 0]
  for m, n, k in itertools.product(rows, columns, (128, 256, 384, 512, 768, 1024)):
    tiles = tpu_tiles.Tiles(m=m, n=n, k=k)
    with contextlib.suppress(NotImplementedError):
      tpu_tiles.check_tiles(tiles, shape.k, shape.block)
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
    progress: takes a line for each shape.

  Returns:
    Everything that the file now holds.

  Raises:
    NotImplementedError: a device without a kernel to tune, or a shape that it does not take.
    ValueError: a damaged file, or a shape for which no candidate ran.
  """
  kind = kind or jax.devices()[0].device_kind
  if implementation(kind) == "reference":
    raise NotImplementedError(
      f"device {kind!r} runs the reference, which has no tiles; a TPU from v5e on or a Hopper GPU "
      "can be tuned"
    )
  seconds = seconds or measure
  path = file_of(folder, kind)
  tuned = load(folder, kind)
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
    tuned[shape] = Tuned(tiles=best, seconds=times[best], heuristic_seconds=first)
    files.write_text(path, _encode(kind, tuned))
    gain = f", {first / times[best]:.2f}x the heuristic's speed" if first else ""
    progress(f"{shape}: {best} of {len(times)} that ran{gain}")
  return tuned


def measure(shape: Shape, tiles: Tiles, repeats: int = 20) -> float:
  """Median seconds of a product with bfloat16 results on the present device."""
  x, w, epilogue = example(shape)
  if isinstance(tiles, gpu_tiles.Tiles):
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


def file_of(folder: str | Path, kind: str) -> Path:
  """Where the results of a device kind lie."""
  return Path(folder) / (re.sub(r"[^a-z0-9]+", "-", kind.lower()).strip("-") + ".json")


def load(folder: str | Path, kind: str) -> dict[Shape, Tuned]:
  """What was tuned for a device kind; nothing where there is no file.

  Raises:
    ValueError: a file that is damaged, of another version or of another device, naming it.
  """
  path = file_of(folder, kind)
  if not path.exists():
    return {}
  try:
    content = json.loads(path.read_text(encoding="utf-8"))
    version, device = content["version"], content["device"]
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path}: no file of tuned tiles ({error!r}); delete it and tune") from error
  if version != VERSION:
    raise ValueError(f"{path}: version {version!r}; {VERSION} is accepted, tune again")
  if device != kind:
    raise ValueError(f"{path}: tuned on {device!r}, this is for {kind!r}")
  try:
    return dict(_decode(entry, kind) for entry in content["tuned"])
  except (ValueError, TypeError, KeyError) as error:
    raise ValueError(f"{path}: an entry cannot be read: {error}") from error


def _encode(kind: str, tuned: Mapping[Shape, Tuned]) -> str:
  entries = [
    {"shape": dataclasses.asdict(shape), **dataclasses.asdict(tuned[shape])}
    for shape in sorted(tuned)
  ]
  return json.dumps({"version": VERSION, "device": kind, "tuned": entries}, indent=2) + "\n"


def _decode(entry: Mapping[str, Any], kind: str) -> tuple[Shape, Tuned]:
  tiles = _CLASSES[implementation(kind)](**entry["tiles"])
  seconds, first = float(entry["seconds"]), entry["heuristic_seconds"]
  first = None if first is None else float(first)
  return Shape(**entry["shape"]), Tuned(tiles=tiles, seconds=seconds, heuristic_seconds=first)
