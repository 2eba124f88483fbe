"""The routes of the Open Inference Protocol.

Source: KServe, Open Inference Protocol V2, HTTP/REST; Triton's extensions for the binary format,
`classification`, and `priority` and `timeout` of a request.

| parameter of a request | what it does here |
|---|---|
| `timeout` | microseconds to its deadline, from when its body has arrived |
| `priority` | 1, 2, ...: the deadline that the server has for this class |
| `binary_data_output` | all outputs as bytes |
"""

from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexiq_jax.serving.server import body, codec
from flexiq_jax.serving.server.limits import Held
from flexiq_jax.serving.server.model import Model, examples
from flexiq_jax.serving.server.refusals import Refused, shown
from flexiq_jax.serving.server.service import Service, json, route, timings

EXTENSIONS = ("binary_tensor_data", "classification", "parameters", "schedule_policy")
# What the event loop reads itself, a millisecond or less; the rest goes to a worker thread.
_TEXT, _BYTES = 64 * 1024, 1024 * 1024


def routes(service: Service, version: str) -> list[Route]:
  """All of them.

  Args:
    service: the service.
    version: of this server.
  """
  engine, model = service.engine, service.model
  ready = lambda: bool(engine.ready) and not engine.stopping

  async def server(request: Request, held: Held) -> Response:
    return json({"name": "flexiq_jax", "version": version, "extensions": EXTENSIONS})

  async def live(request: Request, held: Held) -> Response:
    return json({"live": True})

  async def server_ready(request: Request, held: Held) -> Response:
    return json({"live": True, "ready": ready()}, 200 if ready() else 503)

  async def metadata(request: Request, held: Held) -> Response:
    _require(model, request)
    return json(model.metadata())

  async def model_ready(request: Request, held: Held) -> Response:
    _require(model, request)
    return json({"name": model.name, "ready": ready()}, 200 if ready() else 503)

  async def infer(request: Request, held: Held) -> Response:
    _require(model, request)
    content = await body.read(request, service.limits, held)
    arguments = (content, request.headers.get(codec.LENGTH), model, service.limits.batch)
    header = request.headers.get(codec.LENGTH, "")
    text = int(header[:12]) if header.isdecimal() else len(content)
    large = min(text, len(content)) > _TEXT or len(content) > _BYTES
    parsed, x = await service.decode(_read, *arguments) if large else _read(*arguments)
    seconds = deadline(parsed.parameters, service.priorities)
    codec.require_outputs(parsed, (model.output,))
    answer = await service.answer(request, x, seconds)
    parameters, headers = timings(answer)
    results = {model.output: np.asarray(answer.y)}
    names = model.class_names
    content, more = codec.write(parsed, model.name, model.version, results, parameters, names)
    return Response(content, 200, headers | more)

  several = ("", "/versions/{version}")
  of = [f"/v2/models/{{name}}{part}" for part in several]
  return [  # looked through in this order
    *(route(service, f"{path}/infer", infer, "POST", kind="infer") for path in of),
    route(service, "/v2", server, "GET"),
    route(service, "/v2/health/live", live, "GET"),
    route(service, "/v2/health/ready", server_ready, "GET"),
    *(route(service, path, metadata, "GET") for path in of),
    *(route(service, f"{path}/ready", model_ready, "GET") for path in of),
  ]


def deadline(parameters: codec.Parameters, priorities: tuple[float, ...]) -> float | None:
  """Seconds to the deadline that a request asks for, None where it asks for none.

  Args:
    parameters: of the request.
    priorities: seconds of priority 1, 2, ...

  Raises:
    Refused: a value that is not accepted.
  """
  timeout, priority = parameters.get("timeout", 0), parameters.get("priority", 0)
  if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
    raise Refused(400, f"timeout: {shown(timeout)}; microseconds are accepted")
  if type(priority) is not int or not 0 <= priority <= len(priorities):
    raise Refused(400, f"priority: {shown(priority)}; 0..{len(priorities)} is accepted")
  asked = [priorities[priority - 1]] if priority else []
  asked += [timeout / 1e6] if timeout else []
  return min(asked, default=None)


def _require(model: Model, request: Request) -> None:
  model.require(request.path_params["name"], request.path_params.get("version"))


def _read(content: bytes, length: str | None, model: Model, most: int) -> tuple[Any, np.ndarray]:
  parsed = codec.read(content, length)
  return parsed, examples(parsed, model, most)
