"""What one client, and all together, may take of the server."""

import dataclasses

from flexiq_jax.serving.server.refusals import Refused


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """Bounds of the server.

  Attributes:
    batch: examples of one request.
    body: bytes of one request's body, also after decompression.
    memory: bytes of all bodies and responses that are in the server at a time.
    pixels: of an image, and of what resizing makes of it.
    connections: open at a time; further ones get 503 and are closed.
    header_seconds: from a connection's start to its first request's end of headers.
    body_seconds: in which a body has to arrive.
    answer_seconds: in which the engine has to answer; then 504.
    idle_seconds: that a connection may wait for its next request.
    workers: threads that decode images and long bodies.
  """

  batch: int = 128
  body: int = 32 * 2**20
  memory: int = 512 * 2**20
  pixels: int = 25_000_000
  connections: int = 4096
  header_seconds: float = 10.0
  body_seconds: float = 20.0
  answer_seconds: float = 30.0
  idle_seconds: float = 60.0
  workers: int = 2

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value, whole = getattr(self, field.name), field.type in (int, "int")
      fine = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < 2**53
      if not fine or (whole and int(value) != value):
        kind = "a positive integer" if whole else "a positive number"
        raise ValueError(f"{field.name}: {value!r}; {kind} is accepted")
    if self.memory < self.body:
      raise ValueError(f"memory: {self.memory}; at least body, {self.body}, is accepted")


class Budget:
  """Bytes that requests hold at a time; one event loop uses it."""

  def __init__(self, size: int) -> None:
    """Starts with nothing held."""
    self._size, self._taken = size, 0

  @property
  def taken(self) -> int:
    """Bytes that are held now."""
    return self._taken

  def hold(self) -> "Held":
    """What one request holds; a context that gives it back."""
    return Held(self)

  def _take(self, count: int) -> None:
    if self._taken + count > self._size:
      raise Refused(
        503,
        f"the server holds {self._taken} bytes of requests and {self._size} at most; send it again",
        {"Retry-After": "1"},
      )
    self._taken += count

  def _give(self, count: int) -> None:
    self._taken -= count


class Held:
  """Bytes of one request."""

  def __init__(self, budget: Budget) -> None:
    """Holds nothing yet."""
    self._budget, self._count = budget, 0

  def add(self, count: int) -> None:
    """Takes more.

    Raises:
      Refused: all requests together would hold too much.
    """
    self._budget._take(count)
    self._count += count

  def __enter__(self) -> "Held":
    return self

  def __exit__(self, *_: object) -> None:
    self._budget._give(self._count)
