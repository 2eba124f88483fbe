"""Products of DeiT-S, ViT-B and ResNet-50: ours at each 4-bit share, beside their peers.

| function | what |
|---|---|
| `mixed 0 %` .. `mixed 100 %` | `kernels.mixed_matmul`, bfloat16 results; one executable |
| `xla_int8`, `xla_bfloat16` | `jnp.matmul`, the same epilogue |
| `torch_int8`, `torch_bfloat16` | the vendor's library through torch, no epilogue |
| `triton_int8` | a plain Triton kernel with our epilogue (`triton_int8.py`) |

With the option `tuned`: the same with measured tiles beside those by rule (`rule 0 %`, ...), and of
the peers torch's alone, which need no compilation.

`share` is the time that a perfect kernel would need at the measured ceilings, over the time taken;
`binds` is what that perfect kernel would wait for: weights, activations and results once each
through memory, or 8-bit products (Hopper has no others) on the tensor cores. Activations stay where
they are from call to call, as after the layer that made them; weights change with every call.
Calls of one chain are started by XLA or, of torch and Triton, by a CUDA graph: of kernels that take
a few microseconds the start of the next one is part of the time.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import statistics
from typing import Any

import numpy as np

from benchmarks import kernel_times
from benchmarks.device import present, shapes, timing, torch_peers
from benchmarks.device.context import Context, Skipped, claim
from benchmarks.kernel_products import Product
from flexiq_jax.kernels import tile_files

BASE = "mixed 0 %"
WAVE = 4  # shapes that are compiled side by side


def run(context: Context) -> dict[str, Any]:
  """Measures shape after shape until the time box is over."""
  device, tuned = present.device(context), "tuned" in context.options
  tiles = read_tiles(context) if tuned else None
  work = order(context, device.platform, device.device_kind, tiles)
  ceilings = context.earlier("ceilings").get("ceilings", {})
  result: dict[str, Any] = {"rows": [], "peers_of_torch": torch_peers.available() or "there"}
  result["cold_bytes"] = timing.COLD
  if not tuned:
    result["exact"] = exactness(result["peers_of_torch"] == "there")
    context.save(finished(result))
  torch = result["peers_of_torch"] == "there"
  waves = [work[i : i + WAVE] for i in range(0, len(work), WAVE)]
  for number, wave in enumerate(waves):
    each = (context.seconds - context.left()) / number if number else 0.0
    if context.left() < 2 + each:
      print(f"stopped after {number} of {len(waves)} waves, {each:.1f} s each", flush=True)
      return finished(result) | {"complete": False, "left_out": len(work) - number * WAVE}
    make = lambda one: _tried(one[2], one[1], tiles, torch, context.small)
    with concurrent.futures.ThreadPoolExecutor(WAVE) as pool:
      built = list(pool.map(make, wave))
    warm(built, first=number == 0)
    for (name, batch, product), one in zip(wave, built, strict=True):
      row = measure(one, context.small)
      row |= {"model": name, "batch": batch, "layers": product.name.split(",")}
      row |= {"m": product.rows(batch), "k": product.k, "n": product.n, "block": product.block}
      bounds(row, product, batch, ceilings)
      result["rows"].append(row)
      context.save(finished(result))
      show(row)
  return finished(result)


def read_tiles(context: Context) -> dict[tile_files.Shape, tile_files.Tiles]:
  """What the step `tiles` measured."""
  try:
    return tile_files.read(context.folder / "tiles")
  except ValueError as error:
    raise Skipped(f"no measured tiles: {error}") from error


def order(context: Context, platform: str, kind: str, tiles) -> list[tuple[str, int, Product]]:
  """What to measure, most important first: each model's largest shapes at every batch."""
  found = {name: shapes.products(name, platform, kind, context.small) for name in shapes.NAMES}
  batches = (1,) if context.small else (8, 128, 1, 32)
  if context.small:
    return [(name, 1, products[0]) for name, products in found.items()]
  queues = [
    [(name, batch, product) for batch in batches]
    for rank in range(max(len(p) for p in found.values()))
    for name in ("vit_b", "resnet50", "deit_s")
    for product in found[name][rank : rank + 1]
  ]
  # The first batches of three shapes of each model, then their other batches, and so on.
  rounds = [
    entry
    for start in range(0, len(queues), 9)
    for half in (slice(0, 2), slice(2, 4))
    for queue in queues[start : start + 9]
    for entry in queue[half]
  ]
  if tiles is None:
    return rounds
  shape = lambda p, batch: tile_files.Shape(m=p.rows(batch), k=p.k, n=p.n, block=p.block)
  return [(name, batch, p) for name, batch, p in rounds if shape(p, batch) in tiles]


