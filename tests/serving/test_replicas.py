"""Two replicas under Ray Serve, one of which is killed under load."""

import asyncio
import collections
import json
import os
import pathlib
import signal

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
  ],
)
def test_wrong_numbers(numbers, text):
  with pytest.raises(ValueError, match=text):
    replicas.application(lambda: None, **numbers)


def build():
  """A replica: the stand-in behind the server."""
  from flexiq_jax.serving.server import Limits, create_app
  from tests.serving.server import served_for_test as served

  engine = served.engine(served.sleeping(0.005), controller="load", queue=1024)
  return create_app(engine, served.MODEL, limits=Limits(batch=8), lives=True)


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


@pytest.fixture
def port(tmp_path):
  ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'ray[serve]'")
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
    serve.run(replicas.application(build, least=2))
    yield 8177
  finally:
    serve.shutdown()
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Ray's own
def test_one_replica_is_killed_under_load(port):
  times = workloads.poisson(60.0, 20.0, seed=0)
  requests = [request(i, False) for i in range(len(times))]
  before = processes()
  assert len(before) == 2

  async def main():
    sending = asyncio.create_task(http_client.open_loop(port, requests, times))
    await asyncio.sleep(6)
    os.kill(before[0], signal.SIGKILL)
    return await sending

  found = asyncio.run(main())
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
  assert before[0] not in processes() and before[1] in processes()
