"""The engine: every request answered once, at one ratio, whatever happens to it."""

import asyncio
import collections
import time

import numpy as np
import pytest

from flexiq_jax import serving
from tests.serving.engine_for_test import (
  PROFILE,
  Device,
  Lowest,
  engine_of,
  examples,
  held,
  run,
  until,
)


def test_requests_get_their_own_rows_and_stay_whole():
  async def scenario(engine, device):
    assert engine.ready and not engine.stopping
    first = await held(engine, device)
    parts = [(1, 2), (3,), (4, 5, 6, 7), (8, 9), (10,)]
    tasks = [asyncio.create_task(engine.submit(examples(*part))) for part in parts]
    await until(lambda: engine.state().queued == 10)
    device.free.set()
    answers = await asyncio.gather(first, *tasks)
    for part, answer in zip([(-1,), *parts], answers, strict=True):
      np.testing.assert_array_equal(answer.y[:, 0], 2 * np.array(part, np.float32))
    # Eight at most, in the order in which they came: 2 + 1 + 4, then 2 + 1.
    assert [len(x) for x, _ in device.ran] == [1, 7, 3]
    assert [answer.batch for answer in answers] == [0, 1, 1, 1, 2, 2]
    assert answers[1].queued_s > 0 and answers[1].computed_s > 0
    state = engine.state()
    assert (state.answered, state.batches) == (6, {1: 1, 3: 1, 7: 1})
    assert (state.refused, state.late, state.failed, state.cancelled) == (0, 0, 0, 0)
    assert 0 < state.p50 <= state.p90 <= state.p99

  run(scenario)


def test_all_sizes_are_warm_before_it_is_ready():
  async def main():
    device = Device()
    engine = engine_of(device, controller=serving.create("load", PROFILE, target=1.0))
    device.free.clear()
    starting = asyncio.create_task(engine.start())
    await asyncio.sleep(0.02)
    assert not engine.ready
    with pytest.raises(serving.Stopping, match="not ready"):
      await engine.submit(examples(1))
    device.free.set()
    await starting
    assert engine.ready
    assert [(len(x), r) for x, r in device.ran] == [
      (n, r) for n in (1, 2, 4, 8) for r in (1.0, 0.0)
    ]
    await engine.stop()

  asyncio.run(main())


def test_start_says_what_is_wrong_with_the_device():
  async def main(device, match):
    with pytest.raises(serving.Failed, match=match):
      await engine_of(device).start()

  failing = Device()
  failing.failing = RuntimeError("no memory")
  asyncio.run(main(failing, "RuntimeError: no memory"))
  asyncio.run(main(lambda x, ratio: x[:1], "1 results for 2 examples"))


def test_a_batch_that_fails_answers_its_own_requests_and_no_others():
  async def scenario(engine, device):
    device.failing = KeyError("weights")
    with pytest.raises(serving.Failed, match="KeyError") as error:
      await engine.submit(examples(1))
    assert error.value.cause is device.failing
    device.failing = SystemExit(3)
    with pytest.raises(serving.Failed, match="SystemExit"):
      await engine.submit(examples(1))
    device.failing = None
    answer = await engine.submit(examples(5))
    assert answer.y[0, 0] == 10
    assert (engine.state().failed, engine.state().answered) == (2, 1)

  run(scenario)


def test_who_hangs_up_leaves_the_queue_and_the_batch():
  async def scenario(engine, device):
    first = await held(engine, device)
    tasks = [asyncio.create_task(engine.submit(examples(i))) for i in range(4)]
    await until(lambda: engine.state().queued == 4)
    tasks[1].cancel()
    first.cancel()  # in the batch that runs
    await until(lambda: engine.state().queued == 3)
    device.free.set()
    found = await asyncio.gather(first, *tasks, return_exceptions=True)
    assert [isinstance(f, asyncio.CancelledError) for f in found] == [
      True,
      False,
      True,
      False,
      False,
    ]
    assert device.ran[1][0] == [0, 2, 3]
    state = engine.state()
    assert (state.answered, state.cancelled, state.queued) == (3, 2, 0)

  run(scenario)


def test_a_full_queue_refuses():
  async def scenario(engine, device):
    await held(engine, device)
    tasks = [asyncio.create_task(engine.submit(examples(1, 2, 3))) for _ in range(3)]
    await until(lambda: engine.state().queued == 9)
    with pytest.raises(serving.Overloaded, match="9 examples wait, of at most 10"):
      await engine.submit(examples(1, 2))
    last = asyncio.create_task(engine.submit(examples(1)))
    await until(lambda: engine.state().queued == 10)
    device.free.set()
    await asyncio.gather(*tasks, last)
    assert engine.state().refused == 1

  run(scenario, queue=10)


