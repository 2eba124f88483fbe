"""Connections that cost nothing but what was agreed: how many there are, and how long they idle.

uvicorn closes a connection that waits for its next request, but not one that never sends a first
one, nor one whose headers come a byte at a time; and its own limit on connections answers requests,
while the connections stay. Here a connection beyond the limit gets 503 and is closed as it comes,
and one whose headers are not complete in time gets 408.
"""

import resource
from typing import Any

import msgspec
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flexiq_jax.serving.server.limits import Limits

_RESERVED = 128  # file descriptors for all that is no connection
_HEADERS = 64 * 1024  # bytes of a request's line and headers, but for what came at once


def allow(connections: int) -> int:
  """Raises the limit on file descriptors to hold so many connections, as far as the system lets it.

  Returns:
    How many connections there can be.
  """
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  wanted = connections + _RESERVED
  if soft != resource.RLIM_INFINITY and soft < wanted:
    soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
  if soft == resource.RLIM_INFINITY:
    return connections
  return max(1, min(connections, soft - _RESERVED))


def protocol(limits: Limits) -> type[HttpToolsProtocol]:
  """A protocol class for uvicorn that keeps to limits."""

  class Guarded(HttpToolsProtocol):
    _waiting: Any = None
    _refused = False
    _header_bytes = 0

    def connection_made(self, transport: Any) -> None:
      if len(self.connections) >= limits.connections:
        self._refused, self.transport = True, transport
        text = f"{limits.connections} connections are open, and no more are accepted"
        transport.write(_response(503, "Service Unavailable", text))
        transport.close()
        return
      super().connection_made(transport)
      self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
      self._stop_waiting()
      if not self._refused:
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
      if self._refused or self.transport.is_closing():
        return
      waited = self._waiting
      super().data_received(data)
      if waited is not None and self._waiting is waited:  # all of it was headers
        self._header_bytes += len(data)
        if self._header_bytes > _HEADERS:
          self.send_400_response("")

    def on_message_begin(self) -> None:
      self._header_bytes = 0
      if self._waiting is None:
        self._wait()
      super().on_message_begin()

    def on_headers_complete(self) -> None:
      self._stop_waiting()
      super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
      # uvicorn's own is plain text.
      self.transport.write(
        _response(400, "Bad Request", "this is no HTTP request, or its headers are too long")
      )
      self.transport.close()

    def _wait(self) -> None:
      self._waiting = self.loop.call_later(limits.header_seconds, self._late)

    def _stop_waiting(self) -> None:
      if self._waiting is not None:
        self._waiting.cancel()
        self._waiting = None

    def _late(self) -> None:
      self._waiting = None
      if not self.transport.is_closing():
        text = f"no complete request line and headers in {limits.header_seconds:g} s"
        self.transport.write(_response(408, "Request Timeout", text))
        self.transport.close()

  return Guarded


def _response(status: int, phrase: str, text: str) -> bytes:
  body = msgspec.json.encode({"error": text})
  head = (
    f"HTTP/1.1 {status} {phrase}\r\nContent-Type: application/json\r\n"
    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
  )
  return head.encode() + body
