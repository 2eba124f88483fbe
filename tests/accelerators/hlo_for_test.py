"""Reads compiled programs: which products they hold, of which layer, in which types."""

import dataclasses
import re

_DEFINED = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = \(?(\w+)\[")
_PRODUCT = re.compile(r"= \(?(\w+)\[[^=]*?\s(dot|convolution|custom-call)\((.*?)\)(.*)$")
_LIBRARIES = ("__cudnn$", "__cublas$")


@dataclasses.dataclass(frozen=True)
class Product:
  """One product of two arrays in a compiled program.

  Attributes:
    where: path of JAX names that it comes from, the layer's name in it.
    kind: `dot` or `convolution` of XLA's own, or the vendor's function.
    operands: types of both operands.
    result: type of the result.
    precise: whether float operands keep their bits.
  """

  where: str
  kind: str
  operands: tuple[str, ...]
  result: str
  precise: bool


def products(text: str) -> list[Product]:
  """The products in a compiled program's text."""
  types = {}
  for line in text.splitlines():
    if found := _DEFINED.match(line):
      types[found[1]] = found[2]
  every = []
  for line in text.splitlines():
    found = _PRODUCT.search(line)
    if not found:
      continue
    result, kind, inside, rest = found.groups()
    if kind == "custom-call":
      target = re.search(r'custom_call_target="([^"]+)"', rest)
      if not target or not target[1].startswith(_LIBRARIES):
        continue
      kind = target[1]
    names = re.findall(r"%([\w.\-]+)", inside)[:2]
    where = re.search(r'op_name="([^"]*)"', rest)
    every.append(
      Product(
        where=where[1] if where else "",
        kind=kind,
        operands=tuple(types.get(name, "?") for name in names),
        result=result,
        precise="highest" in rest.lower(),
      )
    )
  return every
