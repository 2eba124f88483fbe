"""SIGTERM loses nothing: what waits is answered, what comes is refused, then the sockets close."""

import concurrent.futures
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from flexiq_jax.serving.server import bind
from flexiq_jax.serving.server.connections import allow
from tests.serving.server.served_for_test import SHAPE, Gate, logits, served, until


def test_what_waits_is_answered_and_what_comes_is_refused():
  x = np.random.default_rng(0).random((8, 8, *SHAPE), np.float32)
  gate = Gate()
  with (
    served(gate, drain=60.0) as client,
    concurrent.futures.ThreadPoolExecutor(8) as pool,
  ):
    gate.closed.set()
    replies = [pool.submit(client.infer, x[i]) for i in range(8)]
    until(lambda: client.engine.state().queued == 56)
    client.stop.set()
    until(lambda: client.engine.stopping)
    late = client.infer(x[0])
    assert (late.status, late.headers["connection"]) == (503, "close")
    assert "stopping" in late.json["error"]
    assert client.get("/v2/health/ready").status == 503
    assert client.get("/v2/health/live").status == 200
    assert client.get("/state").json["stopping"] is True
    gate.let(8)
    for i, reply in enumerate(replies):
      assert reply.result().status == 200
      y = np.float32(reply.result().json["outputs"][0]["data"]).reshape(8, 3)
      np.testing.assert_array_equal(y, logits(x[i], 0.0))
  with pytest.raises(OSError):
    socket.create_connection(("127.0.0.1", client.port), timeout=1)


def test_who_waits_too_long_is_told():
  gate = Gate()
  with served(gate, drain=1.0) as client:
    gate.closed.set()
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
      replies = [pool.submit(client.infer, np.zeros((8, *SHAPE))) for _ in range(6)]
      until(lambda: client.engine.state().queued == 40)
      client.stop.set()
      gate.let(1)
      found = sorted(reply.result().status for reply in replies)
      gate.let(6)
    assert found == [200] + [503] * 5


SCRIPT = """
import time
from tests.serving.server.served_for_test import engine, sleeping, MODEL
from flexiq_jax.serving.server import Limits, Listening, bind, create_app
limits, made, sock = Limits(batch=8), engine(sleeping(0.6)), bind("127.0.0.1", 0)
Listening(
  app=create_app(made, MODEL, limits=limits),
  engine=made,
  sock=sock,
  limits=limits,
  ready=lambda: print(sock.getsockname()[1], flush=True),
).run()
print("ended", made.state().answered, flush=True)
"""


@pytest.mark.parametrize(
  "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_process_ends_with_zero(number):
  server = subprocess.Popen(
    [sys.executable, "-c", SCRIPT],
    stdout=subprocess.PIPE,
    text=True,
    env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
  )
  try:
    port, statuses = int(server.stdout.readline()), []

    def send():
      import http.client

      connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
      tensor = {"name": "input", "shape": [8, *SHAPE], "datatype": "FP32", "data": [0] * 128}
      connection.request("POST", "/v2/models/toy/infer", json.dumps({"inputs": [tensor]}))
      response = connection.getresponse()
      statuses.append(response.status)
      response.read()
      connection.close()

    threads = [threading.Thread(target=send) for _ in range(5)]
    for thread in threads:
      thread.start()
    time.sleep(1.5)  # of the three seconds that five batches take
    server.send_signal(number)
    for thread in threads:
      thread.join()
    assert server.wait(20) == 0
    assert statuses == [200] * 5
    assert server.stdout.read() == "ended 5\n"
  finally:
    server.kill()
    server.wait()
    server.stdout.close()


def test_a_port_that_is_taken_is_one_message():
  with bind("127.0.0.1", 0) as sock:
    port = sock.getsockname()[1]
    with pytest.raises(ValueError, match=f"port: {port} of 127.0.0.1 is taken by another process"):
      bind("127.0.0.1", port)
  for host, port, text in (
    ("127.0.0.1", 65536, "port: 65536; 0..65535"),
    ("127.0.0.1", True, "port: True; 0..65535"),
    ("no.such.host.invalid", 0, "host: 'no.such.host.invalid': .*; an address or a name"),
    ("203.0.113.1", 0, "host: '203.0.113.1' cannot be listened at"),
  ):
    with pytest.raises(ValueError, match=text):
      bind(host, port)


def test_the_limit_on_file_descriptors_is_raised(monkeypatch):
  import resource

  limits, seen = {"now": (256, 1000)}, []
  monkeypatch.setattr(resource, "getrlimit", lambda kind: limits["now"])
  monkeypatch.setattr(resource, "setrlimit", lambda kind, value: seen.append(value))
  assert allow(500) == 500
  assert allow(5000) == 872
  assert allow(100) == 100
  assert seen == [(628, 1000), (1000, 1000)]
