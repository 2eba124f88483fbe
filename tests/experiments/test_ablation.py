"""Gains over greedy: paired over images, each with its mean over the seeds."""

import numpy as np
import pytest
from ml_collections import config_dict

from experiments import ablation

IMAGES = 200


@pytest.fixture
def folders(tmp_path):
  """Two seeds; the second has no row of `evolution`."""
  rng = np.random.default_rng(0)
  for seed in (0, 1):
    folder = tmp_path / f"seed{seed}"
    (folder / "correct").mkdir(parents=True)
    greedy = rng.random(IMAGES) < 0.7
    np.save(ablation._correct(folder, "greedy", 0.5), greedy)
    np.save(ablation._correct(folder, "gram", 0.5), greedy | (rng.random(IMAGES) < 0.1))
    if seed == 0:
      np.save(ablation._correct(folder, "evolution", 0.5), greedy)
  return [tmp_path / "seed0", tmp_path / "seed1"]


def test_gain_is_paired_over_images(folders):
  load = lambda folder, method: np.load(ablation._correct(folder, method, 0.5)).astype(float)
  each = [load(f, "gram") - load(f, "greedy") for f in folders]
  gain, error, seeds = ablation._gain(folders, "gram", 0.5)
  assert seeds == 2
  assert gain == pytest.approx(100 * np.mean([e.mean() for e in each]))
  mean = (each[0] + each[1]) / 2
  assert error == pytest.approx(100 * np.sqrt(mean.var(ddof=1) / IMAGES))
  # Seeds that were each other's copies would add nothing.
  assert ablation._gain([folders[0]] * 3, "gram", 0.5)[:2] == pytest.approx(
    ablation._gain(folders[:1], "gram", 0.5)[:2]
  )


def test_rows_that_are_not_there_are_left_out(folders):
  assert ablation._gain(folders, "gram", 0.25) is None
  assert ablation._gain(folders, "evolution", 0.5) == (0.0, 0.0, 1)
  config = config_dict.create(
    ablation={
      "methods": ("random", "greedy", "evolution", "gram"),
      "ratios": (0.25, 0.5),
      "random_ratios": (0.5,),
    }
  )
  lines = ablation._gains(config, folders).splitlines()[4:]
  assert [[cell.strip() for cell in line.split("|")[1:4]] for line in lines] == [
    ["evolution", "50 %", "1"],
    ["gram", "50 %", "2"],
  ]
  assert lines[0].count("—") == 1  # no error, no ratio to it
