"""The mixed matmul on accelerators: measured where there is one, estimated for TPUs where not.

    python benchmarks/kernels.py --json build/kernels.json

With a TPU or a Hopper GPU as JAX's default backend the products of DeiT-S, ViT-B and ResNet-50 are
timed at 0/25/50/75/100 % 4-bit, in turn with their peers: plain XLA int8 and bfloat16 products and,
where it is installed, qwix's int8 and int4 ones.

Without, libtpu compiles the same kernels ahead of time, and two things are read off:

* *schedule*: bundles (VLIW instructions, about a cycle each) of the whole product at 100 % and at
  0 % 4-bit, and of the peers' products, from the compiler's final listing;
* *estimate*: the time of each layer at each level as the larger of its bundles over the clock and
  its bytes over the bandwidth, bytes as the kernel's copies and tiles are counted
  (`kernels.tpu_tiles.traffic`). Beside the products of the layers: what prepares their operands
  (`prepare`), by the schedule and bytes of its kernel, or, for im2col, by its bytes alone: a lower
  bound. Attention products, norms and residual sums are left out. **An estimate, not a
  measurement.**

Boundaries come from recipes that the pipeline writes: random weights, images of noise, greedy. No
accuracy belongs to them; `top-1: random weights` stands in every row.
"""

import argparse
import collections
import dataclasses
import json
import math
import os
import pathlib
import re
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from benchmarks import kernel_times, llo
from flexiq_jax import deploy, flexiq, models, runtime
from flexiq_jax.deploy.layers import Mixed
from flexiq_jax.deploy.layout import rows_before
from flexiq_jax.grouping import LowSettings
from flexiq_jax.kernels import (
  Activations,
  Epilogue,
  Requantize,
  Weights,
  tpu,
  tpu_epilogue,
  tpu_prepare,
  tpu_tiles,
)

