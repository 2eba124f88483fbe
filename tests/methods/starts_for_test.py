"""What methods start from: the small network of every kind of layer, and tasks for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexiq_jax import models
from flexiq_jax.calibrated import Calibrated, Observations
from flexiq_jax.methods import Examples, Method, Start, Task
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.network import Network
from flexiq_jax.runs.workdir import Workdir
from tests.methods import models_for_test
from tests.search import networks_for_test as networks

NAMES = ("conv", "up", "down")

MAIN = Task(
  bits=(4, 8),
  activation_bits=None,
  per_channel=True,
  kept=8,
  unit="average bits",
  layers_only=False,
)
WIDE = dataclasses.replace(MAIN, bits=(2, 4, 8), layers_only=True)
SIZE = Task(bits=(2, 4, 8), activation_bits=8, per_channel=False, kept=FLOAT, unit="size")
FLOAT8 = Task(
  bits=(8, FLOAT), activation_bits=None, per_channel=True, kept=FLOAT, unit="share in 8 bits"
)


@dataclasses.dataclass(frozen=True)
class Batches:
  """Training examples in an order that depends on the epoch alone."""

  images: np.ndarray
  labels: np.ndarray | None
  batch_size: int

  @property
  def steps(self) -> int:
    return len(self.images) // self.batch_size

  def epoch(self, epoch):
    order = np.random.default_rng(epoch).permutation(len(self.images))
    for rows in order[: self.steps * self.batch_size].reshape(self.steps, -1):
      yield self.images[rows], None if self.labels is None else self.labels[rows]


@functools.cache
def calibrated() -> Calibrated:
  m = models_for_test.made()
  return Calibrated(m.network, [m.images], Observations(m.values, {}), m.ranges)


def start_of(task, folder, **changes) -> Start:
  """All calibration examples are measured on; there is no order of channel groups."""
  m = models_for_test.made()
  (folder / "table").mkdir(parents=True, exist_ok=True)
  start = Start(
    task=task,
    table="table",
    calibrated=calibrated(),
    apply=networks.apply,
    params=networks.parameters(),
    names=NAMES,
    x=m.images,
    examples=Examples(m.images, m.labels),
    seed=0,
    workdir=Workdir(folder),
    folder=folder / "table",
    order=lambda greedy: NotImplemented,
    training=lambda batch_size: Batches(m.images, m.labels, batch_size),
    prepare=lambda key, images: images,
  )
  return dataclasses.replace(start, **changes)


def resnet18_start(folder) -> Start:
  """The graph of a network with shortcuts, and nothing else."""
  module = nnx.eval_shape(lambda: models.create("resnet18", seed=0, **models.get("resnet18").tiny))
  apply, params = models.functional(module)
  x = np.zeros((1, *module.input_shape), np.float32)
  real = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), params)
  network = Network(apply, real, x)
  return start_of(
    MAIN,
    folder,
    calibrated=Calibrated(network, [x], Observations({}, {}), calibrated().ranges),
    apply=apply,
    params=params,
    names=tuple(layer.name for layer in network.layers[1:-1]),
    x=x,
    examples=Examples(x, np.zeros(1, np.int32)),
  )


def made(method: type[Method], start: Start, **settings) -> Method:
  """A method with its defaults, but for some settings; small where it matters."""
  known = {f.name for f in dataclasses.fields(method.Settings)}
  small = {"block": 16, "time_limit": 5.0, "probes": 2}
  given = {name: value for name, value in (small | settings).items() if name in known}
  return method(start, method.Settings(**given))


def macs() -> dict[str, int]:
  """MACs of the layers to choose for."""
  return {name: calibrated().network.layer(name).macs for name in NAMES}
