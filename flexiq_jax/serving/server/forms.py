"""The one file of a form (`multipart/form-data`, RFC 7578), from a body that is in memory."""

import python_multipart
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from flexiq_jax.serving.server.refusals import Refused

KIND = "multipart/form-data"


class _Parts:
  """Collects the content of parts that are files; names of files are not looked at."""

  def __init__(self) -> None:
    self.files: list[bytearray] = []
    self.complete = self._is_file = False
    self._field, self._value = bytearray(), bytearray()

  def on_part_begin(self) -> None:
    self._is_file = False

  def on_header_field(self, data: bytes, start: int, end: int) -> None:
    self._field += data[start:end]

  def on_header_value(self, data: bytes, start: int, end: int) -> None:
    self._value += data[start:end]

  def on_header_end(self) -> None:
    if self._field.lower() == b"content-disposition":
      _, options = parse_options_header(bytes(self._value))
      self._is_file = b"filename" in options
      if self._is_file:
        self.files.append(bytearray())
    self._field.clear()
    self._value.clear()

  def on_part_data(self, data: bytes, start: int, end: int) -> None:
    if self._is_file:
      self.files[-1] += data[start:end]

  def on_end(self) -> None:
    self.complete = True


def one_file(body: bytes, content_type: str) -> bytes:
  """The content of the only file of a form.

  Args:
    body: of the request.
    content_type: the header, which has the boundary.

  Raises:
    Refused: no form, one that is cut short, or one without a file or with several.
  """
  _, options = parse_options_header(content_type.encode("latin-1"))
  parts = _Parts()
  names = ("on_part_begin", "on_header_field", "on_header_value", "on_header_end", "on_part_data")
  callbacks = {name: getattr(parts, name) for name in (*names, "on_end")}
  try:
    parser = python_multipart.MultipartParser(options[b"boundary"], callbacks)  # type: ignore
    parser.write(body)
    parser.finalize()
  except (FormParserError, KeyError, ValueError) as error:
    why = "it has no boundary" if isinstance(error, KeyError) else str(error)
    raise Refused(400, f"body: no form with a file: {why}") from None
  if not parts.complete:
    raise Refused(400, "body: the form is cut short; is the file complete?")
  if len(parts.files) != 1:
    raise Refused(400, f"body: a form with {len(parts.files)} files; one file is accepted")
  return bytes(parts.files[0])
