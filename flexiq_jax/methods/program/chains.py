"""Simulated annealing of a bit width program: many chains at once, each polished at its end.

A move gives one block another option, or two blocks at once, so that one may pay for the other;
only moves that keep all limits are made. The best state of each chain then descends to a state that
no single change and no pair of changes improves.

| symbol | meaning |
|---|---|
| C | chains |
| J, m, K | blocks, options, limits (blocks.py) |
| slope | linear + 2 pairs z, `[C, m]` |
"""

import math
import time

import numpy as np

from flexiq_jax.methods.program.blocks import Blocks

_CHAINS = 32
_WARMEST = 0.5  # first temperature, in units of the median size of a change
_COLDEST = 0.01  # last one above zero, in units of the first
_WARM = 0.9  # share of the steps that have a temperature


def search(blocks: Blocks, start: np.ndarray, seed: int, time_limit: float) -> np.ndarray:
  """A plan of small objective.

  Args:
    blocks: the program.
    start: int `[J]`, `taken` of a plan that meets the limits.
    seed: decides the result, if there is time to finish.
    time_limit: seconds.

  Returns:
    `taken`, int `[J]`; not above `start`.
  """
  end = time.monotonic() + time_limit
  rng = np.random.default_rng(seed)
  tried = [start, *_anneal(blocks, start, rng, end)]
  tried = np.unique(np.array(tried), axis=0)
  tried = tried[np.argsort(blocks.value(tried), kind="stable")]
  polished = [_descend(blocks, tried[0], math.inf), *(_descend(blocks, t, end) for t in tried[1:])]
  return polished[int(np.argmin(blocks.value(np.array(polished))))]


def _anneal(blocks: Blocks, start: np.ndarray, rng, end: float) -> np.ndarray:
  """The best state of each chain, int `[C, J]`."""
  sizes, starts, caps = np.array(blocks.sizes), blocks.starts, blocks.caps
  free = np.flatnonzero(sizes > 1)
  if not len(free):
    return start[None]
  chain = np.arange(_CHAINS)
  taken = np.tile(start, (_CHAINS, 1))
  slope = np.tile(_slope(blocks, start), (_CHAINS, 1))
  spent = np.tile(blocks.costs[:, start].sum(axis=1), (_CHAINS, 1))
  value = np.zeros(_CHAINS)
  best, least = taken.copy(), value.copy()
  steps, warmest = int(np.clip(100 * len(free), 1000, 10_000)), 0.0
  for step in range(steps):
    if time.monotonic() > end:
      break
    draws = rng.random((4, _CHAINS))
    first = (draws[0] * len(free)).astype(int)
    # The second block is drawn by an offset from the first; with one block free it is not used.
    second = (first + 1 + (draws[1] * (len(free) - 1)).astype(int)) % len(free)
    both = (rng.random(_CHAINS) < 0.5) & (len(free) > 1)
    block = free[np.stack([first, second], axis=1)]
    old = taken[chain[:, None], block]
    turn = 1 + (draws[2:].T * (sizes[block] - 1)).astype(int)
    new = starts[block] + (old - starts[block] + turn) % sizes[block]
    index = np.concatenate([old, new], axis=1)
    sign = np.array([-1.0, -1.0, 1.0, 1.0]) * np.stack([np.ones(_CHAINS), both] * 2, axis=1)
    change = (np.take_along_axis(slope, index, axis=1) * sign).sum(axis=1)
    if blocks.pairs is not None:
      between = blocks.pairs[index[:, :, None], index[:, None]]  # [C, 4, 4]
      change += np.einsum("ci,cij,cj->c", sign, between, sign)
    paid = spent + (blocks.costs[:, index] * sign).sum(axis=2).T
    if step < 100:  # before that many, few changes have been seen
      warmest = max(warmest, _WARMEST * float(np.median(np.abs(change))))
    done = step / (_WARM * steps)
    temperature = warmest * _COLDEST**done if done < 1 else 0.0
    accepted = (paid <= caps).all(axis=1) & (change < -temperature * np.log1p(-rng.random(_CHAINS)))
    who = np.flatnonzero(accepted)
    if not len(who):
      continue
    value[who] += change[who]
    spent[who] = paid[who]
    taken[who, block[who, 0]] = new[who, 0]
    two = who[both[who]]
    taken[two, block[two, 1]] = new[two, 1]
    if blocks.pairs is not None:
      slope[who] += 2 * (sign[who, :, None] * blocks.pairs[index[who]]).sum(axis=1)
    better = value < least
    best[better], least[better] = taken[better], value[better]
  return best[blocks.meets(best)]  # sums that were updated step by step may be off by rounding


def _descend(blocks: Blocks, taken: np.ndarray, end: float) -> np.ndarray:
  """Makes the best change of one or two blocks until none improves."""
  block, caps = blocks.block, blocks.caps
  other = block[:, None] != block[None]
  while time.monotonic() < end:
    old = taken[block]  # [m], what an option would replace
    single = _slope(blocks, taken)
    single = single - single[old]
    change = single[:, None] + single[None]
    if blocks.pairs is not None:
      p = blocks.pairs
      alone = np.diag(p) + np.diag(p)[old] - 2 * p[np.arange(len(old)), old]
      single = single + alone
      cross = p - p[:, old] - p[old] + p[np.ix_(old, old)]
      change = single[:, None] + single[None] + 2 * cross
    extra = blocks.costs - blocks.costs[:, old]  # [K, m]
    left = caps - blocks.costs[:, taken].sum(axis=1)
    fits = other & (extra[:, :, None] + extra[:, None] <= left[:, None, None]).all(axis=0)
    change = np.where(fits, change, np.inf)
    single = np.where((extra <= left[:, None]).all(axis=0), single, np.inf)
    i, j = np.unravel_index(np.argmin(change), change.shape)
    moves = [int(np.argmin(single))] if single.min() <= change[i, j] else [int(i), int(j)]
    new = taken.copy()
    new[block[moves]] = moves
    before, after = blocks.value(taken), blocks.value(new)
    if not (blocks.meets(new) and after < before - 1e-12 * abs(before)):
      break
    taken = new
  return taken


def _slope(blocks: Blocks, taken: np.ndarray) -> np.ndarray:
  linear = blocks.linear
  return linear if blocks.pairs is None else linear + 2 * blocks.pairs[:, taken].sum(axis=1)
