"""Requests and responses of the Open Inference Protocol, from bytes and to bytes.

Source: KServe, Open Inference Protocol V2, "Inference"; Triton's extensions `binary_tensor_data`
and `classification`. Nothing here knows HTTP but for two header names, or a model.

    request  = JSON, then the bytes of all inputs with `binary_data_size`, in their order
    response = JSON, then the bytes of all outputs with `binary_data_size`, in their order

The header `Inference-Header-Content-Length` says how long the JSON part is; without it, all is
JSON.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from flexiq_jax.serving.server import tensors
from flexiq_jax.serving.server.refusals import Refused, shown

LENGTH = "Inference-Header-Content-Length"
_DIMENSIONS = 8
Parameters = dict[str, str | int | float | bool]


class Input(msgspec.Struct):
  """An input tensor as it stands in the JSON part."""

  name: str
  shape: list[int]
  datatype: str
  parameters: Parameters = {}
  data: msgspec.Raw = msgspec.Raw()  # empty where there is none


class Output(msgspec.Struct):
  """An output that is asked for."""

  name: str
  parameters: Parameters = {}


class _Body(msgspec.Struct):
  inputs: list[Input]
  id: str | None = None
  parameters: Parameters = {}
  outputs: list[Output] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tensor:
  """An input whose content is not decoded yet, so that its shape can be looked at first.

  Attributes:
    name, datatype, shape: as the client says.
    content: JSON text or bytes.
    binary: which of the two.
  """

  name: str
  datatype: str
  shape: tuple[int, ...]
  content: Any
  binary: bool

  def array(self) -> np.ndarray:
    """Decodes the content.

    Raises:
      Refused: it is not what datatype and shape say.
    """
    read = tensors.from_bytes if self.binary else tensors.from_json
    return read(self.datatype, self.shape, self.content, f"input {shown(self.name)}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """An inference request.

  Attributes:
    id: the client's, or None.
    parameters: of the request.
    inputs: its tensors.
    outputs: those that are asked for; None asks for all.
  """

  id: str | None
  parameters: Parameters
  inputs: tuple[Tensor, ...]
  outputs: tuple[Output, ...] | None


_DECODER = msgspec.json.Decoder(_Body)


def read(body: bytes, header_length: str | None) -> Request:
  """Reads a request.

  Args:
    body: all of it.
    header_length: value of the header `Inference-Header-Content-Length`, None where there is none.

  Raises:
    Refused: it is none; says why.
  """
  length = len(body)
  if header_length is not None:
    if not header_length.isascii() or not header_length.isdigit() or len(header_length) > 12:
      raise Refused(400, f"{LENGTH}: {shown(header_length)}; a number of bytes is accepted")
    length = int(header_length)
    if length > len(body):
      raise Refused(400, f"{LENGTH}: {length}, but the body has {len(body)} bytes")
  view = memoryview(body)
  try:
    message = _DECODER.decode(view[:length])
  except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
    raise Refused(400, f"body: no inference request: {error}") from None
  rest, found = view[length:], []
  for given in message.inputs:
    tensor, rest = _tensor(given, rest)
    found.append(tensor)
  if len(rest):
    raise Refused(
      400,
      f"body: {len(rest)} bytes after the JSON part and its tensors; each binary input needs the "
      f"parameter binary_data_size, and the request the header {LENGTH}",
    )
  outputs = None if message.outputs is None else tuple(message.outputs)
  return Request(
    id=message.id, parameters=message.parameters, inputs=tuple(found), outputs=outputs or None
  )


def write(
  request: Request,
  model: str,
  version: str,
  results: Mapping[str, np.ndarray],
  parameters: Parameters,
  labels: Sequence[str] = (),
) -> tuple[bytes, dict[str, str]]:
  """Writes a response.

  Args:
    request: the request; says which outputs it takes (see `require_outputs`), and how.
    model: its name.
    version: its version.
    results: output name -> array.
    parameters: of the response.
    labels: names of the classes, for `classification`.

  Returns:
    The body, and headers for it.

  """
  binary = bool(request.parameters.get("binary_data_output", False))
  entries, parts = [], []
  for wanted in request.outputs or [Output(name) for name in results]:
    array = results[wanted.name]
    if classes := _classes(wanted):
      array = classification(array, classes, labels)
    shape = list(array.shape)
    entry: dict[str, Any] = {"name": wanted.name, "datatype": tensors.datatype(array.dtype)}
    entry["shape"] = shape
    if wanted.parameters.get("binary_data", binary):
      parts.append(tensors.to_bytes(array))
      entry["parameters"] = {"binary_data_size": len(parts[-1])}
    else:
      entry["data"] = tensors.to_json(array)
    entries.append(entry)
  message: dict[str, Any] = {"model_name": model, "model_version": version}
  if request.id is not None:
    message["id"] = request.id
  head = msgspec.json.encode(message | {"parameters": parameters, "outputs": entries})
  if not parts:
    return head, {"Content-Type": "application/json"}
  headers = {"Content-Type": "application/octet-stream", LENGTH: str(len(head))}
  return b"".join((head, *parts)), headers


def require_outputs(request: Request, names: Sequence[str]) -> None:
  """Refuses outputs that a model does not have, before it runs.

  Raises:
    Refused: names the output, or the wrong parameter of one.
  """
  for wanted in request.outputs or ():
    if wanted.name not in names:
      raise Refused(
        400, f"outputs: {shown(wanted.name)} is not one of {', '.join(map(repr, names))}"
      )
    _classes(wanted)


def classification(scores: np.ndarray, count: int, labels: Sequence[str] = ()) -> np.ndarray:
  """The largest scores of each example as `score:index[:label]`, BYTES [B, count]."""
  count = min(count, scores.shape[-1])
  order = np.argsort(-scores, axis=-1, kind="stable")[..., :count]
  best = np.take_along_axis(scores, order, axis=-1)
  found = np.empty(order.shape, object)
  for place in np.ndindex(order.shape):
    label = f":{labels[order[place]]}" if labels else ""
    found[place] = f"{best[place]:.6f}:{order[place]}{label}".encode()
  return found


def _classes(wanted: Output) -> int:
  count = wanted.parameters.get("classification", 0)
  if type(count) is not int or count < 0:
    raise Refused(400, f"outputs: classification {shown(count)}; a number of classes is accepted")
  return count


def _tensor(given: Input, rest: memoryview) -> tuple[Tensor, memoryview]:
  """An input and what is left of the binary part after it."""
  what = f"input {shown(given.name)}"
  tensors.known(given.datatype, what)
  fine = len(given.shape) <= _DIMENSIONS and all(0 <= side < 2**63 for side in given.shape)
  if not fine or math.prod(given.shape) >= 2**63:
    raise Refused(
      400, f"{what}: shape {shown(given.shape)}; up to {_DIMENSIONS} sides from 0 on are accepted"
    )
  size = given.parameters.get("binary_data_size")
  if (size is None) == (not bytes(given.data)):
    raise Refused(400, f"{what}: one of data and binary_data_size is needed")
  content: Any = given.data
  if size is not None:
    if type(size) is not int or not 0 <= size <= len(rest):
      raise Refused(
        400, f"{what}: binary_data_size {shown(size)}, and {len(rest)} bytes are left of the body"
      )
    content, rest = rest[:size], rest[size:]
  return (
    Tensor(
      name=given.name,
      datatype=given.datatype,
      shape=tuple(given.shape),
      content=content,
      binary=size is not None,
    ),
    rest,
  )
