"""What clients may take of the server: connections, time, memory. It lives through all of it."""

import json
import socket
import threading
import time

import numpy as np
import pytest

from flexiq_jax.serving.server import Limits
from flexiq_jax.serving.server.limits import Budget
from flexiq_jax.serving.server.refusals import Refused
from tests.serving.server.served_for_test import PATH, SHAPE, Gate, request, served, until

X = np.zeros((1, *SHAPE), np.float32)
TIGHT = Limits(
  batch=8,
  body=10_000,
  memory=25_000,
  connections=20,
  header_seconds=0.8,
  body_seconds=0.8,
  idle_seconds=1.0,
)


def open_socket(client) -> socket.socket:
  return socket.create_connection(("127.0.0.1", client.port), timeout=10)


def head(length, path=PATH) -> bytes:
  return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()


def read_all(sock) -> bytes:
  found = b""
  while chunk := sock.recv(65536):
    found += chunk
  return found


@pytest.fixture(scope="module")
def client():
  with served(limits=TIGHT) as client:
    yield client


def test_connections_beyond_the_limit_are_closed_with_an_error(client):
  time.sleep(0.1)  # those of other tests are gone
  idle = [open_socket(client) for _ in range(TIGHT.connections)]
  time.sleep(0.1)
  more = [open_socket(client) for _ in range(30)]
  for sock in more:
    reply = read_all(sock)
    assert reply.startswith(b"HTTP/1.1 503 ") and b"20 connections are open" in reply
    sock.close()
  for sock in idle:
    sock.close()
  time.sleep(0.1)
  assert client.infer(X).status == 200


@pytest.mark.parametrize(
  "sent", [b"", b"POST ", head(9)[:-2], b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 9]
)
def test_headers_that_do_not_come_are_not_waited_for(client, sent):
  with open_socket(client) as sock:
    sock.sendall(sent)
    assert b"408 Request Timeout" in read_all(sock)


def test_headers_a_byte_at_a_time_are_not_waited_for(client):
  with open_socket(client) as sock:
    started = time.monotonic()
    try:
      for byte in head(9) * 9:
        sock.sendall(bytes([byte]))
        time.sleep(0.05)
    except OSError:
      pass
    assert time.monotonic() - started < 5


def test_bodies_that_do_not_come_are_not_waited_for(client):
  with open_socket(client) as sock:
    sock.sendall(head(100) + b"x" * 10)
    reply = read_all(sock)
    assert b" 408 " in reply and b"10 bytes in 0.8 s" in reply


def test_truncated_bodies_of_clients_that_hang_up(client):
  for _ in range(5):
    with open_socket(client) as sock:
      sock.sendall(head(100) + b"x" * 10)
  assert client.infer(X).status == 200


@pytest.mark.parametrize(
  "sent",
  [
    *(b"\x16\x03\x01\x02\x00\x01", b"hello\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
    b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 70_000,
    b"GET /" + b"y" * 70_000,
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
  ],
)
def test_what_is_no_http(client, sent):
  with open_socket(client) as sock:
    sock.sendall(sent)
    reply = read_all(sock)
    assert reply.startswith(b"HTTP/1.1 400 ")
    assert json.loads(reply.partition(b"\r\n\r\n")[2]) == {
      "error": "this is no HTTP request, or its headers are too long"
    }


def test_a_chunked_body_is_counted_as_it_comes(client):
  with open_socket(client) as sock:
    sock.sendall(f"POST {PATH} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
    sock.sendall(b"1000\r\n" + b" " * 4096 + b"\r\n")
    sock.sendall(b"2000\r\n" + b" " * 8192 + b"\r\n")
    assert sock.recv(65536).startswith(b"HTTP/1.1 413 ")


def test_all_bodies_together_are_bounded(client):
  """Three clients announce 9,000 bytes each, and 25,000 is what the server holds."""
  socks = [open_socket(client) for _ in range(3)]
  for sock in socks:
    sock.sendall(head(9_000))
  time.sleep(0.1)
  replies = [read_all(sock) for sock in socks]
  counts = [sum(f" {status} ".encode() in r[:20] for r in replies) for status in (408, 503)]
  assert counts == [2, 1]
  for sock in socks:
    sock.close()
  assert client.infer(X).status == 200
  assert "flexiq_request_bytes 0.0" in client.get("/metrics").body.decode()


def test_budget():
  budget = Budget(100)
  with budget.hold() as a, budget.hold() as b:
    a.add(60)
    b.add(40)
    with pytest.raises(Refused, match="holds 100 bytes of requests and 100 at most"):
      b.add(1)
    assert budget.taken == 100
  assert budget.taken == 0


@pytest.mark.parametrize(
  ("field", "value", "text"),
  [
    ("batch", 0, "batch: 0; a positive integer"),
    ("batch", 1.5, "batch: 1.5; a positive integer"),
    ("pixels", -1, "pixels: -1; a positive integer"),
    ("body_seconds", float("nan"), "body_seconds: nan; a positive number"),
    ("memory", 1, "memory: 1; at least body"),
    ("workers", True, "workers: True; a positive integer"),
  ],
)
def test_wrong_limits(field, value, text):
  with pytest.raises(ValueError, match=text):
    Limits(**{field: value})


def test_who_hangs_up_leaves_the_queue():
  gate = Gate()
  with served(gate) as client:
    gate.closed.set()
    threads = [threading.Thread(target=client.infer, args=(np.zeros((8, *SHAPE)),)) for _ in "ab"]
    for thread in threads:
      thread.start()
    until(lambda: client.engine.state().queued == 8 and gate.waits.is_set())
    content = json.dumps(request(X)).encode()
    with open_socket(client) as sock:
      sock.sendall(head(len(content)) + content)
      until(lambda: client.engine.state().queued == 9)
    until(lambda: client.engine.state().queued == 8)
    gate.let(2)
    for thread in threads:
      thread.join()
    assert client.engine.state().cancelled == 1
    assert 'outcome="gone"} 1.0' in client.get("/metrics").body.decode()


@pytest.mark.slow
def test_ten_thousand_connections():
  """Most are closed with an error, memory stays, and the server answers others meanwhile."""
  with served(limits=Limits(batch=8, connections=500, header_seconds=3)) as client:
    # In a process of its own: both ends of a connection take a file descriptor.
    import subprocess
    import sys

    script = (
      "import resource, socket, sys, time\n"
      "hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]\n"
      "resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))\n"
      "socks = []\n"
      "for i in range(10_000):\n"
      "  socks.append(socket.create_connection(('127.0.0.1', int(sys.argv[1])), timeout=30))\n"
      "print('open', flush=True)\n"
      "closed = 0\n"
      "for sock in socks:\n"
      "  closed += sock.recv(100).startswith(b'HTTP/1.1 503')\n"
      "print(closed, flush=True)\n"
    )
    rss = lambda: float(
      client.get("/metrics").body.decode().split("\nprocess_resident_memory_bytes ")[1].split()[0]
    )
    before = rss()
    other = subprocess.Popen(
      [sys.executable, "-c", script, str(client.port)], stdout=subprocess.PIPE, text=True
    )
    out, _ = other.communicate(timeout=120)
    assert out.split()[0] == "open"
    assert int(out.split()[1]) >= 9_000
    time.sleep(0.5)
    assert client.infer(X).status == 200
    assert rss() - before < 100e6
