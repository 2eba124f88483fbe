"""The one exception of the server's request handling: a status, and a text for the client."""

from collections.abc import Mapping


class Refused(Exception):
  """A request that gets an error response `{"error": text}`.

  Attributes:
    status: of the HTTP response.
    text: what is wrong and what is accepted.
    headers: of the response, further ones.
  """

  def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
    """Keeps the three."""
    super().__init__(text)
    self.status, self.text, self.headers = status, text, dict(headers or {})


def shown(value: object) -> str:
  """A client's value for a message: quoted, and cut where it is long."""
  text = repr(value)
  return text if len(text) <= 80 else f"{text[:77]}..."
