"""`python run.py` as a user meets it: what a run leaves, resuming, recipes."""

import csv
import json
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from flexiq_jax.orders import recipes
from flexiq_jax.runs.workdir import Workdir
from tests.runs_for_test import SMALL, TRAINED, compiled, start

ROOT = pathlib.Path(__file__).parent.parent.parent
__all__ = ["compiled"]


def rows(workdir):
  with (workdir / "results.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def row(workdir, method, ratio=""):
  (found,) = [r for r in rows(workdir) if (r["method"], r["ratio"]) == (method, ratio)]
  return found


def events(workdir, name):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [e for e in map(json.loads, lines) if e["event"] == name]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
  """Workdir of the whole digits run, and what it printed."""
  workdir = tmp_path_factory.mktemp("finished")
  variants = "--config.variants=('naive',)"
  ended = start(*TRAINED, variants, f"--workdir={workdir}", compiled, pictures=True)
  assert ended.status == 0, ended
  return workdir, ended


def test_workdir_holds_what_the_readme_says(finished):
  workdir, ended = finished
  names = {path.name for path in workdir.iterdir() if not path.name.startswith(".")}
  pictures = ("accuracy", "layers", "search", "unused_bits")
  assert names == {
    *(f"{picture}.{kind}" for picture in pictures for kind in ("png", "pdf")),
    "calibration",
    "config.json",
    "finished",
    "metrics.jsonl",
    "recipe.json",
    "recipes",
    "report.md",
    "results.csv",
    "train",
  }
  assert json.loads((workdir / "config.json").read_text())["groups"]["group_size"] == 4
  text = (workdir / "report.md").read_text()
  assert "# FlexiQ: resnet8 on digits" in text
  assert "--config=configs/digits.py:runlocal" in text
  assert all(f"]({name})" in text for name in ("accuracy.png", "layers.png", "unused_bits.png"))
  assert all((workdir / f"{n}.png").stat().st_size > 5000 for n in ("accuracy", "layers"))
  assert f"report: {workdir / 'report.md'}" in ended.out
  assert ended.error == ""
  assert re.search(r"\nflexiq_greedy +50 % ", ended.out)
  # What it will do, and what came out of it.
  assert ended.out.startswith(
    "FlexiQ: resnet8 on digits: training, calibration on 64 training images, selection (gram), "
    "evaluation of every method on 100 images\n"
  )
  said = re.search(r"\n(Top-1 is \S+ % in 8 bits and \S+ % in uniform INT4\. .*)\n", ended.out)
  assert said and said[1] in text
  top1 = float(row(workdir, "flexiq_gram", "0.5")["top1"])
  assert f": {top1:.2f} % with 50 % of the MACs in 4 bits (random order: " in said[1]


def test_rows(finished):
  workdir, _ = finished
  header = (workdir / "results.csv").read_text().splitlines()[0]
  assert header == (
    "method,ratio,seed,top1,drop_float,drop_int8,avg_bits,mac_share,channel_share,images,"
    "model,data,config,commit"
  )
  found = rows(workdir)
  keys = [(r["method"], r["ratio"]) for r in found]
  assert keys == [
    ("float", ""),
    ("uniform_int8", ""),
    ("uniform_int4", ""),
    *(("flexiq_gram", ratio) for ratio in ("0.0", "0.5", "1.0")),
    *(("flexiq_greedy", ratio) for ratio in ("0.5", "1.0")),
    *(("flexiq_greedy_naive", ratio) for ratio in ("0.5", "1.0")),
    ("flexiq_random", "0.5"),
  ]
  planned = Workdir(workdir).events("evaluation")
  assert planned[-1]["rows"] == len(found)  # what a sweep's time left goes by
  exact = {r["method"]: float(r["top1"]) for r in found if r["ratio"] == ""}
  assert exact["float"] > 40  # chance is 10 %
  for r in found:
    assert r["images"] == "100"
    assert float(r["drop_float"]) == exact["float"] - float(r["top1"])
    if r["method"] != "float":
      assert float(r["drop_int8"]) == exact["uniform_int8"] - float(r["top1"])
    if r["ratio"]:
      share = float(r["mac_share"])
      assert float(r["avg_bits"]) == 8 - 4 * share
      assert float(r["ratio"]) <= share <= float(r["ratio"]) + 0.25
  assert row(workdir, "float")["avg_bits"] == "32.0"
  assert row(workdir, "uniform_int4")["avg_bits"] == "4.0"


def test_ratio_0_is_the_8_bit_model(finished):
  workdir, _ = finished
  assert row(workdir, "flexiq_gram", "0.0")["top1"] == row(workdir, "uniform_int8")["top1"]
  assert row(workdir, "flexiq_gram", "0.0")["mac_share"] == "0.0"
  assert row(workdir, "flexiq_gram", "1.0")["channel_share"] == "1.0"


def test_one_compilation_for_all_ratios_and_orders(finished):
  (done,) = events(finished[0], "done")
  # 8 and 4 bits differ in what is static; all orders share one program for each batch size, which
  # is another one where a search looks at the 8-bit model's logits.
  assert done["traces"] == {"float": 1, "uniform": 2, "mixed": 2}


def test_finished_run_is_left_alone(finished):
  workdir, _ = finished
  before = {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}
  ended = start(*TRAINED, "--config.variants=('naive',)", f"--workdir={workdir}")
  assert ended.status == 0
  assert "this run finished at" in ended.out
  assert "nothing to do" in ended.out
  assert before == {p: p.stat().st_mtime_ns for p in workdir.rglob("*") if p.is_file()}


def test_workdir_of_another_config_is_refused_and_overruled(tmp_path, compiled):
  at = (*SMALL, f"--workdir={tmp_path}", compiled)
  assert start(*at, "--config.ratios=(1.0,)").status == 0
  before = (tmp_path / "results.csv").read_text()
  refused = start(*at, "--config.ratios=(0.5, 1.0)")
  assert refused.status == 1
  assert "ratios was [1.0], is now [0.5, 1.0]" in refused.error
  assert "--overrule" in refused.error
  assert (tmp_path / "results.csv").read_text() == before
  # A bad value is no reason to forget the good config.
  assert start(*at, "--config.ratios=(2.0,)", "--overrule").status == 1
  assert json.loads((tmp_path / "config.json").read_text())["ratios"] == [1.0]
  other = start(*at, "--config.model=resnet20", "--config.model_args=tiny", "--overrule")
  assert other.status == 1
  assert other.error.startswith(
    f"error: config.model: 'resnet20', but workdir '{tmp_path}' holds rows of 'resnet8'; name"
  )
  older = json.loads((tmp_path / "recipe.json").read_text())
  # Fields that once were not there.
  assert older["settings"]["groups"].pop("shift_block") == 0
  assert older["settings"]["groups"].pop("whole_heads") is False
  (tmp_path / "recipe.json").write_text(json.dumps(older))
  assert start(*at, "--config.ratios=(0.5, 1.0)", "--overrule").status == 0
  assert (tmp_path / "results.csv").read_text().startswith(before)
  assert row(tmp_path, "flexiq_greedy", "0.5")["mac_share"] == "0.5"
  assert len(events(tmp_path, "calibrated")) == 1
  assert [e["recipe"] for e in events(tmp_path, "selected")] == ["recipe", "greedy"]
  # Groups of another size are another selection, but the same calibration.
  groups = ("--config.groups.group_size=2", "--config.groups.shift_block=4")
  assert start(*at, "--config.ratios=(0.5, 1.0)", *groups, "--overrule").status == 0
  assert len(events(tmp_path, "calibrated")) == 1
  assert len(events(tmp_path, "selected")) == 4
  made = recipes.load(tmp_path / "recipe.json")
  assert (made.settings["groups"]["group_size"], made.settings["groups"]["shift_block"]) == (2, 4)


def test_dry_run_shows_config_and_layers_and_writes_nothing(tmp_path):
  ended = start(*SMALL, "--dry_run", f"--workdir={tmp_path / 'w'}")
  assert ended.status == 0
  assert "--config.data.limit=20\n" in ended.out
  assert "--config.groups.group_size=4\n" in ended.out
  assert re.search(r"\nlayer1/0/conv1  conv +8 +8 .* 4/8\n", ended.out)
  assert re.search(r"\nfc +dense +8 +10 .* 8\n", ended.out)
  assert list(tmp_path.iterdir()) == []
  lines = [line for line in ended.out.splitlines() if line.startswith("--config.ratios=")]
  assert lines == ["--config.ratios='(0.0, 0.5, 1.0)'"]


def test_help_names_configs_and_models():
  ended = start("--help")
  assert (ended.status, ended.error) == (0, "")
  for name in ("digits.py", "resnet20_cifar10.py", "mobilenet_v2", "--dry_run: ", "--workdir: "):
    assert name in ended.out


def test_wrong_values_are_told_before_anything_is_read(tmp_path, monkeypatch):
  def read(*_, **__):
    raise AssertionError("read")

  monkeypatch.setattr("flexiq_jax.data.open_source", read)
  monkeypatch.setattr("experiments.shared.setup.describe", read)
  for dry in ((), ("--dry_run",)):
    ended = start(*SMALL, "--config.search.method=genetic", f"--workdir={tmp_path / 'w'}", *dry)
    assert ended.error.startswith("error: config.search.method: 'genetic' is not one of greedy")


def test_default_workdir_is_named_and_follows_from_overrides(tmp_path, monkeypatch):
  """Runs that differ go to different folders, and the same run to the same."""
  config = f"--config={ROOT / 'configs/digits.py'}:runlocal"
  monkeypatch.chdir(tmp_path)
  found = []
  monkeypatch.setattr(
    "experiments.curve.run", lambda inputs, workdir, _: found.append(workdir.path)
  )
  method, size = "--config.search.method=greedy", "--config.groups.group_size=8"
  for overrides in ((), (method, size), (size, method), (size,), ("--config.seed=1", size)):
    ended = start(config, *overrides)
    assert ended.status == 0 and f"workdir: {found[-1]}\n" in ended.out
  plain, both, again, other, seed = (path.as_posix() for path in found)
  assert plain == "runs/digits_runlocal/resnet8/seed0"
  assert both == again and both != other
  assert re.fullmatch(r"runs/digits_runlocal/resnet8/seed0-[0-9a-f]{8}", both)
  assert seed == other.replace("seed0", "seed1")


def test_recipe_reproduces_the_rows_without_calibration(finished, tmp_path, compiled):
  made, _ = finished
  recipe = made / "recipes/naive.json"  # the one that moves top-1 on this easy task
  ended = start(*TRAINED, f"--config.recipe={recipe}", f"--workdir={tmp_path}", compiled)
  assert ended.status == 0
  assert [(r["method"], r["ratio"]) for r in rows(tmp_path)] == [
    ("float", ""),
    ("uniform_int8", ""),
    *(("flexiq_greedy", ratio) for ratio in ("0.0", "0.5", "1.0")),
  ]
  own = {"config": ""}  # the configs differ in the recipe
  for method in ("float", "uniform_int8"):
    assert row(tmp_path, method) | own == row(made, method) | own
  own["method"] = "x"
  again = {r: row(tmp_path, "flexiq_greedy", r) | own for r in ("0.5", "1.0")}
  assert again == {r: row(made, "flexiq_greedy_naive", r) | own for r in again}
  assert again["0.5"]["top1"] != again["1.0"]["top1"]
  assert not (tmp_path / "calibration").exists()
  assert not events(tmp_path, "calibrated") and not events(tmp_path, "selected")
  assert (tmp_path / "recipe.json").read_text() == recipe.read_text()
  assert "Nothing was calibrated" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    (lambda d: d.update(version=7), "has version 7; this release reads 2"),
    (lambda d: d.update(format="x"), "is not a recipe"),
    (lambda d: d.pop("order"), "is damaged: field 'order' is missing"),
    (lambda d: d["settings"]["groups"].update(colour="red"), "settings do not fit this release"),
    (lambda d: d["layers"][0].update(macs=1), "layer conv1 has macs 1 in the recipe and"),
    (lambda d: d["layers"][0].update(name="stem"), "not in the recipe: conv1"),
  ],
)
def test_recipe_that_does_not_fit_is_refused(finished, tmp_path, change, message):
  document = json.loads((finished[0] / "recipe.json").read_text())
  change(document)
  (tmp_path / "r.json").write_text(json.dumps(document))
  ended = start(*TRAINED, f"--config.recipe={tmp_path / 'r.json'}", f"--workdir={tmp_path / 'w'}")
  assert ended.status == 1
  assert ended.error.startswith("error: config.recipe: ")
  assert message in ended.error
  assert ended.error.count("\n") == 0


