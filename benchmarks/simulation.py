"""How fast each rule runs on this machine, beside the model itself and ordinary fake quantization.

    python benchmarks/simulation.py --json build/simulation.json

Accuracy tables and searches evaluate the mixed model over and over, so the exact integer simulation
must not cost much more than the float model. Peers, timed in the same run and in turn:

* `float`: the model as written;
* `fake_quant`: the usual way to simulate a mixed model, float32 contractions of dequantized values
  (fast, not exact).

Figures are the medians of rounds in which every rule runs once; ratios are to `float` in the same
round. Random weights: speed only.
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import flexiq, graph, models
from flexiq_jax.network import Network
from flexiq_jax.quant import lowering, quantizer
from flexiq_jax.runs import process

CASES = {  # model -> (overrides, batch)
  "resnet20": ({}, 128),
  "vit_cifar10": ({}, 64),
  "resnet18": ({"input_size": 112}, 8),
}


def fake_quant_rule(model, masks):
  """The mixed rule in float32 on dequantized operands."""

  def rule(layer, x, w, contract):
    del w
    q = model[layer.name]
    codes = quantizer.quantize(x, q.x_scale, 8, q.signed)
    weights = q.w
    if layer.name in masks:
      shift = layer.x_vector(q.low.shift, x.shape)
      low = lowering.lower_activations(codes, shift, q.signed) << shift
      channels = masks[layer.name][q.low.group]
      codes = jnp.where(layer.x_vector(channels, x.shape), low, codes)
      weights = jnp.where(layer.w_vector(channels), q.low.w, weights)
    y = contract(codes.astype(jnp.float32) * q.x_scale, weights.astype(jnp.float32))
    return y * layer.y_vector(q.w_scale, y.shape)

  return rule


def measure(name: str, overrides: dict, batch: int, rounds: int) -> dict:
  """Times every rule on one model."""
  module = models.create(name, **overrides)
  apply, params = models.functional(module)
  height, width, channels = models.get(name).input_shape
  size = overrides.get("input_size", height)
  assert height == width
  x = jax.random.normal(jax.random.key(0), (batch, size, size, channels), jnp.float32)
  network = Network(apply, params, x[:1])
  model = flexiq.quantize(network, [np.asarray(x)])
  masks = {n: jnp.asarray(m) for n, m in model.schedule.masks(0.5).items()}
  fake = jax.jit(lambda q, m, p, x: graph.with_rule(network.apply, fake_quant_rule(q, m))(p, x))
  runs = {
    "float": lambda: network.float(x),
    "fake_quant": lambda: fake(model.model, masks, network.params, x),
    "uniform": lambda: network.uniform(model.model, x),
    "mixed": lambda: network.mixed(model.model, masks, x),
    "dynamic": lambda: network.mixed(model.model, masks, x, dynamic=True),
  }
  seconds: dict[str, list[float]] = {rule: [] for rule in runs}
  for i in range(rounds + 1):
    for rule, run in runs.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if i:  # the first round compiles
        seconds[rule].append(time.perf_counter() - start)
  return {
    rule: {
      "images_per_second": batch / statistics.median(times),
      "time_relative_to_float": statistics.median(
        t / f for t, f in zip(times, seconds["float"], strict=True)
      ),
    }
    for rule, times in seconds.items()
  }


def main():
  """Runs all cases, prints a table and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  results = {}
  print(f"{'model':12} {'rule':12} {'images/s':>10} {'time / float':>14}")
  for name, (overrides, batch) in CASES.items():
    results[name] = measure(name, overrides, batch, args.rounds)
    for rule, row in results[name].items():
      print(
        f"{name:12} {rule:12} {row['images_per_second']:10.1f} "
        f"{row['time_relative_to_float']:14.2f}",
        flush=True,
      )
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": process.describe(), "rounds": args.rounds, "results": results}
    args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
  main()
