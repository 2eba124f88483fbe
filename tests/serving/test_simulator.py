"""The simulator against an engine that handles one event at a time, and its laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.serving_events import event_by_event
from flexiq_jax import serving
from flexiq_jax.serving import records, workloads

PROFILE = serving.modelled(int8=100, gain=1.6, fixed=0.02, sizes=(1, 2, 4, 8))
TARGET = 0.3
CASES = {
  "greedy": {},
  "delay": {"batching": serving.Batching(size=8, delay=0.05)},
  "small_queue": {"queue": 8},
  "deadline": {"deadline": 0.2},
  "impossible": {"deadline": 0.001},
  "all": {"batching": serving.Batching(size=6, delay=0.03), "queue": 6, "deadline": 0.15},
}


def arrivals(seed, rate=90):
  calm, busy = workloads.poisson(rate / 2, 4, seed), workloads.poisson(2 * rate, 2, seed + 1)
  return np.concatenate([calm, 4 + busy, 6 + workloads.poisson(rate / 3, 3, seed + 2)])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["load", "swapping", "fixed"])
def test_equals_one_event_at_a_time(case, name):
  settings = {"batching": serving.Batching(size=8), "queue": 64} | CASES[case]
  options = {
    "swapping": {"levels": (0.0, 1.0), "load_s": 0.1, "hold": 0.4},
    "fixed": {"ratio": 0.5},
  }
  controller = serving.create(name, PROFILE, target=TARGET, **options.get(name, {}))
  for seed in (0, 10):
    times = arrivals(seed)
    found = serving.simulate(times, controller, profile=PROFILE, **settings)
    ratio, start, finish, outcome, batch = event_by_event(
      *(times, controller, PROFILE, settings["batching"], settings["queue"]),
      settings.get("deadline"),
    )
    np.testing.assert_array_equal(found.outcome, outcome)
    np.testing.assert_array_equal(found.batch, batch)
    np.testing.assert_array_equal(found.ratio, ratio)
    np.testing.assert_allclose(found.start, start, rtol=1e-12)
    np.testing.assert_allclose(found.finish, finish, rtol=1e-12)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_equals_one_event_at_a_time_to_the_last_bit(data):
  draw = data.draw
  # Many come at once, others alone after a rest.
  gaps = draw(st.lists(st.sampled_from([0.0, 0.0, 0.004, 0.03, 0.2, 1.0]), min_size=1, max_size=80))
  times = np.cumsum(gaps)
  size = draw(st.sampled_from([1, 2, 8]))
  chosen = serving.Batching(size=size, delay=draw(st.sampled_from([0.0, 0.02])))
  queue = size + draw(st.sampled_from([0, 0, 1, 20]))
  deadline = draw(st.sampled_from([None, None, 0.03, 0.15]))
  name = draw(st.sampled_from(["load", "predictive"]))
  controller = serving.create(name, PROFILE, target=TARGET)
  found = serving.simulate(
    times, controller, profile=PROFILE, batching=chosen, queue=queue, deadline=deadline
  )
  plain = event_by_event(times, controller, PROFILE, chosen, queue, deadline)
  ours = (found.ratio, found.start, found.finish, found.outcome, found.batch)
  for one, other in zip(ours, plain, strict=True):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_lost_and_the_device_runs_one_batch_at_a_time(case):
  settings = {"batching": serving.Batching(size=8), "queue": 64} | CASES[case]
  controller = serving.create("load", PROFILE, target=TARGET)
  found = serving.simulate(arrivals(5), controller, profile=PROFILE, **settings)
  ran = found.outcome == records.ANSWERED
  assert (found.outcome != records.PENDING).all()
  assert (found.batch[ran] >= 0).all() and (found.batch[~ran] == -1).all()
  assert (found.start[ran] >= found.arrival[ran]).all()
  order = found.batch[ran].argsort(kind="stable")
  assert (np.diff(found.batch[ran][order]) <= 1).all()
  # In order of arrival, at one ratio in each batch, one batch after the other.
  assert (np.diff(found.batch[ran]) >= 0).all()
  for values in (found.ratio, found.start, found.finish):
    assert all(len(set(values[found.batch == b])) == 1 for b in set(found.batch[ran]))
  numbers, first = np.unique(found.batch[ran], return_index=True)
  assert (found.start[ran][first][1:] >= found.finish[ran][first][:-1] - 1e-12).all()
  assert np.bincount(found.batch[ran], minlength=1).max() <= settings["batching"].size
  if deadline := settings.get("deadline"):
    late = found.outcome == records.LATE
    assert late.any() == (case != "all") and late.all() == (case == "impossible")
    assert (found.latency[ran] <= deadline + 1e-9).all()
  assert len(numbers) == found.batch.max() + 1


def test_is_a_function_of_its_arguments():
  controller = serving.create("predictive", PROFILE, target=TARGET)
  one, two = (
    serving.simulate(arrivals(1), controller, profile=PROFILE, batching=serving.Batching(size=8))
    for _ in range(2)
  )
  for name in ("start", "finish", "ratio", "outcome", "batch"):
    np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


class Steps:
  """Ratio 0 at first, 1 from the first second on."""

  levels = (0.0, 1.0)

  def __init__(self, switch_s):
    self.switch_s = switch_s

  def start(self):
    return None

  def step(self, state, seen):
    return state, float(seen.now >= 1)


def test_a_change_of_the_ratio_costs_what_the_controller_says():
  times = np.array([0.0, 1.0])
  for load_s in (0.0, 0.5):
    found = serving.simulate(
      *(times, Steps(load_s)), profile=PROFILE, batching=serving.Batching(size=8)
    )
    assert found.switches == 1
    took = np.array([PROFILE.p50[0, 0], PROFILE.p50[0, -1] + load_s])
    np.testing.assert_allclose(found.finish, times + took)


def test_summary_counts_what_had_no_result_as_endless():
  record = records.Record(
    arrival=np.array([0.0, 1.0, 2.0, 4.0]),
    start=np.array([0.0, np.nan, 2.0, 4.0]),
    finish=np.array([0.5, 1.0, 3.0, 4.25]),
    ratio=np.array([0.0, np.nan, 1.0, 0.5]),
    outcome=np.array([records.ANSWERED, records.REFUSED, records.ANSWERED, records.ANSWERED]),
    batch=np.array([0, -1, 1, 2]),
    switches=2,
  )
  found = records.summary(record, target=0.5, accuracy={0.0: 90.0, 1.0: 80.0})
  assert (found["median"], found["p90"], found["p99"]) == (0.5, np.inf, np.inf)
  assert (found["in_time"], found["goodput"]) == (0.5, 0.5)
  assert (found["mean_ratio"], found["accuracy"]) == (0.5, 85.0)
  assert (found["answered"], found["refused"], found["pending"]) == (3, 1, 0)
  assert records.summary(record, target=1.0)["accuracy"] is None
  bins = np.array([0.0, 1.5, 3.0, 4.0, 5.0])
  found = records.over_time(record, bins, record.latency, "median")
  np.testing.assert_array_equal(found, [np.inf, 1.0, np.nan, 0.25])
  found = records.over_time(record, bins, record.ratio, "mean")
  np.testing.assert_array_equal(found, [0.0, 1.0, np.nan, 0.5])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"arrivals": np.array([1.0, 0.0])}, "arrivals: .*ascending"),
    ({"arrivals": np.array([np.nan])}, "arrivals"),
    ({"queue": 3}, "queue: 3; at least batching.size, 8"),
    ({"deadline": 0.0}, "deadline: 0.0"),
    ({"batching": serving.Batching(size=9)}, r"largest: 9; the profile covers 1\.\.8"),
  ],
)
def test_wrong_arguments_are_named(change, message):
  arguments = {
    "arrivals": np.array([0.0]),
    "controller": serving.create("fixed", PROFILE, target=1.0, ratio=0.0),
    "profile": PROFILE,
    "batching": serving.Batching(size=8),
  }
  with pytest.raises(ValueError, match=message):
    serving.simulate(**arguments | change)


def test_no_requests():
  controller = serving.create("load", PROFILE, target=1.0)
  found = serving.simulate(
    np.zeros(0), controller, profile=PROFILE, batching=serving.Batching(size=8)
  )
  summary = serving.summary(found, target=1.0)
  assert summary["requests"] == 0 and summary["median"] is None
