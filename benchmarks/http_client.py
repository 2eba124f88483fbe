"""A lean HTTP client that keeps to its plan: requests leave at intended times, whatever comes back.

An open loop: a slow server does not slow its clients down. Latency counts from the intended time of
a request, so that time which the client itself was late is not hidden (coordinated omission).
"""

import asyncio
import collections
import dataclasses
import selectors
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

_END = b"\r\n\r\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """One request and what became of it.

  Attributes:
    number: of the request.
    intended: when it was to leave, seconds from the start.
    sent: when it left.
    done: when its response was complete, or it was clear that none comes.
    status: of the response; 0 where the connection ended without one, -1 where nobody waited.
    body: of the response.
  """

  number: int
  intended: float
  sent: float
  done: float
  status: int
  body: bytes


class Connection(asyncio.Protocol):
  """One connection, one request at a time."""

  def __init__(self) -> None:
    """Not connected yet."""
    self._buffer, self.closed = bytearray(), False
    self._answer: asyncio.Future[tuple[int, bytes]] | None = None
    self._transport: Any = None
    self.unasked = 0  # bytes that no request asked for
    self.ended = asyncio.Event()

  def connection_made(self, transport: asyncio.BaseTransport) -> None:
    """Keeps the transport."""
    self._transport = transport

  def connection_lost(self, exc: Exception | None) -> None:
    """Whoever waits gets status 0."""
    self.closed = True
    self.ended.set()
    if self._answer is not None and not self._answer.done():
      self._answer.set_result((0, b""))

  def data_received(self, data: bytes) -> None:
    """Completes the answer once all of it is there."""
    self._buffer += data
    if self._answer is None or self._answer.done():
      self.unasked += len(data)
      return
    head = self._buffer.find(_END)
    if head < 0:
      return
    text = bytes(self._buffer[:head]).lower()
    length = int(text.partition(b"\r\ncontent-length:")[2].partition(b"\r\n")[0] or 0)
    if len(self._buffer) < head + 4 + length:
      return
    body = bytes(self._buffer[head + 4 : head + 4 + length])
    del self._buffer[: head + 4 + length]
    self.unasked += len(self._buffer)
    self._answer.set_result((int(text[9:12]), body))
    if b"connection: close" in text:
      self.close()

  async def ask(self, request: bytes) -> tuple[int, bytes]:
    """Sends a whole request; status and body of its response."""
    if self.closed:
      return 0, b""
    self._answer = answer = asyncio.get_running_loop().create_future()
    self._transport.write(request)
    return await answer

  def close(self) -> None:
    """Hangs up."""
    self.closed = True
    self._transport.close()


class Pool:
  """Connections to one server; as many as there are requests at a time."""

  def __init__(self, port: int) -> None:
    """Connects when asked."""
    self._port, self.unasked = port, 0
    self._idle: collections.deque[Connection] = collections.deque()
    self._all: set[Connection] = set()

  async def ask(self, request: bytes, patience: float | None = None) -> tuple[int, bytes]:
    """Sends a request on a free connection.

    Args:
      request: all its bytes.
      patience: seconds after which the client hangs up; None waits.
    """
    connection = None
    while self._idle and (connection is None or connection.closed):
      connection = self._idle.pop()
    if connection is None or connection.closed:
      loop = asyncio.get_running_loop()
      try:
        _, connection = await loop.create_connection(Connection, "127.0.0.1", self._port)
      except OSError:
        return 0, b""
      self._all.add(connection)
    try:
      async with asyncio.timeout(patience):
        answer = await connection.ask(request)
    except TimeoutError:
      connection.close()
      return -1, b""
    self.unasked += connection.unasked
    if connection.closed:
      self._all = {c for c in self._all if not c.ended.is_set()}
    else:
      self._idle.append(connection)
    return answer

  async def close(self) -> None:
    """Closes all connections."""
    for connection in self._all:
      connection.close()
    for connection in self._all:
      await connection.ended.wait()


def post(path: str, body: bytes, **headers: str) -> bytes:
  """The bytes of a POST request."""
  more = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
  head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{more}\r\n"
  return head.encode() + body


def punctual_loop() -> asyncio.AbstractEventLoop:
  """An event loop that wakes when it is time; epoll's and uvloop's wait for whole milliseconds."""
  return asyncio.SelectorEventLoop(selectors.SelectSelector())


async def open_loop(
  port: int,
  requests: Sequence[bytes],
  times: np.ndarray,
  patience: Sequence[float | None] | None = None,
) -> list[Exchange]:
  """Sends requests at their times.

  Args:
    port: of the server.
    requests: N whole requests.
    times: float64 `[N]`, seconds from the start, ascending.
    patience: seconds after which the client of each hangs up.

  Returns:
    What became of each, by number.
  """
  pool, start, tasks = Pool(port), time.perf_counter(), []

  async def one(number: int) -> Exchange:
    sent = time.perf_counter() - start
    wait = None if patience is None else patience[number]
    status, body = await pool.ask(requests[number], wait)
    return Exchange(
      number=number,
      intended=float(times[number]),
      sent=sent,
      done=time.perf_counter() - start,
      status=status,
      body=body,
    )

  for number, due in enumerate(times):
    left = due - (time.perf_counter() - start)
    if left > 0:
      await asyncio.sleep(left)
    tasks.append(asyncio.create_task(one(number)))
  found = list(await asyncio.gather(*tasks))
  await pool.close()
  if pool.unasked:
    raise RuntimeError(f"{pool.unasked} bytes came that no request asked for")
  return found


async def closed_loop(port: int, request: bytes, clients: int, seconds: float) -> tuple[int, float]:
  """So many clients, each of which sends again as soon as it has an answer.

  Returns:
    Number of answers with status 200, and seconds that they took.
  """
  pool, start, answered = Pool(port), time.perf_counter(), 0

  async def client() -> None:
    nonlocal answered
    while time.perf_counter() - start < seconds:
      status, _ = await pool.ask(request)
      answered += status == 200

  await asyncio.gather(*(client() for _ in range(clients)))
  await pool.close()
  return answered, time.perf_counter() - start
