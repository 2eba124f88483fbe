"""The peer: a mixed-precision search as it is ordinarily written in PyTorch.

One copy of the model. A forward-pre hook on each layer quantizes its input and lowers the channels
that the mask names; the weights are exchanged for each individual; everything is fake-quantized
float32. What does not depend on the mask is made once. The evolutionary search on top is FlexiQ's
Algorithm 1 in NumPy, one individual after the other, at one level.

The network is the CIFAR ResNet with folded batch norm, converted from our quantized layers, so that
both compute the same distances. float32 sums against exact ones now and then round an activation
to the other side, which changes single images by as much as a group does. torch is imported where
it is needed only: `make .venv-parity/.installed-parity` installs it.
"""

import importlib
import importlib.util
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from flexiq_jax.network import Network
from flexiq_jax.orders import Schedule, Space, greedy
from flexiq_jax.quant import QLayer, QModel, lowering, quantizer

Array = Any


def available() -> bool:
  """Whether torch is installed."""
  return importlib.util.find_spec("torch") is not None


def version() -> str | None:
  """The installed version of torch; None without it."""
  return metadata.version("torch") if available() else None


class TorchFitness:
  """Mean squared distance of mixed models' logits from the 8-bit model's; call it with masks.

  Attributes:
    layout: memory format and images in one forward pass, the fastest that were tried.
  """

  def __init__(
    self,
    network: Network,
    model: QModel,
    space: Space,
    images: np.ndarray,
    threads: int = 2,
    device: str = "cpu",
    tf32: bool = False,
  ):
    """Converts a CIFAR ResNet.

    Args:
      network: the float model.
      model: its quantized layers, those of the space with their 4-bit side.
      space: the channel groups.
      images: float32 `[n, H, W, C]`.
      threads: that torch computes with.
      device: cpu or cuda.
      tf32: on a GPU, let convolutions round their operands to 11 bits, as torch does by itself; the
        distances are then others.
    """
    self._torch = torch = importlib.import_module("torch")
    torch.set_num_threads(threads)
    self._device, self._tf32 = torch.device(device), tf32
    self._space = space
    self._net = _resnet(torch, model).eval().to(self._device)
    modules = dict(self._net.named_modules())
    self._layers = {
      name: _Hook(
        torch, modules[name.replace("/", ".")], q, _bias(network.params, name), self._device
      )
      for name, q in model.items()
    }
    self._images = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    self._images = self._images.to(self._device)
    self.layout = self._fastest()
    self._swap(np.zeros(space.total, bool))
    self._reference = self._logits()

  def __call__(self, masks: np.ndarray) -> np.ndarray:
    """Fitness float64 `[P]` of masks bool `[P, T]`."""
    return self.per_image(masks).mean(axis=1, dtype=np.float64)

  def per_image(self, masks: np.ndarray) -> np.ndarray:
    """Distances float32 `[P, n]`."""
    values = []
    for mask in masks:
      self._swap(mask)
      values.append((self._logits() - self._reference).square().sum(dim=1).cpu().numpy())
    return np.stack(values)

  def _swap(self, mask: np.ndarray) -> None:
    """Makes the one model that of a mask."""
    with self._torch.no_grad():
      for name, layer_mask in self._space.split(mask).items():
        self._layers[name].swap(layer_mask)

  def _logits(self) -> Array:
    self._torch.backends.cudnn.allow_tf32 = self._tf32
    with self._torch.no_grad():
      return self._torch.cat([self._net(x) for x in self._images.split(self._block)])

  def _wait(self) -> None:
    if self._device.type == "cuda":
      self._torch.cuda.synchronize()

  def _fastest(self) -> str:
    """Takes the memory format and the block in which the mixed model is fastest here."""
    torch, found = self._torch, []
    self._swap(np.arange(self._space.total) % 2 == 0)
    for name in ("contiguous", "channels_last"):
      order = torch.channels_last if name == "channels_last" else torch.contiguous_format
      for block in {min(b, len(self._images)) for b in (32, 64, 256)}:
        self._arrange(order, block)
        self._logits()
        self._wait()
        start = time.perf_counter()
        self._logits()
        self._wait()
        found.append((time.perf_counter() - start, f"{name}, {block} images", order, block))
    _, layout, order, block = min(found, key=lambda entry: entry[0])
    self._arrange(order, block)
    return layout

  def _arrange(self, order: Any, block: int) -> None:
    self._net = self._net.to(memory_format=order)
    for hook in self._layers.values():
      hook.arrange(order)
    self._images = self._images.contiguous(memory_format=order)
    self._block = block


