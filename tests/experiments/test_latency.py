"""Latency tables in small: rows, layers, files that are read, and refusals."""

import csv
import dataclasses
import json

import pytest

from experiments.shared import served, works
from flexiq_jax import serving
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.serving import profile_files
from tests.runs_for_test import start

SCHEDULES = {
  "environment": {},
  "estimates": [
    {
      **{"model": "deit_s", "chip": "v5e", "batch": 8, "top1": "random weights"},
      "levels": [
        {"seconds": 4e-4 - 1e-5 * i, "bound_by_compute": 0.75, "weight_bytes": 20, "bytes": 50}
        for i in range(5)
      ],
    }
  ],
}


def config(*more):
  return ("--config=configs/latency.py:of=digits,runlocal", *more)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  files = tmp_path_factory.mktemp("files")
  profile = serving.modelled(int8=1000, sizes=(1, 4, 8))
  profile_files.write(files / "profile.json", profile)
  (files / "kernels.json").write_text(json.dumps(SCHEDULES))
  workdir = tmp_path_factory.mktemp("latency")
  arguments = config(
    *(f"--workdir={workdir}", f"--config.latency.profiles=('{files}/profile.json',)"),
    f"--config.latency.schedules={files}/kernels.json",
  )
  ended = start(*arguments, pictures=True)
  assert (ended.status, ended.error) == (0, "")
  return workdir, arguments, profile


