"""What a finetuning step costs, beside a step of ordinary training of the same model and batch.

    python benchmarks/finetune.py --json build/finetune.json

The peer, in the same run and in turn, trains the float model on labels, with batch norm in training
mode where the model has some, and Adam. Figures: seconds of a step, medians of rounds; memory that
the compiler plans for a pass, arguments and temporaries. Both are ratios to the peer too. Random
weights: cost only.

Cases show how it grows with the batch, and with the number of ratios in a step (1: only the drawn
one; 2: the default).
"""

import argparse
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from flexiq_jax import flexiq, models, search
from flexiq_jax.finetuning import FinetuneSettings, joint, objective
from flexiq_jax.network import Network
from flexiq_jax.quant import straight
from flexiq_jax.runs import process
from flexiq_jax.training import loop

CASES = (  # model, batch, ratios in a step
  ("resnet20", 32, 1),
  ("resnet20", 32, 2),
  ("resnet20", 64, 2),
  ("resnet20", 128, 2),
  ("vit_cifar10", 32, 2),
  ("mobilenet_v2", 4, 2),
)


def training_step(name: str, x, labels):
  """The peer's step, compiled, and its arguments."""
  module = models.create(name)
  module.train()
  graph, params, rest = nnx.split(module, nnx.Param, ...)

  def loss(params, rest, key, batch):
    del key
    images, labels = batch
    module = nnx.merge(graph, params, rest, copy=True)
    value = optax.softmax_cross_entropy_with_integer_labels(module(images), labels).mean()
    return value, (nnx.split(module, nnx.Param, ...)[2], {})

  optimizer = optax.adam(1e-4)
  state = loop.State(params=params, rest=rest, optimizer=optimizer.init(params))
  return _step(loss, state, optimizer, (x, labels))


def finetuning_step(name: str, x, labels, ratios: int):
  """A finetuning step, compiled, and its arguments."""
  apply, params = models.functional(models.create(name))
  network = Network(apply, params, x[:1])
  model = flexiq.quantize(network, [np.asarray(x)])
  settings = FinetuneSettings(anchors=(0.0, 1.0) if ratios == 2 else ())
  start = {n: straight.Scales(q.x_scale, q.w_scale) for n, q in model.model.items()}
  kept = {
    layer.name: straight.kept(
      *(layer, model.model[layer.name], model.cuts.get(layer.name), model.settings)
    )
    for layer in network.layers
  }
  masks = model.schedule.masks
  loss = objective.objective(network, start, masks, settings)
  trained = {"params": network.params, "log_scales": jax.tree.map(jnp.zeros_like, start)}
  prepare = objective.targets(network, lambda key, x: x)
  optimizer = joint.make_optimizer(settings, network.layers, {k: s.w for k, s in start.items()})
  parts = objective.parts_of(settings, masks)
  state = loop.State(params=trained, rest=kept, optimizer=optimizer.init(trained))
  return _step(loss, state, optimizer, (x, labels), prepare, parts)


def _step(loss, state, optimizer, batch, prepare=None, parts=1):
  step = loop.make_step(loss, optimizer, 0, prepare, parts)
  # A step's programs run one after the other; the pass of one part is the largest of them.
  part = batch if prepare is None else prepare(jax.random.key(0), batch)
  part = part if parts == 1 else (jnp.int32(0), part)
  gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
  compiled = gradient.lower(state.params, state.rest, jax.random.key(0), part).compile()
  return lambda: step(state, batch, jnp.int32(0)), search.memory_of(compiled)


def measure(name: str, batch: int, ratios: int, rounds: int) -> dict:
  """Times both steps of one case in turn."""
  shape = models.get(name).input_shape
  x = jax.random.normal(jax.random.key(0), (batch, *shape), jnp.float32)
  labels = jnp.zeros(batch, jnp.int32)
  steps = {
    "training": training_step(name, x, labels),
    "finetuning": finetuning_step(name, x, labels, ratios),
  }
  seconds: dict[str, list[float]] = {step: [] for step in steps}
  for i in range(rounds + 1):
    for step, (run, _) in steps.items():
      start = time.perf_counter()
      jax.block_until_ready(run())
      if i:
        seconds[step].append(time.perf_counter() - start)
  both = zip(seconds["finetuning"], seconds["training"], strict=True)
  return {
    **{f"{step}_seconds": statistics.median(times) for step, times in seconds.items()},
    "time_relative_to_training": statistics.median(a / b for a, b in both),
    "memory_relative_to_training": steps["finetuning"][1] / steps["training"][1],
  }


def main():
  """Runs all cases, prints a table and writes JSON."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  parser.add_argument("--rounds", type=int, default=5)
  args = parser.parse_args()
  process.keep_memory()  # as run.py does
  results = []
  print(f"{'model':12} {'batch':>6} {'ratios':>6} {'s / step':>9} {'time':>6} {'memory':>7}")
  for name, batch, ratios in CASES:
    row = measure(name, batch, ratios, args.rounds)
    results.append({"model": name, "batch": batch, "ratios": ratios, **row})
    print(
      f"{name:12} {batch:6} {ratios:6} {row['finetuning_seconds']:9.3f} "
      f"{row['time_relative_to_training']:6.2f} {row['memory_relative_to_training']:7.2f}",
      flush=True,
    )
  if args.json:
    args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
  main()
