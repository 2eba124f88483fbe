"""Prints the table of the parity tests at the end of a run."""


def pytest_terminal_summary(terminalreporter):
  rows = [
    value
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    for key, value in report.user_properties
    if key == "parity" and report.when == "call"
  ]
  if not rows:
    return
  terminalreporter.section("parity of logits with torch (random weights, float32, CPU)")
  line = "{:<22}{:<44}{:>13}{:>17}"
  terminalreporter.write_line(line.format("model", "reference", "parameters", "max rel. error"))
  for model, reference, parameters, error in rows:
    terminalreporter.write_line(line.format(model, reference, f"{parameters:,}", f"{error:.1e}"))
