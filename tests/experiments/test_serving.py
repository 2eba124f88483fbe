"""The serving experiments in small: what their runs leave, how they go on, and refusals."""

import csv
import time

import numpy as np
import pytest
from flax import nnx

from experiments import fig8, fig9
from experiments.shared import accuracies, served, works
from flexiq_jax import models
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import profile_files
from tests.runs_for_test import start

SMALL = ":of=digits,runlocal"


def config(name, *more):
  return (f"--config=configs/{name}.py{SMALL}", *more)


@pytest.fixture(scope="module")
def accuracy(tmp_path_factory):
  """A workdir with the rows that a curve leaves."""
  path = tmp_path_factory.mktemp("curve")
  workdir = Workdir(path)
  for method, ratio, top1 in [
    ("uniform_int4", None, 88.0),
    ("flexiq_distilled", 0.0, 92.0),
    ("flexiq_distilled", 0.5, 91.0),
    ("flexiq_distilled", 1.0, 90.0),
  ]:
    workdir.row(method, ratio, 0, top1=top1)
  return path


COMPARED = """method,ratio,seed,top1,avg_bits,table
float,,,93.0,32.0,
flexiq,0.25,0,91.9,7.0,main
hawq,0.25,0,91.0,7.2,main
hawq,0.75,0,89.0,5.0,main
clado,0.25,0,91.0,7.0,main
clado_tensor/hawq,0.5,0,80.0,8.0,clado_tensor
"""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """A comparison of two seeds, of whose plans one misses its average."""
  path = tmp_path_factory.mktemp("comparison")
  for seed, text in enumerate((COMPARED, COMPARED.replace(",0,8", ",1,8").replace("91.0", "90.0"))):
    (path / f"seed{seed}").mkdir()
    (path / f"seed{seed}" / "results.csv").write_text(text.replace(",0,9", f",{seed},9"))
  return path


def test_plans_stand_at_the_share_that_they_have(compared):
  found = accuracies.of_plans(compared, "hawq")
  assert found.top1 == pytest.approx({0.2: 90.5, 0.75: 89.0})
  assert "mean of seeds 0, 1" in found.source and "20.0 %: 90.50" in found.source
  one = accuracies.of_plans(compared / "seed0" / "results.csv", "hawq")
  assert one.top1 == pytest.approx({0.2: 91.0, 0.75: 89.0}) and "seed 0" in one.source


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("hawq,", "gram,", "no rows of 'hawq'; layer-wise methods there: gram, clado"),
    (",main", ",other", "no rows of 'hawq'; layer-wise methods there: none; the workdir of"),
    ("hawq,0.75", "mpqco,0.75", "1 plan of 'hawq'; two or more"),
    ("7.2", "3.5", "avg_bits of 'hawq': 3.5; 4..8 is accepted"),
    ("7.2", "", "avg_bits of 'hawq': ''; a number is accepted"),
    ("91.0,7.2", "inf,7.2", "top1 of 'hawq': 'inf'; a number is accepted"),
    ("top1", "accuracy", "no column 'top1'; a run's results.csv"),
  ],
)
def test_no_plans_without_their_numbers(tmp_path, old, new, message):
  (tmp_path / "results.csv").write_text(COMPARED.replace(old, new))
  with pytest.raises(ValueError) as error:
    accuracies.of_plans(tmp_path, "hawq")
  assert str(error.value).startswith(repr(str(tmp_path))) and message in str(error.value)


def test_a_comparison_that_goes_on_is_refused(compared, tmp_path):
  for seed, text in ((0, COMPARED), (1, COMPARED.replace("hawq,0.75", "mpqco,0.75"))):
    (tmp_path / f"seed{seed}").mkdir()
    (tmp_path / f"seed{seed}" / "results.csv").write_text(text)
  with pytest.raises(ValueError, match="some budgets of 'hawq' have 1 seeds, others 2"):
    accuracies.of_plans(tmp_path, "hawq")
  with pytest.raises(FileNotFoundError, match=r"no results\.csv there"):
    accuracies.of_plans(tmp_path / "none", "hawq")


@pytest.fixture(scope="module")
def nine(tmp_path_factory, accuracy, compared):
  workdir = tmp_path_factory.mktemp("fig9")
  systems = "('load','predictive','int8','int4','swapping','oracle','layerwise')"
  arguments = config(
    *("fig9", f"--workdir={workdir}", f"--config.serving.accuracy={accuracy}"),
    *(f"--config.fig9.layerwise={compared}", f"--config.fig9.systems={systems}"),
  )
  ended = start(*arguments, pictures=True)
  assert (ended.status, ended.error) == (0, "")
  return workdir, arguments


