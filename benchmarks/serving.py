"""What engine and server add to a model's own time, and how many requests they answer.

    python benchmarks/serving.py --json build/serving.json

One small deployed model (the digits' MobileNet, random weights), one request an image, ratio 0:

| way        | what it is                                                                  |
|------------|-----------------------------------------------------------------------------|
| `runner`   | `Runner` called when a request is due, and nothing else                     |
| `engine`   | the same through `Engine.submit`                                            |
| `server`   | our server in a process of its own, requests over HTTP, in bytes            |
| `json`     | the same, requests in JSON                                                  |
| `litserve` | LitServe with the same runner and JSON requests; skipped where not installed |

Latency: an open loop at a fixed rate of Poisson arrivals, from each request's intended time to its
answer; all ways take turns, each round begins with another one, figures are medians of rounds. How
late the client itself was is in it and told beside it. Throughput: clients that send again as
soon as they are answered; beside it the CPU time of all the server's processes for one answer, in
which other processes on the machine show less. LitServe forms batches as large as ours may be; of
its waiting times 0 and 5 ms the better one counts.
"""

import argparse
import asyncio
import contextlib
import importlib
import importlib.util
import json
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator

import jax
import numpy as np

from benchmarks import http_client
from flexiq_jax import deployment, flexiq, models, serving
from flexiq_jax.deployment import artifact
from flexiq_jax.runs import process
from flexiq_jax.serving import server, workloads

MODEL, SHAPE, SIZES = "mobilenet_digits", (8, 8, 1), (1, 8, 32)
STAGES = ((1, 8, 1, 1), (4, 16, 2, 1), (4, 24, 1, 2))  # smaller than the demonstration's
WAITS = (0.0, 0.005)  # LitServe's batch_timeout


def make(folder: pathlib.Path) -> None:
  """Deploys the model with random weights."""
  images = np.random.default_rng(0).random((16, *SHAPE), np.float32)
  function = models.functional(models.create(MODEL, stages=STAGES))
  model = flexiq.quantize(*function, images, progress=False)
  made = deployment.deploy(model, model.network.example, levels=(0.0, 0.5, 1.0), granule=2)
  artifact.save(folder, made, name=MODEL)


def load(folder: str | os.PathLike) -> deployment.Runner:
  """The runner of the artifact, with all sizes compiled."""
  apply, shapes = models.functional(models.create(MODEL, stages=STAGES))
  x = jax.ShapeDtypeStruct((1, *SHAPE), np.float32)
  runner = deployment.Runner(artifact.load(folder, apply, shapes, x), sizes=SIZES)
  for size in SIZES:
    jax.block_until_ready(runner(np.zeros((size, *SHAPE), np.float32)))
  return runner


def engine(runner: deployment.Runner) -> serving.Engine:
  """An engine around a runner."""
  compute, example = serving.runner_function(runner), np.zeros(SHAPE, np.float32)
  profile = serving.measure(compute, example, sizes=SIZES, ratios=(0.0,), repeats=5)
  return serving.Engine(
    compute,
    serving.create("fixed", profile, target=1.0, ratio=0.0),
    profile=profile,
    batching=serving.Batching(size=SIZES[-1]),
    warm=SIZES,
    example=example,
  )


def serve_ours(folder: str, port: int) -> None:
  """Our server, until it is ended."""
  made, limits = engine(load(folder)), server.Limits(batch=SIZES[-1])
  served = server.Model(name=MODEL, shape=SHAPE, classes=10, levels=(0.0,))
  app = server.create_app(made, served, limits=limits)
  sock = server.bind("127.0.0.1", port)
  server.Listening(app=app, engine=made, sock=sock, limits=limits).run()


@contextlib.contextmanager
def running(
  way: str, folder: pathlib.Path, wait: float = 0.0
) -> Generator[tuple[int, int], None, None]:
  """A server in a process of its own; its port and its process group."""
  with socket.create_server(("127.0.0.1", 0)) as sock:
    port = sock.getsockname()[1]
  arguments = ["--serve", way, "--artifact", str(folder), "--port", str(port), "--wait", str(wait)]
  env = os.environ | {
    "PYTHONPATH": os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
  }
  command = [sys.executable, __file__, *arguments]
  quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
  other = subprocess.Popen(command, env=env, **quiet, start_new_session=True)
  path = "/v2/health/ready" if way == "ours" else "/health"
  try:
    _wait_for(other, port, path)
    yield port, other.pid
  finally:
    # All of its processes: LitServe starts several.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(other.pid, 15)
    try:
      other.wait(10)
    except subprocess.TimeoutExpired:
      os.killpg(other.pid, 9)
      other.wait()


