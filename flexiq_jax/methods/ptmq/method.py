r"""PTMQ (Xu et al., "PTMQ: Post-training Multi-Bit Quantization of Neural Networks", AAAI 2024).

One post-training reconstruction, block by block, gives a model that runs at several widths: the
rounding of weights is learned (rounding.py), and so are the scales of activations, at a low, a
middle and a high width at once. The outputs of the three are mixed, and the higher width teaches
the lower ones (block.py). It takes unlabelled calibration images, and no batch norm, which is
folded.

The authors' code is not public; details that the abstract leaves open are those of a third-party
reimplementation (d7chong/ptmq-pytorch): weights of the losses, Adam, the regularizer 0.01 with its
warm-up of 0.2. It learns one width of weights at a time. Here one rounding serves all: every step
draws the width of the weights from `weight_bits`, each with its own scales; with one entry it is
theirs.

Departures:

- 5,000 steps a block there; the budget here is a setting, and the rates are higher for it.
- Weights are symmetric with the scales of calibration, which stay; other layers keep 8 bits and
  their nearest rounding.
- Activations are quantized where layers read them, so inside of blocks, too, at three widths; it is
  logarithms of scales that are trained.
- Where the mixed output of a block is dropped, the float model's stands (as in QDrop).
- Blocks lie between layers at which the fewest activations cross; of residual networks these are
  the residual blocks.
"""

import dataclasses
import functools
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexiq_jax import graph
from flexiq_jax.graph import Segments
from flexiq_jax.methods.anyprecision import require_widths
from flexiq_jax.methods.base import Method, Runnable
from flexiq_jax.methods.ptmq import block as blocks
from flexiq_jax.methods.ptmq import rounding
from flexiq_jax.methods.task import Task, sizes
from flexiq_jax.methods.trained import require_positive, within
from flexiq_jax.network import Network
from flexiq_jax.quant import exact, rules
from flexiq_jax.runs import files
from flexiq_jax.runs.progress import Progress
from flexiq_jax.training import is_real, is_whole, loop, require

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class PtmqSettings:
  """How blocks are reconstructed.

  Attributes:
    steps: of each block.
    batch_size: calibration images a step.
    groups: the low, the middle and the high width.
    weight_bits: widths that weights are drawn from at each step, among `groups`; empty: all.
    rounding_rate: Adam's learning rate of the rounding.
    scale_rate: that of the logarithms of activation scales, from which half a cosine goes down.
    shares: lambda, of low, middle and high width in the blend.
    gammas: weights of the losses.
    regularizer: weight of the regularizer of rounding, after a share `warmup` of the steps.
    warmup: in 0..1.
    float_share: how often an entry of a block's input is the float model's.
  """

  steps: int = 300
  batch_size: int = 32
  groups: tuple[int, ...] = (4, 6, 8)
  weight_bits: tuple[int, ...] = ()
  rounding_rate: float = 1e-2
  scale_rate: float = 4e-3
  shares: tuple[float, ...] = (1 / 3, 1 / 3, 1 / 3)
  gammas: tuple[float, ...] = (100.0, 100.0, 100.0)
  regularizer: float = 0.01
  warmup: float = 0.2
  float_share: float = 0.5

  def __post_init__(self):
    for field in ("steps", "batch_size"):
      require(self, field, is_whole(getattr(self, field), 1), "an integer from 1")
    require_widths(self, "groups")
    require(self, "groups", len(self.groups) == 3, "three ascending widths of 2..8")
    if self.weight_bits:
      require_widths(self, "weight_bits")
    fits = set(self.weight_bits) <= set(self.groups)
    require(self, "weight_bits", fits, f"widths of groups {self.groups}")
    for field in ("rounding_rate", "scale_rate", "regularizer"):
      require_positive(self, field)
    for field in ("shares", "gammas"):
      values = getattr(self, field)
      fits = isinstance(values, tuple | list) and len(values) == 3
      fits = fits and all(is_real(value) and value >= 0 for value in values)
      require(self, field, fits, "three numbers from 0")
    for field in ("warmup", "float_share"):
      value = getattr(self, field)
      require(self, field, is_real(value) and 0 <= value <= 1, "a number in 0..1")

  @property
  def drawn(self) -> tuple[int, ...]:
    """Numbers of the widths that weights are drawn from."""
    return tuple(self.groups.index(b) for b in self.weight_bits or self.groups)


