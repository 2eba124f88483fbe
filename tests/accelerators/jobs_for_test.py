"""What users run, in small: one model of each kind, and the jobs that compile its functions."""

import dataclasses
import functools
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flexiq_jax import calibrated, data, deployment, finetuning, models
from flexiq_jax.calibrated import Calibrated, Observations
from flexiq_jax.deployment.runner import SIZES
from flexiq_jax.methods import METHODS, Start, Task, hawq, layerwise, mpqco
from flexiq_jax.methods.clado.losses import LayerLosses
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.quantune import runs
from flexiq_jax.network import Network
from flexiq_jax.orders import Space
from flexiq_jax.quant import calibration, rules
from flexiq_jax.quant.calibration import RangeSettings
from flexiq_jax.quant.grouping import LowSettings
from flexiq_jax.quant.selectable import selectable
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import fitness, gram
from flexiq_jax.training import classification
from flexiq_jax.training.settings import TrainSettings
from tests.methods.starts_for_test import Batches

# One of each kind: basic and bottleneck blocks, inverted residuals, attention, shifted windows.
MODELS = ("resnet20", "resnet50", "mobilenet_v2", "efficientnet_lite0", "vit_s", "swin_t", "odd")
# As few blocks as have everything: two for a shift of windows, one after the merge of patches.
SMALLER = {"swin_t": {"depths": (2, 1)}, "vit_s": {"depth": 1}}
BATCH = 3
RANGES = RangeSettings(weight="max", activation="max")


def odd(params, x):
  """Grouped, dilated and one-dimensional convolutions, einsums, sizes that fill no tile."""
  conv = functools.partial(jax.lax.conv_general_dilated, padding="SAME")
  image = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
  x = jax.nn.relu(conv(x, params["stem"], (2, 2), **image))
  x = jax.nn.relu(conv(x, params["grouped"], (1, 1), feature_group_count=2, **image))
  x = x + conv(x, params["dilated"], (1, 1), rhs_dilation=(2, 2), **image)
  x = jax.nn.relu(conv(x, params["depthwise"], (1, 1), feature_group_count=14, **image))
  x = x.reshape(len(x), -1, 14)
  lines = {"dimension_numbers": ("NWC", "WIO", "NWC")}
  x = jax.nn.gelu(conv(x, params["line"], (2,), **lines))
  x = jnp.einsum("btc,chd->bthd", x, params["heads"])
  x = jnp.einsum("bthd,hde->bhte", x, params["each"])
  x = jnp.einsum("nhd,bhtd->btn", params["left"], x)
  return x.mean(axis=1) @ params["head"]


def odd_parameters() -> dict[str, Any]:
  rng = np.random.default_rng(0)
  shapes = {
    "stem": (3, 3, 3, 14),
    "grouped": (3, 3, 7, 14),
    "dilated": (3, 2, 14, 14),
    "depthwise": (3, 3, 1, 14),
    "line": (5, 14, 13),
    "heads": (13, 3, 7),
    "each": (3, 7, 5),
    "left": (11, 3, 5),
    "head": (11, 10),
  }
  scale = lambda shape: np.prod(shape[:-1]) ** -0.5
  return {n: jnp.asarray(rng.normal(size=s) * scale(s), jnp.float32) for n, s in shapes.items()}


@dataclasses.dataclass(frozen=True)
class Made:
  """A quantized model and what its jobs take."""

  apply: Any
  params: Any
  calibrated: Calibrated
  model: rules.QModel
  space: Space
  images: np.ndarray
  labels: np.ndarray