class _Hook:
  """Quantizes the input of one convolution or linear layer, and exchanges its weights."""

  def __init__(self, torch: Any, module: Any, q: QLayer, bias: np.ndarray, device: Any):
    self._torch, self._module, self._device = torch, module, device
    self._scale, self._range = float(q.x_scale), quantizer.code_range(8, q.signed)
    self._bias = self._there(bias)
    self._mixed = None
    self._weights = [self._dequantized(q.w, q.w_scale)]
    if q.low is not None:
      shift = np.array(q.low.shift)
      self._step = self._per_channel((1 << shift).astype(np.float32))
      self._half = self._per_channel(((1 << shift) >> 1).astype(np.float32))
      self._low_range = lowering.low_range(q.signed)
      self._group = np.array(q.low.group)
      self._weights.append(self._dequantized(q.low.w, q.w_scale))
      correction = np.array(q.low.bias, np.float32) * np.array(q.w_scale) * self._scale
      self._correction = self._there(correction.astype(np.float32))
    with torch.no_grad():
      module.weight.copy_(self._weights[0])
      module.bias.copy_(self._bias)
    module.register_forward_pre_hook(self)

  def arrange(self, order: Any) -> None:
    """Changes the memory format of the weights."""
    if self._weights[0].ndim == 4:
      self._weights = [w.contiguous(memory_format=order) for w in self._weights]

  def swap(self, mask: np.ndarray) -> None:
    """Weights, bias and channels of a mask bool `[J]`."""
    torch = self._torch
    channels = self._per_channel(mask[self._group])
    self._mixed = channels if mask.any() else None
    high, low = self._weights
    self._module.weight.copy_(torch.where(channels, low, high))
    self._module.bias.copy_(self._bias + self._correction[self._there(mask)].sum(dim=0))

  def __call__(self, module: Any, inputs: tuple) -> Array:
    """The layer's input on its grid, float32 in real units."""
    codes = (inputs[0] / self._scale).round_().clamp_(*self._range)
    if self._mixed is not None:
      low = ((codes + self._half) / self._step).floor_().clamp_(*self._low_range).mul_(self._step)
      codes = self._torch.where(self._mixed, low, codes)
    return codes.mul_(self._scale)

  def _there(self, values: np.ndarray) -> Array:
    return self._torch.from_numpy(values).to(self._device)

  def _per_channel(self, values: np.ndarray) -> Array:
    values = self._there(values)
    return values if self._module.weight.ndim == 2 else values.reshape(1, -1, 1, 1)

  def _dequantized(self, w: Array, scale: Array) -> Array:
    """Codes HWIO (or IO) with the output's scales -> float32 OIHW (or OI)."""
    w = np.array(w, np.float32) * np.array(scale)
    w = w.transpose((3, 2, 0, 1) if w.ndim == 4 else (1, 0))
    return self._there(np.ascontiguousarray(w))


