"""Plans: the cells of a sweep, that they are the runs of their commands, what is refused."""

import dataclasses
import sys
import time
import warnings

import pytest
from absl import flags
from ml_collections import config_flags

from configs import sweep_digits, table2, table7
from configs.shared import sweeps
from experiments import sweep as job
from experiments.shared import identity
from experiments.sweeps import bases, needs
from experiments.sweeps import tables as drawn
from experiments.sweeps.plan import plan
from flexiq_jax.runs import files
from flexiq_jax.runs.sweeps import collect, states
from flexiq_jax.runs.sweeps import layouts as laid
from flexiq_jax.runs.sweeps.cells import select
from flexiq_jax.runs.sweeps.states import Status
from tests.experiments.sweeps.finished_for_test import DIGITS, LAYOUT, digits, finish, row_config
from tests.runs_for_test import start

TINY = "--config=configs/sweep_digits.py:runlocal"


def test_cells_are_the_products_of_the_axes(tmp_path):
  cells = plan(sweep_digits.get_config("runlocal"), tmp_path)
  assert [cell.name for cell in cells] == [
    f"digits-group_size{size}-seed{seed}" for size in (2, 4, 8) for seed in (0, 1)
  ]
  assert [cell.workdir for cell in cells] == [tmp_path / cell.name for cell in cells]
  assert cells[3].labels == {"base": "digits", "groups.group_size": 4, "seed": 1}
  assert cells[3].missing == ""


