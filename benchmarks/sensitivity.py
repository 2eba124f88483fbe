"""Pairwise sensitivities per second: shared prefixes beside one forward pass for each pair.

    python benchmarks/sensitivity.py --json build/sensitivity.json

CLADO needs the loss of every pair of (layer, bits). Both ways measure it on the same block of
images, in float32 with fake quantization, and take turns in every round:

| way | |
|---|---|
| `sensitivity` | `methods.clado.losses`: all singles and pairs, what they share run once |
| `ordinary` | one jitted forward pass that takes the choice of all layers, for some of the pairs |

An ordinary pass costs the same for every pair, so a sample tells its speed. Ratios are of times in
the same round; compiling does not count. With FLEXIQ_DATA: pretrained ResNet-20 and training
images, all but the first and last layer. Without: a tiny model with random weights, which tells
little about speed.
"""

import argparse
import dataclasses
import importlib
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import loading
from experiments.shared import setup
from flexiq_jax import data, graph, models
from flexiq_jax.methods import layerwise
from flexiq_jax.methods.clado.losses import LayerLosses
from flexiq_jax.methods.examples import Examples, cross_entropy
from flexiq_jax.network import Network
from flexiq_jax.quant import calibration, selectable
from flexiq_jax.runs import process


@dataclasses.dataclass(frozen=True, kw_only=True)
class Loaded:
  """What is measured: a float model at several widths, and labelled images."""

  network: Network
  stacks: layerwise.Stacks
  names: tuple[str, ...]
  images: np.ndarray
  labels: np.ndarray


def load(name: str, images: int, bits: Sequence[int]) -> Loaded:
  """A pretrained model and training images, as its config says."""
  config = importlib.import_module(loading.CONFIGS[name]).get_config()
  config.calibration.images = images
  inputs = setup.prepare(config)
  apply, _ = models.functional(inputs.module)
  indices = data.calibration_indices(inputs.calibration, images, config.seed)
  stream = data.batches(inputs.calibration, inputs.settings.preprocess, images, indices=indices)
  (batch,) = stream
  ranges = inputs.settings.ranges
  return _loaded(apply, inputs.params, batch.images, batch.labels, ranges, inputs.selectable, bits)


def random(name: str, images: int, bits: Sequence[int], **overrides: Any) -> Loaded:
  """A model with random weights and noise."""
  module: Any = models.create(name, **overrides)
  apply, params = models.functional(module)
  rng = np.random.default_rng(0)
  x = rng.normal(size=(images, *module.input_shape)).astype(np.float32)
  labels = rng.integers(0, module.num_classes, images)
  return _loaded(apply, params, x, labels, calibration.RangeSettings(), None, bits)


def _loaded(apply, params, images, labels, ranges, names, bits) -> Loaded:
  network = Network(apply, params, images[:1])
  values = calibration.observe_values(network.apply, network.params, [images])
  stacks = layerwise.create(network.layers, network.weights, values, ranges, bits=bits)
  names = tuple(names or selectable(network.layers))
  return Loaded(network=network, stacks=stacks, names=names, images=images, labels=labels)


def ordinary(loaded: Loaded) -> Callable[[np.ndarray], jax.Array]:
  """Choice `[I]` -> losses `[n]`: a whole forward pass, jitted once for all choices."""
  network, labels = loaded.network, jnp.asarray(loaded.labels, jnp.int32)
  x = jnp.asarray(loaded.images)

  @jax.jit
  def run(stacks, params, choice, x, labels):
    logits = graph.with_rule(network.apply, layerwise.layerwise_rule(stacks, choice))(params, x)
    return cross_entropy(logits, labels)

  return lambda choice: run(loaded.stacks, network.params, choice, x, labels)


