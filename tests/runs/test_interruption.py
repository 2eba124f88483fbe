"""A signal ends a run in order, wherever it arrives, and once."""

import gc
import io
import os
import signal
import threading

import numpy as np
import pytest

from flexiq_jax.runs.checkpoint import Checkpoints
from flexiq_jax.runs.interruption import interruptible
from flexiq_jax.runs.progress import Progress


def test_sigterm_stops_in_order():
  stream, steps = io.StringIO(), []
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as stop, interruptible(stream):
    try:
      os.kill(os.getpid(), signal.SIGTERM)
      steps.append("not reached")
    finally:
      steps.append("cleaned up")
  assert stop.value.code == 130
  assert steps == ["cleaned up"]
  assert stream.getvalue() == "\ninterrupted; run the same command to resume\n"
  assert signal.getsignal(signal.SIGTERM) is before


def test_ctrl_c_stops_in_order():
  with pytest.raises(SystemExit) as stop, interruptible(io.StringIO()):
    raise KeyboardInterrupt
  assert stop.value.code == 130


def test_interruptible_lets_results_and_errors_pass():
  before = signal.getsignal(signal.SIGTERM)
  with interruptible():
    assert signal.getsignal(signal.SIGTERM) is not before
  with pytest.raises(ZeroDivisionError), interruptible():
    _ = 1 / 0
  assert signal.getsignal(signal.SIGTERM) is before


def test_interruptible_works_in_other_threads():
  ran = []

  def work():
    with interruptible():
      ran.append(True)

  thread = threading.Thread(target=work)
  thread.start()
  thread.join()
  assert ran


@pytest.fixture
def lost():
  """Sends a signal inside of a garbage collection, where what it raises is lost."""
  sent = []

  def callback(phase, info):
    if phase == "start" and not sent:
      sent.append(True)
      os.kill(os.getpid(), signal.SIGINT)

  def send():
    gc.callbacks.append(callback)
    gc.collect()

  yield send
  gc.callbacks.remove(callback)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("where", ["progress", "checkpoint", "end"])
def test_a_signal_that_was_lost_ends_the_run_at_the_next_step(lost, where, tmp_path):
  reached = []
  with pytest.raises(SystemExit) as stop, interruptible(io.StringIO()):
    lost()
    reached.append("went on")
    if where == "progress":
      with Progress("steps", 3, stream=io.StringIO()) as progress:
        progress.update()
    elif where == "checkpoint":
      with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(0, {"a": np.ones(2)})
    reached.extend([] if where == "end" else ["too far"])
  assert stop.value.code == 130
  assert reached == ["went on"]
  if where == "checkpoint":  # what was being saved is there
    with Checkpoints(tmp_path) as checkpoints:
      assert checkpoints.steps() == [0]
  with interruptible():  # the next run knows nothing of it
    Progress("steps", 3, stream=io.StringIO()).update()


def test_further_signals_do_not_disturb_the_end():
  steps = []
  with pytest.raises(SystemExit), interruptible(io.StringIO()):
    try:
      os.kill(os.getpid(), signal.SIGTERM)
    finally:
      os.kill(os.getpid(), signal.SIGINT)
      os.kill(os.getpid(), signal.SIGTERM)
      steps.append("cleaned up")
  assert steps == ["cleaned up"]
