"""CLADO's losses on a model: every (layer, bits) alone and every pair of them, forward passes only.

    measurement = LayerLosses(network, stacks, names)
    choices = Choices.create(measurement.names, stacks.bits, {"size": ...})
    g = matrix.matrix(choices, measurement.measure(examples))

All other layers stay in floating point (arXiv 2307.05657, section 3, and its code). What makes it
fast is in suffixes.py. On large models it still takes hours, so a measurement says what it costs
before it starts and keeps its sums in checkpoints.
"""

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from flexiq_jax.methods.clado.matrix import Losses
from flexiq_jax.methods.clado.suffixes import Suffixes
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.layerwise import Stacks
from flexiq_jax.network import Network
from flexiq_jax.runs.checkpoint import Checkpoints

Array = Any
Show = Callable[[str], None]


class LayerLosses:
  """Measures CLADO's losses of one model; compiled once for all examples.

  Attributes:
    names: the layers to choose for, in execution order.
    forwards: cost of a measurement in forward passes over its examples, by MACs.
    plain_forwards: what it would be with a whole pass for each single and pair.
  """

  def __init__(
    self,
    network: Network,
    stacks: Stacks,
    names: Sequence[str],
    *,
    loss: str = "cross_entropy",
    block: int = 64,
    pairs: bool = True,
  ):
    """Plans the measurement.

    Args:
      network: the float model; its result is `[n, K]`.
      stacks: all of its layers, at every width.
      names: layers to choose for, in execution order.
      loss: `cross_entropy`, or `kl` from the float model's prediction.
      block: examples in one forward pass.
      pairs: whether pairs are measured, too; without, all layers cost half a forward pass each.

    Raises:
      ValueError: an unknown loss, no example in a block, stacks or names that do not fit the model.
    """
    if block < 1:
      raise ValueError(f"block: {block}; at least 1 example is accepted")
    self._suffixes = Suffixes(network, stacks, names, loss)
    self._block, self._pairs, self.names = block, pairs, self._suffixes.names
    widths, count, tails = len(stacks.bits), len(self.names), self._suffixes.tails
    later = tails[::-1].cumsum()[::-1] - tails
    both = widths**2 if pairs else 0
    self._work = widths * tails + both * later  # of the rows; see `Suffixes.row`
    self.forwards = 2 + float(self._work.sum())
    self.plain_forwards = 1 + widths * count + both * count * (count - 1) // 2

  def describe(self, examples: int) -> str:
    """What a measurement costs, for the user, in one line."""
    how = "alone and in pairs" if self._pairs else "alone"
    return (
      f"{self.plain_forwards} losses of {len(self.names)} layers, {how}, on {examples} "
      f"examples: as much as {self.forwards:.0f} forward passes of the {examples} examples"
    )

  def measure(
    self,
    examples: Examples,
    *,
    checkpoints: Checkpoints | None = None,
    every: float = 60.0,
    show: Show | None = None,
    report: Callable[[float], None] | None = None,
  ) -> Losses:
    """Mean losses over examples.

    Args:
      examples: of the training set; `kl` does not read their labels.
      checkpoints: where unfinished sums are kept; a measurement goes on from the newest.
      every: least seconds from one checkpoint to the next.
      show: called with the cost before it starts, then with a line every ten seconds or so.
      report: called with the share of the work that is done, after each layer of each block.

    Returns:
      Losses in the order of `Choices.create(names, stacks.bits, ...)`; pairs that were not measured
      are nan.

    Raises:
      ValueError: losses that are not finite, or a checkpoint of another model, quantizer, data set
        or setting.
    """
    size = min(self._block, len(examples))
    made_from = self._made_from(examples, size) if checkpoints else {}
    done, sums = self._restore(checkpoints, made_from)
    count, blocks = len(self.names), -(-len(examples) // size)
    track = _Track(np.tile(self._work, blocks), done, show, report)
    if show:
      show(self.describe(len(examples)) + (f"; {track.share(done):.0%} is done" if done else ""))
    saved = time.monotonic()
    for block, (x, labels, used) in enumerate(examples.blocks(size)):
      if block < done // count:
        continue
      logits, live = self._suffixes.start(x)
      kl = self._suffixes.loss == "kl"
      target = logits if kl else labels
      for i in range(count):
        row = block * count + i
        if row >= done:
          if i == 0:
            sums["base"] += _total(self._suffixes.base(logits, target), used)
          row_losses = self._suffixes.row(i, live, target, self._pairs)
          singles, pairs = (_total(a, used) for a in row_losses)
          if not (np.isfinite(singles).all() and np.isfinite(pairs).all()):
            raise ValueError(f"losses: not finite with layer {self.names[i]} quantized")
          sums["singles"][i] += singles
          sums["pairs"][i, :, i + 1 :] += pairs
          last = row + 1 == blocks * count
          if checkpoints and (last or time.monotonic() - saved >= every):
            checkpoints.save(row + 1, sums, {"made_from": made_from})
            saved = time.monotonic()
          track(row + 1, f"block {block + 1} of {blocks}, layer {self.names[i]}")
        if i + 1 < count:
          live = self._suffixes.pass_by(i, live)
    return self._losses(sums, len(examples))

  def _losses(self, sums: dict[str, np.ndarray], examples: int) -> Losses:
    count, widths = sums["singles"].shape
    later = np.triu(np.full((count, count), self._pairs), 1)[:, None, :, None]
    pairs = np.where(later, sums["pairs"] / examples, np.nan)
    return Losses(
      base=float(sums["base"]) / examples,
      singles=sums["singles"].ravel() / examples,
      pairs=pairs.reshape(count * widths, count * widths),
    )

  def _made_from(self, examples: Examples, block: int) -> dict[str, Any]:
    """What the losses depend on, by the names that a user has for them."""
    s = self._suffixes
    return {
      "model": _digest(s.params),
      "quantizer": _digest((s.stacks, [*s.stacks.bits], [*s.stacks.activation_bits])),
      "data set": _digest((examples.x, examples.labels)),
      "layers": [*self.names],
      "loss": s.loss,
      "block": block,
      **({} if self._pairs else {"pairs": False}),  # which older checkpoints do not name
    }

  def _restore(
    self, checkpoints: Checkpoints | None, made_from: dict[str, Any]
  ) -> tuple[int, dict[str, np.ndarray]]:
    """(number of rows that are done, their sums)."""
    count, widths = len(self.names), len(self._suffixes.stacks.bits)
    sums = {
      "base": np.zeros(()),
      "singles": np.zeros((count, widths)),
      "pairs": np.zeros((count, widths, count, widths)),
    }
    if checkpoints is None:
      return 0, sums
    remedy = f"remove {checkpoints.directory} or name another workdir"
    try:
      found = checkpoints.restore_latest(sums)
    except ValueError as error:
      raise ValueError(f"{error}. If it is of other layers or bit widths: {remedy}") from error
    if found is None:
      return 0, sums
    theirs = found.metadata.get("made_from", {})
    if wrong := [n for n in {**made_from, **theirs} if theirs.get(n) != made_from.get(n)]:
      raise ValueError(f"checkpoint: sensitivities of another {' and '.join(wrong)}; {remedy}")
    # What was read may not be writable.
    return found.step, {name: np.array(found.tree[name]) for name in sums}


class _Track:
  """Says how far a measurement is."""

  def __init__(self, work: np.ndarray, done: int, show: Show | None, report: Any):
    self._done = np.concatenate([[0.0], work.cumsum() / work.sum()])
    self._first, self._show, self._report = done, show, report
    self._start = self._said = time.monotonic()

  def share(self, rows: int) -> float:
    return float(self._done[rows])

  def __call__(self, rows: int, where: str) -> None:
    now, share, first = time.monotonic(), self.share(rows), self.share(self._first)
    if self._show and now - self._said >= 10:
      self._said = now
      left = (now - self._start) / (share - first) * (1 - share)
      self._show(f"sensitivities {share:.0%} ({where}), about {left:.0f} s left")
    if self._report:
      self._report(share)


def _total(losses: np.ndarray, used: np.ndarray) -> np.ndarray:
  """Sums over the examples (last dimension) that count, float64."""
  return np.asarray(losses, np.float64)[..., used].sum(axis=-1)


def _digest(tree: Any) -> str:
  """A number that tells trees of arrays apart."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
    array = np.ascontiguousarray(leaf)
    sha.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
    sha.update(array.data)
  return sha.hexdigest()
