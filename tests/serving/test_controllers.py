"""Controllers: pure, quick up and slow down, and what each knows."""

import numpy as np
import pytest

from flexiq_jax import serving
from flexiq_jax.serving import controllers, workloads
from flexiq_jax.serving.controllers import Rate, Seen, estimate
from flexiq_jax.serving.controllers.load import toward

PROFILE = serving.modelled(int8=1000, gain=2.0)
TARGET = 0.2
OPTIONS = {
  "fixed": {"ratio": 0.5},
  "oracle": {"arrivals": workloads.poisson(1200, 20, 0)},
  "swapping": {"levels": (0.0, 1.0)},
}


def make(name, **options):
  return serving.create(name, PROFILE, target=TARGET, **OPTIONS.get(name, {}) | options)


def drive(controller, rates, dt=0.01, queued=0):
  """Ratios of steps in which `rates` of examples a second come."""
  state, arrived, found = controller.start(), 0.0, []
  for i, rate in enumerate(rates):
    arrived += rate * dt
    state, ratio = controller.step(state, Seen((i + 1) * dt, int(arrived), queued, 0.0))
    found.append(ratio)
  return np.array(found)


@pytest.mark.parametrize("name", controllers.CONTROLLERS)
def test_steps_are_pure_and_stay_within_the_levels(name):
  controller = make(name)
  assert isinstance(controller, serving.Controller)
  rng, state, arrived = np.random.default_rng(0), controller.start(), 0
  for now in np.cumsum(rng.exponential(0.05, 100)):
    arrived += int(rng.integers(0, 200))
    seen = Seen(float(now), arrived, int(rng.integers(1, 300)), float(now))
    again, ratio = controller.step(state, seen)
    assert controller.step(state, seen) == (again, ratio)
    assert ratio in controller.levels
    state = again


def test_estimate_is_of_what_came_so_far_and_an_exponential_window_later():
  rate = estimate(Rate(), Seen(5.0, 3, 1, 5.0), 1.0)
  assert rate.value == 0
  # A few requests at once are no rate yet.
  assert estimate(rate, Seen(5.001, 6, 1, 5.0), 1.0).value == pytest.approx(12, rel=0.01)
  rate = estimate(rate, Seen(5.1, 13, 1, 5.0), 1.0)
  assert 20 < rate.value < 100
  for i in range(2, 400):
    rate = estimate(rate, Seen(5 + 0.1 * i, 3 + 10 * i, 1, 5.0), 1.0)
  assert rate.value == pytest.approx(100)
  # A step of the rate is followed with time constant 1.
  after = rate
  for i in range(1, 101):
    after = estimate(after, Seen(rate.time + 0.01 * i, rate.arrived + 3 * i, 1, 0.0), 1.0)
  assert after.value == pytest.approx(300 - 200 * np.exp(-1), rel=1e-3)
  assert estimate(after, Seen(after.time, after.arrived, 9, 0.0), 1.0) == after


def test_load_takes_the_smallest_level_at_which_the_queue_has_room_for_the_horizon():
  controller = make("load", headroom=1.1, horizon=2.0)
  sustained = [PROFILE.throughput(r, within=TARGET / 2) for r in PROFILE.ratios]
  assert sustained == sorted(sustained) and sustained[0] < sustained[-1]
  found = set()
  for rate in (100, 850, 930, 1000, 1100, 1250, 1400, 1700, 5000):
    last = drive(controller, [rate] * 500, queued=20)[-1]
    enough = [
      r
      for r, t in zip(PROFILE.ratios, sustained, strict=True)
      if (20 + 2.0 * max(0.0, 1.1 * rate - t)) / t <= TARGET / 2
    ]
    assert last == (enough[0] if enough else 1.0), rate
    found.add(last)
  assert found == set(PROFILE.ratios)
  # The longer the horizon, the nearer to a level that carries all of the load.
  assert drive(make("load", horizon=0.1), [1200] * 500)[-1] < controller.levels[-1]
  last = drive(make("load", horizon=1e4), [1200] * 500)[-1]
  assert last == next(r for r, t in zip(PROFILE.ratios, sustained, strict=True) if t >= 1200)


def test_load_goes_up_at_once_and_down_by_one_level_a_hold():
  found = drive(make("load", tau=0.1, hold=0.5), [100] * 100 + [5000] * 100 + [100] * 400)
  up = np.flatnonzero(found == 1.0)[0]
  assert 100 <= up <= 103
  down = np.flatnonzero(np.diff(found) < 0)
  assert found[down + 1].tolist() == [0.75, 0.5, 0.25, 0.0]
  assert (np.diff(down) == 50).all()


def test_a_long_queue_raises_the_level_at_any_rate():
  controller = make("load")
  room = PROFILE.throughput(0.0, within=TARGET / 2) * TARGET / 2
  assert drive(controller, [10] * 3, queued=int(room))[-1] == 0.0
  assert drive(controller, [10] * 3, queued=int(room) + 1)[-1] == 0.25
  assert drive(controller, [10] * 3, queued=10_000)[-1] == 1.0


