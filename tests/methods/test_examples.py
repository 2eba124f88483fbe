"""Labelled examples: blocks of one size, and what does not fit."""

import numpy as np
import pytest

from flexiq_jax.methods.examples import Examples


@pytest.mark.parametrize("block", [1, 3, 5, 8])
def test_blocks_have_one_size_and_hold_each_example_once(block):
  x, labels = np.arange(10.0).reshape(5, 2), np.arange(5)
  blocks = [*Examples(x, labels).blocks(block)]
  assert {len(b) for b, _, _ in blocks} == {min(block, 5)}
  for kept, index in ((x, 0), (labels, 1)):
    parts = [np.asarray(b[index])[b[2]] for b in blocks]
    np.testing.assert_array_equal(np.concatenate(parts), kept)


@pytest.mark.parametrize("count", [0, 15])
def test_labels_that_do_not_fit_are_refused(count):
  with pytest.raises(ValueError, match=r"x, labels: .* expected \[n"):
    Examples(np.zeros((16 * (count > 0), 3)), np.zeros(count, int))