def test_deadlines():
  slow = serving.modelled(int8=2, gain=2.0, fixed=0.1, sizes=(1, 2, 4, 8))  # 0.6 s alone

  async def scenario(engine, device):
    now = time.monotonic()
    with pytest.raises(serving.TooLate, match="takes longer"):
      await engine.submit(examples(1), deadline=now + 0.25)
    first = await held(engine, device)
    # Hopeless after a second, while the device is busy; the one without a deadline waits on.
    late = asyncio.create_task(engine.submit(examples(1), deadline=now + 1.3))
    patient = asyncio.create_task(engine.submit(examples(2)))
    with pytest.raises(serving.TooLate, match="no longer be met"):
      await late
    assert not device.free.is_set()
    assert time.monotonic() - now < 10
    assert engine.state().queued == 1
    device.free.set()
    await asyncio.gather(first, patient)
    assert (engine.state().late, engine.state().answered) == (2, 2)
    # At 25 % this one would be late, at 50 % it is not.
    answer = await engine.submit(examples(3), deadline=time.monotonic() + 0.52)
    assert answer.ratio >= 0.5
    assert (await engine.submit(examples(3), deadline=time.monotonic() + 60)).ratio == 0
    with pytest.raises(ValueError, match="deadline: nan"):
      await engine.submit(examples(3), deadline=float("nan"))

  run(scenario, profile=slow, controller=Lowest())


def test_a_batch_waits_for_company():
  async def scenario(engine, device):
    begun = time.monotonic()
    tasks = []
    for i in range(3):
      tasks.append(asyncio.create_task(engine.submit(examples(i))))
      await asyncio.sleep(0.01)
    await asyncio.gather(*tasks)
    assert time.monotonic() - begun >= 1
    assert [x for x, _ in device.ran] == [[0, 1, 2]]
    # A full one does not.
    answer = await engine.submit(examples(*range(8)))
    assert answer.queued_s < 1
    # And neither does who stops.
    last = asyncio.create_task(engine.submit(examples(7)))
    await asyncio.sleep(0.01)
    await engine.stop()
    assert (await last).queued_s < 1

  run(scenario, batching=serving.Batching(size=8, delay=1.0))


def test_stop_answers_all_and_takes_no_more():
  async def scenario(engine, device):
    first = await held(engine, device)
    tasks = [asyncio.create_task(engine.submit(examples(i))) for i in range(20)]
    await until(lambda: engine.state().queued == 20)
    stopping = asyncio.create_task(engine.stop())
    await until(lambda: engine.stopping)
    with pytest.raises(serving.Stopping, match="is stopping"):
      await engine.submit(examples(1))
    device.free.set()
    await asyncio.gather(stopping, engine.stop())
    answers = await asyncio.gather(first, *tasks)
    assert [a.y[0, 0] for a in answers[1:]] == [2.0 * i for i in range(20)]
    assert not engine.ready

  run(scenario)


def test_stop_does_not_wait_for_ever():
  async def scenario(engine, device):
    first = await held(engine, device)
    waiting = asyncio.create_task(engine.submit(examples(1)))
    await until(lambda: engine.state().queued == 1)
    await engine.stop(drain_s=0.05)
    for task in (first, waiting):
      with pytest.raises(serving.Stopping, match=r"after 0\.05 s"):
        await task

  run(scenario)


def test_a_ratio_is_held_by_hand():
  async def scenario(engine, device):
    assert (await engine.submit(examples(1))).ratio == 0.0
    engine.hold(0.7)
    answer = await engine.submit(examples(1))
    assert answer.ratio == 0.7
    assert answer.y[0, -1] == np.float32(0.7)
    assert (engine.state().held, engine.state().level) == (0.7, 3)
    engine.hold(None)
    assert (await engine.submit(examples(1))).ratio == 0.0
    with pytest.raises(ValueError, match="ratio"):
      engine.hold(1.5)
    assert engine.state().held is None

  run(scenario, controller=serving.create("load", PROFILE, target=1.0))