def test_fig9_has_a_row_and_a_curve_for_each_system(nine):
  workdir, _ = nine
  rows = {row["method"]: row for row in Workdir(workdir).rows()}
  assert tuple(rows) == fig9.SYSTEMS
  assert rows["int8"]["mean_ratio"] == 0 and rows["int8"]["served_top1"] == 92
  assert rows["int4"]["mean_ratio"] == 1 and rows["int4"]["served_top1"] == 88
  assert rows["int8"]["switches"] == rows["int4"]["switches"] == 0
  for name in ("load", "predictive", "oracle"):
    row = rows[name]
    # On a line from 92 through 91 to 90.
    assert row["served_top1"] == pytest.approx(92 - 2 * row["mean_ratio"], abs=1e-6)
    assert row["in_time"] > rows["int8"]["in_time"] and row["switches"] > 0
  swapped = rows["swapping"]
  assert swapped["served_top1"] == pytest.approx(92 - 4 * swapped["mean_ratio"], abs=1e-6)
  plans = rows["layerwise"]
  assert 0.2 <= plans["mean_ratio"] <= 0.75  # on a line from 90.5 to 89
  assert plans["served_top1"] == pytest.approx(
    np.interp(plans["mean_ratio"], (0.2, 0.75), (90.5, 89.0)), abs=1e-6
  )
  with (workdir / "curves" / "load.csv").open(newline="") as file:
    curve = list(csv.DictReader(file))
  assert len(curve) == 20
  served_requests = sum(float(point["rate"]) for point in curve)  # bins of a second
  assert served_requests == rows["load"]["requests"]
  text = (workdir / "report.md").read_text()
  assert "modelled: 100 % is 1.43x of 0 %" in text
  assert "rows `flexiq_distilled` of " in text and "uniform INT4: 88.00" in text
  assert "Layer-wise plans: rows `hawq` of " in text
  assert "| FlexiQ, by load |" in text and "| layer-wise plans |" in text
  assert (workdir / "fig9.png").stat().st_size > 10_000


def test_fig9_goes_on_where_it_stopped(nine, tmp_path):
  workdir, arguments = nine
  before = Workdir(workdir).rows()
  ended = start(*arguments)
  assert ended.status == 0 and "nothing to do" in ended.out
  (workdir / "finished").unlink()
  (workdir / "curves" / "int4.csv").unlink()
  events = len(Workdir(workdir).events("result"))
  ended = start(*arguments)
  assert (ended.status, ended.error) == (0, "")
  assert Workdir(workdir).rows() == before
  # One system ran again, and it found the same.
  assert len(Workdir(workdir).events("result")) == events + 1


def test_fig8_finds_what_is_sustained(tmp_path):
  ended = start(*config("fig8", f"--workdir={tmp_path}"))
  assert (ended.status, ended.error) == (0, "")
  rows = Workdir(tmp_path).rows()
  profile = profile_files.read(tmp_path / "profile.json")
  sustained = {r["ratio"]: r["rate"] for r in rows if r["method"] == "sustained"}
  assert list(sustained) == list(profile.ratios)
  assert 0.8 * 1250 < sustained[0.0] < 1.3 * 1250  # in four seconds
  assert sorted(sustained.values()) == list(sustained.values())
  assert 1.2 < sustained[1.0] / sustained[0.0] < 1.7
  slow = [r for r in rows if r["ratio"] == 0.0 and r["method"] == "rate 1625"]
  assert slow[0]["p90"] > 0.3
  text = (tmp_path / "report.md").read_text()
  assert "## Sustained rates" in text and "no device ran" in text
  assert "the mean ratio stands for the accuracy" in text


def test_highest_is_found_by_bisection():
  calls = []

  def fine(rate):
    calls.append(rate)
    return rate <= 77.7

  for first in (1.0, 50.0, 1000.0):
    found = fig8.highest(fine, first, 0.001)
    assert 77.7 * 0.998 <= found <= 77.7
  assert fig8.highest(lambda rate: False, 100.0, 0.01) == 0.0
  assert len(calls) < 80


def test_npu_counts_each_model_and_array(tmp_path):
  ended = start(*config("npu", f"--workdir={tmp_path}"))
  assert (ended.status, ended.error) == (0, "")
  rows = {(r["method"], r["ratio"]): r for r in Workdir(tmp_path).rows()}
  assert len(rows) == 3 * (2 + 2 * 2)
  for (method, ratio), row in rows.items():
    first = rows[method, 0.0]
    assert row["gain"] == pytest.approx(first["cycles"] / row["cycles"])
    assert row["cycles"] >= row["compute"] and (ratio > 0 or row["gain"] == 1)
  text = (tmp_path / "report.md").read_text()
  assert "4 bits stop paying, with a gain below 1.05, on 256 x 16" in text
  assert "no NPU ran" in text


