"""Several processes: how one learns of the others, what they tell each other, whole runs.

The other processes of a test are real ones, on this machine's loopback.
"""

import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from flexiq_jax import search
from flexiq_jax.runs import distributed
from flexiq_jax.runs.workdir import Workdir
from tests.runs_for_test import SMALL, compiled, several_devices, start

ROOT = pathlib.Path(__file__).parents[2]
__all__ = ["compiled"]

GRAM = (
  "--config.search.block=4",  # several blocks, so that each process measures some
  "--config.search.levels=(0.5,)",
  "--config.ratios=(0.0,0.5)",
  "--config.compare=()",
  "--config.random_seeds=()",
)
EVOLUTION = (
  "--config.search.method=evolution",
  "--config.search.generations=24",
  "--config.search.population=6",
  "--config.search.elites=2",
  "--config.search.checkpoint_every=2",
)
JAX = {
  "JAX_COORDINATOR_ADDRESS": "node:1234",
  "JAX_NUM_PROCESSES": "4",
  "JAX_PROCESS_ID": "3",
}
SLURM = {
  "SLURM_JOB_ID": "7",
  "SLURM_NTASKS": "4",
  "SLURM_PROCID": "3",
  "SLURM_LOCALID": "1",
  "SLURM_STEP_NODELIST": "node[1-2]",
}


def by_variables(rank, port):
  return {
    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
    "JAX_NUM_PROCESSES": "2",
    "JAX_PROCESS_ID": str(rank),
  }


def by_slurm(rank, port):
  return SLURM | {
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": str(rank),
    "SLURM_LOCALID": str(rank),
    "SLURM_STEP_NODELIST": "localhost",
    "JAX_COORDINATOR_PORT": str(port),
  }


class Two:
  """Two processes of one command, ended at the latest with the `with` block."""

  def __init__(self, folder, *command, told=by_variables, devices=1):
    with socket.socket() as free:
      free.bind(("localhost", 0))
      port = free.getsockname()[1]
    clean = {n: v for n, v in os.environ.items() if not n.startswith(("JAX_", "SLURM_", "XLA_"))}
    clean |= {
      "JAX_PLATFORMS": "cpu",
      "XLA_FLAGS": several_devices(devices),
    }
    self.outputs, self.processes = [], []
    for rank in range(2):
      paths = [folder / f"{rank}.{kind}" for kind in ("out", "err")]
      self.outputs.append(paths)
      with paths[0].open("w") as out, paths[1].open("w") as err:
        self.processes.append(
          subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=clean | told(rank, port),
            stdout=out,
            stderr=err,
          )
        )

  def __enter__(self):
    return self

  def __exit__(self, *error):
    for process in self.processes:
      process.kill()
      process.wait()

  def ended(self, timeout=300):
    """Exit statuses, and what went to standard output and to standard error."""
    until = time.monotonic() + timeout
    statuses = [p.wait(max(1, until - time.monotonic())) for p in self.processes]
    out, err = ([paths[kind].read_text() for paths in self.outputs] for kind in (0, 1))
    return statuses, out, err


def run_two(workdir, *arguments, **options):
  folder = workdir.with_name(workdir.name + "_output")
  folder.mkdir(exist_ok=True)
  return Two(folder, "run.py", *SMALL, *arguments, f"--workdir={workdir}", **options)


def steps(workdir):
  """Steps of the searches without the time that they took."""
  names = ("method", "stage", "ratio", "step", "best", "mean", "forwards")
  return [tuple(row[name] for name in names) for row in search.steps(Workdir(workdir))]


def assert_same_run(workdir, alone):
  assert (workdir / "recipe.json").read_text() == (alone / "recipe.json").read_text()
  assert (workdir / "results.csv").read_text() == (alone / "results.csv").read_text()
  got, want = steps(workdir), steps(alone)
  assert [row[:4] for row in got] == [row[:4] for row in want]
  np.testing.assert_allclose(
    np.array([row[4:] for row in got]), np.array([row[4:] for row in want]), rtol=1e-5
  )
  assert (workdir / "finished").is_file()
  assert not (workdir / "search").exists()


