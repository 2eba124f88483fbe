"""A small network of every kind of layer, quantized once, and fitnesses of it, compiled once."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import orders
from flexiq_jax.calibrated import Grouped, calibrate
from flexiq_jax.network import Network
from flexiq_jax.orders import Space
from flexiq_jax.quant import rules
from flexiq_jax.quant.grouping import LowSettings
from flexiq_jax.search.fitness import Fitness
from flexiq_jax.search.gram import Influence, Ties

IMAGES, CLASSES = 16, 5
SELECTABLE = ("conv", "up", "down", "head")


@dataclasses.dataclass(frozen=True)
class Made:
  """A quantized network and what a search of it takes."""

  network: Network
  grouped: Grouped
  model: rules.QModel
  space: Space
  scores: np.ndarray
  images: np.ndarray

  def random_masks(self, count: int, seed: int = 0) -> np.ndarray:
    """Masks bool `[count, T]`, the first of no group and the second of all."""
    masks = np.random.default_rng(seed).random((count, self.space.total)) < 0.5
    masks[0] = False
    masks[1:2] = True
    return masks

  def logits(self, mask: np.ndarray) -> np.ndarray:
    """Logits `[n, K]` of one mixed model, by itself."""
    return np.asarray(self.network.mixed(self.model, self.space.split(mask), self.images))

  def distances(self, mask: np.ndarray, distance: str = "l2") -> np.ndarray:
    """Distances float64 `[n]` of one mixed model from the 8-bit model, in NumPy."""
    z = self.logits(mask).astype(np.float64)
    z8 = self.logits(np.zeros_like(mask)).astype(np.float64)
    if distance == "l2":
      return np.square(z - z8).sum(axis=1)
    log_p, log_p8 = (a - np.log(np.exp(a).sum(axis=1, keepdims=True)) for a in (z, z8))
    return (np.exp(log_p8) * (log_p8 - log_p)).sum(axis=1)


def parameters(seed: int = 0) -> dict[str, Any]:
  rng = np.random.default_rng(seed)

  def kernel(*shape, spread=1.0):
    w = rng.normal(size=shape) * spread / np.sqrt(np.prod(shape[:-1]))
    return jnp.asarray(w, jnp.float32)

  return {
    "stem": kernel(3, 3, 3, 8),
    "depth": kernel(3, 3, 1, 8),
    "conv": kernel(3, 1, 8, 8),
    "up": kernel(8, 12, spread=1.5),
    "down": kernel(12, 8),
    "head": kernel(8, CLASSES, spread=2.0),
    "bias": jnp.asarray(rng.normal(size=CLASSES) * 0.1, jnp.float32),
  }


def apply(params, x):
  """Convolutions, one of them depthwise and one with stride, then tokens through dense layers."""

  def conv(x, w, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride, stride),
      "SAME",
      dimension_numbers=("NHWC", "HWIO", "NHWC"),
      feature_group_count=groups,
    )

  x = jax.nn.relu(conv(x, params["stem"], stride=2))
  x = jax.nn.relu(conv(x, params["depth"], groups=8))
  x = jax.nn.relu(conv(x, params["conv"], stride=2))
  x = x.reshape(len(x), 4, 8)
  x = x + jax.nn.gelu(x @ params["up"]) @ params["down"]
  return x.mean(axis=1) @ params["head"] + params["bias"][None]


def once(function):
  """A function that computes once for each arguments and each way of compiling (see conftest.py).

  Tests that are compiled with optimization do not meet programs of those that are not: results of
  two such programs differ by roundings.
  """
  cached = functools.cache(lambda setting, *args, **kwargs: function(*args, **kwargs))

  @functools.wraps(function)
  def of(*args, **kwargs):
    return cached(jax.config.values["jax_disable_most_optimizations"], *args, **kwargs)

  return of


@once
def made() -> Made:
  """Quantized with random weights; groups of two channels."""
  images = np.random.default_rng(1).normal(size=(IMAGES, 8, 8, 3)).astype(np.float32)
  network = Network(apply, parameters(), images[:1])
  grouped = calibrate(network, [images]).group(SELECTABLE, LowSettings(group_size=2))
  return Made(network, grouped, grouped.model, grouped.space, grouped.scores(), images)


def fitness(**options) -> Fitness:
  """A fitness that tests share: its count of forward passes goes on."""
  options = {"distance": "l2", "capacity": 8, "block": 4, **options}
  return _fitness(tuple(sorted(options.items())))


@once
def _fitness(options: tuple[tuple[str, Any], ...]) -> Fitness:
  m = made()
  return Fitness(m.network, m.model, m.space, m.images, **dict(options))


@once
def influence(
  probes: int = CLASSES, distance: str = "l2", block: int = IMAGES, limit: int = 100
) -> Influence:
  """What measures such a fitness; exactly, unless there are fewer probes than logits."""
  m = made()
  ties = Ties(m.space, m.scores, limit)
  return Influence(fitness(distance=distance), ties, probes=probes, block=block)


def greedy() -> np.ndarray:
  return orders.greedy(made().space, made().scores)


class Counted:
  """A fitness by formula, of blocks of two examples each; keeps what it was asked."""

  def __init__(self, of=None, blocks=8):
    self.space, self.examples = made().space, 2 * blocks
    self.blocks, self.forwards, self.calls = blocks, 0.0, []
    # Effects of single examples differ, and some pairs of groups cancel each other.
    rng = np.random.default_rng(0)
    self._effects = rng.normal(size=(self.examples, 3, self.space.total))
    self._of = of

  def per_example(self, masks, part=(0.0, 1.0)):
    first, last = (round(share * self.examples) for share in part)
    self.calls.append((masks.copy(), part))
    self.forwards += len(masks) * (part[1] - part[0])
    if self._of:
      return self._of(masks)[:, first:last]
    return np.square(masks @ self._effects[first:last].mT).sum(axis=-1).T.astype(np.float32)

  def __call__(self, masks, part=(0.0, 1.0)):
    return self.per_example(masks, part).mean(axis=1, dtype=np.float64)


def plain(rows):
  """Steps of a log without the time that they took."""
  return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]
