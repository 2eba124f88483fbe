"""How much a channel group alone disturbs its own layer's output when it goes to 4 bits.

Both scores are relative to the layer's output energy, so that groups of different layers compare
(docs/flexiq.md, step D).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flexiq_jax.orders.space import Space


def exact_scores(space: Space, errors: Mapping[str, tuple[np.ndarray, float]]) -> np.ndarray:
  """Scores from measured errors.

  Args:
    space: the channel groups.
    errors: layer name -> (`[J]` sum |X_g W_g - X4_g W4_g|^2, sum |X W|^2), same calibration data.

  Returns:
    float64 `[T]`.
  """
  relative = {n: e / max(energy, 1e-30) for n, (e, energy) in errors.items()}
  return space.join(relative)


def range_scores(space: Space, groups: Mapping[str, Any]) -> np.ndarray:
  """Closed-form scores from value ranges alone: no pass over data.

  Rounding at shift e leaves a uniform error of variance `v(e) = (4^e + 2) / 12` code steps squared,
  v(0) = 0. With independent channels `E = E[x^2] v(e_w) step_w^2 + E[w^2] v(e_x)`, and the layer's
  energy is the sum of `E[x^2] E[w^2]`. Saturation is not seen.

  Args:
    space: the channel groups.
    groups: layer name -> object with `x_shift`, `w_shift`, `x_power`, `w_power`, `w_step` (see
      `grouping.Groups`).

  Returns:
    float64 `[T]`.
  """
  scores = {}
  for name, g in groups.items():
    members = np.array([len(c) for c in g.channels], np.float64)
    w_noise = _rounding_variance(g.w_shift).reshape(len(members), -1).mean(axis=1)
    x_noise = _rounding_variance(g.x_shift)
    error = (g.x_power * w_noise * g.w_step + x_noise * members * g.w_power) / members
    energy = (g.x_power * g.w_power / members).sum()
    scores[name] = error / max(energy, 1e-30)
  return space.join(scores)


def _rounding_variance(e: np.ndarray) -> np.ndarray:
  return np.where(e > 0, (4.0**e + 2) / 12, 0.0)