CHIPS = {  # topology, clock in GHz, main memory in GB/s, name of the device kind
  "v5e": ("v5e:2x2", 1.5, 819, "TPU v5 lite"),
  "v6e": ("v6e:2x2", 1.75, 1640, "TPU v6 lite"),
}
# Channels in a group and a shift block: what the chip's matrix unit takes at once in 4 bits, as far
# as a model's layers have so many.
MODELS = {
  "deit_s": {"v5e": 384, "v6e": 384},
  "vit_b": {"v5e": 256, "v6e": 768},
  "resnet50": {"v5e": 256, "v6e": 512},
}
BATCHES = (8, 128)
# Real shapes whose whole schedules are compared: name -> (M, K, N); shift blocks as in `MODELS`.
SHAPES = {
  "deit_s qkv": (25216, 384, 1152),
  "vit_b qkv": (25216, 768, 2304),
  "vit_b fc1": (25216, 768, 3072),
  "vit_b fc2": (25216, 3072, 768),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """One layer's product in a deployed model.

  Attributes:
    name: of the layer.
    m: rows for one example.
    k, n, block: rows of w, outputs, rows in a shift block.
    boundaries: rows of K in 4 bits at each level.
    gathers: whether its operands are prepared in a step of their own.
    channels: C of the layer.
    window: rows of K a channel has.
    activation: of the epilogue.
    next_boundaries: outputs in 4 bits in the layer that it emits codes for; None for real outputs.
    granule: channels that that layer reads at once.
  """

  name: str
  m: int
  k: int
  n: int
  block: int
  boundaries: tuple[int, ...]
  gathers: bool
  channels: int
  window: int
  activation: str
  next_boundaries: tuple[int, ...] | None
  granule: int = 0

  def rows(self, batch: int) -> int:
    return self.m * batch


def products(name: str, group: int) -> list[Product]:
  """The products of a model behind the pipeline: calibrate, group, order, deploy."""
  module = models.create(name)
  apply, params = models.functional(module)
  x = np.random.default_rng(0).normal(size=(2, *models.get(name).input_shape))
  x = x.astype(np.float32)
  network = flexiq.Network(apply, params, x[:1])
  settings = LowSettings(group_size=group, shift_block=group)
  deployed = deploy.deploy(flexiq.quantize(network, [x], settings=settings), x[:1], granule=128)
  found = []
  for layer in network.layers:
    d = deployed.layers[layer.name]
    if not isinstance(d, Mixed):
      continue
    k, n = d.weights.w8.shape
    window = math.prod(layer.window)
    consumer = deployed.layers[d.feeds] if d.feeds else None
    places = lambda d: tuple(int(p) for p in np.asarray(jax.device_get(d.places)))
    found.append(
      Product(
        name=layer.name,
        m=layer.macs // (layer.in_channels * window * layer.out_channels),
        k=k,
        n=n,
        block=d.weights.block,
        boundaries=tuple(
          int(rows_before(p, d.channels, window, d.weights.block)) for p in places(d)
        ),
        gathers=d.order is not None or window > 1,
        channels=layer.in_channels,
        window=window,
        activation=d.activation,
        next_boundaries=places(consumer) if isinstance(consumer, Mixed) else None,
        granule=granule_of(consumer),
      )
    )
  return found


def granule_of(consumer) -> int:
  """Channels that a layer's kernel reads at once; 0 where a window makes rows of K of them."""
  if not isinstance(consumer, Mixed):
    return 0
  k, n = consumer.weights.w8.shape
  if k != len(consumer.shift):
    return 0
  return tpu_tiles.choose_tiles(1, k, n, consumer.weights.block).k


class Compiler:
  """Compiles for chips that are not here, and reads the schedules."""

  def __init__(self, folder: pathlib.Path):
    self._folder = folder
    self._schedules: dict = {}

  def device(self, chip: str):
    return topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip][0]).devices[0]

  def mixed(self, chip, rows, product: Product):
    """(plan, schedule) of a product on a chip; equal tiles are compiled once."""
    tiles = tpu.choose_tiles(rows, product.k, product.n, product.block, CHIPS[chip][3])
    key = (chip, tiles, product.block, product.n, product.k, product.activation)
    key += (product.next_boundaries is None, product.granule)
    if key not in self._schedules:
      self._compile(chip, min(rows, 2 * tiles.m), product, tiles)
      program = llo.newest(self._folder, "mixed_matmul")
      self._schedules[key] = llo.schedule(program)
    return plan(rows, product, tiles), self._schedules[key]

  def _compile(self, chip, rows, product, tiles):
    sharding = SingleDeviceSharding(self.device(chip))
    of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    k, n, j = product.k, product.n, product.k // product.block
    requantize = None
    if product.next_boundaries is not None:
      requantize = Requantize(
        of(jnp.float32), of(jnp.int32), of(jnp.int32, n), signed=False, granule=product.granule
      )
    x = Activations(of(jnp.int8, rows, k), of(jnp.int4, rows, k), of(jnp.int32))
    w = Weights(
      of(jnp.int8, k, n),
      of(jnp.int8, k // 2, n),
      of(jnp.int32, j),
      of(jnp.int32, j, n),
      block=product.block,
    )
    epilogue = Epilogue(
      of(jnp.float32, n),
      of(jnp.int32, n),
      of(jnp.float32, n),
      requantize,
      activation=product.activation,
      out="bfloat16",
    )
    run = lambda x, w, e: tpu.mixed_matmul(x, w, e, tiles=tiles)
    jax.jit(run).lower(x, w, epilogue).compile()

  def prepare(self, chip: str, product: Product) -> llo.Preparation:
    """Schedule of the kernel that makes a product's operands."""
    key = (chip, "prepare", product.channels, product.k)
    if key not in self._schedules:
      sharding = SingleDeviceSharding(self.device(chip))
      of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

      def run(x, scale, shift, boundary, order):
        return tpu_prepare.quantize_lower(
          x, scale, shift, boundary, signed=True, order=order, granule=product.block
        )

      x, places = of(jnp.bfloat16, 1024, product.channels), of(jnp.int32, product.k)
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


def plan(rows: int, product: Product, tiles):
  """The kernel's plan, for its traffic."""
  vectors = {"bias": 1, "correction": 1, "scale": 1, "shift": product.k // product.block}
  requantizes = product.next_boundaries is not None
  if requantizes:
    vectors |= {"inverse": 1, "next_shift": 1}
  return tpu_tiles.Plan(
    shape=(tpu_tiles.up(rows, tpu_tiles.ROWS), product.k, tpu_tiles.up(product.n, tiles.n)),
    tiles=tiles,
    block=product.block,
    activation=product.activation,
    out="bfloat16",
    signed=False if requantizes else None,
    granule=product.granule,
    dynamic=False,
    vectors=tuple(sorted(vectors.items())),
    interpret=False,
  )


def bundles(plan, schedule: llo.Schedule, boundary: int, next_boundary: int = 0) -> int:
  """Bundles of a whole product."""
  steps, columns = plan.grid
  low = -(-boundary // plan.tiles.k)
  high = plan.blocks - boundary // plan.tiles.k
  finishing = 0
  if schedule.finish:
    turns = plan.tiles.m // tpu_epilogue.turn_rows(plan.tiles.m, plan.strip)
    for start in range(0, plan.shape[2], plan.strip):
      kind = 1 if start + plan.strip <= next_boundary else 0 if start >= next_boundary else 2
      finishing += turns * schedule.finish[kind]
  return steps * (columns * schedule.tile(low, high) + finishing)


def estimate(compiler: Compiler, chip: str, found: list[Product], batch: int) -> dict:
  """Seconds of a model's products at each level, and what binds them."""
  _, clock, bandwidth, _ = CHIPS[chip]
  levels = range(len(found[0].boundaries))
  rows = []
  for level in levels:
    seconds: dict[str, float] = collections.defaultdict(float)
    weights = moved = 0
    binds: dict[str, float] = collections.defaultdict(float)
    for product in found:
      kernel, schedule = compiler.mixed(chip, product.rows(batch), product)
      boundary = product.boundaries[level]
      after = product.next_boundaries[level] if product.next_boundaries else 0
      compute = bundles(kernel, schedule, boundary, after) / (clock * 1e9)
      bytes_ = tpu_tiles.traffic(kernel, boundary, after)
      memory = bytes_.total / (bandwidth * 1e9)
      seconds["products"] += max(compute, memory)
      # The same without the activation function, which no 4-bit code makes cheaper.
      bare = dataclasses.replace(product, activation="none")
      _, schedule = compiler.mixed(chip, product.rows(batch), bare)
      compute_bare = bundles(kernel, schedule, boundary, after) / (clock * 1e9)
      seconds["gemms"] += max(compute_bare, memory)
      binds["compute" if compute >= memory else "memory"] += max(compute, memory)
      weights += bytes_.w
      moved += bytes_.total
      if product.gathers:
        seconds["prepare"] += preparing(compiler, chip, product, batch, boundary)
    rows.append(
      {
        "seconds": seconds["products"],
        "gemm_seconds": seconds["gemms"],
        "prepare_seconds": seconds["prepare"],
        "binds": max(binds, key=lambda what: binds[what]),
        "bound_by_compute": binds["compute"] / seconds["products"],
        "weight_bytes": weights,
        "bytes": moved,
      }
    )
  return {"chip": chip, "batch": batch, "levels": rows, "top1": "random weights"}


def preparing(compiler: Compiler, chip: str, product: Product, batch: int, boundary: int) -> float:
  """Seconds of what makes a product's operands of bfloat16 activations."""
  _, clock, bandwidth, _ = CHIPS[chip]
  rows, k = product.rows(batch), product.k
  if product.window > 1 or product.channels % 128 or k % 128:
    # im2col by XLA: reads the codes of both precisions, writes them for each window. Bytes alone.
    return rows * (k + product.channels) * 1.5 / (bandwidth * 1e9)
  low = -(-boundary // product.block) * product.block
  high = k - boundary // product.block * product.block
  memory = rows * (2 * product.channels + high + low / 2) / (bandwidth * 1e9)
  one = compiler.prepare(chip, product)
  columns = tpu_tiles.tile_columns(k)
  strip = math.gcd(columns, product.block)
  turns = lambda n: 512 // tpu_epilogue.turn_rows(512, n)
  tile = one.step * (k // columns) + turns(product.channels) * one.quantize
  for start in range(0, k, strip):
    kind = 1 if start + strip <= boundary else 0 if start >= boundary else 2
    tile += turns(strip) * one.finish[kind]
  return max(memory, math.ceil(rows / 512) * tile / (clock * 1e9))


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
      gathers=False,
      channels=k,
      window=1,
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


def ahead_of_time(args) -> dict:
  """Schedules and estimates without an accelerator."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="llo"))
  os.environ.update(llo.environment(folder))
  compiler = Compiler(folder)
  compiler.device(args.chips[0])  # says so at once where there is no libtpu
  result = {"schedules": [], "estimates": []}
  for chip in args.chips:
    result["schedules"] += schedules(compiler, chip, SHAPES)
    for name in args.models:
      found = products(name, MODELS[name][chip])
      for batch in args.batches:
        one = {"model": name} | estimate(compiler, chip, found, batch)
        result["estimates"].append(one)
        show(one)
  return result


def show(one: dict) -> None:
  """Prints a model's estimates."""
  base = one["levels"][0]
  for percent, row in zip((0, 25, 50, 75, 100), one["levels"], strict=True):
    speed = lambda field, row=row: base[field] / row[field]
    print(
      f"estimate: {one['model']}, {one['chip']}, batch {one['batch']}, {percent} %: products "
      f"{1e3 * row['seconds']:.3f} ms ({speed('seconds'):.2f} of 0 %'s speed; without activation "
      f"functions {speed('gemm_seconds'):.2f}), bound by {row['binds']} "
      f"({100 * row['bound_by_compute']:.0f} % compute), prepare "
      f"{1e3 * row['prepare_seconds']:.3f} ms, weights {row['weight_bytes'] / 2**20:.1f} MiB; "
      f"top-1: {one['top1']}",
      flush=True,
    )


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, required=True)
  parser.add_argument("--models", nargs="*", default=list(MODELS), choices=MODELS)
  parser.add_argument("--chips", nargs="+", default=list(CHIPS), choices=CHIPS)
  parser.add_argument("--batches", nargs="+", type=int, default=list(BATCHES))
  parser.add_argument("--rounds", type=int, default=20, help="of a measurement")
  args = parser.parse_args()

  if jax.default_backend() == "cpu":
    result = ahead_of_time(args)
  else:
    result = {"times": []}
    for name in args.models:
      print(name, flush=True)
      group = MODELS[name]["v6e" if "v6" in jax.devices()[0].device_kind else "v5e"]
      for row in kernel_times.measure(products(name, group), args.batches, args.rounds):
        result["times"].append({"model": name} | row)
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps({"environment": runtime.describe(), **result}, indent=1) + "\n")


if __name__ == "__main__":
  main()
