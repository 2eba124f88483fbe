"""At 1.5 times the capacity of 8 bits every request is answered exactly once, whatever happens.

The device is a stand-in that sleeps as a profile says, at 100 % half as long as at 0 %: with the
gain of 1.43 that the paper has, no ratio carries 1.5 times the load. Clients count by id: some hang
up, some send what makes their batch raise, and SIGTERM comes in the middle.
"""

import asyncio
import collections
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import http_client
from flexiq_jax.serving import modelled, workloads
from tests.serving.server.served_for_test import LEVELS, PATH, SHAPE, logits

SCRIPT = """
import json, sys, time
import numpy as np
from flexiq_jax.serving import modelled
from flexiq_jax.serving.server import Limits, Listening, bind, create_app
from tests.serving.server import served_for_test as served
from tests.serving.server.test_sustained import BROKEN, device

controller, int8 = sys.argv[1], float(sys.argv[2])
profile = device(int8)

def run(x, ratio):
  time.sleep(float(profile.latencies(ratio, 8)[len(x)]))
  if (x == BROKEN).any():
    raise RuntimeError("broken")
  return served.logits(x, ratio)

limits, sock = Limits(batch=8), bind("127.0.0.1", 0)
engine = served.engine(run, controller=controller, on=profile, queue=128, target=0.3)
app = create_app(engine, served.MODEL, limits=limits)
ready = lambda: print(sock.getsockname()[1], flush=True)
Listening(app=app, engine=engine, sock=sock, limits=limits, ready=ready).run()
state = engine.state()
names = ("answered", "refused", "late", "failed", "cancelled")
print(json.dumps({name: getattr(state, name) for name in names}), flush=True)
"""
BROKEN = -1000.0


def device(int8: float):
  """Latencies of the stand-in."""
  return modelled(int8=int8, gain=2.0, fixed=0.002, sizes=(1, 2, 4, 8), ratios=LEVELS)


def example(number: int, broken: bool) -> np.ndarray:
  """The input of a request, which no other has."""
  x = np.full((1, *SHAPE), number / 64, np.float32)
  x[0, 0, 0, 0] = BROKEN if broken else x[0, 0, 0, 0]
  return x


def request(number: int, broken: bool) -> bytes:
  x = example(number, broken)
  tensor = {"name": "input", "shape": x.shape, "datatype": "FP32"}
  tensor["parameters"] = {"binary_data_size": x.nbytes}
  head = json.dumps({"id": str(number), "inputs": [tensor]}).encode()
  return http_client.post(PATH, head + x.tobytes(), Inference_Header_Content_Length=str(len(head)))


def sustain(controller: str, int8: float, seconds: float, *, trouble=True):
  """Runs a server and its clients.

  Returns:
    Exchanges, which of them were to hang up and to break their batch, what the server counted.
  """
  times = workloads.poisson(1.5 * int8, seconds, seed=0)
  rng = np.random.default_rng(1)
  broken = trouble * (rng.random(len(times)) < 0.01) > 0
  hurried = trouble * (rng.random(len(times)) < 0.05) > 0
  requests = [request(i, b) for i, b in enumerate(broken)]
  patience = [
    float(p) if h else None for p, h in zip(rng.random(len(times)) / 20, hurried, strict=True)
  ]
  env = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
  server = subprocess.Popen(
    [sys.executable, "-c", SCRIPT, controller, str(int8)],
    stdout=subprocess.PIPE,
    text=True,
    env=env,
  )
  try:
    port = int(server.stdout.readline())

    async def main():
      sending = asyncio.create_task(http_client.open_loop(port, requests, times, patience))
      await asyncio.sleep(0.8 * seconds if trouble else seconds)
      if not trouble:
        await sending
      server.send_signal(signal.SIGTERM)
      return await sending

    found = asyncio.run(main())
    assert server.wait(30) == 0
    return found, hurried, broken, json.loads(server.stdout.read())
  finally:
    server.kill()
    server.wait()
    server.stdout.close()


def check(found, hurried, broken, counted, seconds) -> collections.Counter:
  """Every answer is one that was asked for; returns how many there are of each status."""
  by = collections.Counter(e.status for e in found)
  assert set(by) <= {200, 429, 500, 503, 0, -1}
  for exchange in found:
    if exchange.status == 200:
      reply = json.loads(exchange.body)
      assert reply["id"] == str(exchange.number)
      ratio = reply["parameters"]["ratio"]
      y = np.float32(reply["outputs"][0]["data"])
      same = [r for r in LEVELS if (logits(example(exchange.number, False), r)[0] == y).all()]
      assert same == [ratio]  # exactly one level's
      assert not broken[exchange.number]
    elif exchange.status == 500:
      assert b"RuntimeError: broken" in exchange.body
    elif exchange.status == -1:
      assert hurried[exchange.number]
    elif exchange.status in (0, 503):  # only once the server was told to end
      assert exchange.done > 0.8 * seconds - 0.1
  answered = by[200]
  assert answered <= counted["answered"] <= answered + by[-1]
  assert by[500] <= counted["failed"] <= by[500] + by[-1]
  assert by[429] <= counted["refused"] <= by[429] + by[-1]
  return by


def test_every_request_is_answered_once():
  seconds = 3.0
  found, hurried, broken, counted = sustain("load", 100.0, seconds)
  by = check(found, hurried, broken, counted, seconds)
  assert by[200] > 100
  assert by[500] >= 1 and by[-1] >= 1 and by[0] + by[503] >= 1


@pytest.mark.slow
def test_control_carries_what_eight_bits_do_not(capsys):
  """SUSTAINED_SECONDS=600 makes it ten minutes."""
  seconds = float(os.environ.get("SUSTAINED_SECONDS", "40"))
  found, hurried, broken, counted = sustain("load", 60.0, seconds)
  by = check(found, hurried, broken, counted, seconds)
  alone, *_ = sustain("fixed", 60.0, min(seconds, 40.0), trouble=False)
  p90 = lambda e: np.percentile([x.done - x.intended for x in e if x.status == 200], 90)
  with capsys.disabled():
    print(f"\n{seconds:g} s: {dict(by)}; server: {counted}")
    print(f"p90 {1e3 * p90(found):.1f} ms; at 8 bits alone {1e3 * p90(alone):.1f} ms")
    refused = sum(e.status == 429 for e in alone)
    print(f"8 bits alone refuses {refused} of {len(alone)}")
  # 8 bits fill the queue and turn away a third; with control hardly anybody is.
  assert refused > 0.2 * len(alone)
  assert by[429] < 0.05 * len(found)
