"""Tiles of the mixed matmul, measured on this device for the products of the three models.

    FOLDER/tiles/DEVICE.json    as `tuning.autotune` writes it, after every shape

`python -m benchmarks.device.report` puts that file where the project looks for it. Each shape has a
share of the time: the tiles by rule come first, then the others that are worth it, compiled a few
at a time, until the share is used up; so a shape that was begun always has an answer.
"""

import concurrent.futures
import time
from typing import Any

import jax

from benchmarks.device import present, shapes, timing
from benchmarks.device.context import Context, Skipped, claim
from flexiq_jax import kernels
from flexiq_jax.kernels import gpu, tile_files, tuning

BATCHES = (8, 1, 128, 32)
SHARE = 3.0  # seconds of a shape, at least


def run(context: Context) -> dict[str, Any]:
  """Tunes shape after shape until the time box is over."""
  device = present.device(context)
  kind = tile_files.present()
  if tile_files.implementation(kind) == "reference":
    raise Skipped(f"device {kind!r} runs the reference, which has no tiles")
  work = wanted(device.platform, kind, context.small)
  folder = context.folder / "tiles"
  tile_files.file_of(folder, kind).unlink(missing_ok=True)
  result: dict[str, Any] = {"device": kind, "tuned": [], "refused": {}}
  for number, shape in enumerate(work):
    each = (context.seconds - context.left()) / number if number else SHARE
    if context.left() < 1 + each:
      return finished(result) | {"complete": False, "left_out": len(work) - number}
    clock = Clock(max(SHARE, context.left() / (len(work) - number)))
    try:
      found = tuning.autotune([shape], folder, kind=kind, seconds=clock.seconds)[shape]
    except Exception as error:
      result["refused"][str(shape)] = timing.reason(error)
      continue
    row = {**vars(shape), "tiles": vars(found.tiles), "us": 1e6 * found.seconds}
    row |= {"rule_us": found.heuristic_seconds and 1e6 * found.heuristic_seconds}
    row |= {"tried": clock.tried, "refused": clock.refused}
    result["tuned"].append(row)
    context.save(finished(result))
    print(row, flush=True)
  return finished(result)


def wanted(platform: str, kind: str, small: bool = False) -> list[tile_files.Shape]:
  """Shapes, most important first: the largest products of each model at every batch."""
  found: dict[tile_files.Shape, None] = {}
  products = {name: shapes.products(name, platform, kind, small) for name in shapes.NAMES}
  for rank in range(max(map(len, products.values()))):
    for batch in BATCHES:
      for name in ("vit_b", "deit_s", "resnet50"):
        for p in products[name][rank : rank + 1]:
          found[tile_files.Shape(m=p.rows(batch), k=p.k, n=p.n, block=p.block)] = None
  return list(found)


class Clock:
  """Measures the tiles of one shape for `tuning.autotune`, until its time is over.

  Attributes:
    tried, refused: how many tiles ran, and did not.
  """

  def __init__(self, seconds: float, threads: int = 6):
    """Starts the time box."""
    self._end = time.monotonic() + seconds
    self._threads = threads
    self._runs: dict[tile_files.Tiles, timing.Run | Exception] | None = None
    self.tried = self.refused = 0

  def seconds(self, shape: tile_files.Shape, tiles: tile_files.Tiles) -> float:
    """Seconds of a product with these tiles.

    Raises:
      ValueError: tiles that do not run, or are not worth the time; `autotune` goes on.
    """
    if self._runs is None:  # the first, by rule: whatever the time
      self._runs = {}
      self._compile(shape, self._candidates(shape, tiles))
    run = self._runs.get(tiles)
    if run is None:
      raise ValueError(f"{tiles}: not among those that were tried")
    if isinstance(run, Exception):
      self.refused += 1
      raise ValueError(str(run)) from run
    self.tried += 1
    times = timing.measure({"tiles": run}, 0.1, rounds=(3, 5), span=2e-3)
    return 1e-6 * times["tiles"].us

  def _candidates(self, shape: tile_files.Shape, first: tile_files.Tiles) -> list[tile_files.Tiles]:
    """The rule's, and one depth of buffers of each other size: the deepest that fits."""
    deepest: dict[tuple, tile_files.Tiles] = {}
    for tiles in tuning.candidates(tile_files.present(), shape):
      key = (tiles,)
      if isinstance(tiles, gpu.Tiles):
        key = (tiles.m, tiles.n, tiles.groups)
        if key in deepest and tiles.buffers <= deepest[key].buffers:  # pyrefly: ignore
          continue
      deepest[key] = tiles
    return list(dict.fromkeys([first, *deepest.values()]))

  def _compile(self, shape: tile_files.Shape, candidates: list[tile_files.Tiles]) -> None:
    """Compiles side by side; those that are late are left out, the first one never."""
    assert self._runs is not None
    x, w, epilogue = tuning.example(shape)
    if kernels.choose_implementation(w) == "gpu":
      from flexiq_jax.kernels import gpu

      w = jax.jit(gpu.prepare)(w)
    copies = timing.copies_for(shape.k * shape.n, 2 * shape.m * shape.n)

    def compile(tiles: tile_files.Tiles) -> timing.Run:
      call = jax.jit(
        lambda x, w, e: kernels.mixed_matmul(
          x, w, e, tuned={shape: tiles}, implementation=tile_files.implementation(kind)
        )
      )
      run = timing.Alone(call, [(x, each, epilogue) for each in weights])
      run.warm()
      return run

    kind = tile_files.present()
    weights = [
      w,
      *(jax.tree.map(lambda a: jax.numpy.array(a, copy=True), w) for _ in range(copies - 1)),
    ]
    pool = concurrent.futures.ThreadPoolExecutor(self._threads)
    futures = {tiles: pool.submit(compile, tiles) for tiles in candidates}
    for tiles, future in futures.items():
      wait = max(0.0, self._end - time.monotonic() - 0.5)
      try:
        self._runs[tiles] = future.result(timeout=30 if tiles == candidates[0] else wait)
      except concurrent.futures.TimeoutError:
        future.cancel()
      except Exception as error:
        self._runs[tiles] = error
    # Nothing is measured while anything still compiles.
    pool.shutdown(wait=True, cancel_futures=True)


def finished(result: dict[str, Any]) -> dict[str, Any]:
  """The result with its claim."""
  gains = [row["rule_us"] / row["us"] for row in result["tuned"] if row["rule_us"]]
  claims = []
  if gains:
    better = sum(gain > 1.02 for gain in gains)
    told = f"{better} of {len(gains)} shapes faster by over 2 %, at most {max(gains):.2f}x"
    claims.append(claim("measured tiles against tiles by rule", told))
  return result | {"claims": claims}
