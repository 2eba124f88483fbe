"""The engine on a device that sleeps, beside the simulator on the same arrivals."""

import asyncio

import numpy as np
import pytest

from flexiq_jax import serving
from flexiq_jax.serving import records, workloads

EXAMPLE = np.zeros((3,), np.float32)
# Slow, so that a busy machine, which wakes sleepers milliseconds late, is no large part of it.
LONG = serving.modelled(int8=75, gain=1.6, fixed=0.12, sizes=(1, 2, 4, 8, 16, 32))
GOAL = 1.6


def live_and_simulated(times, **settings):
  """The same arrivals, served by a device that sleeps, and on a virtual clock."""
  parts = {"profile": LONG, "batching": serving.Batching(size=32), "queue": 256}

  def controller():
    return serving.create("load", LONG, target=GOAL)

  async def main():
    device = serving.stand_in(LONG)
    engine = serving.Engine(device, controller(), warm=(1, 32), example=EXAMPLE, **parts)
    await engine.start()
    record = await serving.replay(engine, times, EXAMPLE[None], **settings)
    await engine.stop()
    return record

  return asyncio.run(main()), serving.simulate(times, controller(), **parts, **settings)


def agree(live, simulated, within, share):
  """Median and p90 within a share of each other, and the ratio within one level for most of it."""
  assert (live.outcome != records.PENDING).all()
  one, two = (serving.summary(r, target=GOAL) for r in (live, simulated))
  for name in ("median", "p90"):
    assert one[name] == pytest.approx(two[name], rel=within), (one, two)
  moments = np.arange(0.5, live.arrival[-1], 0.02)

  def ratio(record):
    ran = np.flatnonzero(record.batch >= 0)
    ran = ran[record.start[ran].argsort(kind="stable")]
    return record.ratio[ran][record.start[ran].searchsorted(moments, "right") - 1]

  near = np.abs(ratio(live) - ratio(simulated)) <= 0.25
  assert near.mean() >= share
  assert len(set(ratio(live))) > 2  # something happened


def waves(seconds):
  """Quiet, above the capacity at 0 %, quiet."""
  quiet, loud = workloads.poisson(30, seconds, 0), workloads.poisson(95, seconds, 1)
  return np.concatenate([quiet, seconds + loud, 2 * seconds + workloads.poisson(30, seconds, 2)])


@pytest.mark.slow  # on a machine that others use, sleepers wake late
def test_the_live_engine_is_near_the_simulator():
  agree(*live_and_simulated(waves(2.5)), within=0.2, share=0.8)


@pytest.mark.slow
def test_the_live_engine_is_what_the_simulator_says():
  agree(*live_and_simulated(waves(30.0)), within=0.05, share=0.95)