def test_toward():
  assert toward(3, 1, 0.0, 5.0, 1.0) == (3, 5.0)
  assert toward(1, 1, 0.0, 5.0, 1.0) == (1, 5.0)
  assert toward(0, 2, 4.5, 5.0, 1.0) == (2, 4.5)
  assert toward(0, 2, 4.0, 5.0, 1.0) == (1, 5.0)


def test_prediction_of_a_ramp_is_exact():
  """The rate grows by s a second; after many windows the forecast is the rate to come."""
  slope, dt, ahead = 40.0, 0.005, 0.5
  controller = make("predictive", fast=0.5, slow=2.0, ahead=ahead)
  state, steps = controller.start(), 4000
  for i in range(1, steps + 1):
    now = i * dt
    state, _ = controller.step(state, Seen(now, slope * now**2 / 2, 0, 0.0))
  fast, slow = state.fast.value, state.slow.value
  assert (fast - slow) / 1.5 == pytest.approx(slope, rel=0.01)
  forecast = fast + (fast - slow) / 1.5 * (0.5 + ahead)
  assert forecast == pytest.approx(slope * (steps * dt + ahead), rel=0.01)
  ramp = slope * np.arange(steps) * dt * 2
  first = lambda name, **o: np.flatnonzero(drive(make(name, **o), ramp, dt) >= 0.5)[0]
  assert first("predictive") < first("load")


def test_oracle_is_the_smallest_level_that_a_fluid_queue_allows():
  arrivals, horizon = OPTIONS["oracle"]["arrivals"], 1.0
  controller = make("oracle", horizon=horizon)
  sustained = controller.needs.sustained

  def waits(rate, now, queued):
    """The longest wait of a queue that is worked off at a rate, one after the other."""
    free, longest = now + queued / rate, queued / rate
    for t in arrivals[(arrivals > now) & (arrivals <= now + horizon)]:
      longest = max(longest, max(0.0, free - t) + 0.0)
      free = max(free, t) + 1 / rate
      longest = max(longest, free - t - 1 / rate)
    return longest

  seen = set()
  for now, queued in [(0.0, 1), (3.3, 5), (7.0, 60), (11.0, 120), (12.0, 400), (19.9, 1)]:
    _, ratio = controller.step(None, Seen(now, 0, queued, now))
    longest = [waits(rate, now, queued) for rate in sustained]
    expected = [r for r, w in zip(controller.levels, longest, strict=True) if w <= TARGET / 2]
    # Where one level is on the edge, the ends of work and its begins differ by one example.
    close = any(abs(w - TARGET / 2) < 3e-3 for w in longest)
    assert close or ratio == (expected[0] if expected else 1.0)
    seen.add(ratio)
  assert len(seen) > 2


def test_peers_pay_for_a_change():
  assert make("swapping", load_s=0.7).switch_s == 0.7
  assert make("layerwise", load_s=0.8, share=0.25).switch_s == pytest.approx(0.2)
  assert make("load").switch_s == 0
  # What queues up while a model loads does not load the other one, until `hold` is over.
  controller = make("swapping", load_s=0.7, hold=2.0)
  rates = [2000] * 50 + [10] * 400
  found = drive(controller, rates, queued=100_000)
  assert found[49] == 1.0
  quiet = drive(controller, rates, queued=0)
  down = np.flatnonzero(np.diff(quiet) < 0)
  assert len(down) == 1 and 200 <= down[0] - 50 <= 350
  state, arrived = controller.start(), 0
  # Nobody comes any more: it goes up for the queue, and down when that was long ago.
  steps = [(0.0, 1, 0), (1.0, 9000, 1), (2.9, 9000, 1), (3.1, 0, 0), (4.8, 9000, 0), (5.2, 9000, 1)]
  for now, queued, expected in steps:
    state, ratio = controller.step(state, Seen(now, arrived, queued, 0.0))
    assert ratio == expected, now
  with pytest.raises(ValueError, match="switch_s: -1"):
    make("swapping", load_s=-1)
  with pytest.raises(ValueError, match="two are accepted"):
    serving.create("swapping", PROFILE, target=1.0)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda: make("best"), "controller: 'best'; one of fixed, load"),
    (lambda: make("load", speed=3), "controller 'load': .*speed"),
    (lambda: make("load", tau=0.0), "tau: 0.0"),
    (lambda: make("load", levels=(0.5, 0.0)), "levels: "),
    (lambda: serving.create("load", PROFILE, target=0.0), "target: 0.0"),
    (lambda: serving.create("oracle", PROFILE, target=1.0), "oracle.*arrivals"),
    (lambda: make("predictive", slow=0.1), "fast < slow"),
    (lambda: make("fixed", ratio=2.0), "ratio: 2.0"),
  ],
)
def test_wrong_settings_are_named(call, message):
  with pytest.raises(ValueError, match=message):
    call()
