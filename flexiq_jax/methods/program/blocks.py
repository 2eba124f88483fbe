"""A bit width program without ties, as the solvers see it.

Layers that are tied decide once, so they become one *block*; its options are the bit widths that
all of them may take. What interactions tied layers have falls on the option itself.

| symbol | meaning |
|---|---|
| J, m | blocks; options of all blocks, those of one block side by side |
| K | limits |
| z | float `[m]`, one-hot in each block |
| taken | int `[..., J]`, the number (in 0..m - 1) of the option that each block takes |
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

from flexiq_jax.methods.program.problem import Problem, Solution

# Sums of costs are compared with limits up to this share of the largest possible sum: a limit that
# was computed as a sum itself must not fail by the order of additions. Whole numbers below 1e11
# still compare exactly.
_ROUNDING = 1e-12


@dataclasses.dataclass(frozen=True)
class Blocks:
  """min linear . z + z' pairs z  with  costs z <= limits.

  Attributes:
    sizes: number of options of each block.
    member: bool `[n, m]`, the layers' options that an option of a block stands for.
    linear: float64 `[m]`.
    pairs: float64 `[m, m]`, symmetric; None in a linear program.
    names: names of the K limits.
    costs: float64 `[K, m]`.
    limits: float64 `[K]`.
  """

  sizes: tuple[int, ...]
  member: np.ndarray
  linear: np.ndarray
  pairs: np.ndarray | None
  names: tuple[str, ...]
  costs: np.ndarray
  limits: np.ndarray

  @classmethod
  def create(cls, problem: Problem) -> "Blocks":
    """Merges tied layers."""
    choices, columns, sizes = problem.choices, [], []
    width = np.concatenate(choices.bits)
    for layers, widths in choices.groups():
      own = np.isin(choices.layer, layers)
      columns += [own & (width == w) for w in widths]
      sizes.append(len(widths))
    member = np.stack(columns, axis=1)
    z, names = member.astype(np.float64), tuple(problem.limits)
    quadratic = np.ndim(problem.objective) == 2
    pairs = z.T @ ((problem.objective + problem.objective.T) / 2) @ z if quadratic else None
    costs = np.array([choices.costs[name] @ z for name in names])
    return cls(
      sizes=tuple(sizes),
      member=member,
      linear=np.zeros(len(z.T)) if quadratic else problem.objective @ z,
      pairs=pairs,
      names=names,
      costs=costs.reshape(len(names), len(z.T)),
      limits=np.array([problem.limits[name] for name in names], np.float64),
    )

  @property
  def starts(self) -> np.ndarray:
    """First option of each block, int `[J]`."""
    return np.cumsum((0, *self.sizes))[:-1]

  @property
  def block(self) -> np.ndarray:
    """Number of the block of each option, int `[m]`."""
    return np.repeat(np.arange(len(self.sizes)), self.sizes)

  @property
  def caps(self) -> np.ndarray:
    """The limits with room for rounding, float64 `[K]`."""
    most = np.maximum.reduceat(np.abs(self.costs), self.starts, axis=1).sum(axis=1)
    return self.limits + _ROUNDING * most

  def one_hot(self, taken: np.ndarray) -> np.ndarray:
    """`taken` -> z, float64 `[..., m]`."""
    z = np.zeros((*np.shape(taken)[:-1], len(self.linear)))
    np.put_along_axis(z, np.asarray(taken), 1.0, axis=-1)
    return z

  def taken(self, problem: Problem, bits: Mapping[str, int]) -> np.ndarray:
    """`taken`, int `[J]`, of bits that a plan of this program has."""
    x = problem.choices.pick(bits)
    return np.flatnonzero((self.member & x[:, None]).sum(axis=0) == self.member.sum(axis=0))

  def least(self, per_option: np.ndarray) -> np.ndarray:
    """The option of each block with the least of some numbers `[m]`, int `[J]`."""
    pieces = np.split(per_option, self.starts[1:])
    return self.starts + np.array([np.argmin(piece) for piece in pieces])

  def value(self, taken: np.ndarray) -> np.ndarray:
    """The objective, float64 `[...]`."""
    z = self.one_hot(taken)
    value = z @ self.linear
    return value if self.pairs is None else value + ((z @ self.pairs) * z).sum(axis=-1)

  def meets(self, taken: np.ndarray) -> np.ndarray:
    """Whether all limits hold, bool `[...]`."""
    return np.all(self.one_hot(taken) @ self.costs.T <= self.caps, axis=-1)

  def convex(self) -> bool:
    """Whether `pairs` is positive semi-definite up to rounding; a linear program is."""
    if self.pairs is None:
      return True
    eigenvalues = np.linalg.eigvalsh(self.pairs)
    return bool(eigenvalues[0] >= -1e-9 * max(abs(eigenvalues[-1]), abs(eigenvalues[0])))

  def solution(
    self, problem: Problem, taken: np.ndarray, *, bound: float, seconds: float, solver: str
  ) -> Solution:
    """The answer for the layers. Bounds above the objective can only be rounding; -inf is None."""
    if not self.meets(taken):
      raise RuntimeError(f"solver: {solver} broke a limit; this is a bug")
    choices, x = problem.choices, self.member[:, taken].any(axis=1)
    bits = dict(zip(choices.names, np.concatenate(choices.bits)[x].tolist(), strict=True))
    value = problem.value(bits)
    return Solution(
      bits=bits,
      objective=value,
      bound=min(float(bound), value) if np.isfinite(bound) else None,
      costs={name: float(cost @ x) for name, cost in choices.costs.items()},
      seconds=seconds,
      solver=solver,
    )
