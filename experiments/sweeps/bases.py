"""Base configs of a sweep: reading their files, setting fields, and the same as a command."""

import difflib
import functools
import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]  # holds run.py and configs/


@functools.cache
def _module(path: Path):
  spec = importlib.util.spec_from_file_location(f"_base_{path.stem}", path)
  assert spec is not None and spec.loader is not None
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def load(source: str) -> Any:
  """The config of `configs/NAME.py` or `configs/NAME.py:argument`, a path from the root.

  Raises:
    ValueError: there is no such file, or it refuses its argument.
  """
  name, _, argument = source.partition(":")
  path = ROOT / name
  if not path.is_file():
    names = [f"configs/{p.name}" for p in (ROOT / "configs").glob("*.py") if p.stem != "common"]
    close = difflib.get_close_matches(name, names, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise ValueError(f"{source!r}: there is no file {name}{hint}")
  return _module(path).get_config(argument or None)


def with_fields(config, fields: Mapping[str, Any]) -> Any:
  """A copy of a config with some fields set.

  Args:
    config: the base.
    fields: dotted field -> value.

  Raises:
    ValueError: a field is not there (names close ones), or takes values of another type.
  """
  changed = config.copy_and_resolve_references()
  for name, value in fields.items():
    *sections, last = name.split(".")
    part = _section(changed, sections)
    if last not in part:
      close = difflib.get_close_matches(name, names(config), n=3)
      hint = f"; close ones: {', '.join(close)}" if close else ""
      raise ValueError(f"{name!r} is no field of {config.name!r}{hint}")
    if hasattr(part[last], "items"):
      raise ValueError(f"{name!r} is a section; name one of its fields: {', '.join(part[last])}")
    try:
      part[last] = value
    except TypeError:
      kind = type(part[last]).__name__
      raise ValueError(f"{name}={value!r}: a value of type {kind} is accepted") from None
  return changed


def _section(config: Any, sections: Sequence[str]) -> Any:
  """A part of a config; an empty one where there is none of that name."""
  for section in sections:
    config = config.get(section) if section in config else {}
    if not hasattr(config, "items"):
      return {}
  return config


def names(config, front: str = "") -> list[str]:
  """Dotted names of all fields."""
  found = []
  for name, value in config.items():
    inside = hasattr(value, "items")
    found += names(value, f"{front}{name}.") if inside else [f"{front}{name}"]
  return found


def command(source: str, fields: Mapping[str, Any], workdir: Path) -> tuple[str, ...]:
  """The command line of a run, as a user gives it in the root folder."""
  flags = [f"--config.{name}={_text(value)}" for name, value in fields.items()]
  return ("python", "run.py", f"--config={source}", *flags, f"--workdir={workdir}")


def _text(value: Any) -> str:
  if isinstance(value, bool):
    return str(value).lower()
  if isinstance(value, Sequence) and not isinstance(value, str):
    return repr(tuple(value))
  return value if isinstance(value, str) else repr(value)