@dataclasses.dataclass(kw_only=True)
class Built:
  """A shape's functions, ready to be compiled.

  Attributes:
    heads: runs that compile an executable each; `levels` then only run.
    levels: ours at the other levels, of the same executable.
    peers: of torch.
    refused: name -> why it does not run here.
    facts: of the row.
  """

  heads: dict[str, timing.Run] = dataclasses.field(default_factory=dict)
  levels: dict[str, timing.Run] = dataclasses.field(default_factory=dict)
  peers: dict[str, timing.Run] = dataclasses.field(default_factory=dict)
  refused: dict[str, str] = dataclasses.field(default_factory=dict)
  facts: dict[str, Any] = dataclasses.field(default_factory=dict)


def _tried(product: Product, batch: int, tiles, torch: bool, small: bool) -> Built:
  try:
    return build(product, batch, tiles, torch, small)
  except Exception as error:  # memory, most often; the other shapes go on
    return Built(refused={"all": timing.reason(error)})


def build(product: Product, batch: int, tiles, torch: bool, small: bool) -> Built:
  """Operands and functions of one shape."""
  m, k, n = product.rows(batch), product.k, product.n
  copies = 2 if small else timing.copies_for(k * n, 2 * m * n)
  chains = timing.Chains()
  calls: dict[str, Any] = dict(kernel_times.mixed(product, m, None, tiles))
  if tiles is None:
    for name, (function, arguments) in kernel_times.peers(m, k, n).items():
      if name.startswith("xla"):
        calls[name] = functools.partial(function, *arguments())
  else:
    by_rule = kernel_times.mixed(product, m, None, {})
    calls |= {name.replace("mixed", "rule"): call for name, call in by_rule.items()}
  runs = {name: chains.run(call, copies) for name, call in calls.items()}
  head = lambda name: not name.endswith(" %") or name.endswith(" 0 %")
  return Built(
    heads={name: run for name, run in runs.items() if head(name)},
    levels={name: run for name, run in runs.items() if not head(name)},
    peers=dict(torch_peers.products(m, k, n, copies)) if torch else {},
    facts={"copies": copies, "weight_bytes": copies * k * n},
  )


def warm(built: list[Built], first: bool) -> None:
  """Compiles several shapes side by side; then nothing compiles while times are taken."""
  heads: dict[Any, timing.Run] = {
    (i, name): run for i, one in enumerate(built) for name, run in one.heads.items()
  }
  if first and any(one.peers for one in built):
    heads[0, "triton blocks"] = torch_peers.TritonBlocks()
  works, refused = timing.warm_all(heads, threads=12)
  for i, one in enumerate(built):
    one.heads = {name: run for name, run in one.heads.items() if (i, name) in works}
    one.refused |= {name: why for (j, name), why in refused.items() if j == i}
    # Graphs are captured one after the other, with nothing else going on.
    for group in ("levels", "peers"):
      ready, not_ready = timing.warm_all(getattr(one, group), threads=1)
      setattr(one, group, ready)
      one.refused |= not_ready


def measure(one: Built, small: bool) -> dict[str, Any]:
  """Times one shape."""
  ready = one.heads | one.levels | one.peers
  span = 2e-4 if small else 3e-3
  times = timing.measure(ready, 0.4, base=BASE, span=span, rounds=(3, 7))
  row = {"times": {name: dataclasses.asdict(t) for name, t in times.items()}}
  row |= {"refused": one.refused, **one.facts}
  if isinstance(triton := one.peers.get("triton_int8"), torch_peers.TritonRun):
    row["triton_blocks"] = dataclasses.asdict(triton.blocks)
  return row


