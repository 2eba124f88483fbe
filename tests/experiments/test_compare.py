"""The comparison from end to end, small: rows, files, resuming, refusals."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from configs import compare_cifar10, compare_imagenet
from experiments import compare
from flexiq_jax.runs.workdir import Workdir
from tests.runs_for_test import compiled, start

CONFIG = (
  "--config=configs/compare_cifar10.py:runlocal",
  "--config.model_args=width=8,depths=(1,)",
  "--config.experiment=compare",  # one run, not a table of several
)
__all__ = ["compiled"]


def rows(workdir):
  with (workdir / "results.csv").open(newline="") as file:
    return list(csv.DictReader(file))


def events(workdir, name):
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  return [e for e in map(json.loads, lines) if e["event"] == name]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled):
  workdir = tmp_path_factory.mktemp("compare")
  ended = start(*CONFIG, f"--workdir={workdir}", compiled)
  assert (ended.status, ended.error) == (0, "")
  return workdir, ended


def test_every_method_has_a_row_for_every_budget(finished):
  workdir, _ = finished
  main = ["flexiq_greedy", "flexiq", "uniform", "quantune"]
  layerwise = ["random", "clado", "clado_block", "clado_diagonal", "mpqco", "hawq"]
  expected = {("float", "", "")}
  expected |= {(m, r, "0") for m in (*main, *layerwise) for r in ("0.5", "0.75")}
  expected |= {(f"clado_tensor/{m}", "0.5", "0") for m in layerwise}
  with_float = ["quantune", "random", "clado_diagonal", "mpqco", "hawq"]
  expected |= {(f"float8/{m}", r, "0") for m in with_float for r in ("0.5", "1.0")}
  assert {(r["method"], r["ratio"], r["seed"]) for r in rows(workdir)} == expected


def test_columns(finished):
  workdir, _ = finished
  (base,) = [r for r in rows(workdir) if r["method"] == "float"]
  for row in rows(workdir):
    top1 = float(row["top1"])
    assert float(row["drop_float"]) == pytest.approx(float(base["top1"]) - top1)
    assert float(row["relative"]) == pytest.approx(100 * top1 / float(base["top1"]))
    assert row["images"] == "64"
    if row["table"] == "main":
      budget, bits = 8 - 4 * float(row["ratio"]), float(row["avg_bits"])
      assert (row["missed"] == "1.0") == (abs(bits - budget) > 0.05)
      assert bits <= budget + 0.05
    if row["table"] == "float8":
      share = (32 - float(row["avg_bits"])) / 24
      assert (row["missed"] == "1.0") == (abs(share - float(row["ratio"])) > 0.05)
      assert share >= float(row["ratio"]) - 1e-9
  by = {(r["method"], r["ratio"]): r for r in rows(workdir)}
  # Uniform bits b: b x b for two layers, 8 x 8 for the first and the last.
  six, five = (float(by["uniform", r]["bitops"]) for r in ("0.5", "0.75"))
  eight = (six * 25 - five * 36) / (25 - 36)  # the part that does not change
  assert 0 < eight < five < six < float(base["bitops"]) * 64 / 1024
  # FlexiQ keeps 8-bit codes.
  assert float(by["flexiq", "0.5"]["size"]) == pytest.approx(float(base["size"]) / 4)
  # All in 8 bits is one plan, and the first and the last layer of it are in floating point.
  whole = [by[f"float8/{m}", "1.0"] for m in ("quantune", "random", "clado_diagonal", "hawq")]
  assert len({(r["top1"], r["bitops"], r["size"], r["avg_bits"]) for r in whole}) == 1
  assert float(whole[0]["bitops"]) > (six * 25 - five * 36) / (25 - 36)
  for method in ("flexiq_greedy", "flexiq", "quantune", "clado", "mpqco", "hawq"):
    assert float(by[method, "0.5"]["forwards"]) > 0
    assert float(by[method, "0.5"]["seconds"]) > 0


def test_equal_plans_have_equal_rows(finished):
  """Where a method keeps all layers at the lowest bits it is any other that does."""
  workdir, _ = finished
  plans = json.loads((workdir / "main/plans.json").read_text())
  top1 = {(r["method"], r["ratio"]): r["top1"] for r in rows(workdir)}
  seen = {}
  for method, of in plans.items():
    for budget, bits in of.items():
      key = tuple(sorted(bits.items()))
      value = top1[method, f"{(8 - float(budget)) / 4:g}"]
      assert seen.setdefault(key, value) == value
  assert len(seen) > 1


def test_files_and_report(finished):
  workdir, ended = finished
  names = {path.name for path in workdir.iterdir() if not path.name.startswith(".")}
  pictures = {
    f"{s}{kind}.png" for s in ("main", "clado_tensor") for kind in ("", "_bits", "_matrix")
  } | {"float8.png", "float8_bits.png"}
  others = {"config.json", "finished", "metrics.jsonl", "report.md", "results.csv"}
  kept = {"calibration", "recipes", "hawq.npz", "main", "clado_tensor", "float8"}
  pictures |= {name.replace(".png", ".pdf") for name in pictures}
  assert names == pictures | others | kept
  text = (workdir / "report.md").read_text()
  for said in (
    "## main: 4 and 8 bits",
    "## main: differences",
    "## clado_tensor: 2, 4 and 8 bits weights with a scale per layer, 8-bit activations",
    "## float8: 8 bits and floating point",
    "## QuantuneV2",
    "## float8: QuantuneV2",
    "8 and 32 bits (floating point):",
    "CLADO, main, seed 0: the unconstrained optimum",
    "the figures show that the pipeline runs, no accuracy",
  ):
    assert said in text
  assert "as much as" in ended.out  # the cost of CLADO's losses, before they are measured
  lists = json.loads((workdir / "main/quantune.json").read_text())
  assert [*lists["lists"]] == ["unfused", "norm", "activation", "residual"]
  assert sum(p["chosen"] for p in lists["plans"]) == 2
  lists = json.loads((workdir / "float8/quantune.json").read_text())
  assert lists["pair"] == [8, 32]
  assert {b for p in lists["plans"] for b in p["node_bits"]} == {8, 32}


def test_plans_with_layers_in_floating_point(finished):
  workdir, _ = finished
  plans = json.loads((workdir / "float8/plans.json").read_text())
  assert [*plans] == ["quantune", "clado_diagonal", "mpqco", "hawq"]
  assert {b for of in plans.values() for b in of["0.5"].values()} == {8, 32}
  assert all(b == 8 for of in plans.values() for b in of["1"].values())


@pytest.fixture
def copied(finished, tmp_path):
  """A copy of the finished run, to go on with."""
  workdir = shutil.copytree(finished[0], tmp_path / "copy")
  (workdir / "finished").unlink()
  return workdir


def test_resuming_fills_what_is_missing(copied, compiled):
  workdir = copied
  before = (workdir / "results.csv").read_text().splitlines()
  kept = [line for line in before if not line.startswith(("clado,0.5", "flexiq,0.75"))]
  assert len(kept) == len(before) - 2
  (workdir / "results.csv").write_text("\n".join(kept) + "\n")
  searches = len(events(workdir, "selected"))
  ended = start(*CONFIG, f"--workdir={workdir}", compiled)
  assert (ended.status, ended.error) == (0, "")
  assert "clado at 6" in ended.out.replace("\r", "\n") or "flexiq at 5" in ended.out
  assert "hawq at" not in ended.out
  after = {(r["method"], r["ratio"]): r["top1"] for r in rows(workdir)}
  old = {(r["method"], r["ratio"]): r["top1"] for r in csv.DictReader(before)}
  assert after == old
  assert len(events(workdir, "selected")) == searches  # recipes are read back
  ended = start(*CONFIG, f"--workdir={workdir}", compiled)
  assert "nothing to do" in ended.out


def test_losses_of_other_images_are_refused(copied, compiled):
  workdir = copied
  text = (workdir / "results.csv").read_text().splitlines()
  broken = [line for line in text if not line.startswith("clado,0.5")]
  (workdir / "results.csv").write_text("\n".join(broken) + "\n")
  ended = start(
    *CONFIG,
    "--config.calibration.images=12",
    "--overrule",
    f"--workdir={workdir}",
    compiled,
  )
  assert ended.status == 1
  assert "checkpoint: sensitivities of another" in ended.error
  assert "data set" in ended.error
  assert "config.comparison, clado at 6" in ended.error


def test_other_models_are_named():
  config = compare_imagenet.get_config("of=resnet50,variant=folder")
  assert (config.name, config.model, config.data.name) == ("compare_resnet50", "resnet50", "folder")
  config = compare_cifar10.get_config("of=resnet56_cifar10,runlocal")
  assert (config.model, config.weights) == ("resnet56", "random")
  assert (config.experiment, config.table.to_dict()) == (
    "table",
    {"job": "compare", "seeds": (0,)},
  )
  with pytest.raises(ValueError, match=r"config argument of='resnet57': there is no configs/"):
    compare_cifar10.get_config("of=resnet57")


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (("averages=(3.0,)",), "config.comparison.averages: 3.0; 4..8 is accepted, the smallest"),
    (("probes=1",), "config.comparison.probes: 1; at least 2 are accepted"),
    (("images=17",), "config.comparison.images: 17; 0 (all) to config.calibration.images, 16,"),
    (("block=0",), "config.comparison.block: 0 is not a positive integer"),
    (("time_limit=0.0",), "config.comparison.time_limit: 0.0; seconds above 0"),
    (("loss=mse",), "config.comparison.loss: 'mse' is not one of cross_entropy, kl"),
  ],
)
def test_refusals_write_nothing(tmp_path, changes, message):
  workdir = tmp_path / "none"
  ended = start(*CONFIG, *(f"--config.comparison.{c}" for c in changes), f"--workdir={workdir}")
  assert ended.status == 1
  assert message in ended.error
  assert not (workdir / "config.json").exists()


def test_correct_answers_are_kept(finished):
  workdir, _ = finished
  right = np.load(workdir / "main/correct/uniform_0.500000.npy")
  (row,) = [r for r in rows(workdir) if (r["method"], r["ratio"]) == ("uniform", "0.5")]
  assert 100 * right.mean() == pytest.approx(float(row["top1"]))


# A method that is not ours, and several runs.

TOYS = "tests.methods.toys_for_test"
OWN = (
  *CONFIG,
  f"--config.comparison.methods=('{TOYS}:CheapestFirst','{TOYS}:TrainedBias','random','uniform')",
  "--config.comparison.tables=('main','clado_tensor')",
  "--config.comparison.averages=(6.0,)",
)


@pytest.fixture(scope="module")
def own(tmp_path_factory, compiled):
  """Two seeds, each a run."""
  folders = [tmp_path_factory.mktemp(f"seed{seed}") for seed in (0, 1)]
  for seed, folder in enumerate(folders):
    ended = start(*OWN, f"--config.seed={seed}", f"--workdir={folder}", compiled)
    assert (ended.status, ended.error) == (0, "")
  return folders


def test_methods_of_others_have_rows(own):
  found = {(r["method"], r["ratio"]): r for r in rows(own[0])}
  assert [*found] == [
    ("float", ""),
    ("uniform", "0.5"),
    ("random", "0.5"),
    ("cheapest_first", "0.5"),
    ("trained_bias", "0.5"),
    ("clado_tensor/random", "0.5"),
    ("clado_tensor/cheapest_first", "0.5"),
  ]
  cheapest, trained = found["cheapest_first", "0.5"], found["trained_bias", "0.5"]
  assert 4 <= float(cheapest["avg_bits"]) <= 6 and float(cheapest["forwards"]) == 0
  assert cheapest["raised"] == "1.0"
  assert (trained["avg_bits"], trained["forwards"], trained["missed"]) == ("8.0", "1.0", "1.0")
  plans = json.loads((own[0] / "main/plans.json").read_text())
  assert [*plans] == ["cheapest_first"]


def test_methods_of_others_are_in_the_report(own):
  text = (own[0] / "report.md").read_text()
  assert "| cheapest_first | 6 " in text
  assert "| cheapest_first - random | 6 | " in text
  assert "| trained_bias | 6 \\* | 8.00 | " in text
  assert "layers were sorted by their MACs." in text


def test_several_runs_have_a_report_in_common(own, tmp_path, capsys):
  config = compare_cifar10.get_config("runlocal")
  config.model_args = "width=8,depths=(1,)"
  config.comparison.update(
    methods=(f"{TOYS}:CheapestFirst", f"{TOYS}:TrainedBias", "random", "uniform"),
    tables=("main", "clado_tensor"),
    averages=(6.0,),
  )
  inputs = compare.prepare(config)
  joint = Workdir(tmp_path / "joint")
  path = compare.collect(inputs, [*map(Workdir, own)], joint, "python run.py", 1.0)
  assert path == tmp_path / "joint/report.md"
  text = path.read_text()
  each = [{(r["method"], r["ratio"]): r for r in rows(folder)} for folder in own]
  top1 = [float(one["uniform", "0.5"]["top1"]) for one in each]
  expected = f"{np.mean(top1):.2f} ± {np.std(top1, ddof=1):.2f}"
  assert re.search(rf"\| uniform \| 6 \| [^|]* \| {expected} \|", text)
  right = {
    method: [np.load(f / f"main/correct/{method}_0.500000.npy").mean() for f in own]
    for method in ("cheapest_first", "random")
  }
  mean = 100 * np.mean(np.subtract(right["cheapest_first"], right["random"]))
  assert re.search(rf"\| cheapest_first - random \| 6 \| {mean:.2f} ± ", text)
  assert "; seeds 2;" in text
  pictures = {path.name for path in joint.path.glob("*.png")}
  assert pictures == {f"{t}{kind}.png" for t in ("main", "clado_tensor") for kind in ("", "_bits")}
  assert "comparison, " in capsys.readouterr().out