def test_a_change_of_the_ratio_mixes_no_batch():
  async def scenario(engine, device):
    notes = []
    engine.on_batch = notes.append
    tasks = []
    for i in range(300):
      engine.hold((0.0, 0.5, 1.0)[i % 3])
      tasks.append(asyncio.create_task(engine.submit(examples(*[i] * (1 + i % 3)))))
      if i % 7 == 0:
        await asyncio.sleep(0.001)
    answers = await asyncio.gather(*tasks)
    for i, answer in enumerate(answers):
      np.testing.assert_array_equal(answer.y[:, :3], 2.0 * i)
      np.testing.assert_array_equal(answer.y[:, 3], np.float32(answer.ratio))
    ratios = collections.defaultdict(set)
    for answer in answers:
      ratios[answer.batch].add(answer.ratio)
    assert all(len(r) == 1 for r in ratios.values())
    assert len({answer.ratio for answer in answers}) == 3
    assert [n.number for n in notes] == list(range(len(notes)))
    assert sum(n.size for n in notes) == sum(1 + i % 3 for i in range(300))
    assert {n.number: n.ratio for n in notes} == {b: r.copy().pop() for b, r in ratios.items()}
    mean = sum(n.size * n.ratio for n in notes) / sum(n.size for n in notes)
    assert engine.state().effective_ratio == pytest.approx(mean)

  run(scenario, queue=1000)


@pytest.mark.parametrize("where", ["on_batch", "controller"])
def test_what_others_raise_does_not_end_the_engine(where, caplog):
  controller = Lowest()
  controller.broken = where == "controller"

  async def scenario(engine, device):
    if where == "on_batch":
      engine.on_batch = lambda record: 1 / 0
      await engine.submit(examples(1))
    else:
      with pytest.raises(serving.Failed, match="no rate"):
        await engine.submit(examples(1))
    controller.broken = False
    assert (await engine.submit(examples(2))).y[0, 0] == 4
    assert "Traceback" in caplog.text

  run(scenario, controller=controller)


@pytest.mark.parametrize(
  ("x", "message"),
  [
    (np.zeros((2, 4), np.float32), r"x: shape \(2, 4\); \[n, 3\] with n in 1..8"),
    (np.zeros((3,), np.float32), "x: shape"),
    (np.zeros((0, 3), np.float32), "x: shape"),
    (np.zeros((9, 3), np.float32), "n in 1..8"),
    (np.zeros((1, 3), np.float64), "dtype float64; float32"),
    (np.array([["a", "b", "c"]]), "dtype"),
  ],
)
def test_inputs_of_another_kind_are_refused(x, message):
  async def scenario(engine, device):
    with pytest.raises(ValueError, match=message):
      await engine.submit(x)

  run(scenario)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"warm": ()}, "warm"),
    ({"warm": (1, 4)}, r"batching.size: 8; 1\.\.4"),
    ({"queue": 4}, "queue: 4; at least"),
    ({"batching": serving.Batching(size=16), "warm": (16,)}, r"largest: 16; .* 1\.\.8"),
  ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    engine_of(Device(), **change)


def test_storm_every_request_ends_once():
  """Hang-ups, failures, deadlines and a stop in the middle; counted by the requests' numbers."""

  async def scenario(engine, device):
    ended, tasks = collections.Counter(), []
    device.seconds = 0.002

    async def one(i):
      try:
        due = time.monotonic() + 0.05 if i % 5 == 0 else None
        answer = await engine.submit(examples(i), deadline=due)
        assert answer.y[0, 0] == 2 * i
        ended[i, "answered"] += 1
      except serving.ServingError as error:
        ended[i, type(error).__name__] += 1
      except asyncio.CancelledError:
        ended[i, "cancelled"] += 1
        raise

    for i in range(600):
      tasks.append(asyncio.create_task(one(i)))
      device.failing = RuntimeError("sometimes") if i % 97 > 90 else None
      if i % 3 == 0:
        await asyncio.sleep(0.0005)
      if i % 11 == 0:
        tasks[max(0, i - 3)].cancel()
      if i == 500:
        stop = asyncio.create_task(engine.stop())
    await asyncio.gather(*tasks, return_exceptions=True)
    await stop
    # Who was cancelled before its first step never ran, so it is in no count.
    numbers = [i for i, _ in ended]
    assert len(numbers) == len(set(numbers)) >= 580
    assert set(ended.values()) == {1}
    how = collections.Counter(what for _, what in ended)
    assert how["answered"] > 100 and how["Stopping"] > 50 and how["cancelled"] > 5
    assert how["Failed"] > 5
    state = engine.state()
    assert (state.refused, state.queued) == (how["Overloaded"], 0)
    # Who hangs up in the very moment of an answer is counted as answered.
    both = zip(
      *((state.answered, state.failed, state.late), ("answered", "Failed", "TooLate")), strict=True
    )
    assert all(counted >= how[what] for counted, what in both)
    counted = state.answered + state.failed + state.late + state.cancelled
    assert counted + how["Stopping"] + how["Overloaded"] == len(numbers)

  run(scenario, controller=serving.create("load", PROFILE, target=0.1))