def bounds(row: dict[str, Any], product: Product, batch: int, ceilings: dict[str, Any]) -> None:
  """Adds `share` and `binds` to every time."""
  m, k, n = product.rows(batch), product.k, product.n
  rate, bandwidth = ceilings.get("int8_top_s"), ceilings.get("copy_gb_s")
  half = ceilings.get("bfloat16_tflop_s")
  if not (rate and bandwidth and half):
    return
  for name, times in row["times"].items():
    low = 0.0
    if name.endswith(" %"):
      low = product.boundaries[kernel_times.LEVELS.index(int(name.split()[1]))] / k
    wide = 2 if "bfloat16" in name else 1
    results = 4 if name == "torch_int8" else 2
    moved = (m * k + k * n) * wide * (1 - low / 2) + m * n * results
    memory = moved / (bandwidth * 1e3)  # microseconds
    compute = 2 * m * k * n / ((half if wide == 2 else rate) * 1e6)
    times["share"] = max(memory, compute) / times["us"]
    times["binds"] = "memory" if memory > compute else "compute"


def exactness(torch: bool) -> dict[str, Any]:
  """Whether ours equals the reference on this device, bit for bit, and Triton's NumPy's sums."""
  product = Product(
    name="check", m=100, k=256, n=192, block=64, boundaries=(0, 64, 128, 192, 256),
    prepares=False, channels=256, taps=1, activation="none", next_boundaries=None,
  )  # fmt: skip
  found: dict[str, Any] = {}
  try:
    ours = kernel_times.mixed(product, 100, None)
    reference = kernel_times.mixed(product, 100, "reference")
    for name, call in ours.items():
      same = np.array_equal(
        np.asarray(call().astype(np.float32)), np.asarray(reference[name]().astype(np.float32))
      )
      found[name] = bool(same)
  except Exception as error:
    found["mixed"] = timing.reason(error)
  if torch:
    try:
      found["triton_int8"] = torch_peers.triton_is_exact()
    except Exception as error:
      found["triton_int8"] = timing.reason(error)
  return found


def show(row: dict[str, Any]) -> None:
  """Prints a shape's times."""
  told = ", ".join(
    f"{name} {t['us']:.1f} us" + (f" ({100 * t['share']:.0f} % of {t['binds']})" * ("share" in t))
    for name, t in row["times"].items()
  )
  told += "".join(f"; {name} not: {why}" for name, why in row["refused"].items())
  print(f"{row['model']} batch {row['batch']}: {row['m']} x {row['k']} x {row['n']}: {told}")


def finished(result: dict[str, Any]) -> dict[str, Any]:
  """The result with its claims: medians over the shapes of a model and batch."""
  claims = []
  if (exact := result.get("exact")) is not None:
    wrong = [name for name, same in exact.items() if same is not True]
    told = "all equal" if not wrong else f"not equal: {', '.join(wrong)}"
    claims.append(claim("mixed matmul against the reference on the device, bit for bit", told))
  pairs = (
    ("mixed 100 %", "mixed 0 %", "4 bits against ours in 8"),
    ("mixed 0 %", "torch_int8", "ours in 8 bits against torch._int_mm"),
    ("mixed 0 %", "xla_int8", "ours in 8 bits against XLA int8"),
    ("mixed 0 %", "triton_int8", "ours in 8 bits against Triton int8"),
    ("mixed 0 %", "rule 0 %", "measured tiles against tiles by rule, 8 bits"),
    ("mixed 100 %", "rule 100 %", "measured tiles against tiles by rule, 4 bits"),
  )
  key = lambda row: (row["model"], row["batch"])
  rows = sorted(result["rows"], key=key)
  for (model, batch), group in itertools.groupby(rows, key=key):
    same = list(group)
    for ours, peer, what in pairs:
      # Both relative to the same base of the same rounds.
      ratios = [
        row["times"][peer]["ratio"] / row["times"][ours]["ratio"]
        for row in same
        if ours in row["times"]
        and peer in row["times"]
        and row["times"][ours].get("ratio")
        and row["times"][peer].get("ratio")
      ]
      if ratios:
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}, median {statistics.median(ratios):.2f}"
        told = f"speed {spread} ({len(ratios)} shapes)"
        claims.append(claim(f"products, {model}, batch {batch}: {what}", told))
  return result | {"claims": claims}
