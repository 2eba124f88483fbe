"""Batches against a search of all prefixes, and who is too late."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import serving
from flexiq_jax.serving import batching

SIZE = 8


def brute_force(now, arrivals, examples, deadlines, seconds, delay):
  """(take, until) by trying every prefix."""
  prefixes = []
  for k in range(1, len(arrivals) + 1):
    total = sum(examples[:k])
    if total <= SIZE:
      due = min(deadlines[:k]) if deadlines is not None else math.inf
      prefixes.append((k, total, now + seconds[total] <= due))
  fits = len(prefixes)
  full = prefixes[-1][1] == SIZE or fits < len(arrivals)
  if not full and delay > 0:
    until = arrivals[0] + delay
    if deadlines is not None:
      until = min(until, min(deadlines[:fits]) - seconds[SIZE])
    if now < until:
      return 0, until
  fine = [(total / seconds[total], k) for k, total, in_time in prefixes if in_time]
  return (max(fine)[1] if fine else 1), None


@st.composite
def queues(draw):
  count = draw(st.integers(1, 12))
  gaps = draw(st.lists(st.integers(0, 4), min_size=count, max_size=count))
  arrivals = np.cumsum(gaps).astype(float)
  examples = np.array(draw(st.lists(st.integers(1, SIZE), min_size=count, max_size=count)))
  if draw(st.booleans()):
    examples = np.ones(count, int)
  deadlines = None
  if draw(st.booleans()):
    slack = draw(
      st.lists(st.sampled_from([1.0, 5.0, 20.0, math.inf]), min_size=count, max_size=count)
    )
    deadlines = arrivals + np.array(slack)
  steps = draw(st.lists(st.integers(0, 3), min_size=SIZE, max_size=SIZE))
  seconds = np.concatenate([[0.0], 1.0 + np.cumsum(steps)])
  now = float(arrivals[-1]) + draw(st.integers(0, 6))
  return now, arrivals, examples, deadlines, seconds, draw(st.sampled_from([0.0, 3.0, 30.0]))


@settings(max_examples=300, deadline=None)
@given(queues())
def test_plan_is_that_of_all_prefixes(case):
  now, arrivals, examples, deadlines, seconds, delay = case
  found = batching.plan(
    *(serving.Batching(size=SIZE, delay=delay), now, arrivals, examples, deadlines, seconds),
    batching.prefixes(seconds),
  )
  if (examples == 1).all():  # as engine and simulator say it
    rest = (deadlines, seconds, batching.prefixes(seconds))
    settings = serving.Batching(size=SIZE, delay=delay)
    assert batching.plan(settings, now, arrivals, None, *rest) == found
  take, until = brute_force(*case)
  assert found.take == take
  if take == 0:
    assert found.until == until > now
    assert found.need == SIZE


def test_a_batch_does_not_grow_into_the_next_padded_size():
  seconds = np.array([0, 1, 2, 2, 9, 9.0])  # 3 examples in 2 s, 4 and 5 in 9 s
  settings = serving.Batching(size=5)
  ones = np.ones(4, int)
  best = batching.prefixes(seconds)
  assert best == [0, 1, 2, 3, 3, 3]
  for count in (2, 3, 4):
    for examples in (ones[:count], None):
      plan = batching.plan(settings, 9.0, np.zeros(count), examples, None, seconds, best)
      assert plan.take == min(count, 3)


def test_hopeless_are_those_that_no_batch_of_their_own_saves():
  fastest = np.array([0.0, 1.0, 3.0])
  found = batching.hopeless(
    10.0, np.array([1, 1, 2, 2, 1]), np.array([11.0, 10.9, 13.0, 12.9, math.inf]), fastest
  )
  assert found.tolist() == [False, True, False, True, False]


@pytest.mark.parametrize("wrong", [{"size": 0}, {"size": 1.5}, {"delay": -1}, {"delay": math.inf}])
def test_wrong_settings_are_named(wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=rf"{name}: .* accepted"):
    serving.Batching(**wrong)