@functools.cache
def built(name: str, dtype: str = "float32") -> tuple[Any, Any, np.ndarray]:
  """A model as `(apply, params)`, and images."""
  if name == "odd":
    images = np.random.default_rng(1).normal(size=(BATCH, 9, 9, 3)).astype(np.float32)
    if dtype == "float32":
      return odd, odd_parameters(), images
    half = lambda p, x: odd(jax.tree.map(lambda a: a.astype(dtype), p), x.astype(dtype))
    return lambda p, x: half(p, x).astype(jnp.float32), odd_parameters(), images
  options = dict(models.get(name).tiny) | SMALLER.get(name, {})
  module = nnx.eval_shape(lambda: models.create(name, dtype=jnp.dtype(dtype), **options))
  rng = np.random.default_rng(1)
  images = rng.normal(size=(BATCH, *module.input_shape)).astype(np.float32)
  apply, shapes = models.functional(module)

  def fill(leaf):  # no random initializers, which take seconds to compile
    low, high = (-0.3, 0.3) if leaf.ndim > 1 else (0.5, 1)  # variances are positive
    return jnp.asarray(rng.uniform(low, high, leaf.shape), leaf.dtype)

  return apply, jax.tree.map(fill, shapes), images


@functools.cache
def made(name: str, dtype: str = "float32") -> Made:
  """A quantized model. What calibration would see is made up: every other input is unsigned."""
  apply, params, images = built(name, dtype)
  network = Network(apply, params, images[:1])
  settings = LowSettings(group_size=4)
  flat = np.ones(calibration.BINS, np.int64)
  edges = [np.linspace(low, 1, calibration.BINS + 1) for low in (-1, 0)]
  observations = Observations(
    {x.name: calibration.Values(flat, edges[i % 2]) for i, x in enumerate(network.layers)},
    {x.name: np.ones((x.in_channels, 256), np.int64) for x in network.layers},
  )
  seen = Calibrated(network, [images], observations)
  grouped = seen.group(selectable(network.layers), settings)
  labels = (np.arange(len(images)) % 10).astype(np.int32)
  return Made(apply, params, seen, grouped.model, grouped.space, images, labels)


def network_for(m: Made, platform: str) -> Network:
  """The network compiled for a platform; its layers' numbers are those of `made`."""
  return Network(m.apply, m.params, m.images[:1], platform)


def inference(m: Made, platform: str) -> None:
  """Every way of running the model that an evaluation uses."""
  network = network_for(m, platform)
  masks = m.space.split(np.arange(m.space.total) % 2 == 0)
  network.float(m.images)
  own = dataclasses.replace(m.calibrated, network=network)  # with weights folded there
  network.uniform(own.uniform(4), m.images)
  network.uniform(m.calibrated.base, m.images)
  network.mixed(m.model, masks, m.images)
  network.mixed(m.model, masks, m.images, dynamic=True)


def calibrate(m: Made, platform: str) -> None:
  """All calibration passes, and the errors of groups."""
  network = network_for(m, platform)
  calibrated.calibrate(network, [m.images])
  calibration.observe_errors(
    network.apply, network.params, m.model, [m.images], platform=network.platform
  )


def search(m: Made, platform: str) -> None:
  """A population in the platform's form, one linearisation, and flips of groups."""
  network = network_for(m, platform)
  scores = np.zeros(m.space.total)
  fit = fitness.Fitness(network, m.model, m.space, m.images, capacity=4, block=2)
  fit(np.zeros((2, m.space.total), bool))
  tied = gram.Ties(m.space, scores, 4096)
  key = jax.random.key(0)
  gram.Influence(fit, tied, probes=2, block=2).measure(key, np.zeros(m.space.total, bool))
  if m.space.total < 40:  # as many passes as groups
    gram.Flips(fit, tied, cuts=2).measure(key, np.zeros(m.space.total, bool))