@pytest.mark.parametrize(
  "name", ["table2", "table7", "group_size", "clado", "quantune", "sweep_digits"]
)
def test_a_command_makes_the_config_of_its_cell(name, tmp_path, monkeypatch):
  """Every command, read as run.py reads it, gives the config that was planned."""
  cells = plan(bases.load(f"configs/{name}.py"), tmp_path)
  for cell in cells[:: max(1, len(cells) // 6)]:
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    argv = [str(word) for word in cell.command[1:]]
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.chdir(bases.ROOT)
    with warnings.catch_warnings():
      # ml_collections' own way of loading a config file.
      warnings.filterwarnings("ignore", r"the load_module\(\) method", DeprecationWarning)
      values(argv)
      found = files.to_plain(identity.plain(config.value))
    assert found == cell.config
    assert values["workdir"].value == str(cell.workdir)


@pytest.mark.parametrize(
  ("given", "message"),
  [
    ({"bases": {}}, "config.sweep.bases: empty"),
    ({"axes": (("groups.group_sise", (1,)),)}, "'groups.group_sise' is no field of"),
    ({"axes": (("groups.group_sise", (1,)),)}, "close ones: groups.group_size"),
    ({"axes": (("groups", (1,)),)}, "'groups' is a section; name one of its fields"),
    ({"axes": (("batch_size", ("many",)),)}, "batch_size='many': a value of type int is accepted"),
    ({"axes": (("batch_size", ()),)}, "config.sweep.axes: 'batch_size' has no values"),
    ({"axes": (("seed", (0,)),)}, "config.sweep.axes: 'seed' stands twice"),
    ({"axes": ("seed",)}, r"config.sweep.axes: 'seed'; \(field, \(value, ...\)\) is accepted"),
    ({"axes": (("batch_size", (0,)),)}, "config.batch_size: 0 is not a positive number"),
    ({"seeds": (-1,)}, "config.sweep.seeds: -1 is not in 0.."),
    ({"seeds": (0, 0)}, "2 cells have the name 'digits-seed0'"),
    ({"axes": (("model_args", ("width=8", "width 8")),)}, "is not name=value"),
    ({"axes": (("keep8", (("a b",), ("a_b",))),)}, "cells have the name 'digits-keep8a_b-seed0'"),
    ({"bases": {"d": sweeps.base("configs/digit.py")}}, "did you mean configs/digits.py?"),
    ({"bases": {"d": sweeps.base(DIGITS, fields=(("modle", "x"),))}}, "close ones: model"),
    ({"bases": {"d": sweeps.base(DIGITS, fields=(("model", "resnet7"),))}}, "resnet7"),
  ],
)
def test_wrong_sweeps_are_refused(tmp_path, given, message):
  with pytest.raises(ValueError, match=message):
    plan(digits(**given), tmp_path)


@pytest.mark.parametrize(
  ("flag", "message"),
  [
    ("--config.executor=pbs", "config.executor: 'pbs' is not one of local, slurm, print"),
    ("--config.only=zebra", "config.only: 'zebra' is found in no cell's name; names are as digits"),
    ("--config.only=(", "config.only: '(' is no regular expression"),
    ("--config.sweep.skip=.", "config.sweep.skip: '.' leaves no cell"),
    ("--config.local.processes=0", "config.local.processes: 0; an integer from 1 is accepted"),
    ("--config.slurm.notice=0", "config.slurm.notice: 0; an integer from 1"),
    ("--config.sweep.bases.digits.memory=1e5", "100000 GiB of memory; this machine has"),
  ],
)
def test_wrong_flags_are_refused(tmp_path, flag, message):
  executor = ["--config.executor=slurm"] if "slurm" in flag else []
  ended = start(TINY, *executor, flag, f"--workdir={tmp_path / 'sweep'}", "--dry_run")
  assert message in ended.error + ended.out
  assert "digits.memory" in flag or ended.status == 1
  assert not (tmp_path / "sweep").exists()


def test_a_folder_that_cannot_be_written_is_told_at_once(tmp_path):
  (tmp_path / "file").write_text("")
  ended = start(TINY, f"--workdir={tmp_path / 'file' / 'sweep'}")
  assert ended.status == 1
  assert "cannot be written (Not a directory): name a folder that you may write to" in ended.error


def test_only_runs_some_and_all_stay_in_the_table(tmp_path, monkeypatch):
  """The print executor stands for a run: what is collected is what there is."""
  flags_ = ("--config.executor=print", "--config.only=size4")
  ended = start(TINY, *flags_, f"--workdir={tmp_path}")
  assert (ended.status, ended.error) == (0, "")
  assert ended.out.count("python run.py --config=configs/digits.py:runlocal") == 2
  rows = collect.read_csv(tmp_path / "results.csv")
  assert [row["status"] for row in rows] == ["waiting"] * 6
  report = (tmp_path / "report.md").read_text()
  assert "0 of 6 have finished" in report and "| 2 | not run | — |" in report


def test_dry_run_says_all_and_writes_nothing(tmp_path):
  ended = start(TINY, f"--workdir={tmp_path / 'sweep'}", "--dry_run")
  assert ended.status == 0, ended
  assert "digits-group_size2-seed0  waiting       12.0 s  1.0 GiB" in ended.out
  assert "6 cells, 6 to be run\ntogether about 1 min 12 s of one process" in ended.out
  assert ended.out.count("\npython run.py --config=configs/digits.py:runlocal") == 6
  assert not (tmp_path / "sweep").exists()


def test_watching_a_sweep_that_nobody_runs_ends(tmp_path):
  ended = start(TINY, "--config.watch", f"--workdir={tmp_path}")
  assert (ended.status, ended.out) == (0, "6 waiting\n")
  assert not any(tmp_path.iterdir())


def test_overrule_is_not_for_sweeps(tmp_path):
  ended = start(TINY, "--overrule", f"--workdir={tmp_path}")
  assert ended.error == (
    "error: --overrule: a sweep's runs keep their configs; give it to a run of its own"
  )


def test_what_is_missing_is_said(tmp_path, monkeypatch):
  monkeypatch.delenv("FLEXIQ_DATA", raising=False)
  for function in (needs._weights, needs._data):
    function.cache_clear()
  monkeypatch.setattr(needs, "_hub_answers", lambda: False)
  ended = start("--config=configs/table2.py", "--config.only=(resnet20|deit_s)-ptq", "--dry_run")
  for function in (needs._weights, needs._data):
    function.cache_clear()
  assert "weights not here: hf:timm/deit_small_patch16_224.fb_in1k; data not here: im" in ended.out
  assert (
    "weights not here: $FLEXIQ_DATA/cifar10_resnets/cifar10_resnet20.safetensors; "
    "data not here: $FLEXIQ_DATA/cifar10"
  ) in ended.out
  assert "2 cells, 0 to be run" in ended.out


def test_a_distilled_run_fills_the_columns_of_the_one_that_was_not_run(tmp_path):
  """Table 2 from rows as `curve` writes them: after distillation, and of one model before it."""
  config = table2.get_config()
  cells = plan(config, tmp_path)
  named = {cell.name: cell for cell in cells}
  top1 = {"float": 91.7, "uniform_int8": 91.8, "uniform_int4": 89.9, "uniform_int4_distilled": 90.4}
  own = {"flexiq_gram": 90.6, "flexiq_distilled": 91.1, "flexiq_greedy": 90.5}
  for name, methods in (
    ("resnet20-distilled-seed0", {**top1, **own}),
    ("resnet32-ptq-seed0", {k: v + 1 for k, v in {**top1, **own}.items() if "dist" not in k}),
  ):
    finish(named[name])
    lines = [
      f"{method},{ratio},0,{value},x,{row_config(named[name])},abc"
      for method, value in methods.items()
      for ratio in ((0, 0.25, 0.5, 0.75, 1) if method in own else ("",))
    ]
    text = "method,ratio,seed,top1,model,config,commit\n" + "\n".join(lines) + "\n"
    (named[name].workdir / "results.csv").write_text(text)
  rows = collect.collect([dataclasses.replace(cell, missing="") for cell in cells])
  tables = {name: laid.cells(layout, rows) for name, layout in drawn.layouts(config).items()}
  lines = {name: {line[0]: line[1:] for line in body} for name, (_, body) in tables.items()}
  assert lines["ptq"]["ResNet-20"][1:] == [
    "91.70",
    "91.80",
    "90.60",
    "90.60",
    "90.60",
    "90.60",
    "89.90",
    "90.50",
  ]
  assert lines["ptq"]["ResNet-44"] == ["not run", *["—"] * 8]
  assert lines["distilled"]["ResNet-20"][1:] == ["91.70", "91.80", *["91.10"] * 5, "90.40"]
  assert lines["distilled"]["ResNet-32"][1:] == ["92.70", "92.80", *["not run"] * 6]
  drops = dict(zip(tables["drops"][0][1:], lines["drops"]["ResNet-20"], strict=True))
  assert drops == {
    **{"post-training, drop at 50 %": "1.10", "post-training, drop at 100 %": "1.10"},
    **{"distilled, drop at 50 %": "0.60", "distilled, drop at 100 %": "0.60"},
    **{"finetuned, drop at 50 %": "not run", "finetuned, drop at 100 %": "not run"},
    **{"post-training, 100 % above INT4": "0.70", "distilled, 100 % above INT4": "0.70"},
    "finetuned, 100 % above INT4": "not run",
  }
  count = len(config.tables.ptq.rows)
  assert lines["drops"]["average"][:2] == [f"1.10 (2 of {count})", f"0.60 (1 of {count})"]
  assert lines["drops"]["the paper's average of its eleven"][-1] == "6.6"


def test_what_the_kernel_makes_of_a_group_size(tmp_path):
  """By hand: the tiny ViT's layers read 32 or 128 channels; the kernel takes 128 rows a block."""
  config = sweeps.sweep(
    "s",
    {"vit": sweeps.base("configs/vit_cifar10.py:runlocal")},
    axes=(("groups.group_size", (4, 16)), ("groups.shift_block", (0, 32))),
    computed=("kernel_rows", "kernel_bytes"),
    tables={"t": LAYOUT},
  )
  found = [cell.labels for cell in plan(config, tmp_path)]
  assert [(c["groups.group_size"], c["groups.shift_block"]) for c in found] == [
    *((4, 0), (4, 32), (16, 0), (16, 32))
  ]
  assert [c["kernel_rows"] for c in found] == [32.0, 4.0, 8.0, 4.0]
  assert [c["kernel_bytes"] for c in found] == [48.0, 6.0, 12.0, 6.0]
  config.sweep.computed = ("kernel_row",)
  with pytest.raises(ValueError, match="'kernel_row' is not one of kernel_rows, kernel_bytes"):
    plan(config, tmp_path)


def test_table2_has_the_models_and_a_row_for_each():
  config = table2.get_config()
  assert len(config.sweep.bases) == 3 * len(config.tables.ptq.rows)
  assert {name.rpartition("-")[2] for name in config.sweep.bases} == {*config.tables} - {
    "drops",
    "headline",
  }
  assert [row for _, row in table7.PARTS][-1] == "method=gram_dynamic"


@pytest.mark.parametrize("count", [50, pytest.param(500, marks=pytest.mark.slow)])
def test_many_cells(tmp_path, count):
  """Plans and collects; prints what that takes."""
  config = digits(seeds=tuple(range(count)))
  begin = time.process_time()
  cells = plan(config, tmp_path)
  planned = time.process_time() - begin
  for cell in cells:
    finish(cell)
  begin = time.process_time()
  path = job.report(config, cells, tmp_path, "command")
  collected = time.process_time() - begin
  print(f"{count} cells: planned in {planned:.2f} s, collected in {collected:.2f} s of CPU time")
  assert len(collect.read_csv(tmp_path / "results.csv")) == 20 * count
  assert f"{count} of {count} have finished" in path.read_text()
  assert {states.state(cell).status for cell in cells} == {Status.FINISHED}
  assert states.expected(cells)[7].minutes == 1.0 and states.expected(cells)[7].memory == 2.0


def test_names_are_selected_by_a_regular_expression(tmp_path):
  cells = plan(sweep_digits.get_config("runlocal"), tmp_path)
  assert [c.name for c in select(cells, "size[28].*1$")] == [
    "digits-group_size2-seed1",
    "digits-group_size8-seed1",
  ]
