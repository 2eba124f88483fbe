"""The demonstration: what it shows, and the easy variant, whose results are known."""

import json

import numpy as np
import pytest

from tests.experiments.test_run import rows
from tests.runs_for_test import start

# The order of ResNet-8 on the plain digits, stage.convolution#group, and which of the 445 images
# each row gets right, as they were found with seed 0 on an x86 CPU.
ORDER = """
  3.2#0 3.1#0 2.2#2 3.2#1 3.2#7 3.2#2 3.2#5 3.2#3 2.2#1 2.2#0 2.2#4 1.2#0 3.2#10 2.2#5 2.1#0
  1.1#2 1.2#1 3.2#6 2.2#3 3.2#13 3.2#4 2.1#1 3.2#14 3.1#3 1.1#1 3.2#12 1.1#0 1.2#2 2.1#3 2.1#2
  3.2#11 3.1#2 3.1#6 2.2#6 3.1#4 3.2#15 3.2#9 1.2#3 3.1#1 3.2#8 3.1#5 1.1#3 2.2#7 3.1#7
"""
RIGHT = {
  "float": [441],
  "uniform_int8": [441],
  "uniform_int4": [440],
  "flexiq_gram": [441, 440, 440, 441, 440],
  "flexiq_greedy": [440, 440, 440, 440],
  "flexiq_greedy_naive": [440, 439, 440, 439],
  "flexiq_greedy_range": [440, 440, 440, 439],
  "flexiq_random": [440, 440, 440, 440, 440, 440, 440, 440, 439],
}
MACS = {
  "flexiq_gram": [0, 0.25, 0.5, 0.75, 1],
  "flexiq_greedy": [0.275, 0.5125, 0.7625, 1],
  "flexiq_random": [0.25, 0.5, 0.75, 0.2625, 0.5, 0.7875, 0.275, 0.5, 0.75],
}


@pytest.mark.slow
def test_easy_digits_end_as_they_did(tmp_path):
  """Training differs in its last bits from CPU to CPU, so most of it is to be equal, not all."""
  ended = start("--config=configs/digits.py:easy", f"--workdir={tmp_path}")
  assert ended.status == 0, ended
  found = {}
  for row in rows(tmp_path):
    found.setdefault(row["method"], []).append(row)
  assert {method: len(of) for method, of in found.items()} == {m: len(n) for m, n in RIGHT.items()}
  for method, right in RIGHT.items():
    top1 = np.array([float(row["top1"]) for row in found[method]])
    np.testing.assert_allclose(top1, 100 * np.array(right) / 445, atol=0.25)
  for method, macs in MACS.items():
    shares = [float(row["mac_share"]) for row in found[method]]
    np.testing.assert_allclose(shares, macs, atol=0.051)
  recipe = json.loads((tmp_path / "recipe.json").read_text())
  order = [name.replace("layer", "").replace("/0/conv", ".") for name in recipe["order"]]
  expected = ORDER.split()
  assert sorted(order) == sorted(expected)
  assert np.mean([a == b for a, b in zip(order, expected, strict=True)]) > 0.8
  for level in (0.25, 0.5, 0.75):  # and within a level the order means little
    count = round(level * len(order))
    assert len({*order[:count]} & {*expected[:count]}) >= 0.9 * count


@pytest.mark.slow
def test_demo_shows_what_the_method_is_worth(tmp_path):
  ended = start("--config=configs/digits.py", f"--workdir={tmp_path}")
  assert ended.status == 0, ended
  found = {}
  for row in rows(tmp_path):
    found.setdefault((row["method"], row["ratio"]), []).append(float(row["top1"]))
    assert row["images"] == "4450"
  (int8,), (int4,) = found["uniform_int8", ""], found["uniform_int4", ""]
  assert int8 > 75 and int8 - int4 > 1.5
  above_greedy = []
  for ratio in ("0.5", "0.75"):
    (searched,), random = found["flexiq_gram", ratio], found["flexiq_random", ratio]
    assert searched > np.mean(random) + np.std(random, ddof=1)
    assert int4 < searched
    above_greedy.append(searched - found["flexiq_greedy", ratio][0])
  assert np.mean(above_greedy) > 0
  text = (tmp_path / "report.md").read_text()
  assert f"Top-1 is {int8:.2f} % in 8 bits and {int4:.2f} % in uniform INT4." in text
  assert "`flexiq_gram`: FlexiQ, Gram search" in text
