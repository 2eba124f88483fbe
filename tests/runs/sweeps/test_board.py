"""The live table of a sweep, on a terminal and in a log file."""

import datetime
import io
import json
import os
import re

from flexiq_jax.runs import files
from flexiq_jax.runs.progress import seconds
from flexiq_jax.runs.sweeps import locks, work
from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.states import Status, left, state
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


def running(folder, *events, log="", age=0.0, minutes=10.0):
  """A cell of an hour by its config, with events so many seconds ago and a log."""
  cell = stubs.cell(folder, 0, minutes=minutes)
  cell.workdir.mkdir(exist_ok=True)
  now = datetime.datetime.now(datetime.UTC)
  lines = [
    {"time": (now - datetime.timedelta(seconds=ago)).isoformat(timespec="milliseconds"), **event}
    for ago, event in events
  ]
  (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
  cell.log.write_text(f"=== now: command\n{log}\n")
  os.utime(cell.log, (now.timestamp() - age,) * 2)
  return cell


def result(ratio):
  return {"event": "result", "method": "flexiq", "ratio": ratio, "seed": 0}


def text_of(cell):
  """What is left, in whole tens of seconds, which a slow machine does not change."""
  return re.sub(r"[\d.]+ (min \d\d )?s", lambda m: str(round(seconds(m[0]), -1)), left(cell))


START, EVALUATION = {"event": "start"}, {"event": "evaluation", "rows": 12}


def test_time_left_is_that_of_the_rows_once_they_come(tmp_path):
  """An earlier start made two rows; since this one there were three in sixty seconds."""
  earlier = [(900, START), (800, EVALUATION), (700, result(0.1)), (600, result(0.2))]
  now = [(300, START), (130, EVALUATION)]
  cell = running(tmp_path, *earlier, *now)
  assert text_of(cell) == "300.0 in all (estimate)"
  rows = [(80, result(0.3)), (50, result(0.4)), (20, result(0.5))]
  cell = running(tmp_path, *earlier, *now, *rows, log="x: 1/2, 9.0 s, about 9.0 s left")
  assert text_of(cell) == "190.0 left"  # 7 rows of 30 s, 20 s of the first are over


def test_time_left_of_a_step_and_by_estimate(tmp_path):
  line = "distill, steps: 400/1600, 2 min 00 s, about 6 min 00 s left, distance at 0.5: 1.2"
  cell = running(tmp_path, (60, START), log=line, age=100.0)
  assert text_of(cell) == "260.0 of this step left, 540.0 in all (estimate)"
  # The estimate is below what the step alone needs: it says nothing.
  assert text_of(running(tmp_path, (60, START), log=line, age=100.0, minutes=3.0)) == (
    "260.0 of this step left"
  )
  assert left(running(tmp_path, (60, START), log="calibration", minutes=0.0)) == ""