def test_rows_are_the_sums_of_their_layers(ran):
  workdir, _, _ = ran
  rows = {(row["method"], row["ratio"]): row for row in Workdir(workdir).rows()}
  layers = works.of_name("resnet8")
  for device, source in (("v5e", "roofline"), ("h100", "roofline"), ("npu", "cycles")):
    for batch in (1, 4):
      with (workdir / "layers" / f"resnet8_{device}_{batch}.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
      assert len(found) == len(layers) * len({row["ratio"] for row in found})
      base = rows[f"resnet8 on {device}, batch {batch}, {source}", 0.0]["seconds"]
      for ratio in {float(row["ratio"]) for row in found}:
        row = rows[f"resnet8 on {device}, batch {batch}, {source}", ratio]
        own = [line for line in found if float(line["ratio"]) == ratio]
        assert row["seconds"] == pytest.approx(sum(float(line["seconds"]) for line in own))
        assert row["gain"] == pytest.approx(base / row["seconds"])
        bound = sum(float(line["seconds"]) for line in own if line["binds"] == "compute")
        assert row["bound_by_compute"] == pytest.approx(bound / row["seconds"], abs=1e-9)
        macs = sum(int(line["macs"]) for line in own)
        assert macs == batch * sum(work.macs for work, _ in layers)
        assert row["weight_bytes"] == pytest.approx(sum(float(r["weight_bytes"]) for r in own))
  # Of the H100 4 bits save bytes of weights alone.
  ends = [rows["resnet8 on h100, batch 4, roofline", ratio] for ratio in (0.0, 1.0)]
  assert ends[0]["activation_bytes"] == ends[1]["activation_bytes"]
  assert ends[0]["weight_bytes"] > ends[1]["weight_bytes"]
  assert ends[0]["compute_s"] == pytest.approx(ends[1]["compute_s"])
  (work, _), (first, low) = layers[0], layers[1]
  assert not layers[0][1] and low
  assert works.boundary(work, False, 1.0) == 0 and works.boundary(first, True, 0.5) == 8


def test_files_are_read_and_the_report_says_which(ran):
  workdir, _, profile = ran
  rows = {(row["method"], row["ratio"]): row for row in Workdir(workdir).rows()}
  row = rows["a model on none, batch 4, estimated", 1.0]
  assert row["seconds"] == pytest.approx(profile.p50[1, -1]) and row["gain"] == pytest.approx(1.43)
  row = rows["deit_s on v5e, batch 8, schedule", 1.0]
  assert row["gain"] == pytest.approx(40 / 36) and row["activation_bytes"] == 30
  text = (workdir / "report.md").read_text()
  assert "## Measured and estimated" in text and "modelled: 100 % is 1.43x" in text
  assert "schedules, estimated by" in text and "no device ran" in text
  assert "NVIDIA's data sheet of the H100 SXM" in text and "## Layers of " in text
  assert (workdir / "latency.png").stat().st_size > 10_000


def test_goes_on_where_it_stopped(ran):
  workdir, arguments, _ = ran
  before = Workdir(workdir).rows()
  (workdir / "finished").unlink()
  (workdir / "layers" / "resnet8_h100_4.csv").unlink()
  events = len(Workdir(workdir).events("result"))
  ended = start(*arguments)
  assert (ended.status, ended.error) == (0, "")
  assert Workdir(workdir).rows() == before
  assert len(Workdir(workdir).events("result")) == events + 3  # of one model, device and batch


def test_an_artifact_is_timed_once(monkeypatch, tmp_path):
  """`served.measured` is tested with Fig. 8; here, what becomes of its profile."""
  asked = []

  def measured(folder, described, name, *, sizes, repeats):
    asked.append((folder, described.config.model, name, tuple(sizes), repeats))
    profile = serving.modelled(int8=100, sizes=(1, 4), ratios=(0.0, 0.5, 1.0))
    return dataclasses.replace(profile, source="measured", device="toy", model="resnet8")

  monkeypatch.setattr(served, "measured", measured)
  folder = tmp_path / "artifact"
  folder.mkdir()
  arguments = config(
    *(f"--workdir={tmp_path / 'run'}", f"--config.latency.artifact={folder}"),
    *("--config.latency.repeats=3", "--config.latency.models=()"),
  )
  for _ in range(2):
    ended = start(*arguments)
    assert (ended.status, ended.error) == (0, "")
    (tmp_path / "run" / "finished").unlink()
  assert asked == [(str(folder), "resnet8", "config.latency.artifact", (1, 4), 3)]
  rows = [r for r in Workdir(tmp_path / "run").rows() if r["method"].endswith(", measured")]
  assert [row["method"] for row in rows[::3]] == [
    f"resnet8 on toy, batch {n}, measured" for n in (1, 4)
  ]
  assert [row["gain"] for row in rows if row["ratio"] == 1] == pytest.approx([1.43, 1.43])


@pytest.mark.parametrize(
  ("override", "message"),
  [
    ("latency.models=('vgg',)", "config.latency.models: "),
    ("latency.devices=('tpu',)", "config.latency.devices: 'tpu' is not one of v5e, v5p"),
    ("latency.devices=()", "config.latency.devices: empty"),
    ("latency.batches=(0,)", "config.latency.batches: (0,); positive"),
    ("latency.array.rows=0", "config.latency.array.rows: 0"),
    ("latency.profiles=('none.json',)", "config.latency.profiles: profile 'none.json': no such"),
    ("latency.schedules=none.json", "config.latency.schedules: 'none.json': no such file"),
    ("latency.artifact=none", "config.latency.artifact: 'none' is no folder"),
    ("latency.repeats=1", "config.latency.repeats: 1"),
    ("ratios=(0.5,1.0)", "config.ratios: (0.5, 1.0); 0 is needed"),
  ],
)
def test_wrong_fields_are_named(override, message, tmp_path):
  ended = start(*config(f"--workdir={tmp_path}", f"--config.{override}"))
  assert ended.status == 1
  assert message in ended.error
  assert not list(tmp_path.glob("*.csv"))


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"batch": 0}, "estimates[0].batch: 0; an integer >= 1 is needed"),
    ({"levels": []}, "estimates[0].levels: []; a list of length >= 5 is needed"),
    ({"chip": None}, "estimates[0].chip: None; a text is needed"),
  ],
)
def test_wrong_schedules_are_named(change, message, tmp_path):
  wrong = {"estimates": [SCHEDULES["estimates"][0] | change]}
  (tmp_path / "k.json").write_text(json.dumps(wrong))
  ended = start(*config(f"--config.latency.schedules={tmp_path}/k.json"))
  assert ended.status == 1 and f"/k.json': {message}" in ended.error