class Evolution:
  """The plain search: keys, tournaments, crossover of layers, swaps inside layers, elites."""

  def __init__(
    self,
    fitness: Callable[[np.ndarray], np.ndarray],
    space: Space,
    scores: np.ndarray,
    ratio: float,
    *,
    population: int = 32,
    elites: int = 4,
    seed: int = 0,
  ):
    """Evaluates greedy and noisy greedy orders.

    Args:
      fitness: masks bool `[P, T]` -> `[P]`.
      space: the channel groups.
      scores: float `[T]`, error of each group alone.
      ratio: level.
      population: individuals.
      elites: individuals that outlive a generation.
      seed: of everything random.
    """
    self._rng = np.random.default_rng(seed)
    self._fitness, self._space, self._ratio, self._elites = fitness, space, ratio, elites
    noise = np.exp(0.5 * self._rng.standard_normal((population, space.total)))
    noise[0] = 1
    orders = np.stack([greedy(space, scores * factors) for factors in noise])
    self._keys = np.argsort(orders, axis=1)  # the place of each group in the order
    self._values = fitness(np.stack([self._mask(keys) for keys in self._keys]))

  @property
  def best(self) -> float:
    """Least fitness so far."""
    return float(self._values.min())

  def step(self) -> None:
    """One generation."""
    ranked = np.argsort(self._values, kind="stable")[: self._elites]
    children = [self._child() for _ in range(len(self._keys) - self._elites)]
    values = self._fitness(np.stack([self._mask(keys) for keys in children]))
    self._keys = np.concatenate([self._keys[ranked], children])
    self._values = np.concatenate([self._values[ranked], values])

  def _mask(self, keys: np.ndarray) -> np.ndarray:
    return Schedule(self._space, np.argsort(keys, kind="stable")).mask(self._ratio)

  def _child(self) -> np.ndarray:
    rng, space = self._rng, self._space
    a, b = (self._tournament() for _ in range(2))
    from_a = rng.random(len(space.sizes)) < 0.5
    keys = np.where(from_a[space.layer], self._keys[a], self._keys[b])
    inside = self._mask(keys)
    for layer in np.flatnonzero(rng.random(len(space.sizes)) < 0.1):
      leave = np.flatnonzero(inside & (space.layer == layer))
      enter = np.flatnonzero(~inside & (space.layer == layer))
      if len(leave) and len(enter):
        i, j = rng.choice(leave), rng.choice(enter)
        keys[i], keys[j] = keys[j], keys[i]
    return keys

  def _tournament(self) -> int:
    drawn = self._rng.choice(len(self._values), 3, replace=False)
    return int(drawn[np.argmin(self._values[drawn])])


def _bias(params: Any, name: str) -> np.ndarray:
  """The bias after a layer, batch norm included."""
  for part in name.split("/"):
    params = params[part]
  return np.array(params["bias"], np.float32)


def _resnet(torch: Any, model: QModel) -> Any:
  """The CIFAR ResNet of He et al. with shortcut A and folded batch norm, shapes as in `model`."""
  nn = torch.nn

  def conv(name: str, stride: int = 1) -> Any:
    inputs, outputs = model[name].w.shape[2:]
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)

  class Block(nn.Module):
    def __init__(self, name: str, stride: int):
      super().__init__()
      self.conv1, self.conv2 = conv(f"{name}/conv1", stride), conv(f"{name}/conv2")
      self.stride = stride
      self.missing = (self.conv1.out_channels - self.conv1.in_channels) // 2

    def forward(self, x):
      y = self.conv2(self.conv1(x).relu_())
      if self.stride > 1 or self.missing:
        x = x[:, :, :: self.stride, :: self.stride]
        x = nn.functional.pad(x, (0, 0, 0, 0, self.missing, self.missing))
      return y.add_(x).relu_()

  class Stage(nn.Sequential):
    def __init__(self, stage: int):
      blocks = sum(name.startswith(f"layer{stage}/") for name in model) // 2
      strides = [1 if stage == 1 else 2] + [1] * (blocks - 1)
      super().__init__(*(Block(f"layer{stage}/{i}", s) for i, s in enumerate(strides)))

  class ResNet(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1 = conv("conv1")
      self.stages = [n for n in range(1, 5) if f"layer{n}/0/conv1" in model]
      for number in self.stages:
        setattr(self, f"layer{number}", Stage(number))
      self.fc = nn.Linear(*model["fc"].w.shape)

    def forward(self, x):
      x = self.conv1(x).relu_()
      for number in self.stages:
        x = getattr(self, f"layer{number}")(x)
      return self.fc(x.mean(dim=(2, 3)))

  return ResNet()