def layer_bits(m: Made, platform: str) -> None:
  """What the methods run that give whole layers their bits."""
  network = network_for(m, platform)
  values = m.calibrated.observations.values
  stacks = layerwise.create(network.layers, network.weights, values, RANGES, bits=(4, 8))
  several = layerwise.Layerwise(network.apply, network.params, stacks, network.platform)
  bits = dict.fromkeys(stacks.names, 4)
  several.exact(bits, m.images)
  several.simulated(bits, m.images)
  names = [layer.name for layer in network.layers][-2:]
  examples = Examples(m.images, m.labels)
  LayerLosses(network, stacks, names, block=2).measure(examples)
  hawq.mean_traces(jax.random.key(0), network, examples, stacks.names, probes=2)
  mpqco.relative_logits(network, stacks, examples, stacks.names)
  rule = rules.uniform_rule(m.calibrated.base, network.platform)
  runs.measure(network.apply, network.params, rule, [m.images])


def serve(
  m: Made, platform: str, implementation: str | None = None, kind: str | None = None
) -> None:
  """A deployed model at all batch sizes, at a ratio that changes."""
  network = network_for(m, platform)
  granule = {"gpu": 64, "tpu": 128}[platform]
  settings = LowSettings(group_size=16, shift_block=16)
  here = dataclasses.replace(m.calibrated, network=network)
  grouped = here.group(selectable(network.layers), settings)
  model = grouped.ordered(np.arange(grouped.space.total))
  deployed = deployment.deploy(model, m.images[:1], granule=granule)
  where = {"implementation": implementation, "platform": platform, "kind": kind}
  runner = deployment.Runner(deployed, **where)
  for size in SIZES:
    runner(np.zeros((size, *m.images.shape[1:]), np.float32))
  runner.switch(1.0)


def finetune(m: Made, platform: str) -> None:
  """Reconstruction, then a step over two ratios with a fit of the shifts after it."""
  here = dataclasses.replace(m.calibrated, network=network_for(m, platform))
  grouped = here.group(selectable(here.network.layers), LowSettings())
  model = grouped.ordered(np.arange(grouped.space.total))
  settings = finetuning.FinetuneSettings(steps=1, every=1, refit=0, warmup=0, batch_size=2)
  settings = dataclasses.replace(settings, reconstruct=True)
  examples = finetuning.Examples(np.asarray(m.images))
  finetuning.finetune(model, examples, [m.images], settings)


def train_methods(m: Made, platform: str) -> None:
  """A step of each comparison method that trains, and the model that becomes of it."""
  here = dataclasses.replace(m.calibrated, network=network_for(m, platform))
  task = Task(
    **{"bits": (4, 8), "activation_bits": None, "per_channel": True, "kept": 8},
    **{"unit": "average bits", "layers_only": False},
  )
  with tempfile.TemporaryDirectory() as folder:
    start = Start(
      task=task,
      table="table",
      calibrated=here,
      apply=m.apply,
      params=m.params,
      names=tuple(selectable(here.network.layers))[:2],  # one block
      x=m.images,
      examples=Examples(m.images, m.labels),
      seed=0,
      workdir=Workdir(folder),
      folder=pathlib.Path(folder),
      order=lambda greedy: NotImplemented,
      training=lambda size: Batches(m.images, m.labels, size),
      prepare=lambda key, images: images,
    )
    for name, settings in {
      "ptmq": {},
      "robustquant": {"every": 1},
      "anyprecision": {"every": 1, "trained_bits": (4, 8)},
    }.items():
      method = METHODS[name]
      own = method.Settings(steps=1, batch_size=2, **settings)
      method(start, own).at(4.0).predict(m.images)


def training(name: str) -> None:
  """One epoch of a model's training."""
  module = models.create(name, **models.get(name).tiny)
  height, width, channels = module.input_shape
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (9, height, width, channels), dtype=np.uint8)
  source = data.ArraySource(
    images, np.arange(9) % 3, name="random", split="train", identity=("random",)
  )
  preprocess = data.Preprocess(mean=(0.5,) * channels, std=(0.5,) * channels)
  settings = TrainSettings(epochs=1, batch_size=3, learning_rate=0.1, warmup=0.0)
  classification.fit(module, source, preprocess, settings=settings)
