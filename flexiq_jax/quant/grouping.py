"""Channel groups of a layer: sort, cut, choose extraction shifts, lower the weights.

A group shares one activation shift (and, by default, one weight shift), so it should be
homogeneous: channels are sorted before they are cut into groups. With *shift blocks*, several
groups that lie next to each other in the layout share them; the layout follows from the order of
the groups, so shifts are then chosen a second time (`reshift`). Everything here is offline NumPy on
code histograms and weight codes. See docs/flexiq.md, steps B, C and F.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from flexiq_jax.graph import Layer
from flexiq_jax.quant import exact, lowering, rules
from flexiq_jax.quant.quantizer import check_one_of

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowSettings:
  """How channels are grouped and lowered to 4 bits.

  Attributes:
    group_size: G, channels per group; a layer's last group may be short.
    shift_block: S, channels per shift block: a run of channels in layout order that shares its
      shifts, as hardware wants it. Blocks are made of whole groups, so S is a multiple of G; where
      it is a divisor, and for 0, every group has shifts of its own.
    activation_shift: `range`, `mse` or `naive` (see `quant.lowering`).
    weight_shift: the same.
    weight_shift_per: `group`, one weight shift for all outputs, or `output`, one per (group, output
      channel). Where there are shift blocks, read "shift block" for "group".
    sort: sort channels by shift and error before cutting them into groups.
    bias_correction: correct the mean output error of the groups in 4 bits (see `lower`).
    whole_heads: in a layer that reads an attention's result, groups are made of whole heads, as
      many as reach G channels, so that deployment can fold their order into queries, keys and
      values.
  """

  group_size: int = 4
  shift_block: int = 0
  activation_shift: lowering.ShiftMethod = "mse"
  weight_shift: lowering.ShiftMethod = "mse"
  weight_shift_per: Literal["group", "output"] = "group"
  sort: bool = True
  bias_correction: bool = True
  whole_heads: bool = False

  def __post_init__(self):
    if self.group_size < 1:
      raise ValueError(f"group_size: {self.group_size} is not a positive number of channels")
    sizes = sorted((self.group_size, self.shift_block))
    if sizes[0] < 0 or (sizes[0] and sizes[1] % sizes[0]):
      raise ValueError(
        f"shift_block: {self.shift_block}; 0, a multiple or a divisor of group_size "
        f"({self.group_size}) is accepted"
      )
    for field in ("activation_shift", "weight_shift"):
      check_one_of(field, getattr(self, field), lowering.SHIFT_METHODS)
    check_one_of("weight_shift_per", self.weight_shift_per, ("group", "output"))


@dataclasses.dataclass(frozen=True)
class Cut:
  """One layer's channel groups and what their 4-bit codes depend on besides the weights.

  Attributes:
    channels: J arrays of feature channel numbers; together every channel once.
    block: int32 `[J]`, number of the group's shift block; groups of equal number share their
      shifts, of the weights, too.
    x_shift: int32 `[J]`, static extraction shift of the activation.
    x_mean: float64 `[C]`, mean 8-bit activation code on calibration data.
    low_mean: float64 `[C]`, mean of the same codes lowered to 4 bits, in 8-bit steps.
  """

  channels: tuple[np.ndarray, ...]
  block: np.ndarray
  x_shift: np.ndarray
  x_mean: np.ndarray
  low_mean: np.ndarray


@dataclasses.dataclass(frozen=True)
class Groups(Cut):
  """A cut, and what calibration learned of the groups.

  Attributes:
    w_shift: int32 `[J]`, or `[J, N/g]` when shifts are per output.
    x_top: int32 `[J]`, largest magnitude code of the activation.
    w_top: int32 `[J, N/g]`, largest magnitude code of the weights, per output channel.
    x_error: float64 `[J]`, mean squared error of the lowered activation code, summed over channels.
    x_power: float64 `[J]`, mean squared activation code, summed over channels.
    w_power: float64 `[J]`, squared weights in real units, summed over the group.
    w_step: float64 `[J]`, squared weight scales summed over the group's weights.
  """

  w_shift: np.ndarray
  x_top: np.ndarray
  w_top: np.ndarray
  x_error: np.ndarray
  x_power: np.ndarray
  w_power: np.ndarray
  w_step: np.ndarray


def group_count(channels: int, settings: LowSettings, run: int = 1) -> int:
  """How many groups `group_channels` makes of a layer's C channels, whose runs stay together."""
  return -(-(channels // run) // -(-settings.group_size // run))


def group_channels(
  layer: Layer, q: rules.QLayer, counts: np.ndarray, settings: LowSettings, run: int = 1
) -> Groups:
  """Cuts a layer's feature channels into groups and picks their extraction shifts.

  Channels are sorted by the shift their activation wants, then by the shift their weights want,
  then by error, so that a group is homogeneous in what it has to share.

  Args:
    layer: the layer.
    q: its 8-bit quantization.
    counts: int `[C, 256]`, from `observe_codes`.
    settings: group size and how shifts are chosen.
    run: channels that stay together, a divisor of C: groups are made of runs of so many.

  Raises:
    ValueError: histograms of another number of channels, or a run that does not divide it.
  """
  if counts.shape != (layer.in_channels, 256):
    raise ValueError(
      f"counts: shape {counts.shape} for layer {layer.name}, expected ({layer.in_channels}, 256)"
    )
  if run < 1 or layer.in_channels % run:
    raise ValueError(
      f"run: {run}; a divisor of the {layer.in_channels} channels of layer {layer.name} is accepted"
    )
  runs = np.arange(layer.in_channels).reshape(-1, run)
  if settings.sort:
    shared = dataclasses.replace(settings, weight_shift_per="group")
    alone = reshift(layer, q, counts, list(runs), np.arange(len(runs)), shared)
    runs = runs[np.lexsort((alone.x_error * alone.w_power, alone.w_shift, alone.x_shift))]
  size = -(-settings.group_size // run)
  channels = tuple(runs[i : i + size].reshape(-1) for i in range(0, len(runs), size))
  return reshift(layer, q, counts, channels, np.arange(len(channels)), settings)


def reshift(
  layer: Layer,
  q: rules.QLayer,
  counts: np.ndarray,
  channels: Sequence[np.ndarray],
  block: np.ndarray,
  settings: LowSettings,
) -> Groups:
  """Picks the extraction shifts of given groups, one choice for all groups of a shift block.

  Args:
    layer: the layer.
    q: its 8-bit quantization.
    counts: int `[C, 256]`, from `observe_codes`.
    channels: J arrays of feature channel numbers; together every channel once.
    block: int `[J]`, number of each group's shift block; the numbers are 0, 1, ... without a gap.
    settings: how shifts are chosen.
  """
  codes = np.arange(256) - (128 if q.signed else 0)
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  x_errors = share @ lowering.squared_errors(q.signed, half_even=False).T  # [C, 5]
  x_top = np.where(counts > 0, np.abs(codes), 0).max(axis=1)
  w, steps = _weight_codes(layer, q)
  w_power = (np.square(w.astype(np.float64)).sum(axis=1) * np.square(steps)).sum(axis=1)
  blocks = _merged(channels, block)
  tops, errors = _over(blocks, x_top, np.max), _over(blocks, x_errors, np.sum)
  x_shift = lowering.choose_shifts(settings.activation_shift, tops, errors, q.signed)[block]
  e = _per_channel(channels, x_shift)
  values = lowering.lowered_values(q.signed, half_even=False)[e]
  return Groups(
    channels=tuple(channels),
    block=np.asarray(block, np.int32),
    x_shift=x_shift,
    # As a recipe holds them: what it says and what runs are to be the same.
    x_mean=(share @ codes).round(4),
    low_mean=(share * values).sum(axis=1).round(4),
    w_shift=_weight_shifts(w, blocks, settings)[block],
    x_top=_over(channels, x_top, np.max),
    w_top=_over(channels, np.abs(w).max(axis=1), np.max),
    x_error=_over(channels, np.take_along_axis(x_errors, e[:, None], 1)[:, 0], np.sum),
    x_power=_over(channels, share @ np.square(codes), np.sum),
    w_power=_over(channels, w_power, np.sum),
    w_step=_over(channels, np.square(steps).sum(axis=1) * w.shape[1], np.sum),
  )


def lower(layer: Layer, q: rules.QLayer, cut: Cut, settings: LowSettings) -> rules.QLayer:
  """Adds the 4-bit side to an 8-bit layer.

  Saturated and rounded codes are off in one direction on average (activations after ReLU have no
  negative half to balance it), and such errors add up over channels and layers. Each group
  therefore brings the mean of its own output error as a correction per output channel, from the
  mean codes seen in calibration: `sum_c (x_mean w8 - low_mean w4)`. It is the bias correction of
  Nagel et al., "Data-Free Quantization" (2019), per channel group, so that it follows the mask;
  zero padding is neglected. Not part of FlexiQ as far as its public descriptions go; a setting
  turns it off.

  Args:
    layer: the layer.
    q: its 8-bit quantization.
    cut: channel groups, shift blocks, activation shifts and mean codes; weight shifts follow from
      the weights.
    settings: how weight shifts are chosen, and whether biases are corrected.

  Raises:
    ValueError: the groups do not hold each channel once.
  """
  if not np.array_equal(np.sort(np.concatenate(cut.channels)), np.arange(layer.in_channels)):
    raise ValueError(
      f"cut: its groups do not hold each of the {layer.in_channels} channels of layer "
      f"{layer.name} once"
    )
  w, _ = _weight_codes(layer, q)
  group = _per_channel(cut.channels, np.arange(len(cut.channels)))
  e = np.broadcast_to(weight_shifts(layer, q, cut, settings)[:, None], w.shape)
  low = lowering.lower_weights(w, e) << e
  bias = np.zeros((len(cut.channels), layer.out_channels), np.int64)
  if settings.bias_correction:
    means = [lowering.mean_units(mean)[:, None] for mean in (cut.x_mean, cut.low_mean)]
    sums = [codes.sum(axis=1, dtype=np.int64) for codes in (w, low)]
    # Contraction group n of a layer reads its own channels and writes its own run of outputs.
    own = np.arange(layer.in_channels) // (layer.in_channels // layer.groups)
    error = np.zeros((len(cut.channels), layer.groups, w.shape[2]), np.int64)
    np.add.at(error, (group, own), means[0] * sums[0] - means[1] * sums[1])
    bias = lowering.divide_half_even(error, lowering.MEAN_UNITS).reshape(bias.shape)
  native = layer.native(low.astype(np.int8).reshape(layer.canonical(np.asarray(q.w)).shape))
  return dataclasses.replace(
    q,
    parts=exact.parts(layer, np.asarray(q.w), native),
    low=rules.Low(
      w=jnp.asarray(native),
      shift=jnp.asarray(np.asarray(cut.x_shift, np.int32)[group]),
      group=jnp.asarray(group, jnp.int32),
      bias=jnp.asarray(bias, jnp.int32),
      block=jnp.asarray(cut.block[group]) if settings.shift_block else None,
    ),
  )


def weight_shifts(layer: Layer, q: rules.QLayer, cut: Cut, settings: LowSettings) -> np.ndarray:
  """Extraction shifts of an 8-bit layer's weights, int32 `[C, 1]`, or `[C, N/g]` per output."""
  w, _ = _weight_codes(layer, q)
  shifts = _weight_shifts(w, _merged(cut.channels, cut.block), settings)[cut.block]
  return shifts.reshape(len(cut.channels), -1)[
    _per_channel(cut.channels, np.arange(len(cut.channels)))
  ]


def _merged(channels: Sequence[np.ndarray], block: np.ndarray) -> list[np.ndarray]:
  """The channels of each shift block."""
  members: list[list[np.ndarray]] = [[] for _ in range(int(np.max(block)) + 1)]
  for group, number in zip(channels, block, strict=True):
    members[number].append(group)
  return [np.concatenate(groups) for groups in members]


def _per_channel(channels: Sequence[np.ndarray], values: np.ndarray) -> np.ndarray:
  """Values per group `[J]` -> per channel `[C]`."""
  flat = np.empty(sum(map(len, channels)), np.asarray(values).dtype)
  for members, value in zip(channels, values, strict=True):
    flat[members] = value
  return flat


def _weight_codes(layer: Layer, q: rules.QLayer) -> tuple[np.ndarray, np.ndarray]:
  """Codes `[C, K, N/g]` and the scales `[C, N/g]` of the outputs that read each channel."""
  codes = layer.canonical(np.asarray(q.w))
  g, inner, window, n = codes.shape
  steps = np.asarray(q.w_scale, np.float64).reshape(g, 1, n)
  steps = np.broadcast_to(steps, (g, inner, n)).reshape(g * inner, n)
  return codes.reshape(g * inner, window, n), steps


def _weight_shifts(w, channels, settings: LowSettings, shared: bool | None = None):
  """Weight shifts of groups of channels: `[J]`, or `[J, N/g]` when they are per output.

  Errors are counted in each output channel's own steps, so that every output has the same say in a
  shared shift.
  """
  shared = settings.weight_shift_per == "group" if shared is None else shared
  top = _over(channels, np.abs(w).max(axis=1), np.max)  # [J, n]
  table = lowering.squared_errors(signed=True, half_even=True)
  index = w.astype(np.int16) + 128
  errors = np.stack([row[index].sum(axis=1) for row in table], axis=-1)  # [C, n, 5]
  errors = _over(channels, errors, np.sum)
  if shared:
    top, errors = top.max(axis=1), errors.sum(axis=1)
  return lowering.choose_shifts(settings.weight_shift, top, errors, signed=True)


def _over(channels: Sequence[np.ndarray], values: np.ndarray, reduce) -> np.ndarray:
  return np.stack([reduce(values[members], axis=0) for members in channels])


def lower_layers(
  layers: Sequence[Layer],
  model: rules.QModel,
  cuts: Mapping[str, Cut],
  settings: LowSettings,
) -> dict[str, rules.QLayer]:
  """An 8-bit model, its layers in `cuts` with their 4-bit side (see `lower`)."""
  return {
    layer.name: lower(layer, model[layer.name], cuts[layer.name], settings)
    if layer.name in cuts
    else model[layer.name]
    for layer in layers
  }
