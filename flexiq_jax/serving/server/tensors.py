"""Tensors as the Open Inference Protocol writes them: JSON numbers or little-endian bytes.

Source: KServe, Open Inference Protocol V2, "Tensor Data"; Triton's binary tensor data extension.

| datatype | bytes | datatype | bytes | datatype | bytes |
|---|--:|---|--:|---|--:|
| BOOL | 1 | INT8, UINT8 | 1 | FP16, BF16 | 2 |
| BYTES | 4 + length | INT16, UINT16 | 2 | FP32 | 4 |
| | | INT32, UINT32; INT64, UINT64 | 4; 8 | FP64 | 8 |

An element of BYTES is its length, four bytes, and its content. In JSON, `data` is row-major and
flat, or nested as the shape says.
"""

import functools
import math
import struct
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import msgspec
import numpy as np

from flexiq_jax.serving.server.refusals import Refused, shown

DTYPES: dict[str, np.dtype] = {
  "BOOL": np.dtype("?"),
  **{f"{kind}{8 * n}": np.dtype(f"<{kind[0].lower()}{n}")
     for kind in ("UINT", "INT") for n in (1, 2, 4, 8)},
  "FP16": np.dtype("<f2"),
  "BF16": np.dtype(ml_dtypes.bfloat16),
  "FP32": np.dtype("<f4"),
  "FP64": np.dtype("<f8"),
  "BYTES": np.dtype(object),
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ITEMS = {"b": bool, "i": int, "u": int, "f": float, "V": float, "O": str}


def datatype(dtype: np.dtype) -> str:
  """The protocol's name of a dtype."""
  return _NAMES[np.dtype(dtype).newbyteorder("<")]


def from_bytes(datatype: str, shape: Sequence[int], raw: memoryview | bytes, what: str) -> Any:
  """Reads a tensor's bytes.

  Args:
    datatype: a key of `DTYPES`.
    shape: of the tensor.
    raw: its content; the array is a view of it where it can be.
    what: its name, for messages.

  Raises:
    Refused: the content is shorter or longer.
  """
  count, dtype = math.prod(shape), DTYPES[datatype]
  if datatype == "BYTES":
    return _strings(bytes(raw), count, what).reshape(shape)
  if len(raw) != count * dtype.itemsize:
    raise Refused(
      400,
      f"{what}: {len(raw)} bytes; shape {list(shape)} of {datatype} takes {count * dtype.itemsize}",
    )
  return np.frombuffer(raw, dtype).reshape(shape)


def to_bytes(array: np.ndarray) -> bytes:
  """The bytes of an array; one of objects holds `bytes`."""
  if array.dtype != object:
    return np.ascontiguousarray(array, array.dtype.newbyteorder("<")).tobytes()
  return b"".join(struct.pack("<I", len(item)) + item for item in array.ravel())


def from_json(datatype: str, shape: Sequence[int], raw: bytes | msgspec.Raw, what: str) -> Any:
  """Reads the JSON text of `data`.

  Args:
    datatype: a key of `DTYPES`.
    shape: of the tensor.
    raw: the text, flat or nested as the shape is.
    what: the tensor's name, for messages.

  Raises:
    Refused: it holds something else.
  """
  text, dtype = bytes(raw), DTYPES[datatype]
  nested = _depth(text) > 1
  levels = len(shape) if nested else 1
  try:
    items = _decoder(_ITEMS[dtype.kind], levels).decode(text)
    if datatype == "BYTES":
      items = _encoded(items)
    array = np.array(items, dtype)
  except (ValueError, OverflowError, msgspec.MsgspecError, RecursionError) as error:
    raise Refused(400, f"{what}: data is not {datatype} of shape {list(shape)}: {error}") from None
  if array.size != math.prod(shape) or (nested and array.shape != tuple(shape)):
    raise Refused(
      400,
      f"{what}: data of shape {list(array.shape)}, {array.size} values; shape {list(shape)} takes "
      f"{math.prod(shape)}",
    )
  return array.reshape(shape)


def to_json(array: np.ndarray) -> list:
  """The flat values of an array; text that is not UTF-8 gets replacement characters."""
  if array.dtype == object:
    return [item.decode(errors="replace") for item in array.ravel()]
  return np.asarray(array).ravel().tolist()


@functools.lru_cache(maxsize=64)
def _decoder(kind: type, levels: int) -> msgspec.json.Decoder:
  for _ in range(levels):
    kind = list[kind]
  return msgspec.json.Decoder(kind)


def _depth(text: bytes) -> int:
  """Number of brackets that a text begins with."""
  head = text[:64].translate(None, b" \t\r\n")
  return len(head) - len(head.lstrip(b"["))


def _encoded(items: Any) -> Any:
  return [_encoded(item) if isinstance(item, list) else item.encode() for item in items]


def _strings(raw: bytes, count: int, what: str) -> np.ndarray:
  found, at = [], 0
  while at < len(raw) and len(found) <= count:
    if at + 4 > len(raw):
      break
    (length,) = struct.unpack_from("<I", raw, at)
    if at + 4 + length > len(raw):
      break
    found.append(raw[at + 4 : at + 4 + length])
    at += 4 + length
  if at != len(raw) or len(found) != count:
    raise Refused(400, f"{what}: {len(raw)} bytes are not {count} elements of BYTES")
  array = np.empty(count, object)
  array[:] = found
  return array


def known(name: str, what: str) -> str:
  """Checks a datatype's name.

  Raises:
    Refused: there is none of this name.
  """
  if name not in DTYPES:
    raise Refused(400, f"{what}: datatype {shown(name)}; {', '.join(DTYPES)} are there")
  return name
