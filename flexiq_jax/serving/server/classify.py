"""The image endpoint: a JPEG or PNG in, its classes out.

    POST /v2/models/NAME/classify?top=5      the file as the body, or as one part of a form
    POST /classify?top=5                     the same

    curl --data-binary @photo.jpg localhost:8000/classify
    curl -F image=@photo.jpg localhost:8000/classify

The format is read from the file's first bytes, whatever `Content-Type` says: curl calls everything
a form. Preprocessing is the model's own.
"""

import numpy as np
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexiq_jax.serving.server import body, forms, images
from flexiq_jax.serving.server.limits import Held
from flexiq_jax.serving.server.model import Model
from flexiq_jax.serving.server.refusals import Refused, shown
from flexiq_jax.serving.server.service import Service, json, route, timings

TOP = 5


def routes(service: Service) -> list[Route]:
  """Both paths; none where the model takes no images."""
  model = service.model
  if model.preprocess is None:
    return []

  async def classify(request: Request, held: Held) -> Response:
    if "name" in request.path_params:
      model.require(request.path_params["name"], None)
    top = _number(request, "top", TOP, model.classes)
    timeout = _number(request, "timeout_ms", 0, 10**9) or None
    content = await body.read(request, service.limits, held)
    content_type = request.headers.get("content-type", "")
    if content_type.startswith(forms.KIND):
      content = forms.one_file(content, content_type)
    x = await service.decode(images.example, content, model, service.limits)
    answer = await service.answer(request, x, None if timeout is None else timeout / 1e3)
    parameters, headers = timings(answer)
    found = best(np.asarray(answer.y)[0], model, top)
    return json(
      {"model_name": model.name, "classes": found, "parameters": parameters}, 200, headers
    )

  paths = ("/classify", "/v2/models/{name}/classify")
  return [route(service, path, classify, "POST", kind="classify") for path in paths]


def best(logits: np.ndarray, model: Model, top: int) -> list[dict]:
  """The likeliest classes.

  Args:
    logits: [K].
    model: with names, where they are known.
    top: how many.

  Returns:
    `class`, `probability` (softmax), and `name` of each, the likeliest first.
  """
  scores = logits.astype(np.float64)
  scores = np.exp(scores - scores.max())
  scores /= scores.sum()
  order = np.argsort(-scores, kind="stable")[:top]
  name = lambda i: {"name": model.class_names[i]} if model.class_names else {}
  return [{"class": int(i), "probability": float(scores[i]), **name(i)} for i in order]


def _number(request: Request, name: str, default: int, most: int) -> int:
  text = request.query_params.get(name)
  if text is None:
    return min(default, most)
  if not (text.isascii() and text.isdigit() and len(text) < 12 and 1 <= int(text) <= most):
    raise Refused(400, f"{name}: {shown(text)}; 1..{most} is accepted")
  return int(text)
