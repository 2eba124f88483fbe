"""Evolutionary search over orders: the operators of FlexiQ's Algorithm 1 (docs/flexiq.md, step E).

The paper evolves one bit flag per channel: mutation exchanges channels inside a layer, crossover
moves the 4-bit share between layers, and fitness is the distance to the 8-bit model's output. Here
an individual is a whole order, as keys (keys.py), and operators and rates are our choice.

| symbol | meaning |
|---|---|
| P | individuals in the population |
| T, L, V | channel groups, layers (of J_l groups each), levels scored at once |
| key, keys | a random key of JAX; the keys of an individual, float32 `[T]` |

    encoding = Encoding.create(space, scores, [0.5])
    keys = seeds(seeds_key, encoding, settings, [greedy(space, scores)])
    state = init(key, keys, fitness(jax.vmap(decode, (None, 0))(encoding, keys)))
    for _ in range(generations):
      state, offspring, masks, differ = ask(state, encoding, settings)
      state = tell(state, offspring, fitness(masks), settings)
    best = Schedule(space, order_of(encoding, state.keys[0]))

`fitness` is the caller's: masks `[N, V, T]` -> `[N]`, smaller is better. Operators are written for
one individual. A generation depends on the state alone, and none compiles anew.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from flexiq_jax.search.evolution.keys import (
  Encoding,
  Order,
  decode,
  keys_of,
  normalize,
  read,
)
from flexiq_jax.search.settings import EvolutionSettings

Array = Any


@struct.dataclass
class Population:
  """A population.

  Attributes:
    key: typed random key, of the next generation.
    keys: float32 `[P, T]`, normalized, best first.
    fitness: float32 `[P]`, ascending; inf where it was NaN.
    generation: int32 scalar, 0 at first.
  """

  key: Array
  keys: Array
  fitness: Array
  generation: Array


def seeds(
  key: Array, encoding: Encoding, settings: EvolutionSettings, orders: Sequence[Order] = ()
) -> Array:
  """A first population: given orders, then equal thirds of three kinds.

  Noisy greedy: scores times log-normal factors. Layered: at any ratio each layer has about the same
  share of its groups in 4 bits, those of smallest score per cost. Random: any order.

  Args:
    key: random key.
    encoding: of the space; its frozen groups come first in all seeds.
    settings: `population` and `noise` are read.
    orders: int `[T]` each, as greedy's.

  Returns:
    float32 `[P, T]`, normalized.

  Raises:
    ValueError: more orders than the population holds, or one that is not of all T groups.
  """
  total, left = encoding.total, settings.population - len(orders)
  if left < 0:
    raise ValueError(f"orders: {len(orders)} do not fit in a population of {settings.population}")
  given = np.zeros((len(orders), total), np.float32)
  for number, order in enumerate(orders):
    if np.shape(order) != (total,):
      raise ValueError(f"orders: number {number} has shape {np.shape(order)}, expected ({total},)")
    given[number] = keys_of(order)
  noisy_key, layered_key, random_key = jax.random.split(key, 3)
  noisy, layered, anyhow = (((left + 2 - kind) // 3, total) for kind in range(3))
  place, size = _places(encoding)  # a draw decides between layers at the same place
  keys = [
    given,
    encoding.log_score[None] + settings.noise * jax.random.normal(noisy_key, noisy),
    (place[None] + jax.random.uniform(layered_key, layered)) / size[None],
    jax.random.uniform(random_key, anyhow),
  ]
  return jax.vmap(normalize, (None, 0))(encoding, jnp.concatenate(keys))


def select_parents(key: Array, fitness: Array, settings: EvolutionSettings) -> Array:
  """Two tournaments: of `tournament` different individuals the one of least fitness.

  Args:
    key: random key.
    fitness: `[P]`, no NaN.
    settings: `tournament` is read.

  Returns:
    int32 `[2]`; may be the same twice, whose child is then a mutation of it.
  """

  def winner(key: Array) -> Array:
    drawn = jax.random.choice(key, len(fitness), (settings.tournament,), replace=False)
    return drawn[jnp.argmin(fitness[drawn])]

  return jax.vmap(winner)(jax.random.split(key))


def crossover(key: Array, encoding: Encoding, a: Array, b: Array) -> Array:
  """Takes the keys of each layer from `a` or from `b`, by a fair coin.

  Args:
    key: random key.
    encoding: of the space.
    a: `[T]`, normalized; so frozen groups have the same keys in both.
    b: the same.

  Returns:
    `[T]`, not normalized: groups of different layers may have the same key.
  """
  from_a = jax.random.bernoulli(key, shape=(len(encoding.sizes),))
  return jnp.where(from_a[encoding.layer], a, b)


def mutate(key: Array, encoding: Encoding, settings: EvolutionSettings, keys: Array) -> Array:
  """Swaps keys of groups in the prefix with keys of groups of the same layer outside of it.

  First the level is drawn whose prefix it is, then layers, at least one if any has free groups on
  both sides; then the number of swaps in each layer, uniform in 1..max(1, swap_share J_l); then the
  groups, without replacement: in the prefix in proportion to their score per cost, so that bad ones
  leave, outside in proportion to its inverse.

  Where costs in a layer differ (its last group may be short) a swap changes the cost of the groups
  that it moves; `decode` then cuts at another place, and the budget holds.

  Args:
    key: random key.
    encoding: of the space; its frozen groups take no part.
    settings: `layer_rate` and `swap_share` are read.
    keys: `[T]`.

  Returns:
    `[T]`, the same numbers in each layer.
  """
  level_key, layer_key, swap_key, group_key = jax.random.split(key, 4)
  layers, groups = len(encoding.sizes), jnp.arange(encoding.total)
  level = jax.random.randint(level_key, (), 0, len(encoding.thresholds))
  inside = decode(encoding, keys)[level]

  # Segments 2 l and 2 l + 1 are the free groups of layer l inside and outside of the prefix;
  # segment 2 L are the frozen ones, whose partners in 2 L + 1 do not exist.
  side = 2 * encoding.layer + jnp.where(inside, 0, 1)
  segment = jnp.where(encoding.frozen, 2 * layers, side)
  members = jnp.zeros(2 * layers + 2, jnp.int32).at[segment].add(1)
  pairs = members.reshape(-1, 2).min(axis=1)[:-1]

  # The layer of the smallest draw is mutated at any rate.
  draw = jnp.where(pairs > 0, jax.random.uniform(layer_key, (layers,)), jnp.inf)
  chosen = (draw < settings.layer_rate) | (draw == draw.min())
  # 0.29 of 100 groups are 29, although 0.29 * 100 is less in binary.
  most = [max(1, math.floor(settings.swap_share * size + 1e-6)) for size in encoding.sizes]
  swaps = jax.random.randint(swap_key, (layers,), 1, np.array(most) + 1)
  swaps = jnp.append(jnp.where(chosen, jnp.minimum(swaps, pairs), 0), 0)

  # Gumbel top-k in all segments with one sort: the j-th of a segment swaps with the j-th of its
  # partner. Frozen groups and those after the last swap stay.
  weight = jnp.where(inside, encoding.log_score, -encoding.log_score)
  drawn = weight + jax.random.gumbel(group_key, (encoding.total,))
  segment, _, group = jax.lax.sort((segment, -drawn, groups), num_keys=3)
  starts = jnp.cumsum(members) - members
  j = groups - starts[segment]
  source = jnp.where(j < swaps[segment // 2], starts[segment ^ 1] + j, groups)
  return keys.at[group].set(keys[group[source]])


@jax.jit
def init(key: Array, keys: Array, fitness: Array) -> Population:
  """Generation 0.

  Args:
    key: typed random key, from which all generations follow.
    keys: `[P, T]`, normalized, as from `seeds`.
    fitness: `[P]`; NaN counts as inf.

  Raises:
    ValueError: not one fitness for each individual.
  """
  if fitness.shape != keys.shape[:1]:
    raise ValueError(f"fitness: shape {fitness.shape} for keys of shape {keys.shape}")
  return _ascending(key, keys, fitness, jnp.zeros((), jnp.int32))


@functools.partial(jax.jit, static_argnames="settings")
def ask(
  state: Population, encoding: Encoding, settings: EvolutionSettings
) -> tuple[Population, Array, Array, Array]:
  """Makes offspring: tournaments, crossover, mutation.

  Args:
    state: the population.
    encoding: of the space.
    settings: static.

  Returns:
    The state, with a new random key; offspring, float32 `[P - elites, T]`, normalized; its masks,
    bool `[P - elites, V, T]`; and bool `[P - elites]`, whether they differ from the masks of both
    parents.

  Raises:
    ValueError: the population is not of the settings' size or not of the encoding's groups.
  """
  expected = (settings.population, encoding.total)
  if state.keys.shape != expected:
    raise ValueError(f"state: keys of shape {state.keys.shape}, expected {expected}")
  key, offspring_key = jax.random.split(state.key)
  parents_masks = jax.vmap(decode, (None, 0))(encoding, state.keys)

  def child(key: Array) -> tuple[Array, Array, Array]:
    select_key, cross_key, mutate_key = jax.random.split(key, 3)
    parents = select_parents(select_key, state.fitness, settings)
    crossed = crossover(cross_key, encoding, *state.keys[parents])
    keys, masks = read(encoding, mutate(mutate_key, encoding, settings, crossed))
    differ = jnp.any(masks[None] != parents_masks[parents], axis=(1, 2)).all()
    return keys, masks, differ

  offspring = settings.population - settings.elites
  children = jax.vmap(child)(jax.random.split(offspring_key, offspring))
  return dataclasses.replace(state, key=key), *children


@functools.partial(jax.jit, static_argnames="settings")
def tell(
  state: Population, offspring: Array, fitness: Array, settings: EvolutionSettings
) -> Population:
  """The next generation: the elites of this one and all offspring. The best never gets worse.

  Args:
    state: from `ask`.
    offspring: `[P - elites, T]`, from `ask`.
    fitness: `[P - elites]`; NaN counts as inf.
    settings: static.

  Raises:
    ValueError: offspring or fitness of another shape.
  """
  expected = (settings.population - settings.elites, state.keys.shape[1])
  if offspring.shape != expected or fitness.shape != expected[:1]:
    raise ValueError(
      f"offspring, fitness: shapes {offspring.shape} and {fitness.shape}, expected {expected} and "
      f"{expected[:1]}"
    )
  keys = jnp.concatenate([state.keys[: settings.elites], offspring])
  fitness = jnp.concatenate([state.fitness[: settings.elites], fitness.astype(jnp.float32)])
  return _ascending(state.key, keys, fitness, state.generation + 1)


def _places(encoding: Encoding) -> tuple[Array, Array]:
  """Of each group its place in its layer, 0..J_l - 1, frozen ones first, then by score; and J_l."""
  groups, sizes = jnp.arange(encoding.total), np.array(encoding.sizes)
  keys = (encoding.layer, encoding.fixed, encoding.log_score, groups)
  order = jax.lax.sort(keys, num_keys=4)[3]
  starts = jnp.asarray(np.cumsum(sizes) - sizes)
  place = jnp.zeros_like(groups).at[order].set(groups) - starts[encoding.layer]
  return place, jnp.asarray(sizes)[encoding.layer]


def _ascending(key: Array, keys: Array, fitness: Array, generation: Array) -> Population:
  best = jnp.argsort(fitness, stable=True)  # puts NaN after inf
  fitness = fitness[best].astype(jnp.float32)
  return Population(
    key=key,
    keys=keys[best],
    fitness=jnp.where(jnp.isnan(fitness), jnp.inf, fitness),
    generation=generation,
  )
