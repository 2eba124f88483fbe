"""Several replicas of a server under Ray Serve, on one machine or many.

    def build():  # runs in each replica
      engine = Engine(...)
      return server.create_app(engine, model, lives=True)

    ray.serve.run(replicas.application(build, least=2, most=8))

Each replica has an engine, a queue and a ratio of its own: a replica that gets more requests than
another computes more in 4 bits, at once; Ray adds replicas where that does not last, in seconds to
minutes. Ray's proxy sends a request to one replica; one whose replica dies meanwhile gets an error
from the proxy, and the next goes elsewhere. Needs the extras `serve` and `ray`.
"""

import importlib
import math
from collections.abc import Callable
from typing import Any


def application(
  build: Callable[[], Any],
  *,
  least: int = 1,
  most: int | None = None,
  ongoing: int = 64,
  up_s: float = 30.0,
  down_s: float = 600.0,
  queue: int = 1024,
  drain_s: float = 30.0,
  resources: dict[str, Any] | None = None,
) -> Any:
  """An application for `ray.serve.run`.

  Args:
    build: makes the ASGI application in the replica's process; Ray pickles it by value where it is
      of a script, by name where it is of a module.
    least: replicas that are always there.
    most: up to which Ray adds replicas; None stays at `least`.
    ongoing: requests in a replica, waiting or running, above which Ray adds another.
    up_s: seconds that more replicas have to be wanted before they come; loads that last shorter
      are the ratio's.
    down_s: seconds that fewer have to be wanted before some go.
    queue: requests that Ray sends to a replica at most; at least what its engine may queue, since
      that is where batches form.
    drain_s: seconds for a replica that ends to answer what it has.
    resources: of a replica, as `{"num_gpus": 1}`; one CPU if None.

  Raises:
    ValueError: numbers that do not fit.
    ImportError: Ray is not installed.
  """
  most = least if most is None else most
  if not 1 <= least <= most:
    raise ValueError(f"least, most: {least}, {most}; 1 <= least <= most is accepted")
  if not 1 <= ongoing <= queue:
    raise ValueError(f"ongoing: {ongoing}; 1..queue, {queue}, is accepted")
  for name, seconds in (("up_s", up_s), ("down_s", down_s)):
    if not 0 < seconds < math.inf:
      raise ValueError(f"{name}: {seconds}; positive seconds are accepted")
  serve = importlib.import_module("ray.serve")
  scaling: dict[str, Any] = {"num_replicas": least}
  if most > least:
    scaling["autoscaling_config"] = {
      **{"min_replicas": least, "max_replicas": most, "target_ongoing_requests": ongoing},
      **{"upscale_delay_s": up_s, "downscale_delay_s": down_s},
      # What is averaged over must not outlast the delays, and is measured some times within.
      "look_back_period_s": min(30.0, up_s, down_s),
      "metrics_interval_s": min(10.0, up_s / 3, down_s / 3),
    }
    del scaling["num_replicas"]
  deployment = serve.deployment(
    serve.ingress(build)(),
    name="flexiq",
    max_ongoing_requests=queue,
    graceful_shutdown_timeout_s=drain_s,
    ray_actor_options=resources,
    **scaling,
  )
  return deployment.bind()
