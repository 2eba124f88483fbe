"""The ASGI application: all routes around one engine."""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from flexiq_jax.serving.server import classify, live, pages, protocol, service
from flexiq_jax.serving.server.limits import Budget, Limits
from flexiq_jax.serving.server.live import Live, Shown
from flexiq_jax.serving.server.metrics import Metrics
from flexiq_jax.serving.server.model import Model
from flexiq_jax.serving.server.refusals import shown


def create_app(
  engine: Any,
  model: Model,
  *,
  limits: Limits | None = None,
  told: Shown | None = None,
  priorities: tuple[float, ...] = (),
  deadline: float | None = None,
  lives: bool = False,
) -> Starlette:
  """Makes the application.

  Args:
    engine: answers batches; whoever starts it stops it (see `lives`). Its hook `on_batch` is taken.
    model: what it computes.
    limits: on requests.
    told: what the live page is told, and whether it may hold the ratio.
    priorities: seconds to the deadline of requests of priority 1, 2, ...
    deadline: seconds for all others; None is no deadline.
    lives: whether the application's own start and end are the engine's, as under a server that is
      not `Listening`.

  Raises:
    ValueError: a deadline that is not positive.
  """
  for name, seconds in (("deadline", deadline), *(("priorities", p) for p in priorities)):
    if seconds is not None and not seconds > 0:
      raise ValueError(f"{name}: {seconds}; positive seconds are accepted")
  limits, counted = limits or Limits(), Metrics(model.levels)
  budget, page = Budget(limits.memory), Live(engine, model, told or Shown())
  workers = ThreadPoolExecutor(limits.workers, thread_name_prefix="decode")

  def on_batch(record: Any) -> None:
    counted.batch(record)
    if record.outcome == "answered":
      page.add(record.ratio, record.size)

  engine.on_batch = on_batch
  counted.gauge("ratio", "The present 4-bit ratio", lambda: engine.state().ratio)
  counted.gauge("queued_examples", "Examples that wait", lambda: engine.state().queued)
  counted.gauge("request_bytes", "Bytes that requests hold", lambda: budget.taken)
  if model.accuracies:
    text = "Top-1 in %, mean over the last examples"
    counted.gauge("effective_accuracy", text, lambda: page.accuracy() or float("nan"))

  served = service.Service(
    engine=engine,
    model=model,
    limits=limits,
    metrics=counted,
    budget=budget,
    workers=workers,
    priorities=tuple(priorities),
    deadline=deadline,
  )

  @contextlib.asynccontextmanager
  async def lifespan(app: Starlette) -> AsyncGenerator[None, None]:
    async def sample() -> None:
      while True:
        page.sample()
        await asyncio.sleep(live.PERIOD)

    if lives:
      await engine.start()
    sampling = asyncio.create_task(sample())
    try:
      yield
    finally:
      sampling.cancel()
      if lives:
        await engine.stop()
      workers.shutdown(wait=False, cancel_futures=True)

  return Starlette(
    routes=[
      *protocol.routes(served, metadata_version()),
      *classify.routes(served),
      *pages.routes(served, page),
    ],
    exception_handlers={HTTPException: _http_error},
    lifespan=lifespan,
  )


def metadata_version() -> str:
  """Version of this package; that of the sources where it is not installed."""
  try:
    return metadata.version("flexiq_jax")
  except metadata.PackageNotFoundError:
    return "source"


async def _http_error(request: Request, found: Exception) -> Response:
  """Unknown paths and methods, in the protocol's form."""
  assert isinstance(found, HTTPException)
  path = request.url.path
  texts = {
    404: f"there is nothing at {shown(path)}; /v2 and / are there",
    405: f"{request.method} is not accepted at {shown(path)}",
  }
  text = texts.get(found.status_code, found.detail)
  return service.error(found.status_code, text, dict(found.headers or {}))
