"""The simulator's benchmark: what it counts, and that it refuses a peer that decides otherwise."""

import json

import numpy as np
import pytest

from benchmarks import serving_simulator
from benchmarks.serving_events import event_by_event


def test_rows_say_what_was_served(tmp_path, capsys):
  path = tmp_path / "serving.json"
  serving_simulator.main(["--seconds", "0.5", "--rounds", "1", "--json", str(path)])
  rows = json.loads(path.read_text())
  assert [(r["load"], r["controller"]) for r in rows] == [
    (load, name) for load in serving_simulator.LOADS for name in ("fixed", "load")
  ]
  for row in rows:
    assert 0 < row["batches"] <= row["requests"]
    assert row["per_second"] / row["batches_per_second"] == pytest.approx(
      row["requests"] / row["batches"]
    )
    assert row["relative_to_peer"] > 0
  assert capsys.readouterr().out.count("requests/s") == len(rows)


def test_a_peer_that_forms_other_batches_is_no_peer():
  def other(*arguments):
    *rest, batch = event_by_event(*arguments)
    return (*rest, np.maximum(batch - 1, 0))

  with pytest.raises(RuntimeError, match="the peer forms other batches"):
    serving_simulator.measure(0.5, 1, other)


@pytest.mark.parametrize("arguments", [["--rounds", "0"], ["--seconds", "0"]])
def test_wrong_arguments_are_named(arguments, capsys):
  with pytest.raises(SystemExit):
    serving_simulator.main(arguments)
  assert arguments[0] in capsys.readouterr().err
