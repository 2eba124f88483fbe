"""The experiment `serve`: from an artifact to a server that answers, and its refusals."""

import http.client
import io
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import flexiq_jax as fq
from configs import serve as serve_config
from experiments import serve as experiment
from experiments.server import sources
from flexiq_jax import deployment, models, serving
from flexiq_jax.deployment import artifact
from flexiq_jax.runs import files
from flexiq_jax.serving import profile_files
from tests.runs_for_test import TINY, compiled, start

__all__ = ["compiled"]
ROOT = pathlib.Path(__file__).parent.parent.parent
CONFIG = "--config=configs/serve.py:of=digits,block=8,runlocal"
SMALL = (CONFIG, "--config.serve.port=0", "--config.serve.sizes=(1,4)")


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
  """What a run of `deploy` leaves, as far as a server reads it."""
  folder = tmp_path_factory.mktemp("deployed")
  module = models.create("resnet8", width=8, depths=(1,))
  images = np.random.default_rng(0).random((16, 8, 8, 1), np.float32)
  model = fq.quantize(*models.functional(module), images, progress=False)
  made = deployment.deploy(model, model.network.example, levels=(0.0, 0.5, 1.0), granule=2)
  artifact.save(folder / "artifact", made, name="resnet8")
  described = {"model": "resnet8", "model_args": "width=8,depths=(1,)", "preprocess": {"crop": 8}}
  files.write_text(folder / "config.json", json.dumps(described))
  rows = "deployed,0.0,80\ndeployed,0.5,79\ndeployed,1.0,75\n"
  files.write_text(folder / "results.csv", f"method,ratio,top1\n{rows}")
  return folder


def get(port, method, path, body=None) -> tuple[int, dict]:
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
  connection.request(method, path, body)
  response = connection.getresponse()
  content = response.read()
  connection.close()
  return response.status, json.loads(content)


@pytest.fixture
def process(tmp_path, compiled):
  """Starts `run.py` in a process of its own; ends it."""
  started = []

  def begin(*arguments, cwd=tmp_path):
    command = [sys.executable, str(ROOT / "run.py"), *arguments, compiled]
    command[2] = command[2].replace("configs/", f"{ROOT}/configs/")
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started.append(subprocess.Popen(command, cwd=cwd, env=env, **pipes))
    return started[-1]

  yield begin
  for one in started:
    one.kill()
    one.wait()
    one.stdout.close()


def port_of(server) -> int:
  lines = []
  for line in server.stdout:
    lines.append(line)
    if line.startswith("serving "):
      return int(line.rsplit(":", 1)[1].strip("/\n"))
  raise AssertionError("".join(lines))


def test_serves_an_artifact_until_it_is_told_to_end(finished, process, tmp_path):
  """All that a run's artifact needs is its folder: model and preprocessing come from beside it."""
  names = tmp_path / "names.txt"
  names.write_text("\n".join(f"digit {i}" for i in range(10)))
  server = process(
    *SMALL,
    f"--config.artifact={finished / 'artifact'}",
    f"--config.serve.classes={names}",
    f"--workdir={tmp_path / 'served'}",
  )
  port = port_of(server)
  status, described = get(port, "GET", "/v2/models/resnet8")
  assert (status, described["inputs"][0]["shape"]) == (200, [-1, 8, 8, 1])
  picture = io.BytesIO()
  Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(picture, "PNG")
  status, found = get(port, "POST", "/classify?top=2", picture.getvalue())
  assert status == 200
  assert [c["name"] for c in found["classes"]] == [f"digit {c['class']}" for c in found["classes"]]
  status, facts = get(port, "GET", "/state")
  assert facts["levels"] == [0.0, 0.5, 1.0] and len(facts["accuracies"]) == 3
  server.send_signal(signal.SIGTERM)
  out = server.stdout.read()
  assert server.wait(60) == 0, out
  text = (tmp_path / "served" / "report.md").read_text()
  assert "# Served resnet8" in text and "Answered 1; refused 0" in text
  assert profile_files.read(tmp_path / "served" / "profile.json").source == "measured"


