"""What the server says of its model, and which inputs it takes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flexiq_jax.serving import records
from flexiq_jax.serving.server import codec
from flexiq_jax.serving.server.refusals import Refused, shown

PLATFORM = "flexiq_jax"
# Each of their values is a float32 but for FP64, which is rounded; others are refused by name.
ACCEPTED = ("FP32", "FP16", "BF16", "FP64", "INT8", "UINT8", "INT16", "UINT16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
  """The served model.

  Attributes:
    name: in URLs; compared, never opened.
    version: the one that there is.
    shape: of one example, without the batch.
    classes: logits of one example.
    levels: ratios at which it can run, ascending.
    input, output: names of its tensors.
    class_names: one for each class, or empty.
    accuracies: ratio -> top-1 in %, where it is known.
    preprocess: from a decoded image (Pillow) to one example; None where it takes no images.
    geometry: (resize, crop) of that preprocessing, either None; for limits.
  """

  name: str
  shape: tuple[int, ...]
  classes: int
  levels: tuple[float, ...]
  version: str = "1"
  input: str = "input"
  output: str = "logits"
  class_names: tuple[str, ...] = ()
  accuracies: Mapping[float, float] = dataclasses.field(default_factory=dict)
  preprocess: Callable[[Any], np.ndarray] | None = None
  geometry: tuple[int | None, int | None] = (None, None)

  def __post_init__(self):
    if self.class_names and len(self.class_names) != self.classes:
      raise ValueError(
        f"class_names: {len(self.class_names)}; one for each of {self.classes} classes is accepted"
      )

  def metadata(self) -> dict[str, Any]:
    """The protocol's model metadata."""
    tensor = lambda name, shape: {"name": name, "datatype": "FP32", "shape": [-1, *shape]}
    return {
      "name": self.name,
      "versions": [self.version],
      "platform": PLATFORM,
      "inputs": [tensor(self.input, self.shape)],
      "outputs": [tensor(self.output, [self.classes])],
    }

  def require(self, name: str, version: str | None) -> None:
    """Refuses names and versions of other models."""
    if name != self.name:
      raise Refused(404, f"model {shown(name)} is unknown; {self.name!r} is served")
    if version not in (None, "", self.version):
      raise Refused(
        404, f"model {name!r}: version {shown(version)} is unknown; {self.version!r} is served"
      )

  def accuracy(self, ratio: float) -> float | None:
    """Top-1 in % at a ratio, between known ones by a line; None where nothing is known."""
    if not self.accuracies:
      return None
    return float(records.interpolated(self.accuracies, ratio))


def examples(request: codec.Request, model: Model, most: int) -> np.ndarray:
  """The examples of a request, float32 [n, *shape].

  Args:
    request: the request.
    model: the model.
    most: examples that one request may have.

  Raises:
    Refused: other inputs than the model takes, or values that are not finite.
  """
  wanted = f"{model.input!r} of shape {[-1, *model.shape]}, up to {most} examples, is accepted"
  if len(request.inputs) != 1 or request.inputs[0].name != model.input:
    names = [tensor.name for tensor in request.inputs]
    raise Refused(400, f"inputs: {shown(names)}; {wanted}")
  (tensor,) = request.inputs
  shape = tensor.shape
  if len(shape) != len(model.shape) + 1 or shape[1:] != model.shape or not 0 < shape[0] <= most:
    raise Refused(400, f"input {model.input!r}: shape {shown(list(shape))}; {wanted}")
  if tensor.datatype not in ACCEPTED:
    raise Refused(
      400,
      f"input {model.input!r}: datatype {tensor.datatype}; {', '.join(ACCEPTED)} are accepted, "
      "computed as FP32",
    )
  # JSON numbers are 2 characters or more each: a text that is much shorter or longer is not read.
  if not tensor.binary and len(bytes(tensor.content)) > 64 * math.prod(shape) + 1024:
    raise Refused(400, f"input {model.input!r}: data has more text than {math.prod(shape)} values")
  with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
    x = tensor.array().astype(np.float32)
  return finite(x, f"input {model.input!r}")


def finite(x: np.ndarray, what: str) -> np.ndarray:
  """Refuses NaN and infinities, whose codes are undefined (see `Runner`)."""
  if not np.isfinite(x).all():
    bad = int(x.size - np.isfinite(x).sum())
    raise Refused(400, f"{what}: {bad} values are not finite as FP32; finite values are accepted")
  return x