def _wait_for(other: subprocess.Popen, port: int, path: str, seconds: float = 180) -> None:
  import http.client

  for _ in range(int(5 * seconds)):
    time.sleep(0.2)
    if other.poll() is not None:
      raise RuntimeError(f"the server ended with status {other.returncode}")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    with contextlib.suppress(OSError), contextlib.closing(connection):
      connection.request("GET", path)
      if connection.getresponse().status == 200:
        return
  raise RuntimeError(f"no server within {seconds} s")


def cpu_seconds(group: int) -> float:
  """CPU time so far of all processes of a group that still run; nan off Linux."""
  found, tick = float("nan"), os.sysconf("SC_CLK_TCK")
  for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
    with contextlib.suppress(OSError):
      fields = path.read_text().rpartition(")")[2].split()
      if int(fields[2]) == group:
        found = np.nansum([found, (int(fields[11]) + int(fields[12])) / tick])
  return float(found)


def requests() -> dict[str, bytes]:
  """One request of each way that goes over HTTP."""
  x = np.random.default_rng(0).random((1, *SHAPE), np.float32)
  tensor = {"name": "input", "shape": x.shape, "datatype": "FP32"}
  text = json.dumps({"inputs": [tensor | {"data": x.ravel().tolist()}]})
  binary = {"inputs": [tensor | {"parameters": {"binary_data_size": x.nbytes}}]}
  head = json.dumps(binary | {"parameters": {"binary_data_output": True}})
  path, kind = f"/v2/models/{MODEL}/infer", {"Content_Type": "application/json"}
  length = {"Inference_Header_Content_Length": str(len(head))}
  plain = json.dumps({"data": x.ravel().tolist()})
  return {
    "server": http_client.post(path, head.encode() + x.tobytes(), **length),
    "json": http_client.post(path, text.encode(), **kind),
    "litserve": http_client.post("/predict", plain.encode(), **kind),
  }


def through_runner(runner: deployment.Runner, times: np.ndarray) -> np.ndarray:
  """Latencies of the runner alone, called when a request is due, one after the other."""
  x, start, found = np.zeros((1, *SHAPE), np.float32), time.perf_counter(), []
  for due in times:
    left = due - (time.perf_counter() - start)
    if left > 0:
      time.sleep(left)
    np.asarray(runner(x))
    found.append(time.perf_counter() - start - due)
  return np.array(found)


async def through_engine(made: serving.Engine, times: np.ndarray) -> np.ndarray:
  """Latencies through the engine in this process."""
  x, start = np.zeros((1, *SHAPE), np.float32), time.perf_counter()

  async def one(due: float) -> float:
    await made.submit(x)
    return time.perf_counter() - start - due

  tasks = []
  for due in times:
    await asyncio.sleep(max(0.0, due - (time.perf_counter() - start)))
    tasks.append(asyncio.create_task(one(due)))
  return np.array(await asyncio.gather(*tasks))


async def latencies(ports: dict[str, int], runner, times: np.ndarray, rounds: int) -> dict:
  """Percentiles of all ways in milliseconds, medians over rounds."""
  made, asked = engine(runner), requests()
  await made.start()
  ways = ("runner", "engine", *ports)
  found: dict[str, list[np.ndarray]] = {way: [] for way in ways}
  late: dict[str, list[float]] = {way: [] for way in ports}
  for turn in range(rounds):
    first = turn % len(ways)
    for way in (*ways[first:], *ways[:first]):
      if way == "runner":
        found[way].append(await asyncio.to_thread(through_runner, runner, times))
      elif way == "engine":
        found[way].append(await through_engine(made, times))
      else:
        exchanges = await http_client.open_loop(ports[way], [asked[way]] * len(times), times)
        if bad := [e for e in exchanges if e.status != 200]:
          raise RuntimeError(f"{way}: status {bad[0].status}: {bad[0].body[:200]!r}")
        found[way].append(np.array([e.done - e.intended for e in exchanges]))
        late[way] += [e.sent - e.intended for e in exchanges]
  await made.stop()
  result = {}
  for way, runs in found.items():
    percentiles = np.median([np.percentile(1e3 * r, (50, 90, 99)) for r in runs], axis=0)
    result[way] = dict(zip(("p50", "p90", "p99"), map(float, percentiles), strict=True))
  told = {way: 1e3 * float(np.median(values)) for way, values in late.items()}
  return result | {"client was late, p50": told}