@pytest.mark.slow
def test_without_an_artifact_the_model_is_deployed_once(process, tmp_path):
  arguments = (*SMALL, *TINY, "--config.search.method=greedy", "--config.serve.controller=fixed")
  made = set()
  for _ in range(2):
    server = process(*arguments)
    port = port_of(server)
    assert get(port, "GET", "/v2/health/ready")[0] == 200
    server.send_signal(signal.SIGINT)
    server.stdout.read()
    assert server.wait(60) == 0
    (folder,) = (tmp_path / "runs" / "deployed").iterdir()
    made.add((folder / "finished").stat().st_mtime)
  assert len(made) == 1


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("artifact", "/no/where", "config.artifact: "),
    ("serve.port", 70000, "config.serve.port: 70000; 0..65535 is accepted"),
    ("serve.controller", "oracle", "config.serve.controller: 'oracle'; one of load, predictive"),
    ("serve.sizes", "(0,)", "config.serve.sizes: (1, 4, 0); positive integers"),
    ("serve.target", 0.0, "config.serve.target: 0.0; seconds above 0"),
    ("serve.gain", -1.0, "config.serve.gain: -1.0; a share of at least 0"),
    ("serve.deadline", -1.0, "config.serve.deadline: -1.0; seconds of at least 0"),
    ("serve.priorities", "(0.0,)", "config.serve.priorities: 0.0; seconds above 0"),
    ("serve.queue", 3, "config.serve.queue: 3; at least the largest of sizes, 4"),
    ("serve.profile", "/no/where.json", "config.serve.profile: "),
    ("serve.accuracies", "/no/where.csv", "config.serve.accuracies: '/no/where.csv': no"),
    ("serve.method", "gram", "methods with ratios: deployed"),
    ("serve.classes", "/no/where.txt", "config.serve.classes: /no/where.txt: no such file"),
    ("limits.pixels", 0, "config.limits.pixels: 0; a positive integer"),
  ],
)
def test_refusals(finished, tmp_path, field, value, message):
  own = () if field == "artifact" else (f"--config.artifact={finished / 'artifact'}",)
  workdir = tmp_path / "x"
  ended = start(*SMALL, *own, f"--config.{field}={value}", f"--workdir={workdir}")
  assert ended.status == 1
  assert message in ended.error
  assert len(ended.error.splitlines()) == 1
  assert not (workdir / "config.json").exists()


def test_a_port_that_is_taken(finished, tmp_path):
  with socket.create_server(("127.0.0.1", 0)) as sock:
    port = sock.getsockname()[1]
    own = (f"--config.serve.port={port}", f"--config.artifact={finished / 'artifact'}")
    ended = start(*SMALL, *own, f"--workdir={tmp_path / 'x'}")
  assert (ended.status, ended.error.count("\n")) == (1, 0)
  assert f"config.serve.port: {port} of 127.0.0.1 is taken by another process" in ended.error


def test_the_artifacts_own_run_says_which_model_it_is(finished):
  config = serve_config.get_config()
  config.artifact = str(finished / "artifact")
  own = sources.adopted(config)
  assert (own.model, own.model_args) == ("resnet8", "width=8,depths=(1,)")
  assert config.model == "mobilenet_digits"
  described = sources.setup.describe(own)
  prepared = sources.preprocessing(described)
  assert (prepared.resize, prepared.crop, prepared.channels) == (8, 8, 1)


def test_photographs_are_resized_though_the_data_set_is_not():
  config = serve_config.get_config("of=efficientnet_lite0")
  assert config.preprocess.resize == 0
  prepared = sources.preprocessing(sources.setup.describe(config))
  assert (prepared.resize, prepared.crop) == (256, 224)


def test_another_port_takes_the_same_deployed_model():
  config, other = serve_config.get_config().lock(), serve_config.get_config().lock()
  other.serve.port, other.limits.body = 1, 2
  assert sources.deployed_at(config) == sources.deployed_at(other)
  other.ratios = (0.0, 1.0)
  assert sources.deployed_at(config) != sources.deployed_at(other)


def test_levels_that_gain_nothing_are_not_chosen():
  levels = (0.0, 0.25, 0.5, 0.75, 1.0)
  fast = serving.modelled(int8=100.0, gain=2.0, fixed=0.0, sizes=(1, 4), ratios=levels)
  assert experiment.gaining(fast, levels, 4, 0.05) == levels
  assert experiment.gaining(fast, levels, 4, 0.2) == (0.0, 0.5, 0.75, 1.0)
  flat = serving.modelled(int8=100.0, gain=1.0, fixed=0.0, sizes=(1, 4), ratios=levels)
  assert experiment.gaining(flat, levels, 4, 0.05) == (0.0,)


def test_class_names_are_one_a_line(tmp_path):
  path = tmp_path / "names.txt"
  path.write_text("a\nb c\n\n")
  assert sources.class_names(str(path), 2) == ("a", "b c")
  assert sources.class_names("", 2) == ()
  with pytest.raises(ValueError, match="2 names; 3 are accepted"):
    sources.class_names(str(path), 3)
