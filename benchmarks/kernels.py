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
  (`kernels.tpu.traffic`). Beside the products of the layers: what prepares their operands
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
import tempfile

import jax

from benchmarks import kernel_times, llo
from benchmarks.kernel_products import BATCHES, MODELS, Product, products
from benchmarks.kernel_schedules import CHIPS, SHAPES, Compiler, bundles, schedules
from flexiq_jax.kernels import tpu
from flexiq_jax.runs import process


def estimate(compiler: Compiler, chip: str, found: list[Product], batch: int) -> dict:
  """Seconds of a model's products at each level, and what binds them."""
  _, clock, bandwidth, _ = CHIPS[chip]
  levels = range(len(found[0].boundaries))
  rows = []
  for level in levels:
    seconds: dict[str, float] = collections.defaultdict(float)
    weights = moved = 0
    binds: dict[str, float] = collections.defaultdict(float)
    for product in (one.of_batch(batch) for one in found):
      kernel, schedule = compiler.mixed(chip, product.rows(batch), product)
      boundary = product.boundaries[level]
      after = product.next_boundaries[level] if product.next_boundaries else 0
      compute = bundles(kernel, schedule, boundary, after) / (clock * 1e9)
      bytes_ = tpu.traffic(kernel, boundary, after)
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
      if product.prepares:
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
  rows, k = product.rows(batch), product.places
  if (product.taps > 1 and product.window is None) or product.channels % 128 or k % 128:
    # im2col by XLA: reads the codes of both precisions, writes them for each window. Bytes alone.
    return rows * (k + product.channels) * 1.5 / (bandwidth * 1e9)
  block = product.block // product.steps
  low = -(-boundary // block) * block
  high = k - boundary // block * block
  memory = rows * (2 * product.channels + high + low / 2) / (bandwidth * 1e9)
  one = compiler.prepare(chip, product)
  columns = tpu.tile_columns(k)
  strip = math.gcd(columns, block)
  turns = lambda n: 512 // tpu.epilogue_rows(512, n)
  tile = one.step * (k // columns) + turns(product.channels) * one.quantize
  for start in range(0, k, strip):
    kind = 1 if start + strip <= boundary else 0 if start >= boundary else 2
    tile += turns(strip) * one.finish[kind]
  return max(memory, math.ceil(rows / 512) * tile / (clock * 1e9))


def convolutions(compiler: Compiler, chip: str, found: list[Product], batch: int) -> list[dict]:
  """Microseconds of convolutions whose windows slide, beside the same by im2col and by XLA.

  Products as the larger of bundles and bytes; im2col's patches by their bytes; of XLA's int8
  convolution the bundles alone, without what brings its operands into its own layout.
  """
  _, clock, bandwidth, _ = CHIPS[chip]
  rows, seen = [], set()
  for product in (one.of_batch(batch) for one in found):
    key = (product.m, product.k, product.n, product.block)
    if product.window is None or key in seen:
      continue
    seen.add(key)
    channels = min(product.block // product.steps, product.channels)
    block = tpu.up(channels * product.taps, tpu.LANES)
    patches = dataclasses.replace(
      product, window=None, copies=1, k=product.k // product.block * block, block=block
    )
    ends = {product: (0, product.places), patches: (0, patches.k)}
    row: dict = {"chip": chip, "batch": batch, "name": product.name}
    row |= {"pixels": product.m, "channels": product.channels, "n": product.n}
    for name, one in (("slides", product), ("im2col", patches)):
      kernel, schedule = compiler.mixed(chip, one.rows(batch), one)
      for width, boundary in zip((8, 4), ends[one], strict=True):
        after = min(one.next_boundaries or (0,)) if width == 8 else max(one.next_boundaries or (0,))
        compute = bundles(kernel, schedule, boundary, after) / (clock * 1e9)
        memory = tpu.traffic(kernel, boundary, after).total / (bandwidth * 1e9)
        row[f"{name}_{width}bit"] = 1e6 * max(compute, memory)
    made = preparing(compiler, chip, patches, batch, 0)
    row["im2col_patches"] = 1e6 * made
    side = math.isqrt(product.m)
    peer = kernel_times.convolution(side, product.channels, product.channels, batch)
    count = compiler.peer(chip, *peer)
    row["xla_int8"] = count and 1e6 * count / (clock * 1e9)
    rows.append(row)
    told = "unknown" if count is None else f"{row['xla_int8']:.0f}"
    print(
      f"{chip} {product.name}, {product.channels} channels, {side} x {side}, batch {batch}, us in "
      f"8 / 4 bits: slides {row['slides_8bit']:.0f} / {row['slides_4bit']:.0f}; im2col "
      f"{row['im2col_8bit']:.0f} / {row['im2col_4bit']:.0f} and {row['im2col_patches']:.0f} for "
      f"patches; XLA int8 {told}",
      flush=True,
    )
  return rows


def ahead_of_time(args) -> dict:
  """Schedules and estimates without an accelerator."""
  folder = pathlib.Path(tempfile.mkdtemp(prefix="llo"))
  os.environ.update(llo.environment(folder))
  compiler = Compiler(folder)
  compiler.device(args.chips[0])  # says so at once where there is no libtpu
  result = {"schedules": [], "estimates": [], "convolutions": []}
  for chip in args.chips:
    result["schedules"] += schedules(compiler, chip, SHAPES)
    for name in args.models:
      found = products(name, MODELS[name][chip], kind=CHIPS[chip][3])
      for batch in args.batches:
        one = {"model": name} | estimate(compiler, chip, found, batch)
        result["estimates"].append(one)
        show(one)
        result["convolutions"] += convolutions(compiler, chip, found, batch)
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
      granule = 128 if jax.default_backend() == "tpu" else 64
      for row in kernel_times.measure(products(name, group, granule), args.batches, args.rounds):
        result["times"].append({"model": name} | row)
  args.json.parent.mkdir(parents=True, exist_ok=True)
  args.json.write_text(json.dumps({"environment": process.describe(), **result}, indent=1) + "\n")


if __name__ == "__main__":
  main()
