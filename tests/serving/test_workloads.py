"""Arrivals: their distribution, their span, and the traces that they replay."""

import numpy as np
import pytest
from scipy import stats

from flexiq_jax.serving import workloads

KINDS = {
  "poisson": lambda seed: workloads.poisson(200, 50, seed),
  "gamma": lambda seed: workloads.gamma(200, 50, 2.0, seed),
  "bursts": lambda seed: workloads.bursts(100, 500, 50, seed),
  "trace": lambda seed: workloads.trace(np.full(50, 200.0), seed),
}


@pytest.mark.parametrize("kind", KINDS)
def test_arrivals_ascend_within_the_span_and_follow_the_seed(kind):
  times = KINDS[kind](3)
  assert times.dtype == np.float64
  assert (np.diff(times) >= 0).all() and times[0] >= 0 and times[-1] < 50
  np.testing.assert_array_equal(times, KINDS[kind](3))
  other = KINDS[kind](4)
  assert len(other) != len(times) or not (other == times).all()


@pytest.mark.parametrize("kind", ["poisson", "trace"])
def test_gaps_are_exponential(kind):
  gaps = np.diff(KINDS[kind](0))
  assert stats.kstest(gaps * 200, "expon").pvalue > 1e-3
  # And independent: counts of seconds vary as Poisson's do.
  counts = np.histogram(KINDS[kind](1), np.arange(51))[0]
  assert 0.4 < counts.var() / counts.mean() < 1.8


@pytest.mark.parametrize("cv", [0.25, 1.0, 3.0])
def test_gamma_gaps_have_the_coefficient_of_variation(cv):
  gaps = np.diff(workloads.gamma(500, 400, cv, 0))
  assert gaps.mean() == pytest.approx(1 / 500, rel=0.05)
  assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.05)


def test_bursts_have_two_rates():
  times = workloads.bursts(100, 900, 2000, 0, calm=10, burst=5)
  counts = np.histogram(times, np.arange(2001))[0]
  share = (counts > 500).mean()
  assert 0.25 < share < 0.42  # a third of the time
  assert np.median(counts[counts < 200]) == pytest.approx(100, rel=0.1)
  assert np.median(counts[counts > 700]) == pytest.approx(900, rel=0.1)


def test_nobody_comes_at_rate_zero():
  assert workloads.poisson(0, 10, 0).shape == (0,)
  assert workloads.bursts(0, 0, 10, 0).shape == (0,)
  times = workloads.trace(np.array([0.0, 300.0, 0.0]), 0)
  assert ((times >= 1) & (times <= 2)).all() and len(times) > 200


def test_trace_follows_its_seconds_and_is_stretched_at_the_same_rates():
  counts = np.array([100.0, 400.0, 50.0])
  many = np.mean(
    [np.histogram(workloads.trace(counts, seed), np.arange(4))[0] for seed in range(200)], axis=0
  )
  np.testing.assert_allclose(many, counts, rtol=0.05)
  longer = workloads.trace(np.full(10, 100.0), 0, seconds=30)
  assert len(longer) == pytest.approx(3000, rel=0.1)


def test_rescale_is_an_affine_map_of_the_running_mean():
  counts = np.random.default_rng(0).poisson(50, 200).astype(float)
  counts[80:120] += 100
  found = workloads.rescale(counts, 500, 1500)
  assert (found.min(), found.max()) == (500, 1500)
  means = np.array([counts[max(0, i - 5) : i + 5].mean() for i in range(len(counts))])
  slope = 1000 / (means.max() - means.min())
  np.testing.assert_allclose(found, 500 + slope * (means - means.min()))
  np.testing.assert_array_equal(workloads.rescale(np.ones(20), 1, 7), np.full(20, 7.0))


@pytest.mark.data
@pytest.mark.parametrize(
  ("name", "seconds", "slope", "offset"),
  [("twitter_bursty_1260s", 1260, 5.127, 297), ("twitter_fluctuating_600s", 600, 5.453, 215)],
)
def test_traces_have_the_maps_that_they_came_with(flexiq_data, name, seconds, slope, offset):
  counts = workloads.read_trace(flexiq_data / f"traces/{name}.csv")
  assert len(counts) == seconds
  found = workloads.rescale(counts, 500, 1500)[10:-10]
  means = np.convolve(counts, np.ones(10) / 10, "same")[10:-10]
  # The maps are of another mean over 10 seconds.
  np.testing.assert_allclose(found, slope * means + offset, rtol=0.05)


def test_reads_a_trace_and_names_what_is_wrong(tmp_path, monkeypatch):
  monkeypatch.setenv("TRACES", str(tmp_path))
  path = tmp_path / "t.csv"
  path.write_text("# source\nsecond,count\n0,5\n1,0\n")
  np.testing.assert_array_equal(workloads.read_trace("$TRACES/t.csv"), [5, 0])
  for text, message in {
    "second,count\n0,5\n2,5\n": "second 1 and its count",
    "second,count\n0,-5\n": "second 0",
    "second,count\n": "no seconds",
    "time,n\n0,5\n": "second,count is accepted",
    "": "second,count is accepted",
  }.items():
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
      workloads.read_trace(path)
  with pytest.raises(FileNotFoundError, match="no such file"):
    workloads.read_trace(tmp_path / "none.csv")


@pytest.mark.parametrize(
  "call",
  [
    lambda: workloads.poisson(-1, 1, 0),
    lambda: workloads.poisson(float("nan"), 1, 0),
    lambda: workloads.gamma(1, 1, 0, 0),
    lambda: workloads.bursts(1, 2, 3, 0, calm=0),
    lambda: workloads.trace(np.array([-1.0]), 0),
    lambda: workloads.trace(np.zeros(0), 0),
    lambda: workloads.rescale(np.ones(20), 5, 1),
    lambda: workloads.rescale(np.ones(5), 1, 5),
  ],
)
def test_wrong_values_are_refused(call):
  with pytest.raises(ValueError, match="accepted"):
    call()
