"""Checkpoints: exact round trips, half-written steps, clear refusals."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexiq_jax.runs.checkpoint import Checkpoints, pack, unpack


def _tree():
  params = {"conv": {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones(3, jnp.bfloat16)}}
  return {
    "params": params,
    "optimizer": optax.sgd(0.1, momentum=0.9).init(params),
    "codes": np.arange(-4, 4, dtype=np.int8),
    "offset": np.array([2**40], np.int64),
    "empty": jnp.zeros((0, 3)),
    "key": jax.random.key(7),
    "generation": 3,
  }


def _blank(tree):
  """The same structure with other values, so that a restore which reads nothing is noticed."""

  def blank(leaf):
    if isinstance(leaf, int):
      return 0
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
      return jax.random.key(0)
    return leaf * 0

  return jax.tree.map(blank, tree)


def _assert_same(got, want):
  assert jax.tree.structure(got) == jax.tree.structure(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert type(a) is type(b)
    if isinstance(a, jax.Array) and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    assert np.asarray(a).dtype == np.asarray(b).dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_round_trip_is_exact_in_a_new_process_view(tmp_path):
  tree, metadata = _tree(), {"log": [1, 2.5, None, "text"], "rate": 0.1}
  with Checkpoints(tmp_path / "deep" / "folder") as checkpoints:
    checkpoints.save(5, tree, metadata)
  with Checkpoints(tmp_path / "deep" / "folder") as checkpoints:
    restored = checkpoints.restore_latest(_blank(tree))
  assert restored is not None and restored.step == 5 and restored.metadata == metadata
  _assert_same(restored.tree, tree)


def test_packed_trees_come_back_exactly():
  tree, metadata = _tree(), {"log": [1, 2.5, None, "text"], "rate": 0.1}
  got, told = unpack(_blank(tree), pack(tree, metadata))
  _assert_same(got, tree)
  assert told == metadata


def test_an_abstract_template_gives_jax_arrays(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, {"a": np.arange(3.0, dtype=np.float32)})
    restored = checkpoints.restore_latest({"a": jax.ShapeDtypeStruct((3,), jnp.float32)})
  assert isinstance(restored.tree["a"], jax.Array)
  np.testing.assert_array_equal(restored.tree["a"], np.arange(3.0))


def test_keeps_the_newest_and_restores_the_latest(tmp_path):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.restore_latest({"a": 0}) is None
    for step in (1, 2, 3):
      checkpoints.save(step, {"a": step * 10}, {"step": step})
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.restore_latest({"a": 0}) == (3, {"a": 30}, {"step": 3})


@pytest.mark.parametrize("lost", ["_CHECKPOINT_METADATA", "tree", "metadata", "everything"])
def test_half_written_steps_are_ignored_and_survive_the_next_save(tmp_path, lost):
  with Checkpoints(tmp_path, keep=2) as checkpoints:
    checkpoints.save(1, {"a": 10})
  half = tmp_path / "2"
  if lost == "everything":
    half.mkdir()
  else:
    shutil.copytree(tmp_path / "1", half)
    (shutil.rmtree if (half / lost).is_dir() else os.remove)(half / lost)
  (tmp_path / "9.orbax-checkpoint-tmp").mkdir()

  with Checkpoints(tmp_path, keep=2) as checkpoints:
    assert checkpoints.steps() == [1]
    assert checkpoints.restore_latest({"a": 0}).tree == {"a": 10}
    checkpoints.save(2, {"a": 20})
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.restore_latest({"a": 0}).tree == {"a": 20}
  assert (tmp_path / "2.incomplete-0").is_dir()


def test_a_damaged_step_is_named(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, {"a": np.arange(1000.0)})
    for file in (tmp_path / "4" / "tree").rglob("*"):
      if file.is_file() and file.parent.name == "d":
        file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 cannot be read; remove it"):
      checkpoints.restore_latest({"a": np.zeros(1000)})


@pytest.mark.parametrize("dtype", [np.float32, "bfloat16", bool])
def test_damage_that_orbax_does_not_see_is_told(tmp_path, dtype):
  tree = {"other": np.ones(3), "values": np.asarray(jnp.arange(64).astype(dtype).reshape(8, 8))}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, tree, {"epoch": 2})
    assert checkpoints.restore_latest(tree).metadata == {"epoch": 2}
    metadata = tmp_path / "4/metadata/metadata"
    saved = json.loads(metadata.read_text())
    saved["leaf_checksums"]["values"] ^= 1
    metadata.write_text(json.dumps(saved))
    message = r"4 cannot be read; remove it .*: leaf 'values' is not what was saved"
    with pytest.raises(ValueError, match=message):
      checkpoints.restore_latest(tree)
    del saved["leaf_checksums"]  # as older releases have it
    metadata.write_text(json.dumps(saved))
    restored = checkpoints.restore_latest(tree)
    np.testing.assert_array_equal(restored.tree["values"], tree["values"])


# After a read that failed, Orbax's other reads report to an event loop that is gone.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_changed_byte_changes_no_value_unnoticed(tmp_path):
  rng = np.random.default_rng(0)
  tree = {f"leaf{i}": rng.normal(size=(50, 20)).astype(np.float32) for i in range(4)}
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(4, tree)
    told = 0
    files = [file for file in sorted((tmp_path / "4/tree").rglob("d/*")) if file.stat().st_size]
    for file in rng.choice(files, 24):
      whole = file.read_bytes()
      damaged = bytearray(whole)
      damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
      file.write_bytes(damaged)
      try:
        restored = checkpoints.restore_latest(_blank(tree)).tree
      except ValueError as error:
        assert "4 cannot be read; remove it" in str(error)
        told += 1
      else:
        jax.tree.map(np.testing.assert_array_equal, restored, tree)
      file.write_bytes(whole)
    assert told


@pytest.mark.parametrize(
  ("template", "message"),
  [
    ({"a": np.zeros(3, np.float32)}, r"'a' as float32 \[2\], the template as float32 \[3\]"),
    ({"a": np.zeros(2, np.int32)}, r"'a' as float32 \[2\], the template as int32 \[2\]"),
    ({"b": np.zeros(2, np.float32)}, r"lacks 'b', which the template has"),
    ({}, r"has 'a', which the template lacks"),
  ],
)
def test_a_wrong_template_is_refused(tmp_path, template, message):
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(0, {"a": np.zeros(2, np.float32)})
    with pytest.raises(ValueError, match=message):
      checkpoints.restore_latest(template)


def test_wrong_use_is_refused(tmp_path):
  (tmp_path / "file").write_text("x")
  with pytest.raises(ValueError, match="is a file"):
    Checkpoints(tmp_path / "file")
  with pytest.raises(ValueError, match="keep is 0"):
    Checkpoints(tmp_path, keep=0)
  with Checkpoints(tmp_path / "c") as checkpoints:
    checkpoints.save(3, {"a": 1})
    with pytest.raises(ValueError, match="step 3 cannot be saved"):
      checkpoints.save(3, {"a": 1})
    with pytest.raises(ValueError, match="leaf 'a' is str"):
      checkpoints.save(4, {"a": "text"})
    with pytest.raises(ValueError, match="two leaves of the tree have the path 'a/b'"):
      checkpoints.save(4, {"a/b": 1, "a": {"b": 2}})
    checkpoints.save(2, {"a": 2})  # an earlier step is saved too, never skipped silently
    assert checkpoints.steps() == [2, 3]


@pytest.mark.parametrize("told_by", ["system", "library"])
def test_a_full_disk_is_one_error_with_the_folder(tmp_path, monkeypatch, told_by):
  def full(*_, **__):
    if told_by == "system":
      raise OSError(errno.ENOSPC, "No space left on device")
    raise ValueError("RESOURCE_EXHAUSTED: No space left on device [os_error_code='28']")

  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"a": 1})
    with monkeypatch.context() as patch:
      if told_by == "system":
        patch.setattr(os, "posix_fallocate", full)
      else:
        patch.setattr(checkpoints._manager, "save", full)
      with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}'") as error:
        checkpoints.save(2, {"a": 2})
    assert error.value.errno == errno.ENOSPC
    assert checkpoints.steps() == [1]
    checkpoints.save(2, {"a": 2})


def test_a_damaged_step_of_another_kind_is_told_with_its_own_remedy(tmp_path):
  with Checkpoints(tmp_path, remedy="make it again") as checkpoints:
    checkpoints.save(4, {"a": np.arange(1000.0)})
    for file in (tmp_path / "4/tree").rglob("d/*"):
      file.write_bytes(b"")
    with pytest.raises(ValueError, match=r"4 cannot be read; make it again: "):
      checkpoints.restore_latest({"a": np.zeros(1000)})
