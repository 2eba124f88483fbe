"""What a run leaves is checked, and becomes the page."""

import json

import jax
import numpy as np
import pytest

from benchmarks.device import driver, profiles, records, report
from flexiq_jax.kernels import gpu, tile_files
from tests.benchmarks.device.records_for_test import GPU, record, summary


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"status": "fine"}, "record.status: 'fine'; one of done, failed, timed_out, skipped"),
    ({"status": "failed"}, "record.why: empty"),
    ({"result": None}, "record.result: None"),
    ({"seconds": "1"}, "record.seconds: '1'; <class 'float'> is accepted"),
    ({"complete": 1}, "record.complete: 1"),
    ({"result": {"claims": ["x"]}}, "record.result.claims: 'x'"),
  ],
)
def test_records_are_checked(changes, match):
  with pytest.raises(ValueError, match=match):
    record(**changes)


def test_files_of_other_versions_are_refused(tmp_path):
  with pytest.raises(ValueError, match=r"summary\.version: 2; 1 is accepted"):
    summary(version=2)
  with pytest.raises(ValueError, match=r"summary\.machine\.platform: None"):
    summary(machine={"device_kind": "x"})
  (tmp_path / "summary.json").write_text('{"version": 1}')
  with pytest.raises(ValueError, match=r"summary.json: not what `make device` writes"):
    records.read_summary(tmp_path / "summary.json")


def test_what_json_has_no_word_for_does_not_cost_a_step_its_results(tmp_path):
  values = {"a": [float("nan"), np.float32(np.inf), 1.5], "b": np.int32(3), "c": jax.numpy.ones(())}
  records.write(tmp_path / "x.json", values)
  found = json.loads((tmp_path / "x.json").read_text())
  assert found == {"a": ["nan", "inf", 1.5], "b": 3, "c": 1.0}
  with pytest.raises(TypeError, match="object: no value that JSON can hold"):
    records.write(tmp_path / "x.json", {"a": object()})


def test_the_page_is_what_the_committed_results_say():
  page = (driver.ROOT / "docs" / "hardware.md").read_text()
  assert page == report.render(report.documents())
  if not report.documents():
    assert "No device has been measured yet." in page


def test_results_are_taken_step_by_step_into_the_page(tmp_path):
  run, docs, folder = tmp_path / "run", tmp_path / "docs", tmp_path / "tiles"
  claims = lambda text: {"claims": [{"claim": "speed | of it", "result": text}]}
  first = [record(step="a", result=claims("one"), tail="/home/somebody"), record(step="b")]
  failed = record(step="c", status="failed", why="no luck", complete=False, result=None)
  records.write(run / "summary.json", summary(steps=[*first, failed]))
  kind = GPU["device_kind"]
  shape = tile_files.Shape(m=8, k=64, n=64, block=64)
  tuned = tile_files.Tuned(tiles=gpu.Tiles(m=64, n=128), seconds=1.0, heuristic_seconds=None)
  measured = tile_files.file_of(run / "tiles", kind)
  measured.parent.mkdir()
  measured.write_text(tile_files.encode(kind, {shape: tuned}))
  report.take(run, docs, folder)
  assert tile_files.read(folder, kind) == {shape: tuned.tiles}
  (document,) = report.documents(docs / "hardware")
  assert "/home/somebody" not in json.dumps(document)
  page = report.render([document])
  assert f"## {kind}" in page and "No device" not in page
  row = "| speed / of it | `python -m benchmarks.device --steps a` | one | 2026-01-02, 0123 |"
  assert row in page.splitlines()
  assert "| step c | `python -m benchmarks.device --steps c` | failed: no luck |" in page
  # Again: what measured something replaces its step, what did not leaves it.
  later = [
    record(step="a", status="failed", why="x", result=None),
    record(step="c", result=claims("3")),
  ]
  records.write(run / "summary.json", summary(steps=later, date="2026-01-03"))
  report.take(run, docs, folder)
  page = report.render(report.documents(docs / "hardware"))
  assert row in page.splitlines()
  assert "| 3 | 2026-01-03, 0123 |" in page and "no luck" not in page
  with pytest.raises(ValueError, match="this is the document of"):
    report.merged(document, summary(machine={**GPU, "device_kind": "another"}))


def test_profiles_are_checked_and_read_between_what_was_measured(tmp_path):
  row = lambda batch, ratio, us: {
    **{"batch": batch, "ratio": ratio, "p50_us": us, "p99_us": 2 * us, "calls": 9},
    **{"device_p50_us": us, "device_p99_us": us},
  }
  grid = [row(1, 0.0, 100.0), row(1, 1.0, 60.0), row(9, 0.0, 500.0), row(9, 1.0, 300.0)]
  facts = {"version": 1, "device": "d", "platform": "gpu", "made": "measured", "date": "2026-01-02"}
  facts |= {"how": "so", "versions": {}, "tiles": "by rule", "models": {"m": {"latency": grid}}}
  path = tmp_path / "profile.json"
  records.write(path, facts)
  profile = profiles.read(path)
  assert profile.latency("m", batch=1, ratio=0.5) == pytest.approx(80e-6)
  assert profile.latency("m", batch=5, ratio=1.0, field="p99_us") == pytest.approx(360e-6)
  with pytest.raises(ValueError, match=r"batch: 10; 1..9 was measured"):
    profile.latency("m", batch=10, ratio=0.5)
  with pytest.raises(ValueError, match="model: 'x'; one of m is accepted"):
    profile.latency("x", batch=1, ratio=0.5)
  holed = profiles.Profile(**facts | {"models": {"m": {"latency": grid[:3]}}})
  with pytest.raises(ValueError, match=r"\(9, 1.0\) was not measured"):
    holed.latency("m", batch=1, ratio=0.5)
  records.write(path, facts | {"made": "estimated"})
  with pytest.raises(ValueError, match=r"profile\.made: 'estimated'; 'measured' is accepted"):
    profiles.read(path)
  records.write(path, facts | {"models": {"m": {"latency": [row(1, 0.0, -1.0)]}}})
  with pytest.raises(ValueError, match=r"models\.m\.latency\.p50_us: -1\.0; a number from 0 on"):
    profiles.read(path)
