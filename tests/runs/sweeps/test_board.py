"""The live table of a sweep, on a terminal and in a log file."""

import io
import json
import re

from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps import locks, work
from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.states import Status, state
from tests.runs.sweeps import stubs_for_test as stubs


class Terminal(io.StringIO):
  def isatty(self):
    return True


def cells(folder):
  """A finished cell, one at work, one that failed, one in a queue, one that waits, one missing."""
  found = [stubs.cell(folder, seed, minutes=10.0) for seed in range(5)]
  found.append(stubs.cell(folder, 5, missing="needs a GPU"))
  for cell in found[:4]:
    cell.workdir.mkdir()
  (found[0].workdir / "finished").write_text("{}")
  found[1].log.write_text("=== now: command\nsearch, generation 3/10\n")
  event = {"time": "2026-01-01T00:00:00.000+00:00", "event": "start"}
  (found[1].workdir / "metrics.jsonl").write_text(json.dumps(event) + "\n")
  work.note(found[2]).write_text('{"failed": true, "status": 1, "message": "error: no [weights]"}')
  files.write_text(work.job_file(found[3]), "12_3\n")
  return found, locks.take(found[1].workdir)


def test_states(tmp_path):
  found, lock = cells(tmp_path)
  assert [state(cell).status for cell in found] == [
    *(Status.FINISHED, Status.RUNNING, Status.FAILED, Status.QUEUED, Status.WAITING, Status.MISSING)
  ]
  assert state(found[1]).step == "search, generation 3/10"
  assert state(found[3]).message == "job 12_3"
  lock.release()
  assert state(found[1]).status == Status.STOPPED


def test_a_terminal_has_the_whole_table(tmp_path, monkeypatch):
  monkeypatch.setenv("COLUMNS", "120")
  monkeypatch.setenv("LINES", "40")
  found, lock = cells(tmp_path)
  stream = Terminal()
  with Board(found, stream=stream) as board:
    board.update()
    board.say("a line [beside] it")
  text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", stream.getvalue())
  assert "1 finished, 1 running, 1 queued, 1 waiting, 1 failed, 1 missing" in text
  assert re.search(r"stub-seed1 +running +search, generation 3/10", text)
  assert re.search(r"stub-seed2 +failed +error: no \[weights\]", text)
  assert re.search(r"stub-seed5 +missing +needs a GPU", text)
  assert "a line [beside] it" in text
  lock.release()


def test_a_log_file_has_lines_of_what_changed(tmp_path):
  found, lock = cells(tmp_path)
  now, stream = 0.0, io.StringIO()
  with Board(found, stream=stream, clock=lambda: now) as board:
    board.update()
    assert stream.getvalue() == ""
    (found[1].workdir / "finished").write_text("{}")
    lock.release()
    board.update()
    assert re.fullmatch(r"\d\d:\d\d:\d\d stub-seed1: finished\n", stream.getvalue())
    now = 70.0
    board.update()
  assert stream.getvalue().endswith(" 2 finished, 1 queued, 1 waiting, 1 failed, 1 missing\n")
