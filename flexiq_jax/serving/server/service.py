"""What all handlers share, and how a request becomes an answer or an error.

| the engine says | response |
|---|---|
| `Overloaded` | 429, `Retry-After` |
| `TooLate` | 504 |
| `Stopping` | 503, `Retry-After`, and the connection closes |
| `Failed` | 500 |
| nothing in `answer_seconds` | 504 |
| nothing, and the client hangs up | its request is taken back |
"""

import asyncio
import contextlib
import dataclasses
import functools
import logging
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Executor
from typing import Any, TypeVar

import msgspec
import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexiq_jax import serving
from flexiq_jax.serving.server.limits import Budget, Held, Limits
from flexiq_jax.serving.server.metrics import Metrics
from flexiq_jax.serving.server.model import Model
from flexiq_jax.serving.server.refusals import Refused

R = TypeVar("R")
_LOG = logging.getLogger(__name__)
_GONE = 499  # of a client that hung up, as nginx counts it; nobody reads the response
_OUTCOMES = {429: "overloaded", 503: "unavailable", 504: "late", 500: "failed", _GONE: "gone"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Service:
  """What the handlers work with.

  Attributes:
    engine: answers batches (see `serving.Engine`).
    model: the model.
    limits: on requests.
    metrics: that are counted.
    budget: of bytes in the server.
    workers: threads that decode.
    priorities: seconds to the deadline of requests of priority 1, 2, ...
    deadline: of requests without priority or time-out; None is no deadline.
  """

  engine: Any
  model: Model
  limits: Limits
  metrics: Metrics
  budget: Budget
  workers: Executor
  priorities: tuple[float, ...] = ()
  deadline: float | None = None

  async def decode(self, function: Callable[..., R], *arguments: Any) -> R:
    """Calls a function in a worker thread."""
    return await asyncio.get_running_loop().run_in_executor(self.workers, function, *arguments)

  async def answer(self, request: Request, x: np.ndarray, seconds: float | None) -> Any:
    """Has the engine answer a batch of examples.

    Args:
      request: the client's; its body has been read.
      x: float32 [n, ...].
      seconds: to the deadline, None takes that of the service.

    Raises:
      Refused: see the table above.
    """
    seconds = self.deadline if seconds is None else seconds
    deadline = None if seconds is None else time.monotonic() + seconds
    gone = asyncio.ensure_future(request.receive())  # comes when the client hangs up
    patience = asyncio.timeout(self.limits.answer_seconds)
    gone.add_done_callback(functools.partial(_end, patience))
    try:
      async with patience:
        return await self.engine.submit(x, deadline=deadline)
    except TimeoutError:
      if gone.done():
        raise Refused(_GONE, "the client has gone") from None
      raise Refused(504, f"no answer in {self.limits.answer_seconds:g} s") from None
    except serving.Overloaded as error:
      raise Refused(429, str(error), {"Retry-After": "1"}) from error
    except serving.TooLate as error:
      raise Refused(504, str(error)) from error
    except serving.Stopping as error:
      raise Refused(503, str(error), {"Retry-After": "1", "Connection": "close"}) from error
    except serving.Failed as error:
      _log_once(error.cause)
      raise Refused(500, str(error)) from error
    finally:
      gone.cancel()


def _end(patience: asyncio.Timeout, gone: asyncio.Future[Any]) -> None:
  """Ends a wait as its time-out would, unless it has ended."""
  if not gone.cancelled():
    with contextlib.suppress(RuntimeError):  # of one that has ended
      patience.reschedule(asyncio.get_running_loop().time())


def _log_once(cause: BaseException) -> None:
  """Logs what a batch raised, once for all of its requests."""
  if not getattr(cause, "is_logged", False):
    cause.is_logged = True  # type: ignore[attr-defined]
    _LOG.error("a batch failed", exc_info=cause)


Handler = Callable[[Request, Held], Awaitable[Response]]


def route(service: Service, path: str, handler: Handler, *methods: str, kind: str = "") -> Route:
  """A route whose errors are JSON, whose bytes are counted, and whose requests are.

  Args:
    service: the service.
    path: of the route.
    handler: takes the request and what it holds, and returns a response or raises `Refused`.
    *methods: of HTTP.
    kind: name of these requests in the metrics; empty for those that are not counted.
  """

  async def endpoint(scope, receive, send) -> None:
    started, outcome = time.monotonic(), "answered"
    with service.budget.hold() as held:
      try:
        response = await handler(Request(scope, receive, send), held)
      except Refused as refused:
        outcome = _OUTCOMES.get(refused.status, "refused")
        response = error(refused.status, refused.text, refused.headers)
      except Exception:
        _LOG.exception("a request failed")
        outcome = "failed"
        response = error(500, "the server failed on this request; its log says why")
      if kind:
        service.metrics.request(kind, outcome, time.monotonic() - started)
      if getattr(service.engine, "stopping", False):
        response.headers["Connection"] = "close"
      with contextlib.suppress(Refused):  # what is computed is sent, and counted where it fits
        held.add(len(response.body))
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(service.limits.answer_seconds):
          await response(scope, receive, send)

  return Route(path, _Endpoint(endpoint), methods=list(methods))


class _Endpoint:
  """A callable object: Starlette takes functions for handlers of another signature."""

  def __init__(self, call: Callable[..., Awaitable[None]]) -> None:
    self._call = call

  async def __call__(self, scope, receive, send) -> None:
    await self._call(scope, receive, send)


def json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
  """A JSON response; NaN and infinities are null."""
  return Response(msgspec.json.encode(content), status, headers, media_type="application/json")


def error(status: int, text: str, headers: dict[str, str] | None = None) -> Response:
  """The protocol's error response."""
  return json({"error": text}, status, headers)


def timings(answer: Any) -> tuple[dict[str, Any], dict[str, str]]:
  """What every answer says of itself: parameters of the protocol, and headers."""
  queued, computed = 1e3 * answer.queued_s, 1e3 * answer.computed_s
  parameters = {
    "ratio": float(answer.ratio),
    "queued_ms": round(queued, 3),
    "computed_ms": round(computed, 3),
    "batch": int(answer.batch),
  }
  headers = {
    "FlexiQ-Ratio": f"{answer.ratio:g}",
    "Server-Timing": f"queue;dur={queued:.3f}, compute;dur={computed:.3f}",
  }
  return parameters, headers
