r"""RobustQuant, or KURE (Shkolnik, Chmiel et al., "Robust Quantization: One Model to Rule Them
All", NeurIPS 2020; code: moranshkolnik/RobustQuantization).

Weights that are spread uniformly lose least when step or width of a quantizer change. A short
finetuning of the float model makes them so, by a penalty on their kurtosis,

    L = cross-entropy + lambda mean_i (Kurt(W_i) - 1.8)^2,   Kurt(W) = mean(((W - mu) / sigma)^4),

which is 1.8 for a uniform distribution and 3 for a normal one. The mean is over all layers. Any
quantizer then serves at any width.

Departures:

- The source trains 50 to 90 epochs; the budget here is a setting, and the learning rate is larger.
- The source quantizes by LAPQ and leaves first and last layer in floating point. Here the trained
  model is calibrated and quantized like all others (`Calibrated.uniform`): ranges of least squares
  per output channel, other layers in 8 bits.
- W_i are the weights before batch norm is folded; batch norm trains with the moments of the batch
  (batch_norm.py).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flexiq_jax import graph
from flexiq_jax.calibrated import Calibrated, calibrate
from flexiq_jax.methods import batch_norm
from flexiq_jax.methods.base import Runnable
from flexiq_jax.methods.examples import cross_entropy
from flexiq_jax.methods.task import sizes
from flexiq_jax.methods.trained import Trained, TrainedSettings
from flexiq_jax.network import Network
from flexiq_jax.quant import rules
from flexiq_jax.training import is_real, require, require_positive

Array = Any

UNIFORM = 1.8  # the kurtosis of a uniform distribution


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobustQuantSettings(TrainedSettings):
  """How the float model is finetuned.

  Attributes:
    learning_rate: of SGD.
    momentum: of SGD.
    penalty: lambda.
    kurtosis: what weights are drawn to.
  """

  learning_rate: float = 0.01
  momentum: float = 0.9
  penalty: float = 1.0
  kurtosis: float = UNIFORM

  def __post_init__(self):
    super().__post_init__()
    momentum = is_real(self.momentum) and 0 <= self.momentum < 1
    require(self, "momentum", momentum, "0 up to, but not, 1")
    penalty = is_real(self.penalty) and self.penalty >= 0
    require(self, "penalty", penalty, "a number from 0")
    require_positive(self, "kurtosis")


class RobustQuant(Trained):
  """A float model of uniform weights, quantized uniformly at any width."""

  name = "robustquant"
  Settings = RobustQuantSettings

  @functools.cached_property
  def tuned(self) -> Calibrated:
    """The finetuned model, calibrated like the float model."""
    start, settings, data = self.start, self.settings, self.batches()
    network = start.network
    example = jax.tree.map(lambda a: a[:1], start.x)
    normed = graph.batch_normed(start.apply, start.params, example)
    params, affine, running = initial(start, normed)
    optimizer = optax.sgd(settings.rate, momentum=settings.momentum)
    state = self.train(
      data,
      objective(network, normed, settings),
      {"params": params, "affine": affine},
      running,
      optimizer,
      forwards=1,
    )
    tuned = folded(network, jax.device_get(state.params), jax.device_get(state.rest), example)
    return calibrate(tuned, start.calibrated.batches, start.calibrated.ranges)

  def at(self, budget: float) -> Runnable:
    """The finetuned model with all layers at the budget, rounded."""
    start, bits = self.start, round(budget)
    calibrated = start.once(self.name, lambda: self.tuned)
    model = calibrated.uniform(bits, keep8=start.kept)
    plan = dict.fromkeys(start.names, bits)
    return Runnable(
      predict=lambda x: calibrated.network.uniform(model, x),
      avg_bits=float(bits),
      sizes=sizes(start.network.layers, plan, start.task.activation_bits, start.task.kept),
      columns={"steps": float(self.settings.steps)},
    )


def kurtosis(w: Array) -> Array:
  """Fourth standardised moment of all entries, float32 []."""
  w = w.astype(jnp.float32)
  centred = w - w.mean()
  return jnp.mean(centred**4) / jnp.square(jnp.mean(centred**2))


def penalty(weights: list[Array], target: float) -> Array:
  """Mean squared distance of the kurtosis of some tensors from a target, float32 []."""
  return jnp.mean(jnp.square(jnp.stack([kurtosis(w) for w in weights]) - target))


def initial(start: Any, normed: tuple[str, ...]) -> tuple[Any, dict, dict]:
  """Parameters, norms and running moments that compute the float model."""
  network, batches = start.network, list(start.calibrated.batches)
  seen = batch_norm.observe(network.apply, network.params, batches, rules.float_rule)
  affine = {name: batch_norm.affine_of(seen[name]) for name in normed}
  params = batch_norm.unfolded_weights(start, normed)
  running = batch_norm.observe(network.apply, params, batches, rules.float_rule, affine)
  return params, affine, running


def objective(network: Network, normed: tuple[str, ...], settings: RobustQuantSettings) -> Any:
  """The loss of batches (inputs, labels)."""

  def loss(trained, running, key, batch):
    del key
    x, labels = batch
    weights, records = [], {}

    def plain(layer, x, w, contract):
      weights.append(w)
      return contract(x, w)

    rule = batch_norm.rule_normed(plain, trained["affine"], running, normed, records)
    z = graph.with_rule(network.apply, rule)(trained["params"], x)
    entropy = cross_entropy(z, labels).mean()
    apart = penalty(weights, settings.kurtosis)
    mean = jnp.mean(jnp.stack([kurtosis(w) for w in weights]))
    metrics = {"cross_entropy": entropy, "penalty": apart, "kurtosis": mean}
    return entropy + settings.penalty * apart, (records, metrics)

  return loss


def folded(network: Network, trained: Any, running: Any, example: Any) -> Network:
  """The trained model in inference mode, its norms folded again."""
  rule = batch_norm.rule_normed(rules.float_rule, trained["affine"], running)
  apply = lambda params, x: graph.with_rule(network.apply, rule)(params, x)
  return Network(apply, trained["params"], example, network.platform)
