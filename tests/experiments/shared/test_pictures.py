"""Which pictures a run has data for."""

import re
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
  found = pictures.draw(
    *(workdir, "A model", ROWS, network, chosen, None),
    **{"distance": "l2", "images": 400, "search_images": 16},
  )
  assert all(path.is_file() for _, path in found)
  return {path.name: caption for caption, path in found}


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
  captions = drawn(tmp_path)
  assert {*captions} == {"accuracy.png", "layers.png"} | ({"search.png"} if expected else set())
  if expected:
    assert "its 16 training images" in captions["search.png"]
    assert "on 400 other images" in captions["search.png"]


def test_band_is_the_standard_error_of_a_share(tmp_path, monkeypatch):
  given = {}
  draw = lambda path, curves, **options: given.update(curves=curves, **options) or path
  monkeypatch.setattr(pictures.plots, "accuracy_against_ratio", draw)
  int8 = {"method": "uniform_int8", "ratio": None, "seed": 0, "top1": 80.0, "images": 400}
  caption, _ = pictures.accuracy(tmp_path / "a.png", "T", ROWS, {"INT8": int8})
  assert given["error"] == ("INT8", pytest.approx(2.0))  # sqrt(0.8 * 0.2 / 400)
  assert "one binomial standard error (2.00 points) of 400 independent images" in caption
  caption, _ = pictures.accuracy(tmp_path / "a.png", "T", ROWS, {"float": ROWS[0]})
  assert given["error"] is None and "standard error" not in caption


def test_curves_reach_the_ends_that_are_the_same_model():
  rows = [
    *ROWS,
    {"method": "flexiq_greedy_naive", "ratio": 1.0, "seed": 0, "top1": 80.0},
    {"method": "flexiq_random", "ratio": 0.5, "seed": 7, "top1": 85.0},
  ]
  added = pictures._completed(rows)[len(rows) :]
  assert [(r["method"], r["ratio"], r["seed"], r["top1"]) for r in added] == [
    ("flexiq_greedy_naive", 0.0, 0, 90.0),
    ("flexiq_random", 0.0, 7, 90.0),
    ("flexiq_random", 1.0, 7, 89.0),
  ]


@pytest.mark.parametrize(
  ("activations", "weights", "said"),
  [
    (
      [9, 1, 0, 0, 0],
      [8, 2, 0, 0, 0],
      "the minority: .* 90 % of the former and 80 % of the latter",
    ),
    ([9, 1, 0, 0, 0], [1, 9, 0, 0, 0], "for one of the two. .* 90 % of the former and 10 % of the"),
    ([0, 9, 0, 0, 1], [1, 9, 0, 0, 0], "Here most do"),
  ],
)
def test_unused_bits_are_told_for_what_they_mean(activations, weights, said):
  counts = (np.array([part]) for part in (activations, weights))
  assert re.search(said, pictures._unused_caption(*counts))
