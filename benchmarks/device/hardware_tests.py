"""The tests that need the device (`pytest -m gpu`), of the files that have any."""

import os
import pathlib
import subprocess
import sys
from typing import Any

from benchmarks.device import present
from benchmarks.device.context import Context, Skipped, claim

ROOT = pathlib.Path(__file__).parents[2]


def run(context: Context) -> dict[str, Any]:
  """Runs them in a process of their own and reads off what became of each."""
  platform = present.device(context).platform
  marker = {"gpu": "gpu"}.get(platform)
  if marker is None:
    raise Skipped(f"no test is marked for {platform}")
  files = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "tests").rglob("test_*.py"))
    if f"pytest.mark.{marker}" in path.read_text()
  ]
  if not files:
    raise Skipped(f"no test is marked {marker}")
  report = context.folder / "hardware_tests.txt"
  command = [sys.executable, "-m", "pytest", "-m", marker, "-rA", "-q", "--tb=short"]
  # Warnings of another version of a library are no errors here; plugins that write are off.
  command += ["-W", "default", "-p", "no:cacheprovider", *files]
  with report.open("w") as output:
    code = None
    try:
      code = subprocess.run(
        command,
        cwd=ROOT,
        env=dict(os.environ),
        stdout=output,
        stderr=subprocess.STDOUT,
        timeout=max(1.0, context.left()),
      ).returncode
    except subprocess.TimeoutExpired:
      print("the tests were not done in time", flush=True)
  text = report.read_text(errors="replace")
  print(text[-8000:], flush=True)
  return outcome(text, code)


def outcome(text: str, code: int | None) -> dict[str, Any]:
  """What pytest's short summary says.

  Args:
    text: its output with -rA.
    code: exit status; None where it was stopped.
  """
  found: dict[str, list[str]] = {"PASSED": [], "FAILED": [], "ERROR": [], "SKIPPED": []}
  for line in text.splitlines():
    word, _, rest = line.partition(" ")
    if word in found and rest:
      found[word].append(rest[:300])
  counts = {word.lower(): len(lines) for word, lines in found.items()}
  told = ", ".join(f"{n} {word}" for word, n in counts.items() if n) or "none ran"
  return {
    "exit": code,
    **counts,
    "not_passed": found["FAILED"] + found["ERROR"] + found["SKIPPED"],
    "complete": code is not None,
    "claims": [claim("kernel tests on the device, exact against NumPy's integer sums", told)],
  }