class Ptmq(Method):
  """One rounding and three scales of activations, reconstructed block by block."""

  name = "ptmq"
  Settings = PtmqSettings

  @classmethod
  def fits(cls, task: Task) -> bool:
    """All layers have one width, so budgets are average bits; the others stay at 8 bits."""
    return task.unit == "average bits" and not task.layers_only and task.kept == 8

  @functools.cached_property
  def uniform(self) -> dict[int, dict[str, rules.QLayer]]:
    """All layers at each width of the groups, with the nearest roundings."""
    start = self.start
    return {b: start.calibrated.uniform(b, keep8=start.kept) for b in self.settings.groups}

  @functools.cached_property
  def grids(self) -> dict[str, blocks.Grid]:
    """Layer name -> its weights and scales at each width, of layers to lower."""
    weights = self.start.network.weights
    return {
      layer.name: blocks.grid(layer, weights[layer.name], self.uniform)
      for layer in self.start.layers
    }

  @functools.cached_property
  def trained(self) -> dict[str, dict[str, Array]]:
    """Roundings (`v`) and logarithms of scales (`log_x`) of each layer to lower."""
    size, count = self.settings.batch_size, len(self.start.x)
    if size > count:
      raise ValueError(f"batch_size: {size}; 1..{count} is accepted, the calibration images")
    return Reconstruction(self).run()

  @functools.cached_property
  def model(self) -> dict[int, dict[str, rules.QLayer]]:
    """All layers at each width of the groups."""
    network, trained = self.start.network, self.trained
    return {
      bits: finished(network, self.uniform[bits], self.grids, trained, k)
      for k, bits in enumerate(self.settings.groups)
    }

  def at(self, budget: float) -> Runnable:
    """The largest of the three widths that keeps the budget, weights and activations alike."""
    start, settings = self.start, self.settings
    bits = within(settings.groups, budget)
    model = start.once(self.name, lambda: self.model)[bits]
    plan = dict.fromkeys(start.names, bits)
    return Runnable(
      predict=lambda x: start.network.uniform(model, x),
      avg_bits=float(bits),
      sizes=sizes(start.network.layers, plan, start.task.activation_bits, start.task.kept),
      columns={"steps": float(settings.steps * len(self.trained_blocks))},
    )

  @functools.cached_property
  def segments(self) -> Segments:
    """The model, cut into blocks."""
    start = self.start
    return boundaries(start.network, jax.tree.map(lambda a: a[:1], start.x))

  @functools.cached_property
  def trained_blocks(self) -> dict[int, tuple[str, ...]]:
    """Number of each block with layers to lower -> these layers."""
    order = [layer.name for layer in self.start.network.layers]
    ends = [*map(order.index, self.segments.names), len(order)]
    inside = {
      i: tuple(n for n in order[a:b] if n in self.start.names)
      for i, (a, b) in enumerate(itertools.pairwise(ends))
    }
    return {i: names for i, names in inside.items() if names}


def boundaries(network: Network, x: Any) -> Segments:
  """Cuts a model at its first layer, and wherever the fewest activations cross."""
  names = [layer.name for layer in network.layers]

  def crossing(name: str) -> int:
    head = graph.cut(network.apply, network.params, x, [name]).head(rules.float_rule)
    return len(jax.eval_shape(head, network.params, x).values)

  count = {name: crossing(name) for name in names}
  least = min([*count.values()][1:], default=0)
  chosen = [name for name in names if name == names[0] or count[name] == least]
  return graph.cut(network.apply, network.params, x, chosen)


def finished(
  network: Network,
  uniform: rules.QModel,
  grids: dict[str, blocks.Grid],
  trained: dict[str, Any],
  k: int,
) -> dict[str, rules.QLayer]:
  """The quantized layers of width number k, roundings made up."""
  model = dict(uniform)
  for name, own in grids.items():
    layer, q = network.layer(name), uniform[name]
    codes = rounding.hard_codes(own.steps(layer, k), trained["v"][name], q.bits)
    w = codes.astype(jnp.int8)
    scale = own.x_scale[k] * jnp.exp(trained["log_x"][name][k])
    parts = exact.parts(layer, np.asarray(w))
    model[name] = dataclasses.replace(q, w=w, x_scale=scale, parts=parts)
  return model


