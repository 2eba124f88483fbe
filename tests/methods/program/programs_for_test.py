"""Small random bit width programs, and their solutions by trying everything."""

import dataclasses
import itertools
import math

import numpy as np
from hypothesis import strategies as st

from flexiq_jax.methods.program import Choices, Problem


def everything(problem):
  """(bits, objective, costs) of all allowed choices, from the definition, in plain Python."""
  choices, found = problem.choices, []
  offsets = np.cumsum((0, *map(len, choices.bits)))
  for widths in itertools.product(*choices.bits):
    bits = dict(zip(choices.names, widths, strict=True))
    if any(len({bits[name] for name in layers}) > 1 for layers in choices.tied):
      continue
    k = [offsets[i] + choices.bits[i].index(w) for i, w in enumerate(widths)]
    if problem.objective.ndim == 1:
      value = math.fsum(problem.objective[a] for a in k)
    else:
      value = math.fsum(problem.objective[a, b] for a in k for b in k)
    costs = {name: math.fsum(cost[a] for a in k) for name, cost in choices.costs.items()}
    found.append((bits, value, costs))
  return found


def within(costs, limits):
  return all(costs[name] <= limit + 1e-9 * abs(limit) for name, limit in limits.items())


def least(problem):
  """The least objective of all choices that meet the limits; inf where none does."""
  allowed = (v for _, v, costs in everything(problem) if within(costs, problem.limits))
  return min(allowed, default=math.inf)


def between(choices, cost, share):
  """The cost of all layers at their lowest bits plus a share of the way to the highest."""
  low, high = (float(choices.costs[cost] @ choices.pick(choices.uniform(w))) for w in (min, max))
  return low + share * (high - low)


def random_problem(seed, kind, *, layers=4, limits=1, tied=False, share=0.5):
  """A program whose layers have 1 to 3 bit widths; costs are whole numbers and fractions.

  Args:
    seed: decides all numbers.
    kind: "linear", "psd" (of low rank) or "indefinite".
    layers: I.
    limits: how many costs are limited, of 2.
    tied: ties two layers.
    share: where the limits are between all lowest and all highest bits.
  """
  rng = np.random.default_rng(seed)
  names = [f"layer{i}" for i in range(layers)]
  sets = [(2, 4, 8), (4, 8), (8, 4), (2, 8, 3)]
  bits = [sets[rng.integers(len(sets))] for _ in names]
  if layers > 3:
    bits[3] = (8,)
  size = [rng.integers(1, 50) * np.array(b) for b in bits]
  time = [rng.random() * np.sort(rng.random(len(b)))[np.argsort(np.argsort(b))] for b in bits]
  choices = Choices.create(
    names,
    bits,
    {"size": size, "time": time, "free": size},
    tied=[names[:2]] if tied else (),
  )
  n = choices.total
  noise = np.sqrt([16 / 4**b for layer in bits for b in layer])
  if kind == "linear":
    objective = rng.normal(size=n)
  elif kind == "psd":
    effects = rng.normal(size=(n, 3)) * noise[:, None]
    objective = effects @ effects.T
  else:
    objective = rng.normal(size=(n, n))
    objective = objective + objective.T
  used = ["size", "time"][:limits]
  return Problem(
    choices=choices,
    objective=objective,
    limits={name: between(choices, name, share) for name in used},
  )


def looser(problem, factor):
  return dataclasses.replace(
    problem, limits={name: limit * factor for name, limit in problem.limits.items()}
  )


problems = st.builds(
  random_problem,
  seed=st.integers(0, 2**31),
  kind=st.sampled_from(["linear", "psd", "indefinite"]),
  layers=st.integers(3, 5),
  limits=st.integers(0, 2),
  tied=st.booleans(),
  share=st.floats(0, 1),
)
