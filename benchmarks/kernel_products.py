"""The products of real models after the pipeline, for `benchmarks/kernels.py`."""

import dataclasses
import math

import jax
import numpy as np

from flexiq_jax import deployment, flexiq, models
from flexiq_jax.deployment import Mixed, rows_before
from flexiq_jax.graph import tracing
from flexiq_jax.kernels import Window, tpu
from flexiq_jax.network import Network
from flexiq_jax.quant import LowSettings

# Channels in a group and a shift block, as far as a layer has so many: what v5e's matrix unit takes
# at once in 4 bits, or more; on v6e a block of K, as long as pays.
MODELS = {
  "deit_s": {"v5e": 384, "v6e": 768},
  "vit_b": {"v5e": 256, "v6e": 1536},
  "resnet50": {"v5e": 256, "v6e": 512},
}
BATCHES = (8, 128)
V5E = "TPU v5 lite"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Product:
  """One layer's product in a deployed model.

  Attributes:
    name: of the layer.
    m: rows for one example.
    k, n, block: rows of w, outputs, rows in a shift block.
    boundaries: columns of x in 4 bits at each level.
    prepares: whether its operands are prepared in a step of their own.
    gathers: whether that step puts channels into another order.
    channels: C of the layer.
    taps: rows of K a channel has.
    activation: of the epilogue.
    next_boundaries: outputs in 4 bits in the layer that it emits codes for; None for real outputs.
    granule: channels that that layer reads at once.
    window: of a convolution that slides over pixels; None where x has all rows of K.
    copies: see `kernels.Weights`.
  """

  name: str
  m: int
  k: int
  n: int
  block: int
  boundaries: tuple[int, ...]
  prepares: bool
  channels: int
  taps: int
  activation: str
  next_boundaries: tuple[int, ...] | None
  gathers: bool = False
  granule: int = 0
  window: Window | None = None
  copies: int = 1

  @property
  def steps(self) -> int:
    """How many rows of w each column of x has."""
    return 1 if self.window is None else self.window.steps(self.copies)

  @property
  def places(self) -> int:
    """Columns of x."""
    return self.k // self.steps

  def rows(self, batch: int) -> int:
    return self.m * batch

  def of_batch(self, batch: int) -> "Product":
    """The product of a batch: with images innermost where the kernel takes so many."""
    if self.window is None:
      return self
    window = tpu.of_batch(self.window, batch, self.places, self.n)
    return dataclasses.replace(self, window=window)


def products(name: str, group: int, granule: int = 128, kind: str = V5E) -> list[Product]:
  """The products of a model after the pipeline: calibrate, group, order, deploy.

  Args:
    name: of the model.
    group: channels in a group and a shift block.
    granule: see `deployment.deploy`.
    kind: of a TPU, as `jax.Device.device_kind` has it.
  """
  module = models.create(name)
  apply, params = models.functional(module)
  x = np.random.default_rng(0).normal(size=(2, *models.get(name).input_shape))
  x = x.astype(np.float32)
  network = Network(apply, params, x[:1])
  settings = LowSettings(group_size=group, shift_block=group, whole_heads=True)
  deployed = deployment.deploy(
    flexiq.quantize(network, [x], settings=settings), x[:1], granule=granule
  )
  traced = tracing.trace(network.apply, network.params, x[:1])
  windows = deployment.windows(traced)
  found = []
  for layer in network.layers:
    d = deployed.layers[layer.name]
    if not isinstance(d, Mixed):
      continue
    k, n = d.weights.w8.shape
    taps = math.prod(layer.window)
    window = windows[layer.name] if d.slides else None
    consumer = deployed.layers[d.feeds] if d.feeds else None
    places = lambda d: tuple(int(p) for p in np.asarray(jax.device_get(d.places)))
    found.append(
      Product(
        name=layer.name,
        m=layer.macs // (layer.in_channels * taps * layer.out_channels),
        k=k,
        n=n,
        block=d.weights.block,
        boundaries=tuple(
          p if window else int(rows_before(p, d.channels, taps, d.weights.block)) for p in places(d)
        ),
        prepares=not deployed.wiring.feeds[layer.name].producer or (taps > 1 and window is None),
        gathers=d.order is not None,
        channels=layer.in_channels,
        taps=taps,
        window=window,
        copies=d.weights.copies,
        activation=d.activation,
        next_boundaries=places(consumer) if isinstance(consumer, Mixed) else None,
        granule=granule_of(consumer, kind),
      )
    )
  return found


def granule_of(consumer, kind: str) -> int:
  """Channels that a layer's kernel reads at once; 0 where a window makes rows of K of them."""
  if not isinstance(consumer, Mixed):
    return 0
  k, n = consumer.weights.w8.shape
  if consumer.slides:
    return consumer.channels
  if k != len(consumer.shift):
    return 0
  return tpu.choose_tiles(1, k, n, consumer.weights.block, kind).k
