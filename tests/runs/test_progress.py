"""Progress on a terminal and in a log file; durations."""

import io

import pytest

from flexiq_jax.runs.progress import PassProgress, Progress, duration, seconds


class Clock:
  """A clock that goes on by hand, seconds."""

  def __init__(self):
    self.now = 100.0

  def __call__(self):
    return self.now


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_plain_progress_is_bounded():
  clock, stream = Clock(), io.StringIO()
  with Progress("search", 100, interval=10, stream=stream, clock=clock) as progress:
    for step in range(100):
      clock.now += 0.5
      progress.update(note=f"best {step}")
  assert stream.getvalue().split("\n") == [
    "search: 1/100, 0.5 s, about 49.5 s left, best 0",
    "search: 21/100, 10.5 s, about 39.5 s left, best 20",
    "search: 41/100, 20.5 s, about 29.5 s left, best 40",
    "search: 61/100, 30.5 s, about 19.5 s left, best 60",
    "search: 81/100, 40.5 s, about 9.5 s left, best 80",
    "search: 100/100, 50.0 s, best 99",
    "",
  ]


def test_plain_progress_without_a_total_ends_with_the_count():
  clock, stream = Clock(), io.StringIO()
  with Progress("read", stream=stream, clock=clock) as progress:
    for _ in range(3):
      progress.update(steps=5)
  assert stream.getvalue() == "read: 5, 0.0 s\nread: 15, 0.0 s\n"


def test_plain_progress_says_where_it_stopped():
  clock, stream = Clock(), io.StringIO()
  with (
    pytest.raises(KeyboardInterrupt),
    Progress("eval", 9, stream=stream, clock=clock) as progress,
  ):
    progress.update()
    progress.update()
    raise KeyboardInterrupt
  assert stream.getvalue().endswith("eval: stopped at 2/9, 0.0 s\n")


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
  monkeypatch.setenv("TERM", "xterm")
  monkeypatch.setenv("COLUMNS", "100")
  stream = Terminal()
  with Progress("search", 3, stream=stream) as progress:
    progress.update(3, note="[/x] 0.5")
  shown = stream.getvalue()
  assert "━" in shown and "3/3" in shown and "[/x] 0.5" in shown
  assert "search: " not in shown


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0, "0.0 s"),
    (59.9, "59.9 s"),
    (59.96, "1 min 00 s"),
    (245, "4 min 05 s"),
    (3599.6, "1 h 00 min"),
    (7620, "2 h 07 min"),
  ],
)
def test_duration(seconds, text):
  assert duration(seconds) == text


def test_the_first_batch_of_a_pass_takes_time():
  clock, stream = Clock(), io.StringIO()
  with PassProgress(4, stream=stream, clock=clock) as progress:
    for name in ("ranges", "codes"):
      for done, seconds_ in ((2, 9.0), (4, 1.0)):
        clock.now += seconds_
        progress(name, done)
  assert stream.getvalue().split("\n") == [
    "ranges, examples: 2/4, 9.0 s, about 9.0 s left",
    "ranges, examples: 4/4, 10.0 s",
    "codes, examples: 2/4, 9.0 s, about 9.0 s left",
    "codes, examples: 4/4, 10.0 s",
    "",
  ]


def test_passes_are_shown_one_after_the_other(capsys):
  with PassProgress(4, "greedy, ") as progress:
    progress("ranges", 2)
    progress("ranges", 4)
    progress("codes", 4)
  lines = capsys.readouterr().out.splitlines()
  starts = ["greedy, ranges, examples: 2/4", "greedy, ranges, examples: 4/4"]
  starts += ["greedy, codes, examples: 4/4"]
  assert [line[: len(start)] for line, start in zip(lines, starts, strict=True)] == starts


@pytest.mark.parametrize("text", ["8.2 s", "4 min 05 s", "2 h 07 min", "0.0 s"])
def test_durations_are_read_back(text):
  assert duration(seconds(text)) == text


@pytest.mark.parametrize("text", ["", "soon", "4 min 05", "4 min 05 x"])
def test_what_is_no_duration_is_refused(text):
  with pytest.raises(ValueError, match="is no duration, as '4 min 05 s'"):
    seconds(text)
