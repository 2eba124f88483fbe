"""Replicas under Ray Serve: one of two is killed under load, and a second one comes with the load.

Ray is not among the development requirements. In an environment of its own that has those:
`pip install 'ray[serve]'`, then `pytest -s -m slow tests/serving/test_replicas.py`.
"""

import asyncio
import collections
import contextlib
import json
import os
import pathlib
import signal
import time

import numpy as np
import pytest

from benchmarks import http_client
from flexiq_jax.serving import replicas, workloads
from tests.serving.server.served_for_test import LEVELS, logits
from tests.serving.server.test_sustained import example, request


@pytest.mark.parametrize(
  ("numbers", "text"),
  [
    ({"least": 0}, "least, most: 0, 0"),
    ({"least": 3, "most": 2}, "least, most: 3, 2"),
    ({"ongoing": 9, "queue": 8}, "ongoing: 9; 1..queue, 8"),
    ({"up_s": 0.0}, "up_s: 0.0; positive seconds"),
    ({"down_s": float("inf")}, "down_s: inf; positive seconds"),
  ],
)
def test_wrong_numbers(numbers, text):
  with pytest.raises(ValueError, match=text):
    replicas.application(lambda: None, **numbers)


def build(seconds: float = 0.005):
  """A replica: a stand-in that takes its time, behind the server."""
  from flexiq_jax.serving.server import Limits, create_app
  from tests.serving.server import served_for_test as served

  engine = served.engine(served.sleeping(seconds), controller="load", queue=1024)
  return create_app(engine, served.MODEL, limits=Limits(batch=8), lives=True)


def build_slow():
  """One that answers 40 requests a second."""
  return build(0.2)


def processes() -> list[int]:
  """Ids of the replicas' processes."""
  found = []
  for path in pathlib.Path("/proc").glob("[0-9]*/cmdline"):
    try:
      if path.read_bytes().startswith(b"ray::ServeReplica"):
        found.append(int(path.parent.name))
    except OSError:
      continue
  return found


@contextlib.contextmanager
def running(application):
  """Ray with an application; yields its port."""
  import ray
  from ray import serve

  root = str(pathlib.Path(__file__).parent.parent.parent)
  ray.init(
    num_cpus=4,
    include_dashboard=False,
    configure_logging=False,
    runtime_env={"env_vars": {"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"}},
  )
  try:
    serve.start(http_options={"host": "127.0.0.1", "port": 8177})
    serve.run(application)
    yield 8177
  finally:
    serve.shutdown()
    ray.shutdown()


@pytest.fixture
def with_ray():
  pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_one_replica_is_killed_under_load(with_ray):
  times = workloads.poisson(60.0, 20.0, seed=0)
  requests = [request(i, False) for i in range(len(times))]

  async def main(port, victim):
    sending = asyncio.create_task(http_client.open_loop(port, requests, times))
    await asyncio.sleep(6)
    os.kill(victim, signal.SIGKILL)
    return await sending

  with running(replicas.application(build, least=2)) as port:
    before = processes()
    assert len(before) == 2
    found = asyncio.run(main(port, before[0]))
    after = processes()
  by = collections.Counter(e.status for e in found)
  print(dict(by))
  for exchange in found:
    if exchange.status == 200:
      reply = json.loads(exchange.body)
      assert reply["id"] == str(exchange.number)
      y = np.float32(reply["outputs"][0]["data"])
      ratio = reply["parameters"]["ratio"]
      same = [r for r in LEVELS if (logits(example(exchange.number, False), r)[0] == y).all()]
      assert same == [ratio]
  # Every request has one answer; those that were in the killed replica an error.
  assert set(by) <= {200, 500, 503} and by[200] > 0.95 * len(found)
  assert all(e.status == 200 for e in found if e.intended < 5 or e.intended > 15)
  assert before[0] not in after and before[1] in after


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_a_second_replica_comes_with_the_load_and_goes_with_it(with_ray):
  times = workloads.poisson(30.0, 60.0, seed=0)
  requests = [request(i, False) for i in range(len(times))]
  application = replicas.application(
    build_slow, least=1, most=2, ongoing=4, up_s=2.0, down_s=6.0, drain_s=10.0
  )

  async def main(port):
    sending, counts = asyncio.create_task(http_client.open_loop(port, requests, times)), []
    while not sending.done():
      counts.append(len(processes()))
      await asyncio.sleep(0.5)
    return await sending, counts

  with running(application) as port:
    assert len(processes()) == 1
    found, counts = asyncio.run(main(port))
    ended = time.monotonic()
    while len(processes()) > 1:
      assert time.monotonic() - ended < 60
      time.sleep(0.5)
    took = time.monotonic() - ended
    last = asyncio.run(http_client.open_loop(port, requests[:1], times[:1]))
  came = 0.5 * counts.index(2)
  print(f"two replicas after {came:g} s, one {took:.1f} s after the last request")
  assert counts[0] == 1 and max(counts) == 2
  assert [e.status for e in (*found, *last)] == [200] * (len(found) + 1)  # nobody noticed
  # Each replica counts its batches from 0: the second one has answered, too.
  numbers = [json.loads(e.body)["parameters"]["batch"] for e in found if e.intended > came > 2]
  assert min(numbers) < 5
