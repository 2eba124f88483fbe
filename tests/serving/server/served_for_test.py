"""A server in a thread, with a real engine, a device that sleeps, and real sockets."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import threading
import time

import numpy as np

from flexiq_jax.serving import Batching, Engine, profile
from flexiq_jax.serving.controllers import create
from flexiq_jax.serving.server import Limits, Listening, Model, Shown, bind, create_app

SHAPE, CLASSES, LEVELS = (4, 4, 1), 3, (0.0, 0.5, 1.0)
PROFILE = profile.modelled(int8=1000.0, fixed=0.0005, sizes=(1, 2, 4, 8), ratios=LEVELS)
MODEL = Model(
  name="toy",
  shape=SHAPE,
  classes=CLASSES,
  levels=LEVELS,
  class_names=("ant", "bee", "cat"),
  accuracies={0.0: 80.0, 0.5: 79.0, 1.0: 75.0},
)
PATH = "/v2/models/toy/infer"


def logits(x: np.ndarray, ratio: float) -> np.ndarray:
  """What the stand-in computes: no two ratios or examples give the same."""
  mean = x.reshape(len(x), -1).mean(axis=1, keepdims=True)
  return (mean + np.array([[0.0, 1.0, 2.0]]) * (1 + ratio)).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class Reply:
  """A response."""

  status: int
  headers: dict[str, str]
  body: bytes

  @property
  def json(self):
    return json.loads(self.body)


@dataclasses.dataclass
class Client:
  """Sends requests to a server."""

  port: int
  engine: Engine
  app: object
  stop: threading.Event

  def send(self, method, path, body=None, headers=None, timeout=20) -> Reply:
    connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
    with contextlib.closing(connection):
      connection.request(method, path, body, headers or {})
      response = connection.getresponse()
      names = {name.lower(): value for name, value in response.getheaders()}
      return Reply(response.status, names, response.read())

  def get(self, path, **more) -> Reply:
    return self.send("GET", path, **more)

  def post(self, path, body=b"", headers=None, **more) -> Reply:
    body = json.dumps(body).encode() if isinstance(body, dict) else body
    return self.send("POST", path, body, headers, **more)

  def infer(self, x, **parameters) -> Reply:
    return self.post(PATH, request(x, **parameters))


def request(x, **parameters) -> dict:
  """A request in JSON."""
  x = np.asarray(x, np.float32)
  tensor = {"name": "input", "shape": x.shape, "datatype": "FP32", "data": x.ravel().tolist()}
  return {"inputs": [tensor]} | ({"parameters": parameters} if parameters else {})


def engine(
  run=logits,
  *,
  controller="fixed",
  size=8,
  queue=64,
  on=PROFILE,
  shape=SHAPE,
  target=0.1,
  **options,
) -> Engine:
  """An engine on the stand-in."""
  if controller == "fixed":
    options = {"ratio": 0.0} | options
  return Engine(
    run,
    create(controller, on, target=target, largest=size, **options),
    profile=on,
    batching=Batching(size=size),
    queue=queue,
    warm=on.sizes,
    example=np.zeros(shape, np.float32),
  )


@contextlib.contextmanager
def served(run=logits, *, limits=None, model=MODEL, hold=False, drain=5.0, app=None, **options):
  """A client of a server that runs meanwhile; `options` are of `engine` and `create_app`."""
  limits = limits or Limits(batch=8)
  of_app = {name: options.pop(name) for name in ("priorities", "deadline") if name in options}
  serving, sock = engine(run, **options), bind("127.0.0.1", 0)
  made = create_app(serving, model, limits=limits, told=Shown(hold=hold), **of_app)
  ready, failed, stopping = threading.Event(), [], threading.Event()
  client = Client(sock.getsockname()[1], serving, made, stopping)

  async def main():
    stop = asyncio.Event()
    listening = Listening(
      app=made, engine=serving, sock=sock, limits=limits, drain_seconds=drain, ready=ready.set
    )
    task = asyncio.create_task(listening.serve(stop=stop))
    while not task.done() and not stopping.is_set():
      await asyncio.sleep(0.01)
    stop.set()
    await task

  def thread():
    try:
      asyncio.run(main())
    except BaseException as error:
      failed.append(error)
      ready.set()

  running = threading.Thread(target=thread)
  running.start()
  try:
    assert ready.wait(20)
    if not failed:
      yield client
  finally:
    stopping.set()
    running.join(20)
    assert not running.is_alive()
  if failed:
    raise failed[0]


def sleeping(seconds: float):
  """A device that takes its time."""

  def run(x, ratio):
    time.sleep(seconds)
    return logits(x, ratio)

  return run


class Gate:
  """A device that, once closed, runs a batch for each permit, so that a queue can be looked at."""

  def __init__(self) -> None:
    self.closed, self.waits = threading.Event(), threading.Event()
    self._permits = threading.Semaphore(0)

  def __call__(self, x, ratio):
    if self.closed.is_set():
      self.waits.set()
      assert self._permits.acquire(timeout=60)
    return logits(x, ratio)

  def let(self, batches: int) -> None:
    """Lets some batches run."""
    self._permits.release(batches)


def until(what, seconds: float = 30.0) -> None:
  """Waits for a condition; fails where it does not come true."""
  end = time.monotonic() + seconds
  while not what():
    assert time.monotonic() < end
    time.sleep(0.01)
