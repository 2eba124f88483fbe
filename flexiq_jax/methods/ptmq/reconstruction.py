"""PTMQ's reconstruction: one block after the other, each kept once it is done.

A block takes what crosses its ends in the float model, and the mixed output of the block before
with its roundings made up. A killed run reads finished blocks back and repeats the one that it was
at, so what it gives is the same.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from flexiq_jax.graph import Segments
from flexiq_jax.methods.ptmq import block as blocks
from flexiq_jax.methods.ptmq import rounding
from flexiq_jax.methods.ptmq.settings import PtmqSettings
from flexiq_jax.methods.start import Start
from flexiq_jax.network import Network
from flexiq_jax.quant import rules
from flexiq_jax.runs import files
from flexiq_jax.runs.progress import Progress
from flexiq_jax.training import loop

Array = Any


class Reconstruction:
  """The blocks of one model, one after the other."""

  def __init__(
    self,
    start: Start,
    settings: PtmqSettings,
    segments: Segments,
    layers: Mapping[int, Sequence[str]],
    widths: blocks.Widths,
    note: Callable[[float, float], None],
  ):
    """Keeps what is needed.

    Args:
      start: what the method starts from.
      settings: of the method.
      segments: the model, cut into blocks.
      layers: number of each block with layers to lower -> these layers.
      widths: all layers.
      note: called with the seconds that a block took, and the forward passes of all.
    """
    self._start, self._settings, self._network = start, settings, start.network
    self._segments, self._layers, self._widths, self._note = segments, layers, widths, note

  def run(self) -> dict[str, dict[str, Array]]:
    """`v` and `log_x` of each layer; blocks that a killed run finished are read back."""
    settings, segments = self._settings, self._segments
    found: dict[str, dict[str, Array]] = {"v": {}, "log_x": {}}
    params, size = self._network.params, settings.batch_size
    rows = np.arange(-(-len(self._start.x) // size) * size) % len(self._start.x)
    head = jax.jit(segments.head(rules.float_rule))
    real = [head(params, self._start.x[own]) for own in np.split(rows, len(rows) // size)]
    quantized, last = real, max(self._layers)
    with Progress("ptmq, blocks", last + 1) as progress:
      for i in range(last + 1):
        begin, note = time.monotonic(), ""
        step = jax.jit(segments.step(i, rules.float_rule))
        after = [step(params, live) for live in real]
        if names := self._layers.get(i):
          trained, log = self._train(i, names, real, quantized, after)
          note = f"loss {log[-1]['loss']:.4f}"
          for part, of in trained.items():
            found[part].update(of)
        if i < last:
          quantized, real = self._next(i, found, quantized), after
        cost = 3 * 3 * settings.steps * size / len(self._start.x)
        self._note(time.monotonic() - begin, cost)
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
      objective(self._network, self._segments, i, self._widths, settings),
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
    segments, network = self._segments, self._network
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