class Reconstruction:
  """The blocks of one model, one after the other."""

  def __init__(self, method: Ptmq):
    """Keeps what is needed."""
    self._method = method
    self._widths = blocks.Widths(grids=method.grids, base=method.start.calibrated.base)
    self._settings, self._start = method.settings, method.start
    self._network = self._start.network

  def run(self) -> dict[str, dict[str, Array]]:
    """`v` and `log_x` of each layer; blocks that a killed run finished are read back."""
    settings, segments = self._settings, self._method.segments
    found: dict[str, dict[str, Array]] = {"v": {}, "log_x": {}}
    params, size = self._network.params, settings.batch_size
    rows = np.arange(-(-len(self._start.x) // size) * size) % len(self._start.x)
    head = jax.jit(segments.head(rules.float_rule))
    real = [head(params, self._start.x[own]) for own in np.split(rows, len(rows) // size)]
    quantized, last = real, max(self._method.trained_blocks)
    with Progress("ptmq, blocks", last + 1) as progress:
      for i in range(last + 1):
        begin, note = time.monotonic(), ""
        step = jax.jit(segments.step(i, rules.float_rule))
        after = [step(params, live) for live in real]
        if names := self._method.trained_blocks.get(i):
          trained, log = self._train(i, names, real, quantized, after)
          note = f"loss {log[-1]['loss']:.4f}"
          for part, of in trained.items():
            found[part].update(of)
        quantized = self._next(i, found, quantized)
        real = after
        cost = 3 * 3 * settings.steps * size / len(self._start.x)
        self._method.note(time.monotonic() - begin, cost)
        progress.update(1, note)
    return found

  def _train(self, i: int, names: Sequence[str], real, quantized, after):
    """Trains block number i."""
    settings, start = self._settings, self._start
    grids = {name: self._widths.grids[name] for name in names}
    low = settings.drawn[0]
    steps = {name: own.steps(self._network.layer(name), low) for name, own in grids.items()}
    params = {
      "v": {name: rounding.start(of) for name, of in steps.items()},
      "log_x": {name: jnp.zeros(3, jnp.float32) for name in names},
    }
    scales = optax.adam(optax.cosine_decay_schedule(settings.scale_rate, settings.steps))
    optimizer = optax.multi_transform(
      {"v": optax.adam(settings.rounding_rate), "log_x": scales},
      lambda params: {part: jax.tree.map(lambda _, p=part: p, of) for part, of in params.items()},
    )

    def entry(epoch: loop.Epoch, state: loop.State) -> dict[str, Any]:
      decided = rounding.decided(state.params["v"])
      return {"epoch": epoch.epoch, "step": epoch.step, "loss": epoch.loss, "decided": decided}

    state, log = loop.train(
      objective(self._network, self._method.segments, i, self._widths, settings),
      params,
      jnp.zeros((), jnp.int32),
      optimizer,
      _Draws(real, quantized, after, settings.steps, (start.seed, i)),
      epochs=1,
      seed=start.seed,
      entry=entry,
      run=files.to_plain(
        {
          "settings": dataclasses.asdict(settings),
          "block": names,
          "seed": start.seed,
          "weights": self._network.fingerprint,
          "images": len(start.x),
        }
      ),
      checkpoint_dir=start.folder / "ptmq" / f"block{i}",
      progress=lambda entry: start.workdir.event(
        "trained", table=start.table, method="ptmq", block=i, **entry
      ),
    )
    return state.params, log

  def _next(self, i: int, trained: Any, quantized: Sequence[Any]) -> list[Any]:
    """The blend of the block's outputs with roundings made up, at each width."""
    segments, network = self._method.segments, self._network
    hard = {
      **trained,
      "v": {name: jnp.where(v >= 0, 100.0, -100.0) for name, v in trained["v"].items()},
    }

    @jax.jit
    def run(params, trained, live):
      outputs = [segments.step(i, self._widths.rule(trained, k, k))(params, live) for k in range(3)]
      return blocks.blend(outputs, self._settings.shares)

    return [run(network.params, hard, live) for live in quantized]


def objective(
  network: Network, segments: Segments, i: int, widths: blocks.Widths, settings: PtmqSettings
) -> loop.Loss:
  """The loss of block number i, of batches (float input, mixed input, float output).

  What is carried along is the number of steps done.
  """
  drawn = jnp.asarray(settings.drawn)

  def loss(trained, done, key, batch):
    real, quantized, after = batch
    keys = jax.random.split(key)
    live = blocks.mix(keys[0], real, quantized, settings.float_share)
    weight = jax.random.choice(keys[1], drawn)
    outputs = [
      segments.step(i, widths.rule(trained, weight, k))(network.params, live) for k in range(3)
    ]
    blended = blocks.blend(outputs, settings.shares)
    value = blocks.distillation(after, outputs, blended, settings.gammas)
    beta = rounding.beta_at(done, settings.steps, settings.warmup)
    undecided = sum(rounding.regularizer(v, beta) for v in trained["v"].values())
    late = done >= settings.warmup * settings.steps
    value += jnp.where(late, settings.regularizer * undecided, 0.0)
    return value, (done + 1, {})

  return loss


@dataclasses.dataclass(frozen=True)
class _Draws:
  """`loop.Data`: batches of what crosses a block's ends, drawn with replacement."""

  real: Sequence[Any]
  quantized: Sequence[Any]
  after: Sequence[Any]
  steps: int
  seed: tuple[int, int]

  def epoch(self, epoch: int) -> Iterator[Any]:
    rng = np.random.default_rng((*self.seed, epoch))
    join = lambda parts: jax.tree.map(lambda *a: np.concatenate(a), *parts)
    whole = [join(parts) for parts in (self.real, self.quantized, self.after)]
    size = len(jax.tree.leaves(self.real[0])[0])
    count = size * len(self.real)
    for _ in range(self.steps):
      rows = rng.choice(count, size, replace=False)
      yield tuple(jax.tree.map(lambda a, rows=rows: a[rows], tree) for tree in whole)
