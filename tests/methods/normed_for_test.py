"""A small network with batch norm, its labelled images, and what methods that train start from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from flexiq_jax.calibrated import Calibrated, Observations
from flexiq_jax.methods import Examples, Start
from flexiq_jax.network import Network
from flexiq_jax.quant import calibration
from flexiq_jax.quant.calibration import RangeSettings
from tests.configured_for_test import configured
from tests.methods.starts_for_test import MAIN, Batches, start_of

CLASSES, IMAGES = 4, 48
NORMED = ("stem", "first", "second")
NAMES = ("first", "second")


def apply(params, x):
  """A convolution, a residual block, a dense layer; batch norm after convolutions."""

  def normed(name, x):
    kind = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    y = jax.lax.conv_general_dilated(x, params[name]["kernel"], (1, 1), "SAME", **kind)
    p = {key: v.reshape(1, 1, 1, -1) for key, v in params[name].items() if key != "kernel"}
    return (y - p["mean"]) * (p["scale"] / jnp.sqrt(p["var"] + 1e-5)) + p["bias"]

  x = jax.nn.relu(normed("stem", x))
  x = jax.nn.relu(x + normed("second", jax.nn.relu(normed("first", x))))
  return x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"][None]


@functools.cache
def parameters():
  rng = np.random.default_rng(0)

  def norm(n):
    return {
      "mean": rng.normal(size=n) * 0.1,
      "var": rng.uniform(0.5, 1, n),
      "scale": rng.uniform(0.3, 1, n),
      "bias": rng.normal(size=n) * 0.2,
    }

  conv = lambda a, b: {"kernel": rng.standard_t(3, size=(3, 3, a, b)) / np.sqrt(9 * a), **norm(b)}
  head = {"kernel": rng.normal(size=(6, CLASSES)), "bias": rng.normal(size=CLASSES)}
  tree = {"stem": conv(3, 6), "first": conv(6, 6), "second": conv(6, 6), "head": head}
  return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)


@functools.cache
def images():
  return np.random.default_rng(1).normal(size=(IMAGES, 6, 6, 3)).astype(np.float32)


@functools.cache
def calibrated() -> Calibrated:
  x = images()
  network, ranges = Network(apply, parameters(), x[:1]), RangeSettings()
  values = calibration.observe_values(network.apply, network.params, [x])
  return Calibrated(network, [x], Observations(values, {}), ranges)


def start(folder, **changes) -> Start:
  """Labels are what the float model predicts."""
  x = images()
  labels = np.asarray(calibrated().network.float(x)).argmax(axis=1).astype(np.int32)
  return start_of(
    MAIN,
    folder,
    **{
      "calibrated": calibrated(),
      "apply": apply,
      "params": parameters(),
      "names": NAMES,
      "x": x,
      "examples": Examples(x, labels),
      "training": lambda batch_size: Batches(x, labels, batch_size),
      **changes,
    },
  )


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  """Keeps compiled programs on disk, since each method that starts compiles the same ones."""
  with configured(
    compilation_cache_dir=str(tmp_path_factory.mktemp("compiled")),
    persistent_cache_min_compile_time_secs=0.0,
    persistent_cache_min_entry_size_bytes=-1,
  ):
    compilation_cache.reset_cache()
    yield
  compilation_cache.reset_cache()


class Killed:
  """Training examples that end a run before some step."""

  def __init__(self, batches: Batches, after: int):
    self._batches, self._after = batches, after

  @property
  def steps(self) -> int:
    return self._batches.steps

  def epoch(self, epoch):
    for i, batch in enumerate(self._batches.epoch(epoch)):
      if (epoch - 1) * self.steps + i >= self._after:
        raise KeyboardInterrupt
      yield batch
