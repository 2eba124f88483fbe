r"""Any-precision networks (Yu et al., "Any-Precision Deep Neural Networks", AAAI 2021; code:
SHI-Labs/Any-Precision-DNNs).

One set of weights serves several widths, of weights and activations alike; each width has batch
norm of its own. A step computes the model at all widths, from the highest down: the highest learns
from the labels, each other one from the predictions of the next higher (recursive teachers, through
which no gradient goes), and the gradients of all are added up. Weights are quantized by DoReFa
(dorefa.py), from real weights or by dropping bits of 8-bit codes.

Departures:

- The source trains 200 epochs from scratch, with 1, 2, 4, 8 and 32 bits; here training starts from
  the float model, its budget and the widths are settings, and the highest width is no 32 bits.
- The source's ResNets have their activations in 0..1, clip them there and round. Those of a given
  model are anywhere, so their clipping ranges are those of calibration at each width.
- Layers that may not be lowered have 8 bits; the source leaves first and last in floating point.
- Batch norm was folded and is rebuilt for every width (batch_norm.py). A layer without it, and
  every layer of a model of layer norms, has an affine map for each width instead.
- What is evaluated multiplies codes in float32. The 2^k levels are odd multiples of a step, of
  which 8 bits do not fit int8.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from flexiq_jax import graph
from flexiq_jax.graph import Layer, Rule
from flexiq_jax.methods import activations, batch_norm, dorefa
from flexiq_jax.methods.base import Runnable
from flexiq_jax.methods.examples import cross_entropy
from flexiq_jax.methods.start import Start
from flexiq_jax.methods.task import sizes
from flexiq_jax.methods.trained import Trained, TrainedSettings, within
from flexiq_jax.network import Network
from flexiq_jax.quant import check_one_of, rules
from flexiq_jax.training import loop, require

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AnyPrecisionSettings(TrainedSettings):
  """How the widths are trained.

  Attributes:
    learning_rate: of Adam.
    trained_bits: the widths, ascending.
    drop: `round` or `truncate` (see dorefa.py).
  """

  learning_rate: float = 2e-4
  trained_bits: tuple[int, ...] = (4, 6, 8)
  drop: str = "round"

  def __post_init__(self):
    super().__post_init__()
    require_widths(self, "trained_bits")
    check_one_of("drop", self.drop, dorefa.DROPS)


def require_widths(settings: Any, field: str) -> None:
  """Refuses a field of settings that is no ascending tuple of widths."""
  bits = getattr(settings, field)
  fits = isinstance(bits, tuple | list) and len(bits) > 0
  fits = fits and all(isinstance(b, int) and b in range(2, 9) for b in bits)
  fits = fits and list(bits) == sorted(set(bits))
  require(settings, field, fits, "ascending widths of 2..8")


class AnyPrecision(Trained):
  """Weights in common, a norm for each width."""

  name = "anyprecision"
  Settings = AnyPrecisionSettings

  @functools.cached_property
  def model(self) -> "Model":
    """The layers at each width; nothing is trained of it."""
    return Model.create(self.start, self.settings.trained_bits, self.settings.drop)

  @functools.cached_property
  def trained(self) -> loop.State:
    """The trained weights and norms, and their running moments."""
    data, model, settings = self.batches(), self.model, self.settings
    params, running = model.initial(self.start)
    return self.train(
      data, objective(model), params, running, optax.adam(settings.rate), forwards=len(model.bits)
    )

  def at(self, budget: float) -> Runnable:
    """The largest trained width that keeps the budget."""
    start, model = self.start, self.model
    bits = within(model.bits, budget)
    state = start.once(self.name, lambda: self.trained)
    run = jax.jit(lambda params, running, x: model.run(params, running, bits, x))
    return Runnable(
      predict=lambda x: run(state.params, state.rest, x),
      avg_bits=float(bits),
      sizes=sizes(
        start.network.layers,
        dict.fromkeys(start.names, bits),
        start.task.activation_bits,
        start.task.kept,
      ),
      columns={"steps": float(self.settings.steps)},
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """A network at any of some widths.

  Attributes:
    network: the float model, folded.
    bits: widths, ascending.
    drop: one of `dorefa.DROPS`.
    names: layers at the width; others have 8 bits.
    normed: layers with batch norm.
    x_scales: layer name -> width -> scale of its input.
    signed: layer name -> whether codes of its input are signed.
  """

  network: Network
  bits: tuple[int, ...]
  drop: str
  names: tuple[str, ...]
  normed: tuple[str, ...]
  x_scales: Mapping[str, Mapping[int, float]]
  signed: Mapping[str, bool]

  @classmethod
  def create(cls, start: Start, bits: Sequence[int], drop: str) -> "Model":
    """A model with the clipping ranges that calibration finds."""
    network, bits = start.network, tuple(bits)
    found = {k: start.calibrated.uniform(k, keep8=start.kept) for k in bits}
    layers = [layer.name for layer in network.layers]
    example = jax.tree.map(lambda a: a[:1], start.x)
    return cls(
      network=network,
      bits=bits,
      drop=drop,
      names=start.names,
      normed=graph.batch_normed(start.apply, start.params, example),
      x_scales={name: {k: float(found[k][name].x_scale) for k in bits} for name in layers},
      signed={name: found[bits[0]][name].signed for name in layers},
    )

  def initial(self, start: Start) -> tuple[dict[str, Any], dict[str, Any]]:
    """Weights of the float model; for each width norms that give results their float moments.

    Returns:
      What is trained, `params` and width -> layer -> affine (`affine`); the running moments.
    """
    network, batches = self.network, list(start.calibrated.batches)
    seen = batch_norm.observe(network.apply, network.params, batches, rules.float_rule)
    own = {name: batch_norm.affine_of(moments) for name, moments in seen.items()}
    params = batch_norm.unfolded_weights(start, self.normed)
    running = {
      str(k): batch_norm.observe(network.apply, params, batches, self.rule(k), own)
      for k in self.bits
    }
    return {"params": params, "affine": {str(k): own for k in self.bits}}, running

  def rule(self, bits: int) -> Rule:
    """Layers at a width, without norms, float32."""

    def run(layer: Layer, x: Array, w: Array, contract: graph.Contract) -> Array:
      own, scale = bits if layer.name in self.names else 8, self.x_scales[layer.name][bits]
      x = activations.rounded(x, scale, own, self.signed[layer.name])
      return contract(x, dorefa.weights(w, own, self.drop), jnp.float32)

    return run

  def run(
    self,
    trained: Mapping[str, Any],
    running: Mapping[str, Any],
    bits: int,
    x: Array,
    records: dict[str, batch_norm.Moments] | None = None,
  ) -> Array:
    """Logits at a width; with `records` as while training (see `batch_norm.rule_normed`)."""
    live = () if records is None else self.normed
    norms = trained["affine"][str(bits)], running[str(bits)]
    rule = batch_norm.rule_normed(self.rule(bits), *norms, live, records)
    return graph.with_rule(self.network.apply, rule)(trained["params"], x)


def objective(model: Model) -> loop.Loss:
  """The sum of the losses of all widths; metrics have that of each."""

  def loss(trained, running, key, batch):
    del key
    x, labels = batch
    total: Any = 0.0
    teacher, fresh, metrics = None, {}, {}
    for bits in reversed(model.bits):
      records = fresh[str(bits)] = {}
      z = model.run(trained, running, bits, x, records)
      if teacher is None:
        value = cross_entropy(z, labels).mean()
      else:
        value = optax.softmax_cross_entropy(z, teacher).mean()
      teacher = jax.lax.stop_gradient(jax.nn.softmax(z))
      metrics[f"loss_{bits}"] = value
      total += value
    return total, (fresh, metrics)

  return loss