def measure(
  loaded: Loaded, rounds: int, sample: int, say: Callable[[str], None] = print
) -> dict[str, Any]:
  """Times both ways in turn and compares their losses.

  Args:
    loaded: what is measured.
    rounds: how often; one more compiles.
    sample: pairs that the ordinary way measures in each round.
    say: called with lines of progress.

  Raises:
    RuntimeError: the losses are not the same.
  """
  network, stacks, names = loaded.network, loaded.stacks, loaded.names
  ours = LayerLosses(network, stacks, names, block=len(loaded.images))
  plain, widths = ordinary(loaded), len(stacks.bits)
  options = [*itertools.product(names, stacks.bits)]
  pairs = [
    (k, m)
    for k, m in itertools.combinations(range(len(options)), 2)
    if options[k][0] != options[m][0]
  ]
  picked = np.random.default_rng(0).permutation(len(pairs))[:sample]
  base = dict.fromkeys(stacks.names, layerwise.FLOAT)
  choices = [stacks.choice({**base, **dict(options[index] for index in pairs[p])}) for p in picked]
  say(ours.describe(len(loaded.images)))
  seconds: dict[str, list[float]] = {"sensitivity": [], "ordinary": []}
  found, expected = None, np.zeros(0)
  for i in range(rounds + 1):
    start = time.perf_counter()
    found = ours.measure(Examples(loaded.images, loaded.labels))
    middle = time.perf_counter()
    expected = np.array([np.asarray(plain(choice), np.float64).mean() for choice in choices])
    end = time.perf_counter()
    if i:  # the first round compiles
      seconds["sensitivity"].append(middle - start)
      seconds["ordinary"].append((end - middle) / len(choices) * len(pairs))
    say(f"round {i}: {middle - start:.1f} s for all, {end - middle:.1f} s for {len(choices)} pairs")
  assert found is not None
  # A sum rounded the other way may move a code: single losses may differ, most must not.
  differ = np.abs(found.pairs[tuple(np.array([pairs[p] for p in picked]).T)] / expected - 1)
  if np.median(differ) > 1e-4:
    raise RuntimeError(f"losses differ by {np.median(differ):.2g} in the median; expected 1e-4")
  both = zip(seconds["ordinary"], seconds["sensitivity"], strict=True)
  return {
    "layers": len(names),
    "bits": [*stacks.bits],
    "images": len(loaded.images),
    "pairs": len(pairs),
    "sampled": len(choices),
    "forwards": {"sensitivity": ours.forwards, "ordinary": ours.plain_forwards},
    "seconds": seconds,
    "pairs_per_second": {
      way: len(pairs) / statistics.median(times) for way, times in seconds.items()
    },
    "ratio": spread([a / b for a, b in both]),
    "loss_differs": {"median": float(np.median(differ)), "most": float(differ.max())},
    "singles": len(names) * widths,
  }


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, least and largest."""
  return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def line(document: dict[str, Any]) -> str:
  """The result as text."""
  speed, ratio, passes = (document[key] for key in ("pairs_per_second", "ratio", "forwards"))
  return (
    f"{document['layers']} layers at {document['bits']} bits, {document['images']} images: "
    f"{speed['sensitivity']:.1f} pairs/s, singles included; ordinary {speed['ordinary']:.1f} "
    f"pairs/s; ratio {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}), "
    f"{passes['ordinary'] / passes['sensitivity']:.2f} by MACs"
  )


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  parser.add_argument("--images", type=int, default=64, help="in the block")
  parser.add_argument("--bits", default="2,4,8", help="comma-separated")
  parser.add_argument("--rounds", type=int, default=5)
  parser.add_argument("--sample", type=int, default=200, help="pairs of the ordinary way")
  args = parser.parse_args(arguments)
  try:
    args.bits = tuple(int(bits) for bits in args.bits.split(","))
  except ValueError:
    parser.error(f"--bits: {args.bits!r}; whole numbers with commas between are accepted")
  for name in ("images", "rounds", "sample"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}: {getattr(args, name)}; at least 1 is accepted")
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Times both ways, prints how they compare and writes JSON."""
  args = parse(arguments)
  pretrained = loading.has_data()
  if pretrained:
    loaded = load("resnet20", args.images, args.bits)
  else:
    tiny: Any = {"depths": (1, 1), "width": 8, "input_size": 8}
    loaded = random("resnet20", args.images, args.bits, **tiny)
  document = measure(loaded, args.rounds, args.sample, lambda text: print(text, flush=True))
  print(("resnet20: " if pretrained else "tiny random model: ") + line(document))
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": process.describe(), "pretrained": pretrained, **document}
    args.json.write_text(json.dumps(document, indent=2) + "\n")


if __name__ == "__main__":
  main()
