"""JSON values by strict schemas of msgspec; messages name the field, its value and what is needed.

msgspec says which type it found and where; a person looks for the value.
"""

import re
import reprlib
from typing import Any

import msgspec

_WORDS = {
  "str": "a text",
  "int": "an integer",
  "float": "a number",
  "bool": "true or false",
  "array": "a list",
  "object": "an object",
  "null": "null",
}


def convert(found: Any, schema: Any) -> Any:
  """A JSON value as a schema's type.

  Args:
    found: as `json.loads` gives it.
    schema: what `msgspec.convert` takes.

  Raises:
    ValueError: it is not of the schema; `FIELD: VALUE; WHAT is needed`.
  """
  try:
    return msgspec.convert(found, schema)
  except (msgspec.ValidationError, OverflowError, RecursionError) as error:
    raise ValueError(_message(str(error), found)) from None


def _message(text: str, found: Any) -> str:
  """The message of msgspec, told by the field's value."""
  told = re.fullmatch(r"(.*?)(?: - at (`key` in )?`\$\.?(.*)`)?", text, re.DOTALL)
  text, keys, place = told.groups() if told else (text, None, None)
  place = place or ""
  if known := re.search(r"(unknown|missing required) field `(.*)`", text):
    inside = f"{place}: " if place else ""
    how = "unknown field {!r}" if known[1] == "unknown" else "field {!r} is missing"
    return inside + how.format(known[2])
  value = found
  # Keys of a mapping are not told: what is shown then is the mapping.
  for name, number in re.findall(r"(\w+)|\[(\d+)\]", place.partition("[...]")[0]):
    value = value[int(number) if number else name]
  shown = f"{'keys of ' if keys else ''}{place or 'the whole'}: {reprlib.repr(value)}"
  if not text.startswith("Expected "):
    return f"{shown} is not accepted ({text})"
  needed = re.sub(r", got .*|^Expected ", "", text)
  needed = re.sub(r"`([\w |]+)`", lambda words: _in_words(words[1]), needed)
  return f"{shown}; {needed} is needed"


def _in_words(types: str) -> str:
  """Types of JSON as msgspec names them: `array | null` is "a list or null"."""
  return " or ".join(_WORDS.get(name, name) for name in types.split(" | "))
