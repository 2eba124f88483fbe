"""Which layers may go to 4 bits, and which stay at 8."""

import re
from collections.abc import Sequence

from flexiq_jax import graph
from flexiq_jax.graph import Layer


def selectable(
  layers: Sequence[Layer],
  *,
  keep8: Sequence[str] = (),
  first_last: bool = True,
  depthwise: bool = False,
) -> tuple[str, ...]:
  """Names of the layers whose channels may go to 4 bits.

  Args:
    layers: all layers of a model.
    keep8: regular expressions; a layer whose name one of them matches anywhere stays 8-bit.
    first_last: keep the first and the last layer 8-bit.
    depthwise: let depthwise convolutions go to 4 bits.

  Raises:
    ValueError: an expression is invalid or matches no layer, or no layer is left.
  """
  names = [layer.name for layer in layers]
  kept = {names[0], names[-1]} if first_last else set()
  if not depthwise:
    kept |= {layer.name for layer in layers if layer.kind == "depthwise"}
  for pattern in keep8:
    try:
      matched = {name for name in names if re.search(pattern, name)}
    except (re.error, TypeError) as error:
      raise ValueError(f"keep8: {pattern!r} is not a regular expression ({error})") from None
    if not matched:
      near = graph.closest(pattern, names)
      raise ValueError(f"keep8: {pattern!r} matches no layer; closest names: {near}")
    kept |= matched
  if left := tuple(name for name in names if name not in kept):
    return left
  left = f"none of the {len(names)} layers is left for 4 bits"
  if keep8:
    raise ValueError(f"keep8: {left}")
  raise ValueError(
    f"names: {left}, since the first, the last and depthwise ones stay 8-bit by default; name "
    f"some, as names=({names[0]!r},), or in a config keep_first_last=False"
  )
