"""The live page, its data, the hand on the ratio, and the metrics.

| route | what it is |
|---|---|
| `GET /` | the page, one file; nothing of it comes from elsewhere |
| `GET /state?after=N` | JSON: the present, and the history after point N |
| `POST /hold` | `{"ratio": 0.5}` holds it, `{"ratio": null}` gives it back; where allowed |
| `GET /metrics` | Prometheus |
"""

import base64
import hashlib
import importlib.resources
import re

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from flexiq_jax.serving.server import body
from flexiq_jax.serving.server.limits import Held
from flexiq_jax.serving.server.live import Live
from flexiq_jax.serving.server.metrics import CONTENT_TYPE
from flexiq_jax.serving.server.refusals import Refused, shown
from flexiq_jax.serving.server.service import Service, json, route


class _Hold(msgspec.Struct):
  ratio: float | None


def routes(service: Service, live: Live) -> list[Route]:
  """All of them."""
  page = importlib.resources.files("flexiq_jax.serving.server").joinpath("page.html").read_text()
  policy = _policy(page)

  async def index(request: Request, held: Held) -> Response:
    return Response(page, 200, policy, media_type="text/html")

  async def state(request: Request, held: Held) -> Response:
    after = request.query_params.get("after", "0")
    if not re.fullmatch(r"\d{1,15}", after, re.ASCII):
      raise Refused(400, f"after: {shown(after)}; the number of a point is accepted")
    return json(live.facts(int(after)), headers={"Cache-Control": "no-store"})

  async def hold(request: Request, held: Held) -> Response:
    if not live.shown.hold:
      raise Refused(403, "hold: this server does not let the ratio be held by hand")
    # Another site's page cannot send this type without asking first, and nobody answers it.
    if request.headers.get("content-type", "").partition(";")[0] != "application/json":
      raise Refused(415, "hold: Content-Type application/json is accepted")
    levels = service.model.levels
    try:
      ratio = msgspec.json.decode(await body.read(request, service.limits, held), type=_Hold).ratio
    except msgspec.MsgspecError as error:
      raise Refused(400, f'hold: {error}; {{"ratio": number or null}} is accepted') from None
    if ratio is not None and ratio not in levels:
      accepted = ", ".join(f"{level:g}" for level in levels)
      raise Refused(400, f"ratio: {shown(ratio)}; {accepted} or null is accepted")
    live.hold(ratio)
    return json({"held": ratio})

  async def metrics(request: Request, held: Held) -> Response:
    return Response(service.metrics.text(), 200, {"Content-Type": CONTENT_TYPE})

  return [
    route(service, "/", index, "GET"),
    route(service, "/state", state, "GET"),
    route(service, "/hold", hold, "POST"),
    route(service, "/metrics", metrics, "GET"),
  ]


def _policy(page: str) -> dict[str, str]:
  """Headers that let the browser run the page's own script and style, and ask this server alone."""
  digest = lambda tag: " ".join(
    f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    for text in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
  )
  return {
    "Content-Security-Policy": (
      f"default-src 'none'; script-src {digest('script')}; style-src {digest('style')}; "
      "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
      "frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
  }
