"""Which pictures a run has data for."""

import types

import numpy as np
import pytest

from experiments.shared import pictures
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import log

ROWS = [
  {"method": "float", "ratio": None, "seed": 0, "top1": 90.0},
  *({"method": "flexiq", "ratio": ratio, "seed": 0, "top1": 90 - ratio} for ratio in (0.0, 1.0)),
]


def drawn(workdir):
  """Names of the files that are drawn of a made-up model of one layer."""
  network = types.SimpleNamespace(layers=[types.SimpleNamespace(name="conv")])
  masks = lambda ratio: {"conv": np.array([ratio > 0.3, ratio > 0.6])}
  chosen = types.SimpleNamespace(schedule=types.SimpleNamespace(masks=masks))
  found = pictures.draw(workdir, "A model", ROWS, network, chosen, None, "l2")
  assert all(path.is_file() for _, path in found)
  return {path.name for _, path in found}


@pytest.mark.parametrize(
  ("methods", "expected"),
  [
    ((), False),
    # A search that met no finite fitness leaves no row of its own.
    (("greedy",), False),
    (("greedy", "gram"), True),
    (("gram",), True),
  ],
)
def test_a_search_is_drawn_if_it_has_steps(tmp_path, methods, expected):
  for method in methods:
    log.add(
      Workdir(tmp_path),
      **{"method": method, "ratio": 0.5, "seed": 0, "step": 0, "stage": method},
      **{"forwards": 1.0, "seconds": 2.0, "best": 3.0, "mean": 4.0},
    )
  assert drawn(tmp_path) == {"accuracy.png", "layers.png"} | ({"search.png"} if expected else set())
