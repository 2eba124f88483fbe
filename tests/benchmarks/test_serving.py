"""The client that benchmarks and tests of the server use, and that the benchmark runs."""

import asyncio
import contextlib

import numpy as np
import pytest

from benchmarks import http_client, serving

REPLY = b"HTTP/1.1 200 OK\r\nInference-Header-Content-Length: 1\r\ncontent-length: 2\r\n\r\nok"


def against(answer, client):
  """Runs a client against a server that answers the n-th request by `answer(n, writer)`."""
  seen = []

  async def serve(reader, writer):
    while head := await reader.readuntil(b"\r\n\r\n"):
      length = int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0])
      seen.append(await reader.readexactly(length))
      await answer(len(seen) - 1, writer)

  async def guarded(reader, writer):
    with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
      await serve(reader, writer)
    writer.close()
    with contextlib.suppress(ConnectionError):
      await writer.wait_closed()

  async def main():
    server = await asyncio.start_server(guarded, "127.0.0.1", 0)
    async with server:
      found = await client(server.sockets[0].getsockname()[1])
      await asyncio.sleep(0.6)  # until the server's side has noticed, too
      return found

  return asyncio.run(main()), seen


def test_requests_leave_at_their_times_though_the_server_is_slow():
  async def answer(number, writer):
    await asyncio.sleep(0.3)
    writer.write(REPLY)

  times = np.array([0.0, 0.05, 0.1])
  requests = [http_client.post("/", b"%d" % i) for i in range(3)]
  found, seen = against(answer, lambda port: http_client.open_loop(port, requests, times))
  assert seen == [b"0", b"1", b"2"]
  assert [(e.number, e.intended, e.status, e.body) for e in found] == [
    (i, times[i], 200, b"ok") for i in range(3)
  ]
  # All three were under way before the first answer.
  assert max(e.sent for e in found) < min(e.done for e in found)
  assert all(e.sent >= e.intended and e.done - e.intended >= 0.3 for e in found)


def test_every_end_of_a_request_is_told_apart():
  async def answer(number, writer):
    if number == 0:
      writer.close()  # no answer
    elif number == 1:
      await asyncio.sleep(0.5)  # nobody waits that long
    else:
      writer.write(REPLY[:20])
      await writer.drain()
      await asyncio.sleep(0.01)
      writer.write(REPLY[20:])

  times, patience = np.array([0.0, 0.1, 0.2]), [None, 0.05, None]
  requests = [http_client.post("/", b"x")] * 3
  found, _ = against(answer, lambda port: http_client.open_loop(port, requests, times, patience))
  assert [e.status for e in found] == [0, -1, 200]


def test_an_answer_that_nobody_asked_for_is_an_error():
  async def answer(number, writer):
    writer.write(REPLY * 2)

  requests = [http_client.post("/", b"x")]
  with pytest.raises(RuntimeError, match="no request asked for"):
    against(answer, lambda port: http_client.open_loop(port, requests, np.zeros(1)))


def test_closed_loop_counts_answers():
  async def answer(number, writer):
    writer.write(REPLY if number % 2 else REPLY.replace(b"200", b"500"))

  request = http_client.post("/", b"x")
  (answered, seconds), seen = against(
    answer, lambda port: http_client.closed_loop(port, request, 1, 0.2)
  )
  assert answered == len(seen) // 2
  assert 0.2 <= seconds < 5


def test_requests_are_whole():
  asked = serving.requests()
  for request in asked.values():
    head, _, body = request.partition(b"\r\n\r\n")
    assert int(head.split(b"Content-Length: ")[1].split(b"\r\n")[0]) == len(body)
  assert b"Inference-Header-Content-Length: " in asked["server"]


@pytest.mark.slow
def test_benchmark_runs_without_its_peer(monkeypatch):
  monkeypatch.setattr(serving, "peer", lambda: "litserve is not installed")
  result = serving.measure(rate=50.0, seconds=0.5, rounds=1, clients=2)
  assert set(result["added p50, ms"]) == {"engine", "server", "json"}
  assert result["skipped"] == "litserve is not installed"
  assert all(rate > 0 for rate in result["throughput, requests a second"].values())