def interrupt(arguments, line, number):
  """Starts a process, sends it a signal once it prints `line`; (status, stderr)."""
  # Shells start background jobs with SIGINT ignored, and children inherit that; a handler they do
  # not inherit, they get the default.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  with subprocess.Popen(
    [sys.executable, "run.py", *arguments],
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout and process.stderr
    for printed in process.stdout:
      if printed.startswith(line):
        process.send_signal(number)
        break
    else:
      pytest.fail(f"never printed {line!r}: {process.stderr.read()}")
    process.stdout.read()
    error = process.stderr.read()
  return process.returncode, error


def test_stopped_run_goes_on_where_it_was(finished, tmp_path, compiled):
  workdir, _ = finished
  same = (*TRAINED, "--config.variants=('naive',)", f"--workdir={tmp_path}", compiled)
  resume = "\ninterrupted; run the same command to resume\n"
  assert interrupt(same, "training, epochs: 1/8", signal.SIGTERM) == (130, resume)
  assert len(events(tmp_path, "train")) < 8
  assert interrupt(same, "calibration, ranges, examples:", signal.SIGINT) == (130, resume)
  assert not events(tmp_path, "calibrated")
  assert interrupt(same, "uniform_int8, images:", signal.SIGKILL) == (-signal.SIGKILL, "")
  assert len(events(tmp_path, "result")) < len(rows(workdir))
  assert not (tmp_path / "finished").exists()
  assert start(*same).status == 0
  losses = lambda folder: [e["loss"] for e in events(folder, "train")]
  assert losses(tmp_path) == losses(workdir)
  assert (tmp_path / "results.csv").read_text() == (workdir / "results.csv").read_text()
  assert (tmp_path / "recipe.json").read_text() == (workdir / "recipe.json").read_text()
  # Nothing that was complete has been computed again.
  assert [e["epoch"] for e in events(tmp_path, "train")] == list(range(1, 9))
  assert len(events(tmp_path, "calibrated")) == 1
  assert [e["recipe"] for e in events(tmp_path, "selected")] == ["recipe", "greedy", "naive"]
  done = [(e["method"], e["ratio"], e["seed"]) for e in events(tmp_path, "result")]
  assert len(set(done)) == len(rows(workdir))
  # A kill between the event and the table has that row done twice.
  assert len(done) - len(set(done)) <= done.count(("uniform_int8", None, 0)) - 1


def test_wrong_flags_are_told_without_imports_or_noise():
  code = "import sys, run; print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
  assert (done.stdout, done.stderr) == ("False\n", "")
  done = subprocess.run([sys.executable, "run.py"], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stdout) == (1, "")
  assert done.stderr == (
    "error: --config is missing: name a config file, as --config=configs/digits.py\n"
  )
