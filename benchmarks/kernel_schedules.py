"""Schedules of kernels for TPUs that are not here, for `benchmarks/kernels.py`.

libtpu compiles them ahead of time; `llo` reads its final listing.
"""

import dataclasses
import math
import pathlib
import re

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import kernel_times, llo
from benchmarks.kernel_products import MODELS, V5E, Product
from flexiq_jax.kernels import Activations, Epilogue, Requantize, Weights, tpu

CHIPS = {  # topology, clock in GHz, main memory in GB/s, name of the device kind
  "v5e": ("v5e:2x2", 1.5, 819, V5E),
  "v6e": ("v6e:2x2", 1.75, 1640, "TPU v6 lite"),
}
# Real shapes whose whole schedules are compared: name -> (M, K, N); shift blocks as in `MODELS`.
SHAPES = {
  "deit_s qkv": (25216, 384, 1152),
  "vit_b qkv": (25216, 768, 2304),
  "vit_b fc1": (25216, 768, 3072),
  "vit_b fc2": (25216, 3072, 768),
}


class Compiler:
  """Compiles for chips that are not here, and reads the schedules."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._schedules: dict = {}

  def device(self, chip: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]

  def mixed(self, chip, rows, product: Product):
    """(sweep, schedule) of a product on a chip; equal tiles are compiled once."""
    tiles = tpu.choose_tiles(
      *(rows, product.k, product.n, product.block, CHIPS[chip][3]),
      *(product.window, product.granule, product.copies),
    )
    key = (chip, tiles, product.block, product.n, product.k, product.activation)
    key += (product.next_boundaries is None, product.granule, product.window)
    whole = sweep(rows, product, tiles, CHIPS[chip][3])
    if key not in self._schedules:
      some = rows if whole.innermost else min(rows, 2 * tiles.m * whole.period)
      self._compile(chip, some, product, tiles)
      program = llo.newest(self._folder, "mixed_matmul")
      shuffles = product.window is not None and not whole.innermost
      stages = tiles.m // tpu.stage_rows(tiles.m) if shuffles else 1
      self._schedules[key] = llo.schedule(program, tiles.m // whole.turn, stages)
    return whole, self._schedules[key]

  def _compile(self, chip, rows, product, tiles):
    sharding = SingleDeviceSharding(self.device(chip))
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    k, n, j = product.k, product.n, product.k // product.block
    requantize = None
    if product.next_boundaries is not None:
      requantize = Requantize(
        of(jnp.float32), of(jnp.int32), of(jnp.int32, n), signed=False, granule=product.granule
      )
    columns = product.places
    x = Activations(of(jnp.int8, rows, columns), of(jnp.int4, rows, columns), of(jnp.int32))
    w = Weights(
      of(jnp.int8, k, n),
      of(jnp.int8, k // 2, n),
      of(jnp.int32, j),
      of(jnp.int32, j, n),
      block=product.block,
      offset=0 if product.window is None else 8,
      taps=1 if product.window is None else product.taps,
      copies=product.copies,
    )
    epilogue = Epilogue(
      of(jnp.float32, n),
      of(jnp.int32, n),
      of(jnp.float32, n),
      requantize,
      activation=product.activation,
      out="bfloat16",
    )
    kind = CHIPS[chip][3]
    run = lambda x, w, e: tpu.mixed_matmul(x, w, e, product.window, tiles=tiles, kind=kind)
    jax.jit(run).lower(x, w, epilogue).compile()

  def prepare(self, chip: str, product: Product) -> llo.Preparation:
    """Schedule of the kernel that makes a product's operands."""
    key = (chip, "prepare", product.channels, product.places, product.gathers)
    if key not in self._schedules:
      sharding = SingleDeviceSharding(self.device(chip))
      of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

      def run(x, scale, shift, boundary, order):
        return tpu.quantize_lower(
          x,
          scale,
          shift,
          boundary,
          signed=True,
          order=order if product.gathers else None,
          granule=product.block // product.steps,
        )

      x, places = of(jnp.bfloat16, 1024, product.channels), of(jnp.int32, product.places)
      jax.jit(run).lower(x, of(jnp.float32), places, of(jnp.int32), places).compile()
      self._schedules[key] = llo.preparation(llo.newest(self._folder, "quantize_lower"))
    return self._schedules[key]

  def peer(self, chip: str, function, arguments) -> int | None:
    """Bundles of a function that XLA compiles; None where loops hide how often they run.

    Args:
      chip: for which it is compiled.
      function: jitted.
      arguments: makes its arguments; only their shapes are used.
    """
    sharding = SingleDeviceSharding(self.device(chip))
    place = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
    shapes = jax.tree.map(place, jax.eval_shape(arguments))
    compiled = function.lower(*shapes).compile()
    found = re.findall(
      r'%(fusion[\w.]*) = .*?"iteration_bounds":\[([^\]]*)\]', compiled.as_text() or ""
    )
    total = 0
    for name, bounds in found:
      trips = math.prod(int(b.strip('"')) for b in bounds.split(","))
      program = llo.newest(self._folder, name, keep=True)
      if len(program.loops) > 1:
        total = 0
        break
      span = program.loops[0] if program.loops else (0, program.bundles)
      total += trips * (span[1] - span[0] + 1)
    llo.clear(self._folder)
    return total or None