@pytest.fixture(scope="module")
def alone(tmp_path_factory, compiled):
  """Workdirs of runs in one process, by the arguments of the search."""
  found = {}

  def of(arguments):
    if arguments not in found:
      found[arguments] = tmp_path_factory.mktemp("alone")
      ended = start(*SMALL, *arguments, f"--workdir={found[arguments]}", compiled)
      assert ended.status == 0, ended
    return found[arguments]

  return of


def test_a_process_alone_needs_nothing():
  assert distributed.arguments_from({}) is None
  assert distributed.arguments_from(JAX | {"JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
  assert distributed.arguments_from(SLURM | {"SLURM_NTASKS": "1"}) is None
  # What a shell inside a job has, without tasks.
  assert distributed.arguments_from({"SLURM_JOB_ID": "7"}) is None


def test_the_environment_says_who_is_who():
  want = {"coordinator_address": "node:1234", "num_processes": 4, "process_id": 3}
  got = distributed.arguments_from(SLURM | JAX)
  assert got == want | {"cluster_detection_method": "deactivate"}
  assert distributed.arguments_from(SLURM) == {"cluster_detection_method": "slurm"}


@pytest.mark.parametrize(
  ("environment", "message"),
  [
    ({"JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS is not set, but JAX_PROCESS_ID is"),
    ({k: v for k, v in JAX.items() if k != "JAX_PROCESS_ID"}, "JAX_PROCESS_ID is not set"),
    (JAX | {"JAX_PROCESS_ID": "4"}, r"JAX_PROCESS_ID: '4'; 0\.\.3"),
    (JAX | {"JAX_PROCESS_ID": "-1"}, r"JAX_PROCESS_ID: '-1'"),
    (JAX | {"JAX_NUM_PROCESSES": "0"}, "JAX_NUM_PROCESSES: '0'; an integer from 1"),
    (JAX | {"JAX_NUM_PROCESSES": "two"}, "JAX_NUM_PROCESSES: 'two'"),
    (JAX | {"JAX_COORDINATOR_ADDRESS": "node"}, "JAX_COORDINATOR_ADDRESS: 'node'; host:port"),
    (SLURM | {"SLURM_NTASKS": "many"}, "SLURM_NTASKS: 'many'"),
    (
      {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
      "SLURM_PROCID is not set, but SLURM_NTASKS is 4: start all processes with srun",
    ),
  ],
)
def test_half_an_environment_is_refused(environment, message):
  with pytest.raises(ValueError, match=message):
    distributed.arguments_from(environment)


def test_one_process_keeps_what_it_has(tmp_path, capfd):
  array = np.arange(3.0)
  with distributed.together(), distributed.folder(tmp_path) as folder:
    print("said")
    assert folder == tmp_path
    assert not distributed.several()
    assert distributed.is_main()
    assert distributed.broadcast_bytes(b"x") == b"x"
    assert distributed.broadcast_bytes(None) is None
    assert distributed.agree([1]) == [1]
    assert distributed.agree_array(array) is array
    assert distributed.mine(range(5)) == range(5)
    np.testing.assert_array_equal(distributed.sum_parts(array), array)
  assert capfd.readouterr().out == "said\n"


# Every process has other values; prints what all have at the end.
_TELLING = """
import json, sys, pathlib
import jax, numpy as np
from flexiq_jax.runs import distributed
distributed._CHUNK = 1000
distributed.initialize()
rank = jax.process_index()
mixed = np.random.default_rng(rank).normal(size=(7, 60)) * 10.0 ** np.arange(60)
data = bytes(range(256)) * 13
result = {
  "rank": rank,
  "devices": jax.device_count(),
  "main": distributed.is_main(),
  "bytes": distributed.broadcast_bytes(data if rank == 0 else b"other") == data,
  "empty": distributed.broadcast_bytes(b"" if rank == 0 else None) == b"",
  "none": distributed.broadcast_bytes(None if rank == 0 else b"other") is None,
  "agree": distributed.agree({"a": [rank, None, 0.1]}),
  "array": distributed.agree_array(np.full((2, 1), np.pi + rank)).tolist(),
  "mine": list(distributed.mine(range(5))),
  "sum": distributed.sum_parts(mixed).tolist(),
  "number": float(distributed.sum_parts(np.float64(2.0**60 + 256 * rank))),
  "none left": distributed.sum_parts(np.zeros((0, 3))).shape == (0, 3),
}
pathlib.Path(sys.argv[1], f"{rank}.json").write_text(json.dumps(result))
"""


def test_two_processes_tell_each_other(tmp_path):
  with Two(tmp_path, "-c", _TELLING, tmp_path, devices=2) as two:
    statuses, _, err = two.ended()
  assert statuses == [0, 0], err
  found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
  scale = 10.0 ** np.arange(60)
  parts = [np.random.default_rng(rank).normal(size=(7, 60)) * scale for rank in range(2)]
  for rank, result in enumerate(found):
    assert result == {
      "rank": rank,
      "devices": 4,
      "main": rank == 0,
      "bytes": True,
      "empty": True,
      "none": True,
      "agree": {"a": [0, None, 0.1]},
      "array": [[np.pi], [np.pi]],
      "mine": [[0, 2, 4], [1, 3]][rank],
      "sum": (parts[0] + parts[1]).tolist(),  # every bit
      "number": 2.0**61 + 256,
      "none left": True,
    }


def test_two_processes_make_the_run_of_one(tmp_path, alone, compiled):
  workdir = tmp_path / "run"
  with run_two(workdir, *GRAM, compiled) as two:
    statuses, out, err = two.ended()
  assert statuses == [0, 0], err
  assert f"report: {workdir / 'report.md'}" in out[0]
  assert out[1] == ""
  assert_same_run(workdir, alone(GRAM))


@pytest.mark.slow
def test_two_processes_leave_a_finished_run_alone(alone, compiled):
  with run_two(alone(GRAM), *GRAM, compiled) as two:
    statuses, out, err = two.ended()
  assert statuses == [0, 0], err
  assert "nothing to do" in out[0]


@pytest.mark.slow
def test_slurm_tasks_of_two_devices_make_the_run_of_one(tmp_path, alone, compiled):
  workdir = tmp_path / "run"
  with run_two(workdir, *EVOLUTION, compiled, told=by_slurm, devices=2) as two:
    statuses, _, err = two.ended()
  assert statuses == [0, 0], err
  assert_same_run(workdir, alone(EVOLUTION))


@pytest.mark.slow
@pytest.mark.parametrize("victims", [(0, 1), (0,)], ids=["both", "the_main_one"])
def test_a_killed_run_goes_on_where_it_was(tmp_path, alone, compiled, victims):
  workdir = tmp_path / "run"
  with run_two(workdir, *EVOLUTION, compiled) as two:
    while not (workdir / "search" / "evolution" / "1").is_dir():
      assert all(p.poll() is None for p in two.processes), two.ended(1)
      time.sleep(0.02)
    for rank in victims:
      two.processes[rank].send_signal(signal.SIGKILL)
    statuses, _, err = two.ended(120)  # what is left ends by itself
  assert all(statuses), err
  assert not (workdir / "recipe.json").exists(), "the run was too fast for this test"
  with run_two(workdir, *EVOLUTION, compiled) as two:
    statuses, _, err = two.ended()
  assert statuses == [0, 0], err
  assert_same_run(workdir, alone(EVOLUTION))


@pytest.mark.slow
def test_a_refusal_in_the_main_process_ends_all(tmp_path, compiled):
  (tmp_path / "config.json").write_text("{}")  # of another run; the others do not see it
  with run_two(tmp_path, *GRAM, compiled) as two:
    statuses, _, err = two.ended(120)
  assert all(statuses)
  assert "error: " in err[0]
  assert "config" in err[0]


@pytest.mark.slow
def test_training_is_for_one_process(tmp_path, compiled):
  with run_two(tmp_path, "--config.weights=train", compiled) as two:
    statuses, _, err = two.ended(120)
  assert all(statuses)
  assert "config.weights: 'train' in several processes" in err[0]
