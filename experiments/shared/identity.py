"""What tells the config of one run from that of another: its fields, but for those that came later.

A new field would make every run that is kept, and every collected row, one of another config. So a
field that came later is left out while it has the value that stands for what runs did before.
"""

from typing import Any

# Field -> its value that changes nothing.
LATER = {
  "distill.crop": 0,
  "distill.interpolate": 1.0,
  "finetune.crop": 0,
  "finetune.interpolate": 1.0,
  "teacher": {"model": "", "model_args": "", "weights": ""},
}


def plain(config) -> dict[str, Any]:
  """A config as workdirs keep it and rows name it, nested dicts."""
  found = config.to_dict()
  for name, before in LATER.items():
    *sections, field = name.split(".")
    part: Any = found
    for section in sections:
      part = part.get(section) or {}
    if part.get(field) == before:
      del part[field]
  return found