def test_npu_takes_sizes_from_the_model():
  module = nnx.eval_shape(lambda: models.create("resnet20"))
  found = {w.name: (w, low) for w, low in works.of_module(module, None)}
  first, low = found["conv1"]
  assert (first.channels, first.window, first.outputs, first.pixels) == (3, 9, 16, 1024)
  assert first.inputs == 32 * 32 * 3 and not low
  strided, low = found["layer2/0/conv1"]
  assert (strided.pixels, strided.inputs, low) == (256, 32 * 32 * 16, True)


def test_a_profile_is_measured_on_the_artifact(monkeypatch, tmp_path):
  """The runner is a stand-in: what is tested is that its levels and sizes are measured and kept."""

  class Deployed:
    levels = np.array([0.0, 1.0])

  class Runner:
    def __init__(self, deployed, sizes):
      assert sizes == (1, 2)

    def switch(self, ratio):
      pass

    def __call__(self, x):
      time.sleep(0.002)
      return x.reshape(len(x), -1)

  monkeypatch.setattr(served.artifact, "load", lambda *_: Deployed())
  monkeypatch.setattr(served, "Runner", Runner)
  arguments = config(
    *("fig8", f"--workdir={tmp_path / 'run'}", "--config.serving.profile=measure"),
    *(f"--config.serving.artifact={tmp_path}", "--config.serving.sizes=(1,2)"),
    *("--config.serving.size=2", "--config.serving.delay=0.0", "--config.fig8.seconds=1.0"),
    "--config.serving.repeats=3",
  )
  ended = start(*arguments)
  assert (ended.status, ended.error) == (0, "")
  profile = profile_files.read(tmp_path / "run" / "profile.json")
  assert (profile.source, profile.sizes, profile.ratios) == ("measured", (1, 2), (0.0, 1.0))
  assert profile.model == "resnet8"


@pytest.mark.parametrize(
  ("name", "override", "message"),
  [
    ("fig8", "serving.profile=none.json", "config.serving.profile: profile 'none.json': no such"),
    ("fig8", "serving.profile=measure", "config.serving.artifact: ''"),
    ("fig8", "serving.accuracy=none", "config.serving.accuracy: 'none': no results.csv"),
    ("fig8", "serving.int8=0.0", "config.serving.profile: int8: 0.0"),
    ("fig8", "serving.target=0.0", "config.serving.target: 0.0"),
    ("fig8", "serving.queue=4", "config.serving.queue: 4"),
    ("fig8", "serving.delay=-1.0", "config.serving.delay: -1.0"),
    ("fig8", "fig8.rates=(0.0,)", "config.fig8.rates: (0.0,)"),
    ("fig8", "fig8.precision=2.0", "config.fig8.precision: 2.0"),
    ("fig9", "fig9.arrivals=waves", "config.fig9.arrivals: 'waves' is not one of trace"),
    ("fig9", "fig9.systems=('best',)", "config.fig9.systems: 'best' is not one of load"),
    ("fig9", "fig9.systems=('layerwise',)", "config.fig9.layerwise: empty"),
    ("fig9", "fig9.low=2.0", "config.fig9.low, high: 2.0, 1.2"),
    ("fig9", "fig9.seconds=0.0", "config.fig9.seconds: 0.0"),
    ("fig9", "fig9.bin=0.0", "config.fig9.bin: 0.0"),
    ("npu", "npu.models=('vgg',)", "config.npu.models: "),
    ("npu", "npu.rows=0", "config.npu.rows: 0"),
    ("npu", "npu.batches=(0,)", "config.npu.batches: (0,); positive"),
    ("npu", "ratios=(0.5,1.0)", "config.ratios: (0.5, 1.0); 0 is needed"),
  ],
)
def test_wrong_fields_are_named(name, override, message, tmp_path):
  ended = start(*config(name, f"--workdir={tmp_path}", f"--config.{override}"))
  assert ended.status == 1
  assert message in ended.error
  assert not list(tmp_path.glob("*.csv"))


def test_a_run_without_the_method_says_which_there_are(accuracy, tmp_path):
  more = (f"--config.serving.accuracy={accuracy}", "--config.serving.method=gram")
  ended = start(*config("fig9", f"--workdir={tmp_path}", *more))
  assert "no rows of 'gram' at 0 % and 100 %" in ended.error
  assert "methods with ratios: flexiq_distilled" in ended.error
