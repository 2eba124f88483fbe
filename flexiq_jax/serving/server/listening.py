"""The server's socket and life: bind, start, serve, drain.

    SIGTERM -> the engine refuses what is new (503) and answers what waits; /v2/health/ready says no
            -> the sockets close; responses that are under way are sent; the process ends with 0
    a second SIGTERM or Ctrl-C -> what still waits is refused

The port is bound before anything is compiled, so that one that is taken is told at once.
"""

import asyncio
import contextlib
import dataclasses
import errno
import signal
import socket
from collections.abc import Callable, Generator
from typing import Any

import uvicorn
from starlette.applications import Starlette

from flexiq_jax.serving.server import connections
from flexiq_jax.serving.server.limits import Limits

_BACKLOG = 4096
_LINGER = 5.0  # seconds in which responses that are under way may be sent at the end


def bind(host: str, port: int) -> socket.socket:
  """Takes a port.

  Args:
    host: address or name.
    port: 0 takes one that is free.

  Raises:
    ValueError: it cannot be taken; says why, and names the field.
  """
  if not isinstance(port, int) or isinstance(port, bool) or not 0 <= port < 65536:
    raise ValueError(f"port: {port!r}; 0..65535 is accepted")
  try:
    family, kind, proto, _, address = socket.getaddrinfo(
      host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
  except OSError as error:
    raise ValueError(
      f"host: {host!r}: {error.strerror}; an address or a name is accepted"
    ) from None
  sock = socket.socket(family, kind, proto)
  try:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(address)
    sock.listen(_BACKLOG)  # now: on Linux a second bind with SO_REUSEADDR fails only then
  except OSError as error:
    sock.close()
    if error.errno == errno.EADDRINUSE:
      why = "is taken by another process; name another, or 0 for one that is free"
    elif error.errno == errno.EACCES:
      why = "needs rights that this process lacks; 1024 and above are accepted"
    else:
      raise ValueError(f"host: {host!r} cannot be listened at: {error.strerror}") from None
    raise ValueError(f"port: {port} of {host or 'all addresses'} {why}") from None
  sock.setblocking(False)
  return sock


@dataclasses.dataclass(kw_only=True)
class Listening:
  """A server of one application on one socket.

  Attributes:
    app: the application.
    engine: that it answers with; started here, and drained.
    sock: from `bind`.
    limits: on connections.
    drain_seconds: in which the engine may answer what waits.
    ready: called once requests are answered.
  """

  app: Starlette
  engine: Any
  sock: socket.socket
  limits: Limits
  drain_seconds: float = 30.0
  ready: Callable[[], None] = lambda: None

  def run(self) -> None:
    """Serves until SIGTERM or Ctrl-C, then drains and returns. Call it in the main thread."""
    factory = None
    with contextlib.suppress(ImportError):
      import uvloop

      factory = uvloop.new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
      runner.run(self.serve(signals=True))

  async def serve(self, *, signals: bool = False, stop: asyncio.Event | None = None) -> None:
    """The same in a running event loop.

    Args:
      signals: whether SIGTERM and SIGINT stop it.
      stop: stops it when it is set.
    """
    stop = stop or asyncio.Event()
    count = connections.allow(self.limits.connections)
    limits = dataclasses.replace(self.limits, connections=count)
    config = uvicorn.Config(
      self.app,
      http=connections.protocol(limits),
      ws="none",
      lifespan="on",
      backlog=_BACKLOG,
      log_config=None,
      access_log=False,
      proxy_headers=False,
      server_header=False,
      date_header=False,
      timeout_keep_alive=max(1, round(limits.idle_seconds)),
      timeout_graceful_shutdown=round(_LINGER),
    )
    server = _Server(config)
    with _handlers(stop.set, signals):
      serving = asyncio.create_task(server.serve(sockets=[self.sock]))
      stopped = asyncio.create_task(stop.wait())
      try:
        # The page and the health checks answer while the engine compiles.
        starting = asyncio.create_task(self.engine.start())
        await asyncio.wait((starting, serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
          starting.result()
          self.ready()
          await asyncio.wait((serving, stopped), return_when=asyncio.FIRST_COMPLETED)
        else:
          await asyncio.wait((starting,))  # a compilation cannot be cut short
      finally:
        await self._drain(stop)
        server.should_exit = True
        stopped.cancel()
        await serving

  async def _drain(self, stop: asyncio.Event) -> None:
    """Lets the engine end; a second signal cuts it short."""
    stop.clear()
    draining = asyncio.create_task(self.engine.stop(self.drain_seconds))
    again = asyncio.create_task(stop.wait())
    await asyncio.wait((draining, again), return_when=asyncio.FIRST_COMPLETED)
    if not draining.done():
      await self.engine.stop(0.0)
    again.cancel()
    await draining


class _Server(uvicorn.Server):
  """uvicorn's server without its signal handlers, which would raise the signal again."""

  @contextlib.contextmanager
  def capture_signals(self) -> Generator[None, None, None]:  # type: ignore[override]
    yield


@contextlib.contextmanager
def _handlers(call: Callable[[], None], wanted: bool) -> Generator[None, None, None]:
  """Calls a function in the event loop at each SIGTERM and SIGINT."""
  loop, numbers = asyncio.get_running_loop(), (signal.SIGTERM, signal.SIGINT) if wanted else ()
  before = {number: signal.getsignal(number) for number in numbers}
  for number in numbers:
    loop.add_signal_handler(number, call)
  try:
    yield
  finally:
    for number, handler in before.items():
      loop.remove_signal_handler(number)
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
