"""Profiles: what they say between their points, how they are kept, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest

from flexiq_jax import serving
from flexiq_jax.serving import profile_files as profiles
from tests.mutants_for_test import MUTANTS, mutants_are_told


@pytest.fixture
def profile():
  return serving.Profile(
    sizes=(1, 4, 8),
    ratios=(0.0, 0.5, 1.0),
    p50=np.array([[2.0, 1.5, 1.0], [4.0, 3.0, 2.0], [9.0, 6.0, 4.0]]),
    p99=np.array([[2.5, 1.5, 1.0], [4.0, 3.0, 2.0], [9.0, 6.0, 4.0]]),
    source="measured",
    device="toy",
    model="net",
    versions={"jax": "1"},
    date="2026-01-02T03:04:05+00:00",
    note="by hand",
  )


def test_sizes_are_padded_and_ratios_are_linear(profile):
  np.testing.assert_array_equal(profile.latencies(0.0), [0, 2, 4, 4, 4, 9, 9, 9, 9])
  np.testing.assert_allclose(profile.latencies(0.25), [0, 1.75, 3.5, 3.5, 3.5, *[7.5] * 4])
  np.testing.assert_array_equal(profile.latencies(1.0, 4), [0, 1, 2, 2, 2])
  np.testing.assert_array_equal(profile.latencies(0.0, 1, p99=True), [0, 2.5])


def test_throughput_is_that_of_the_best_size(profile):
  assert profile.throughput(0.0) == 1.0  # 4 examples in 4 s; 8 take 9
  assert profile.throughput(0.5) == pytest.approx(8 / 6)
  assert profile.throughput(0.5, 4) == pytest.approx(4 / 3)
  assert profile.throughput(1.0, within=2.0) == 2.0
  assert profile.throughput(1.0, within=1.5) == 1.0
  assert profile.throughput(1.0, within=0.1) == 1.0  # of one example, since none is so fast
  assert profile.gain == 2.0


def test_reads_what_it_wrote(profile, tmp_path):
  path = profiles.write(tmp_path / "profile.json", profile)
  again = profiles.read(path)
  for field in dataclasses.fields(profile):
    np.testing.assert_array_equal(getattr(again, field.name), getattr(profile, field.name))
  assert profiles.write(tmp_path / "again.json", again).read_text() == path.read_text()


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"version": 2}, "version 2; 'latency profile' of version 1"),
    ({"kind": "recipe"}, "kind 'recipe'"),
    ({"source": "guessed"}, "source: 'guessed'; one of measured, estimated, device script"),
    ({"device": ""}, "device: empty"),
    ({"device": 5}, "device: 5; a text"),
    ({"sizes": [4, 1, 8]}, "sizes: (4, 1, 8); ascending"),
    ({"sizes": [True, 4, 8]}, "sizes[0]: True; an integer is needed"),
    ({"sizes": [1, 4, 2**21]}, "sizes[2]: 2097152; an integer <= 1048576 is needed"),
    ({"sizes": 3}, "sizes: 3; a list"),
    ({"ratios": [0, 0.5, 2]}, "ratios: (0.0, 0.5, 2.0)"),
    ({"ratios": [0, 0.5, "1"]}, "ratios[2]: '1'; a number is needed"),
    ({"ratios": [0, 0.5]}, "p50: shape (3, 3)"),
    ({"p50": [[1, 2], [3]]}, "p50: "),
    ({"p50": [[1, None]]}, "p50[0][1]: None; a number is needed"),
    ({"p50": [[10**400]]}, "p50[0][0]: 1000"),
    ({"versions": {"jax": 1}}, "versions[...]: {'jax': 1}; a text is needed"),
    ({"p50": "fast"}, "p50: 'fast'; a list is needed"),
    ({"p99": [[1.0] * 3] * 3}, "p99: below p50"),
    ({"p50": [[0.0] * 3] * 3}, "p50: shape (3, 3), smallest 0"),
    ({"extra": 1}, "unknown field 'extra'"),
    ({"note": None}, "note"),
    ({"date": "REMOVED"}, "field 'date' is missing"),
  ],
)
def test_names_what_is_wrong_in_a_file(profile, tmp_path, change, message):
  path = profiles.write(tmp_path / "profile.json", profile)
  record = json.loads(path.read_text()) | change
  path.write_text(json.dumps({k: v for k, v in record.items() if v != "REMOVED"}))
  with pytest.raises(ValueError) as error:
    profiles.read(path)
  assert str(error.value).startswith(f"profile {str(path)!r}")
  assert message in str(error.value)


@pytest.mark.parametrize("count", MUTANTS)
def test_mutants_are_refused_by_name_or_can_be_used(profile, tmp_path, count):
  path = profiles.write(tmp_path / "profile.json", profile)

  def read(mutant):
    path.write_text(json.dumps(mutant))
    profiles.read(path).describe()

  starts = f"profile {str(path)!r}: "
  # The largest size that is accepted is a table of a million numbers.
  mutants_are_told(json.loads(path.read_text()), read, count, starts=starts, most=2**27)


def device_file():
  """What `make device` writes, with two models."""
  row = lambda batch, ratio, us: {
    **{"batch": batch, "ratio": ratio, "p50_us": us, "p99_us": 2 * us, "calls": 9},
    **{"device_p50_us": us, "device_p99_us": us},
  }
  grid = [row(8, 0.0, 500.0), row(1, 0.0, 100.0), row(1, 1.0, 60.0), row(8, 1.0, 300.0)]
  return {
    **{"version": 1, "device": "GPU 9", "platform": "gpu", "made": "measured"},
    **{"date": "2026-01-02", "how": "so", "versions": {"jax": "1"}, "tiles": "by rule"},
    "models": {
      "big": {"latency": grid, "switch_us": [1.0, 2.0], "memory": 5},
      "small": {"latency": grid[1:2]},
    },
  }


def test_a_file_of_make_device_is_a_profile_for_each_model(tmp_path):
  path = tmp_path / "device.json"
  path.write_text(json.dumps(device_file()))
  found = profiles.read(path, "big")
  assert (found.source, found.device, found.model) == ("device script", "GPU 9", "big")
  assert (found.sizes, found.ratios) == ((1, 8), (0.0, 1.0))
  np.testing.assert_allclose(found.p50, [[1e-4, 6e-5], [5e-4, 3e-4]])
  np.testing.assert_allclose(found.p99, 2 * found.p50)
  assert found.gain == pytest.approx(5 / 3)
  assert list(profiles.read_all(path)) == ["big", "small"]
  with pytest.raises(ValueError, match="model: 'vit_b'; big, small are in this file"):
    profiles.read(path, "vit_b")
  whole = device_file()
  del whole["models"]["big"]["latency"][3]
  path.write_text(json.dumps(whole))
  with pytest.raises(ValueError, match=r"models\.big: batch 8 at ratio 1 is not there"):
    profiles.read(path, "big")
  whole["models"] = {"one": device_file()["models"]["small"]}
  path.write_text(json.dumps(whole))
  assert profiles.read(path).model == "one"


@pytest.mark.parametrize("count", MUTANTS)
def test_mutants_of_a_device_file(tmp_path, count):
  path = tmp_path / "device.json"

  def read(mutant):
    path.write_text(json.dumps(mutant))
    for profile in profiles.read_all(path).values():
      profile.describe()

  mutants_are_told(device_file(), read, count, starts=f"profile {str(path)!r}: ", most=2**27)


def test_no_file_and_no_json(tmp_path):
  with pytest.raises(FileNotFoundError, match="no such file"):
    profiles.read(tmp_path / "none.json")
  (tmp_path / "x.json").write_text("{")
  with pytest.raises(ValueError, match=r"x\.json is no JSON object"):
    profiles.read(tmp_path / "x.json")


def test_what_the_profile_does_not_cover_is_refused(profile):
  with pytest.raises(ValueError, match=r"largest: 9; the profile covers 1\.\.8"):
    profile.latencies(0.0, 9)
  narrow = dataclasses.replace(profile, ratios=(0.1, 0.5, 0.9))
  for ratio in (0.0, 1.0, -0.5):
    with pytest.raises(ValueError, match=r"the profile covers 0\.1\.\.0\.9"):
      narrow.latencies(ratio)


def test_a_modelled_profile_has_the_gain_and_says_what_it_is():
  profile = serving.modelled(int8=1250)
  assert profile.throughput(0.0) == pytest.approx(1250)
  np.testing.assert_allclose(profile.p50[:, 0] / profile.p50[:, -1], 1.43)
  saved = 1 - profile.p50[0] / profile.p50[0, 0]
  np.testing.assert_allclose(saved / saved[-1], [0, 0.2, 0.4, 0.7, 1.0])
  assert profile.source == "estimated"
  assert "modelled" in profile.describe() and "1.43x" in profile.describe()
  # A line over sizes.
  per_example = np.diff(profile.p50[:, 0]) / np.diff(profile.sizes)
  np.testing.assert_allclose(per_example, per_example[0])
  for wrong in ({"int8": 0}, {"int8": 1e6}, {"int8": 10, "gain": 0.9}):
    with pytest.raises(ValueError, match="int8"):
      serving.modelled(**wrong)


def test_measures_in_turn_and_leaves_out_the_first():
  now, calls = [0.0], []

  def run(x, ratio):
    first = not any(call == (len(x), ratio) for call in calls)
    calls.append((len(x), ratio))
    now[0] += 100.0 if first else len(x) * (2 - ratio) + 0.001 * len(calls)
    return x

  found = serving.measure(
    *(run, np.zeros((2, 3), np.float32)),
    **{"sizes": (4, 1), "ratios": (1.0, 0.0), "repeats": 5, "model": "toy"},
    clock=lambda: now[0],
  )
  assert found.sizes == (1, 4) and found.ratios == (0.0, 1.0)
  np.testing.assert_allclose(found.p50, [[2, 1], [8, 4]], atol=0.05)
  assert (found.p99 > found.p50).all()
  assert [ratio for _, ratio in calls[:4]] == [0.0, 1.0, 0.0, 1.0]
  assert len(calls) == 2 * 2 * 6
  assert (found.source, found.model) == ("measured", "toy")
  assert found.device and found.date and "jax" in found.versions
  with pytest.raises(ValueError, match="repeats: 1"):
    serving.measure(run, np.zeros(1), sizes=(1,), ratios=(0.0,), repeats=1)


def test_a_runner_is_switched_before_it_is_called():
  class Runner:
    ratio = 0.0

    def switch(self, ratio):
      self.ratio = ratio

    def __call__(self, x):
      return x + self.ratio

  run = serving.runner_function(Runner())
  x = np.ones((2, 2), np.float32)
  assert isinstance(run(x, 0.5), np.ndarray)
  np.testing.assert_array_equal(run(x, 0.5), 1.5)
  np.testing.assert_array_equal(run(x, 0.25), 1.25)
