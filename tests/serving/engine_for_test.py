"""An engine whose device is held, broken and looked at by tests."""

import asyncio
import threading
import time

import numpy as np

from flexiq_jax import serving

PROFILE = serving.modelled(int8=1e4, gain=1.5, fixed=5e-4, sizes=(1, 2, 4, 8))
EXAMPLE = np.zeros((3,), np.float32)


class Device:
  """Doubles its input; can be held, and can fail. Notes what it ran."""

  def __init__(self):
    self.free = threading.Event()
    self.free.set()
    self.failing, self.seconds = None, 0.0
    self.ran = []

  def __call__(self, x, ratio):
    assert threading.current_thread().name.startswith("device")
    assert self.free.wait(10)
    time.sleep(self.seconds)
    self.ran.append((x[:, 0].tolist(), ratio))
    if self.failing is not None:
      raise self.failing
    return np.concatenate([2 * x, np.full((len(x), 1), ratio, x.dtype)], axis=1)


class Lowest:
  """Ratio 0 of all levels; can be broken."""

  levels, switch_s, broken = PROFILE.ratios, 0.0, False

  def start(self):
    return None

  def step(self, state, seen):
    if self.broken:
      raise ZeroDivisionError("no rate")
    return state, 0.0


def engine_of(device, *, controller=None, batching=None, profile=PROFILE, **options):
  controller = controller or serving.create("fixed", profile, target=1.0, ratio=0.0)
  settings = {"queue": 64, "warm": (1, 2, 4, 8), "example": EXAMPLE} | options
  return serving.Engine(
    *(device, controller),
    **{"profile": profile, "batching": batching or serving.Batching(size=8)} | settings,
  )


def examples(*numbers):
  return np.array([[number] * 3 for number in numbers], np.float32)


def run(scenario, **options):
  """Runs `scenario(engine, device)` on a started engine and stops it."""

  async def main():
    device = Device()
    engine = engine_of(device, **options)
    await engine.start()
    device.ran.clear()
    try:
      return await asyncio.wait_for(scenario(engine, device), 20)
    finally:
      device.free.set()
      await engine.stop()

  return asyncio.run(main())


async def until(condition):
  for _ in range(2000):
    if condition():
      return
    await asyncio.sleep(0.001)
  raise AssertionError("it did not come to that")


async def held(engine, device):
  """Occupies the device with one request, behind which others wait."""
  device.free.clear()
  first = asyncio.create_task(engine.submit(examples(-1)))
  await until(lambda: engine.state().queued == 0 and engine._running)
  return first
