"""Simulated annealing of a quadratic in flips, under a budget: the compiled part of `surrogate`.

A step draws K moves and makes the first one that is accepted. That is Metropolis's rule, since a
refused move changes nothing, but a step needs a single O(T) update.

| symbol | meaning |
|---|---|
| T, C, K | channel groups, chains, moves drawn in a step |
| s | flips, bool `[T]`: the groups that are on another side than in the base |
| gain | change of the quadratic; good moves have a negative one |
| slots | the groups, sorted by side in the base and in the mask, borders below |

    0       base inside       mid       base outside       end   frozen   T
    | still inside | outside now | inside now | still outside |           |
                  lo    the flipped groups   hi

So each kind of group can be drawn in O(1), and a group flips by an exchange at the border of its
half and a shift of that border.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

Array = Any

_DRAWN = 32  # K
_BLOCK = 256  # steps whose random numbers are drawn at once
_WARMEST = 0.5  # first temperature, in units of the median size of a gain
_COLDEST = 0.01  # last one above zero, in units of the first
_WARM = 0.9  # share of the steps that have a temperature; the others only descend


@struct.dataclass
class Model:
  """What the chains share.

  Attributes:
    gram: float32 `[T, T]`, in units that make its entries about 1.
    cost: int32 `[T]`.
    threshold: int32 scalar, the least cost of a mask.
    mid: int32 scalar, of the slots.
    end: int32 scalar, of the slots.
  """

  gram: Array
  cost: Array
  threshold: Array
  mid: Array
  end: Array


@struct.dataclass
class Chain:
  """State of a chain.

  Attributes:
    slots: int32 `[T]`, see above.
    lo: int32 scalar.
    hi: int32 scalar.
    h: float32 `[T]`, gradient + gram s.
    cost: int32 scalar, of the groups inside.
    gain: float32 scalar, since the start.
  """

  slots: Array
  lo: Array
  hi: Array
  h: Array
  cost: Array
  gain: Array


@struct.dataclass
class Proposals:
  """Proposed moves `[K]`: that in `leave` goes outside if `out`, that in `enter` inside if `into`.

  `cost` is the cost of the mask after the move; `allowed`, whether it keeps budget and limit.
  """

  leave: Array
  enter: Array
  out: Array
  into: Array
  cost: Array
  gain: Array
  allowed: Array


def propose(model: Model, chain: Chain, limit: Array, draws: Array) -> Proposals:
  """Draws moves: 80 % swaps, half of them with a flipped group; 10 % out; 10 % in.

  Without those swaps little could be drawn once `limit` is reached. The mask must stay reachable:
  above the threshold by less than its most expensive free group. The most
  expensive of the groups that enter or were drawn to leave stands for that group, so some moves
  that would be allowed are refused.

  Args:
    model: the model.
    chain: the state; its mask is reachable.
    limit: int32 scalar, how many free groups may be flipped.
    draws: float32 `[4, K]` in 0..1 (below 1).
  """
  lo, mid, hi, end = chain.lo, model.mid, chain.hi, model.end

  def pick(draw: Array, count: Array) -> Array:
    return jnp.floor(draw * count).astype(jnp.int32)

  kind, flipped = draws[0], lo + pick(draws[1], hi - lo)
  leave, enter = pick(draws[2], lo + hi - mid), lo + pick(draws[3], mid - lo + end - hi)
  leave = jnp.where(leave < lo, leave, leave + mid - lo)  # skips those that are outside
  enter = jnp.where(enter < mid, enter, enter + hi - mid)  # skips those that are inside
  with_flipped = (kind < 0.4) & (hi > lo)
  leave = jnp.where(with_flipped & (flipped >= mid), flipped, leave)
  enter = jnp.where(with_flipped & (flipped < mid), flipped, enter)
  out, into = kind < 0.9, (kind < 0.8) | (kind >= 0.9)

  i, j = chain.slots[leave], chain.slots[enter]
  a, b = _direction(chain, leave) * out, _direction(chain, enter) * into
  gain = 2 * (a * chain.h[i] + b * chain.h[j] + a * b * model.gram[i, j])
  gain += out * model.gram[i, i] + into * model.gram[j, j]
  cost = chain.cost - out * model.cost[i] + into * model.cost[j]

  some_inside, some_outside = lo + hi > mid, mid + end > lo + hi
  # The most expensive may be the one that leaves: if it cost more than there was to spare, the one
  # that enters costs more than there is now; if not, some other group does: the mask was reachable.
  dearest = jnp.maximum(jnp.max(jnp.where(some_inside, model.cost[i], 0)), into * model.cost[j])
  spare = cost - model.threshold
  allowed = (some_inside | ~out) & (some_outside | ~into) & (hi - lo + a + b <= limit)
  allowed &= (spare >= 0) & (spare < dearest)
  return Proposals(leave, enter, out, into, cost, gain, allowed)


def flip(model: Model, chain: Chain, slot: Array, do: Array) -> Chain:
  """Flips the group in a slot, if `do`; groups on the other side of the mask keep their slots.

  Does not touch `cost` and `gain`.
  """
  group, direction, low = chain.slots[slot], _direction(chain, slot) * do, slot < model.mid
  border = jnp.where(low, chain.lo - (direction > 0), chain.hi - (direction < 0))
  border = jnp.where(do, border, slot)
  return dataclasses.replace(
    chain,
    slots=chain.slots.at[slot].set(chain.slots[border]).at[border].set(group),
    lo=chain.lo - direction * low,
    hi=chain.hi + direction * ~low,
    h=chain.h + direction * model.gram[group],
  )


@functools.partial(jax.jit, static_argnames="steps")
def run(
  key: Array, model: Model, chain: Chain, limits: Array, steps: int
) -> tuple[Array, Array, Array]:
  """Anneals C chains from one state.

  The temperature falls geometrically from half the median size of the gains at the start to a
  hundredth of that, and is zero in the last tenth of the steps.

  Args:
    key: typed random key.
    model: the model.
    chain: the start, with a gain of 0.
    limits: int32 `[C]`, how many free groups may be flipped in each chain.
    steps: static; rounded up to whole blocks of 256.

  Returns:
    Of the best state of each chain `slots` `[C, T]`, `lo` `[C]` and `hi` `[C]`.
  """

  def one(key: Array, limit: Array) -> tuple[Array, Array, Array]:
    first_key, key = jax.random.split(key)
    moves = propose(model, chain, limit, jax.random.uniform(first_key, (4, 512)))
    sizes = jnp.where(moves.allowed & (moves.gain != 0), jnp.abs(moves.gain), jnp.nan)
    warmest = _WARMEST * jnp.nan_to_num(jnp.nanmedian(sizes))

    def step(carry, inputs):
      chain, best, least = carry
      number, draws = inputs
      done = number / (_WARM * steps)
      temperature = jnp.where(done < 1, warmest * _COLDEST**done, 0)
      moves = propose(model, chain, limit, draws[:4])
      accepted = moves.allowed & (moves.gain < -temperature * jnp.log1p(-draws[4]))
      move = jax.tree.map(lambda a: a[jnp.argmax(accepted)], moves)
      do = accepted.any()
      chain = flip(model, chain, move.leave, do & move.out)
      chain = flip(model, chain, move.enter, do & move.into)
      cost, gain = jnp.where(do, move.cost, chain.cost), chain.gain + do * move.gain
      chain = dataclasses.replace(chain, cost=cost, gain=gain)
      new = (chain.slots, chain.lo, chain.hi)
      best = jax.tree.map(lambda a, b: jnp.where(gain < least, a, b), new, best)
      return (chain, best, jnp.minimum(gain, least)), None

    def block(carry, number):
      draws = jax.random.uniform(jax.random.fold_in(key, number), (_BLOCK, 5, _DRAWN))
      numbers = number * _BLOCK + jnp.arange(_BLOCK)
      return jax.lax.scan(step, carry, (numbers, draws))[0], None

    start = (chain, (chain.slots, chain.lo, chain.hi), jnp.float32(0))
    return jax.lax.scan(block, start, jnp.arange(-(-steps // _BLOCK)))[0][1]

  return jax.vmap(one)(jax.random.split(key, len(limits)), limits)


def _direction(chain: Chain, slot: Array) -> Array:
  """1 where the group in a slot leaves the base if it flips, -1 where it comes back."""
  return jnp.where((slot >= chain.lo) & (slot < chain.hi), -1, 1)