def throughput(
  servers: dict[str, tuple[int, int]], clients: int, seconds: float, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
  """Answers a second of all ways, and CPU milliseconds of an answer in the server's processes.

  Medians over rounds in which they take turns.
  """
  asked, rates, costs = requests(), {way: [] for way in servers}, {way: [] for way in servers}
  for _ in range(rounds):
    for way, (port, group) in servers.items():
      before = cpu_seconds(group)
      answered, took = asyncio.run(
        http_client.closed_loop(port, asked[way.partition(" ")[0]], clients, seconds)
      )
      rates[way].append(answered / took)
      costs[way].append(1e3 * (cpu_seconds(group) - before) / max(1, answered))
  median = lambda found: {way: statistics.median(values) for way, values in found.items()}
  return median(rates), median(costs)


def peer() -> str | None:
  """Why there is no peer; None where there is."""
  if importlib.util.find_spec("litserve") is None:
    return "litserve is not installed: pip install litserve"
  return None


def measure(*, rate: float, seconds: float, rounds: int, clients: int) -> dict:
  """All figures.

  Args:
    rate: requests a second of the open loop.
    seconds: of one round of one way.
    rounds: so many.
    clients: of the closed loop.
  """
  missing = peer()
  times = workloads.poisson(rate, seconds, seed=0)
  with tempfile.TemporaryDirectory() as temporary, contextlib.ExitStack() as stack:
    folder = pathlib.Path(temporary) / "artifact"
    make(folder)
    runner = load(folder)
    ours = stack.enter_context(running("ours", folder))
    servers = {"server": ours, "json": ours}
    waits = () if missing else WAITS
    several = {f"litserve {1e3 * wait:g} ms": wait for wait in waits}
    others = {
      way: stack.enter_context(running("litserve", folder, w)) for way, w in several.items()
    }
    rates, costs = throughput(servers | others, clients, seconds, rounds)
    best = max(others, key=lambda way: rates[way], default=None)
    if best is not None:
      servers["litserve"] = others[best]
    ports = {way: port for way, (port, _) in servers.items()}
    with asyncio.Runner(loop_factory=http_client.punctual_loop) as loop:
      found = loop.run(latencies(ports, runner, times, rounds))
  result = {
    "environment": process.describe(),
    "setting": {"rate": rate, "seconds": seconds, "rounds": rounds, "clients": clients},
    "latency, ms": found,
    "added p50, ms": {
      way: found[way]["p50"] - found["runner"]["p50"] for way in ("engine", *ports)
    },
    "throughput, requests a second": rates,
    "CPU of a request, ms": costs,
  }
  if missing:
    return result | {"skipped": missing}
  return result | {
    "throughput over litserve": rates["json"] / max(rates[way] for way in others),
    "CPU of a request over litserve": costs["json"] / min(costs[way] for way in others),
  }


def main() -> None:
  """Measures and prints, or is one of the servers."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--json", help="where the result goes")
  parser.add_argument("--rate", type=float, default=200.0)
  parser.add_argument("--seconds", type=float, default=5.0)
  parser.add_argument("--rounds", type=int, default=3)
  parser.add_argument("--clients", type=int, default=64)
  for name, kind in {"serve": str, "artifact": str, "port": int, "wait": float}.items():
    parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
  given = parser.parse_args()
  if given.serve == "ours":
    return serve_ours(given.artifact, given.port)
  if given.serve:
    return importlib.import_module("benchmarks.litserve_peer").serve(
      given.artifact, given.port, given.wait
    )
  result = measure(
    rate=given.rate, seconds=given.seconds, rounds=given.rounds, clients=given.clients
  )
  text = json.dumps(result, indent=2)
  print(text)
  if given.json:
    pathlib.Path(given.json).write_text(text + "\n")
  return None


if __name__ == "__main__":
  main()
