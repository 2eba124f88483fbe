"""The body of a request: as long as is allowed, in the time that is allowed, decompressed.

A body that is too long by its own word is refused before it is read, one that turns out to be so as
soon as it does; one without a length is counted as it comes. `Content-Encoding` gzip and deflate
(clients of Triton have a switch for it) are counted after decompression, piece by piece.
"""

import asyncio
import zlib

from starlette.requests import ClientDisconnect, Request

from flexiq_jax.serving.server.limits import Held, Limits
from flexiq_jax.serving.server.refusals import Refused, shown

_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}


async def read(request: Request, limits: Limits, held: Held) -> bytes:
  """Reads a body.

  Args:
    request: whose body nobody has read.
    limits: of the server.
    held: what the request holds; the body is added.

  Raises:
    Refused: 400 cut short, 408 late, 413 too long, 415 an encoding that is not accepted, 503 the
      server holds too much.
  """
  encoding = request.headers.get("content-encoding", "identity").lower()
  if encoding not in ("identity", *_WINDOWS):
    accepted = ", ".join(("identity", *_WINDOWS))
    raise Refused(415, f"Content-Encoding: {shown(encoding)}; {accepted} are accepted")
  announced = request.headers.get("content-length", "")
  length = int(announced) if announced.isdecimal() and len(announced) < 16 else None
  if (announced and length is None) or (length or 0) > limits.body:
    raise _too_long(limits, f"Content-Length {shown(announced)}")
  held.add(length or 0)
  body = bytearray()
  try:
    async with asyncio.timeout(limits.body_seconds):
      async for chunk in request.stream():
        if len(body) + len(chunk) > limits.body:
          raise _too_long(limits, "body")
        if length is None:
          held.add(len(chunk))
        body += chunk
  except TimeoutError:
    text = f"body: {len(body)} bytes in {limits.body_seconds:g} s, and it is not complete"
    raise Refused(408, text, {"Connection": "close"}) from None
  except ClientDisconnect:
    raise Refused(400, f"body: cut short after {len(body)} bytes") from None
  if encoding == "identity":
    return bytes(body)
  return _decompressed(bytes(body), encoding, limits, held)


def _too_long(limits: Limits, what: str) -> Refused:
  return Refused(413, f"{what}: up to {limits.body} bytes are accepted", {"Connection": "close"})


def _decompressed(body: bytes, encoding: str, limits: Limits, held: Held) -> bytes:
  reader = zlib.decompressobj(_WINDOWS[encoding])
  held.add(min(limits.body, 1032 * len(body)))  # deflate's largest ratio
  try:
    plain = reader.decompress(body, limits.body)
  except zlib.error as error:
    raise Refused(400, f"body: no {encoding}: {error}") from None
  if reader.unconsumed_tail:
    raise _too_long(limits, "decompressed body")
  if not reader.eof:
    raise Refused(400, f"body: {encoding} is cut short")
  return plain
