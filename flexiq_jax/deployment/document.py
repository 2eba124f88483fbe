"""`artifact.json`: what the arrays of a deployed model are, read by a strict schema.

The file repeats the names, dtypes and shapes of all arrays, so that an artifact is checked before
memory is allocated for it. It is sealed: it holds the SHA-256 of its other fields and has to be the
exact text that `write` wrote. People may read it but not edit it; to change a model, make a new
artifact.

Dimensions of a layer's arrays, which have to agree:

| symbol | meaning |
|---|---|
| K, N | rows of the packed weights, outputs (of a depthwise layer: places) |
| H | K / 2, bytes of packed 4-bit weights |
| J | shift blocks; without a kernel, channel groups |
| P | places for channels (see `deployment.layouts`) |
| C | input channels |
| L | levels |
"""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import msgspec

from flexiq_jax.deployment.depthwise import Depthwise
from flexiq_jax.deployment.layers import Mixed, Plain
from flexiq_jax.kernels import Activation, Weights
from flexiq_jax.quant import Low, QLayer
from flexiq_jax.runs import files, schemas

FORMAT = "flexiq_jax deployed model"
VERSION = 3
_AGAIN = "make it again from its recipe"

_Size = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Count = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Digest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]
_Bits = Annotated[int, msgspec.Meta(ge=2, le=8)]

# The fields of each kind of layer and of its parts. A text gives an array's dtype and dimensions;
# `...` stands for any dimensions, equal within a layer, and `?` marks an array that may be absent.
# Anything else is the type of a static field.
_FIELDS: dict[type, dict[str, Any]] = {
  Low: {
    "w": "int8 ...",
    "shift": "int32 C",
    "group": "int32 C",
    "bias": "int32 J N",
    "block": "int32 C ?",
  },
  QLayer: {
    "w": "int8 ...",
    "w_scale": "float32 N",
    "x_scale": "float32",
    "low": Low,
    "bits": _Bits,
    "signed": bool,
    "parts": _Count | None,
  },
  Weights: {
    "w8": "int8 K N",
    "w4": "int8 H N",
    "x_shift": "int32 J",
    "w_shift": "int32 J N",
    "block": _Count,
    "offset": Literal[0, 8],
    "taps": _Count,
    "copies": _Count,
  },
  Mixed: {
    "weights": Weights,
    "x_scale": "float32",
    "order": "int32 P ?",
    "places": "int32 L",
    "scale": "float32 N",
    "correction": "int32 L N",
    "bias": "float32 N ?",
    "channels": _Count,
    "signed": bool,
    "activation": Activation,
    "feeds": str,
  },
  Plain: {"q": QLayer, "masks": "bool L J ?"},
  Depthwise: {
    "q": QLayer,
    "order": "int32 N ?",
    "scale": "float32 N",
    "bias": "float32 N ?",
    "activation": Activation,
    "feeds": str,
  },
}


class _Array(msgspec.Struct, forbid_unknown_fields=True):
  dtype: Annotated[str, msgspec.Meta(pattern="^(bool|u?int(8|16|32|64)|bfloat16|float(16|32|64))$")]
  shape: Annotated[tuple[_Size, ...], msgspec.Meta(max_length=32)]

  def __str__(self) -> str:
    return f"{self.dtype} {list(self.shape)}"


class _Arrays(msgspec.Struct, forbid_unknown_fields=True):
  layers: Annotated[dict[str, Any], msgspec.Meta(min_length=1)]
  floats: dict[str, Any]
  levels: _Array


class Document(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
  """The file.

  Attributes:
    format, version: of the file.
    model: name of the float model, for people.
    dynamic: whether activation shifts are chosen at run time.
    folds: layer name -> the layers that write in its order.
    levels: the ratios at which it runs, ascending.
    arrays: the arrays' names, dtypes and shapes (see `template`).
    parameters: path -> shape of the float model's parameters, batch norm folded.
    files: path below `arrays/` -> SHA-256 of that file.
    sha256: SHA-256 of all other fields.
  """

  format: str
  version: int
  model: str
  dynamic: bool
  folds: dict[str, Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]]
  levels: Annotated[tuple[_Share, ...], msgspec.Meta(min_length=1)]
  arrays: _Arrays
  parameters: dict[str, tuple[_Size, ...]]
  files: dict[str, _Digest]
  sha256: _Digest

  def template(self) -> dict[str, Any]:
    """The arrays `layers`, `floats` and `levels`, as `jax.ShapeDtypeStruct`s.

    Raises:
      ValueError: an entry is malformed, or dimensions do not go together; names it.
    """
    sizes = {"L": len(self.levels)}
    if list(self.levels) != sorted(set(self.levels)):
      raise ValueError(f"levels: {list(self.levels)} do not ascend")
    found: dict[str, Any] = {"layers": {}, "floats": {}}
    for name, entry in self.arrays.layers.items():
      try:
        found["layers"][name] = _template(schemas.convert(entry, _Layer), dict(sizes))
      except ValueError as error:
        raise ValueError(f"layer {name}: {error}") from None
    for path, entry in self.arrays.floats.items():
      try:
        found["floats"][path] = _struct(schemas.convert(entry, _Array))
      except ValueError as error:
        raise ValueError(f"parameter {path}: {error}") from None
    _require_form("levels", self.arrays.levels, "float32 L", sizes)
    return found | {"levels": _struct(self.arrays.levels)}


def entries(arrays: dict[str, Any]) -> dict[str, Any]:
  """What the file says of the arrays `layers`, `floats` and `levels`.

  Raises:
    ValueError: a layer is not as `deploy` makes it.
  """
  return {name: _entry(tree) for name, tree in arrays.items()}