def sweep(rows: int, product: Product, tiles, kind: str = V5E):
  """The kernel's sweep, for its traffic."""
  vectors = {"bias": 1, "correction": 1, "scale": 1, "shift": product.k // product.block}
  requantizes = product.next_boundaries is not None
  if requantizes:
    vectors |= {"inverse": 1, "next_shift": 1}
  return tpu.Sweep(
    shape=(tpu.up(rows, tpu.ROWS), product.k, tpu.up(product.n, tiles.n)),
    tiles=tiles,
    block=product.block,
    activation=product.activation,
    out="bfloat16",
    signed=False if requantizes else None,
    granule=product.granule,
    dynamic=False,
    vectors=tuple(sorted(vectors.items())),
    interpret=False,
    window=product.window,
    copies=product.copies,
    unsigned=product.window is not None,
    wide=tpu.wide(kind),
  )


def bundles(sweep, schedule: llo.Schedule, boundary: int, next_boundary: int = 0) -> int:
  """Bundles of a whole product."""
  steps, columns = sweep.grid
  low = -(-boundary // sweep.columns)
  high = sweep.blocks - boundary // sweep.columns
  finishing = 0
  if schedule.finish:
    turns = sweep.tiles.m // sweep.finishing
    finish = schedule.finish[-3:] if high else schedule.finish[:3]
    for start in range(0, sweep.shape[2], sweep.strip):
      kind = 1 if start + sweep.strip <= next_boundary else 0 if start >= next_boundary else 2
      finishing += turns * finish[kind]
  return steps * (columns * schedule.tile(low, high) + finishing)


def schedules(compiler: Compiler, chip: str, names) -> list[dict]:
  """Whole products: 4-bit against 8-bit, and 8-bit against XLA's."""
  found = []
  for name in names:
    m, k, n = SHAPES[name]
    block = MODELS[name.split()[0]][chip]
    product = Product(
      name=name,
      m=m,
      k=k,
      n=n,
      block=block,
      boundaries=(0, k),
      prepares=False,
      channels=k,
      taps=1,
      activation="none",
      next_boundaries=None,
    )
    kernel, schedule = compiler.mixed(chip, m, product)
    high, low = (bundles(kernel, schedule, boundary) for boundary in (0, k))
    peers = {peer: compiler.peer(chip, *how) for peer, how in kernel_times.peers(m, k, n).items()}
    to_peers = {peer: high / count if count else None for peer, count in peers.items()}
    found.append(
      {
        "chip": chip,
        "shape": name,
        "m": m,
        "k": k,
        "n": n,
        "parts": dataclasses.asdict(schedule),
        "bundles_8bit": high,
        "bundles_4bit": low,
        "ratio": low / high,
        "k_loop_ratio": schedule.low / schedule.high,
        "peers": peers,
        "to_peers": to_peers,
      }
    )
    one = found[-1]
    line = f"{chip} {name}: 4-bit/8-bit {one['ratio']:.3f}, in the loop over K "
    line += f"{one['k_loop_ratio']:.3f}; 8-bit against "
    told = lambda ratio: f"{ratio:.3f}" if ratio else "unknown (loops hide their counts)"
    print(line + ", ".join(f"{n} {told(r)}" for n, r in to_peers.items()), flush=True)
  return found
