"""What methods that train share: steps across passes, and widths that keep a budget."""

import itertools

import numpy as np
import pytest

from flexiq_jax.methods.trained import _Steps, within
from tests.methods.starts_for_test import Batches


@pytest.mark.parametrize("every", [1, 2, 3, 5, 7])
def test_steps_go_on_from_pass_to_pass(every):
  data = Batches(np.arange(14), np.arange(14) % 3, 4)  # three full batches a pass
  steps = _Steps(data, every)
  passes = (data.epoch(number) for number in itertools.count(1))
  expected = itertools.chain.from_iterable(passes)
  for epoch in range(1, 5):
    found = list(steps.epoch(epoch))
    assert len(found) == every
    for batch, other in zip(found, expected, strict=False):
      np.testing.assert_array_equal(batch[0], other[0])
      np.testing.assert_array_equal(batch[1], other[1])
    again = list(steps.epoch(epoch))
    assert all((a[0] == b[0]).all() for a, b in zip(found, again, strict=True))


def test_widths_within_a_budget():
  assert [within((4, 6, 8), budget) for budget in (4.0, 5.9, 6.0, 9.0)] == [4, 4, 6, 8]
  with pytest.raises(ValueError, match=r"budget: 3\.5 bits; the smallest that a width keeps is 4"):
    within((4, 6, 8), 3.5)