def write(path: Path, **fields: Any) -> None:
  """Writes and seals a document with the given fields (see `Document`)."""
  said = {"format": FORMAT, "version": VERSION, **fields}
  files.write_text(path, _text(said | {"sha256": seal(said)}))


def read(path: Path) -> Document:
  """Reads a document.

  Raises:
    FileNotFoundError: no such file.
    ValueError: it is no document, of another version, or not what was written; names the field.
  """
  if not path.is_file():
    raise FileNotFoundError(f"artifact: {path} does not exist; was it written to its end?")
  try:
    text = path.read_text()
    found = json.loads(text)
  except (ValueError, RecursionError) as error:
    raise ValueError(f"artifact: {path} is damaged: not JSON ({error}); {_AGAIN}") from None
  if not isinstance(found, dict) or found.get("format") != FORMAT:
    raise ValueError(f"artifact: {path} is no artifact (its `format` is not {FORMAT!r})")
  if found.get("version") != VERSION:
    raise ValueError(
      f"artifact: {path} has version {found.get('version')!r:.80}; this release reads {VERSION}; "
      + _AGAIN
    )
  # The text as well: digits beyond a number's precision and keys that stand twice change no value.
  if found.get("sha256") != seal(found) or text != _text(found):
    raise ValueError(f"artifact: {path} is damaged: it is not what was written; {_AGAIN}")
  try:
    document = schemas.convert(found, Document)
    document.template()
  except ValueError as error:
    raise ValueError(f"artifact: {path} is damaged: {error}; {_AGAIN}") from None
  return document


def seal(found: dict[str, Any]) -> str:
  """SHA-256 of all fields of a document but `sha256`."""
  said = {key: value for key, value in found.items() if key != "sha256"}
  return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _text(found: dict[str, Any]) -> str:
  return json.dumps(found, indent=1) + "\n"


def _entry(tree: Any) -> Any:
  if isinstance(tree, dict):
    return {key: _entry(value) for key, value in tree.items()}
  if dataclasses.is_dataclass(tree):
    if type(tree) not in _FIELDS:
      raise ValueError(
        f"deployed: weights as {type(tree).__name__} are for one device; save the model that "
        "`deploy` made"
      )
    fields = {f.name: _entry(getattr(tree, f.name)) for f in dataclasses.fields(tree)}
    return {"type": type(tree).__name__, **fields}
  if tree is None or isinstance(tree, (bool, int, str)):
    return tree
  return {"dtype": str(tree.dtype), "shape": list(tree.shape)}


def _schema(kind: type, made: dict[type, Any]) -> Any:
  """The schema of a dataclass of `_FIELDS`."""

  def type_of(form):
    if isinstance(form, str):
      return _Array | None if form.endswith("?") else _Array
    return made[form] | None if form is Low else made.get(form, form)

  return msgspec.defstruct(
    kind.__name__,
    [(name, type_of(form)) for name, form in _FIELDS[kind].items()],
    tag_field="type",
    tag=kind.__name__,
    forbid_unknown_fields=True,
  )


_SCHEMAS: dict[type, Any] = {}
for _kind in _FIELDS:
  _SCHEMAS[_kind] = _schema(_kind, _SCHEMAS)
_KINDS = {schema: kind for kind, schema in _SCHEMAS.items()}
_Layer: Any = _SCHEMAS[Mixed] | _SCHEMAS[Plain] | _SCHEMAS[Depthwise]


def _template(entry: Any, sizes: dict[str, Any]) -> Any:
  """A layer's dataclass, with `jax.ShapeDtypeStruct`s for arrays."""
  if type(entry) not in _KINDS:
    return entry
  kind, values = _KINDS[type(entry)], {}
  for name, form in _FIELDS[kind].items():
    value = getattr(entry, name)
    if isinstance(value, _Array):
      _require_form(name, value, form, sizes)
      values[name] = _struct(value)
    else:
      values[name] = _template(value, sizes)
  made = kind(**values)
  if isinstance(made, Mixed):
    _require_layout(made, sizes)
  return made


def _require_form(name: str, array: _Array, form: str, sizes: dict[str, Any]) -> None:
  """Compares an array with its form; symbols that have no size yet get it."""
  dtype, *symbols = form.removesuffix(" ?").split()
  if symbols == ["..."]:
    wanted = list(sizes.setdefault("...", array.shape))
  elif len(symbols) == len(array.shape):
    pairs = zip(symbols, array.shape, strict=True)
    wanted = [sizes.setdefault(symbol, size) for symbol, size in pairs]
  else:
    wanted = [sizes.get(symbol, symbol) for symbol in symbols]
  if array.dtype != dtype or list(array.shape) != wanted:
    shape = ", ".join(map(str, wanted))
    raise ValueError(f"{name} is {array}; {dtype} [{shape}] is accepted")


def _require_layout(d: Mixed, sizes: dict[str, int]) -> None:
  """Compares a layer's dimensions with what they follow from."""
  block, blocks, rows = d.weights.block, sizes["J"], sizes["K"]
  if rows != block * blocks:
    raise ValueError(f"w8 has {rows} rows; {block * blocks} are accepted, {blocks} blocks")
  if 2 * sizes["H"] != rows:
    raise ValueError(f"w4 has {sizes['H']} rows; {rows / 2:g} are accepted")
  if d.channels * d.weights.steps > block:
    raise ValueError(
      f"channels is {d.channels}; 1..{block // d.weights.steps} are accepted in a block of {block}"
    )
  if sizes.get("P", places := d.channels * blocks) != places:
    raise ValueError(f"order has {sizes['P']} places; {places} are accepted")


def _struct(array: _Array) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(array.shape, jnp.dtype(array.dtype))
