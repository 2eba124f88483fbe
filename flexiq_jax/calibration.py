"""From a float model and calibration images to an 8-bit model with a 4-bit side.

Four passes over the same images, each a compiled function applied batch by batch:

1. `observe_values`: range of every layer's input, then a histogram of it (two passes);
2. `quantize`: weight and activation scales, 8-bit codes (no pass);
3. `observe_codes`: histogram of every feature channel's 8-bit codes, in the 8-bit model;
4. `lower`: channel groups and extraction shifts from those histograms (no pass);
5. `observe_errors`: exact local error of putting one group alone into 4 bits.

Papers: FlexiQ section 1.3, steps A to D.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import rules
from flexiq_jax.graph import Apply, Layer, with_rule
from flexiq_jax.quant import lowering, quantizer

Array = Any
Progress = Callable[[str, int], None]
BINS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeSettings:
  """How clipping ranges are found.

  Attributes:
    activation: `max`, `percentile`, or `mse` (least squared error).
    weight: the same, per output channel.
    percentile: of magnitudes, 0 < p <= 100; read by `percentile` only.
    unsigned: use unsigned codes for inputs that calibration never saw negative.
  """

  activation: quantizer.RangeMethod = "mse"
  weight: quantizer.RangeMethod = "mse"
  percentile: float = 99.99
  unsigned: bool = True

  def __post_init__(self):
    for field in ("activation", "weight"):
      _one_of(field, getattr(self, field), quantizer.RANGE_METHODS)
    if not 0 < self.percentile <= 100:
      raise ValueError(f"percentile: {self.percentile} is not in (0, 100]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowSettings:
  """How channels are grouped and lowered to 4 bits.

  Attributes:
    group_size: G, channels per group; a layer's last group may be short.
    activation_shift: `range`, `mse` or `naive` (see `quant.lowering`).
    weight_shift: the same.
    weight_shift_per: `group`, one weight shift shared over outputs, or `output`, one per (group,
      output channel).
    sort: sort channels by shift and error before cutting them into groups.
  """

  group_size: int = 4
  activation_shift: lowering.ShiftMethod = "mse"
  weight_shift: lowering.ShiftMethod = "mse"
  weight_shift_per: Literal["group", "output"] = "group"
  sort: bool = True

  def __post_init__(self):
    if self.group_size < 1:
      raise ValueError(f"group_size: {self.group_size} is not a positive number of channels")
    for field in ("activation_shift", "weight_shift"):
      _one_of(field, getattr(self, field), lowering.SHIFT_METHODS)
    _one_of("weight_shift_per", self.weight_shift_per, ("group", "output"))


@dataclasses.dataclass(frozen=True)
class Values:
  """What calibration saw of one layer's input: a histogram with ascending edges."""

  counts: np.ndarray  # int64 [BINS]
  edges: np.ndarray  # float64 [BINS + 1]

  @property
  def nonnegative(self) -> bool:
    """Whether no negative value was seen."""
    return bool(self.edges[0] >= 0)


@dataclasses.dataclass(frozen=True)
class Groups:
  """What calibration learned of one layer's channel groups.

  Attributes:
    channels: J arrays of feature channel numbers; together every channel once.
    x_shift: int32 `[J]`, static extraction shift of the activation.
    w_shift: int32 `[J]`, or `[J, N/g]` when shifts are per output.
    x_top, w_top: int32 `[J]`, largest magnitude code of activation and weights.
    x_power: float64 `[J]`, mean squared activation code, summed over channels.
    w_power: float64 `[J]`, squared weights in real units, summed over the group.
    w_step: float64 `[J]`, squared weight scales summed over the group's weights.
  """

  channels: tuple[np.ndarray, ...]
  x_shift: np.ndarray
  w_shift: np.ndarray
  x_top: np.ndarray
  w_top: np.ndarray
  x_power: np.ndarray
  w_power: np.ndarray
  w_step: np.ndarray


def observe_values(
  apply: Apply, params: Any, batches: Iterable[Array], progress: Progress | None = None
) -> dict[str, Values]:
  """Histogram of every layer's input in the float model.

  Args:
    apply: pure function `(params, x) -> y`.
    params: its parameters.
    batches: calibration inputs `[B, ...]`; iterated over twice.
    progress: called as `progress(pass name, examples done)`.

  Raises:
    ValueError: there are no batches, or a layer's input is not finite.
  """

  def span(layer, x):
    del layer
    return jnp.stack([x.min(), x.max()]).astype(jnp.float32)

  spans: dict[str, np.ndarray] = {}
  for records in _passes(rules.observing(apply, span), params, batches, "ranges", progress):
    for name, (low, high) in records.items():
      old = spans.get(name, np.array([np.inf, -np.inf], np.float32))
      # fmin would hide NaN, np.minimum keeps it
      spans[name] = np.array([np.minimum(old[0], low), np.maximum(old[1], high)])
  if not spans:
    raise ValueError("batches: no calibration batch")
  if bad := [name for name, s in spans.items() if not np.isfinite(s).all()]:
    raise ValueError(f"batches: the input of layer {bad[0]} is not finite during calibration")

  def histogram(layer, x):
    low, high = spans[layer.name]
    width = max((float(high) - float(low)) / BINS, np.finfo(np.float32).tiny)
    index = jnp.clip(jnp.floor((x.astype(jnp.float32) - low) / width), 0, BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[index.astype(jnp.int32).ravel()].add(1)

  counts: dict[str, np.ndarray] = {}
  run = rules.observing(apply, histogram)
  for records in _passes(run, params, batches, "histograms", progress):
    _accumulate(counts, records)
  return {
    name: Values(counts[name], np.linspace(*spans[name].astype(np.float64), BINS + 1))
    for name in counts
  }


def quantize(
  layers: Sequence[Layer],
  weights: Mapping[str, Array],
  values: Mapping[str, Values],
  settings: RangeSettings,
  bits: int = 8,
  keep8: Sequence[str] = (),
) -> dict[str, rules.QLayer]:
  """Quantizes every layer at one width.

  Args:
    layers: from `graph.layers`.
    weights: from `graph.weights`, behind folded batch norm.
    values: from `observe_values`.
    settings: how clipping ranges are found.
    bits: width of weights and activations, 2..8.
    keep8: names of layers that stay 8-bit whatever `bits` is.
  """
  model = {}
  for layer in layers:
    b = 8 if layer.name in keep8 else bits
    seen = values[layer.name]
    signed = not (settings.unsigned and seen.nonnegative)
    x_scale = quantizer.activation_scale(
      seen.counts, seen.edges, b, signed, settings.activation, settings.percentile
    )
    model[layer.name] = quantize_layer(layer, weights[layer.name], x_scale, signed, settings, b)
  return model


def quantize_layer(
  layer: Layer,
  w: Array,
  x_scale: float,
  signed: bool,
  settings: RangeSettings,
  bits: int = 8,
) -> rules.QLayer:
  """Quantizes one layer whose activation scale is known."""
  w = layer.canonical(jnp.asarray(w, jnp.float32))
  codes, scale = _quantize_weights(w, bits, settings.weight, settings.percentile)
  return rules.QLayer(
    w=layer.native(codes),
    w_scale=scale.reshape(-1),
    x_scale=jnp.float32(x_scale),
    bits=bits,
    signed=signed,
  )


def observe_codes(
  apply: Apply,
  params: Any,
  model: rules.QModel,
  batches: Iterable[Array],
  progress: Progress | None = None,
) -> dict[str, np.ndarray]:
  """Histograms of every feature channel's 8-bit codes in the 8-bit model, int64 `[C, 256]`.

  Column i counts code `i - 128` (signed) or `i` (unsigned).
  """

  def run(args, x):
    model, params = args

    def count(layer, x):
      q = model[layer.name]
      codes = quantizer.quantize(x, q.x_scale, 8, q.signed) + (128 if q.signed else 0)
      codes = layer.channels_last(codes).reshape(-1, layer.in_channels)
      index = codes + 256 * jnp.arange(layer.in_channels)[None]
      flat = jnp.zeros(256 * layer.in_channels, jnp.int32).at[index.ravel()].add(1)
      return flat.reshape(layer.in_channels, 256)

    return rules.observing(apply, count, rules.int8_rule(model))(params, x)

  counts: dict[str, np.ndarray] = {}
  for records in _passes(run, (model, params), batches, "codes", progress):
    _accumulate(counts, records)
  return counts


def group_channels(
  layer: Layer, q: rules.QLayer, counts: np.ndarray, settings: LowSettings
) -> Groups:
  """Cuts a layer's feature channels into groups and picks their extraction shifts.

  Channels are sorted by the shift their activation wants, then by the shift their weights want, then
  by error, so that a group is homogeneous in what it has to share.

  Args:
    layer: the layer.
    q: its 8-bit quantization.
    counts: int `[C, 256]`, from `observe_codes`.
    settings: group size and how shifts are chosen.
  """
  codes = np.arange(256) - (128 if q.signed else 0)
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  x_errors = share @ lowering.squared_errors(q.signed, half_even=False).T  # [C, 5]
  x_power = share @ np.square(codes)
  x_top = np.where(counts > 0, np.abs(codes), 0).max(axis=1)
  w, steps = _weight_codes(layer, q)
  w_power = (np.square(w.astype(np.float64)).sum(axis=1) * np.square(steps)).sum(axis=1)
  order = np.arange(layer.in_channels)
  if settings.sort:
    x_best = lowering.choose_shifts(settings.activation_shift, x_top, x_errors, q.signed)
    w_best = _weight_shifts(w, steps, [np.array([c]) for c in order], settings, shared=True)
    error = np.take_along_axis(x_errors, x_best[:, None], 1)[:, 0] * w_power
    order = np.lexsort((error, w_best, x_best))
  size = settings.group_size
  channels = tuple(order[i : i + size] for i in range(0, len(order), size))
  tops = _over(channels, x_top, np.max)
  errors = _over(channels, x_errors, np.sum)
  return Groups(
    channels=channels,
    x_shift=lowering.choose_shifts(settings.activation_shift, tops, errors, q.signed),
    w_shift=_weight_shifts(w, steps, channels, settings),
    x_top=tops,
    w_top=_over(channels, np.abs(w).max(axis=(1, 2)), np.max),
    x_power=_over(channels, x_power, np.sum),
    w_power=_over(channels, w_power, np.sum),
    w_step=_over(channels, np.square(steps).sum(axis=1) * w.shape[1], np.sum),
  )


def lower(
  layer: Layer,
  q: rules.QLayer,
  channels: Sequence[np.ndarray],
  x_shift: np.ndarray,
  settings: LowSettings,
) -> rules.QLayer:
  """Adds the 4-bit side to an 8-bit layer.

  Args:
    layer: the layer.
    q: its 8-bit quantization.
    channels: J groups of feature channels, together every channel once.
    x_shift: int `[J]`, activation shifts; weight shifts follow from the weights and `settings`.
    settings: how weight shifts are chosen.
  """
  w, steps = _weight_codes(layer, q)
  w_shift = _weight_shifts(w, steps, channels, settings)
  group = np.empty(layer.in_channels, np.int32)
  for j, members in enumerate(channels):
    group[members] = j
  e = np.broadcast_to(w_shift.reshape(len(channels), 1, -1)[group], w.shape)
  low = np.asarray(lowering.lower_weights(w, e)) << e
  low = low.astype(np.int8).reshape(layer.canonical(np.asarray(q.w)).shape)
  return q.replace(
    low=rules.Low(
      w=jnp.asarray(layer.native(low)),
      shift=jnp.asarray(np.asarray(x_shift, np.int32)[group]),
      group=jnp.asarray(group),
    )
  )


def observe_errors(
  apply: Apply,
  params: Any,
  model: rules.QModel,
  batches: Iterable[Array],
  progress: Progress | None = None,
) -> dict[str, tuple[np.ndarray, float]]:
  """Exact local error of every channel group, measured in the 8-bit model.

  Returns:
    layer name -> (float64 `[J]`, float): `sum |X_g W_g - X4_g W4_g|^2` and the layer's
    `sum |X W|^2`, both over examples, positions and outputs, in real units (papers: FlexiQ section
    1.3 D).
  """
  sizes = {name: int(q.low.group.max()) + 1 for name, q in model.items() if q.low is not None}
  members = {name: _members(np.asarray(model[name].low.group)) for name in sizes}

  def run(args, x):
    model, members, params = args
    records = {}
    base = rules.int8_rule(model)

    def measure(layer, x, w, contract):
      y = base(layer, x, w, contract)
      if layer.name in sizes:
        errors = _group_errors(layer, x, model[layer.name], members[layer.name], contract)
        records[layer.name] = (errors, jnp.square(y).sum())
      return y

    y = with_rule(apply, measure)(params, x)
    return y, records

  total: dict[str, tuple[np.ndarray, float]] = {}
  for records in _passes(run, (model, members, params), batches, "errors", progress):
    for name, (errors, energy) in records.items():
      old = total.get(name, (0.0, 0.0))
      total[name] = (old[0] + np.asarray(errors, np.float64), old[1] + float(energy))
  return total


def _group_errors(layer, x, q, members, contract) -> Array:
  """`[J]` squared error of each group alone; `members` is `[J, G]`, padded with C."""
  low = q.low
  codes = quantizer.quantize(x, q.x_scale, 8, q.signed)
  shift = layer.x_vector(low.shift, x.shape)
  lowered = lowering.lower_activations(codes, shift, q.signed) << shift
  # X W - X4 W4 = (X - X4) W + X4 (W - W4): one contraction, no cancellation of large terms.
  dx, x4 = (codes - lowered).astype(jnp.float32), lowered.astype(jnp.float32)
  w8 = q.w.astype(jnp.float32)
  dw = w8 - low.w.astype(jnp.float32)
  if layer.kind == "dense" and layer.groups == 1:
    wide = [layer.channels_last(a).reshape(-1, layer.in_channels) for a in (dx, x4)]
    tall = [layer.canonical(a).reshape(layer.in_channels, -1) * q.w_scale[None] for a in (w8, dw)]

    def gram(index):
      a = jnp.concatenate([_pick(v, index, 1) for v in wide], axis=1)
      b = jnp.concatenate([_pick(v, index, 0) for v in tall], axis=0)
      return ((a.T @ a) * (b @ b.T)).sum()  # trace of b^T (a^T a) b

    errors = jax.lax.map(gram, members)
  elif layer.groups == 1:
    axis, w_axis = layer.x_dims[0], layer.w_in_dims[0]
    scale = layer.y_vector(q.w_scale, (layer.out_channels,) * layer.y_ndim)

    def alone(index):
      a = jnp.concatenate([_pick(v, index, axis) for v in (dx, x4)], axis=axis)
      b = jnp.concatenate([_pick(v, index, w_axis) for v in (w8, dw)], axis=w_axis)
      return jnp.square(contract(a, b, jnp.float32) * scale).sum()

    errors = jax.lax.map(alone, members)
  else:  # groups of channels may straddle contraction groups: mask instead of picking

    def masked(j):
      keep = layer.x_vector((low.group == j).astype(jnp.float32), x.shape)
      diff = contract(dx * keep, w8, jnp.float32) + contract(x4 * keep, dw, jnp.float32)
      return jnp.square(diff * layer.y_vector(q.w_scale, diff.shape)).sum()

    errors = jax.lax.map(masked, jnp.arange(len(members)))
  return errors * jnp.square(q.x_scale)


def _pick(a: Array, index: Array, axis: int) -> Array:
  return jnp.take(a, index, axis=axis, mode="fill", fill_value=0)


def _members(group: np.ndarray) -> np.ndarray:
  """`[J, G]` channels of each group, padded with C."""
  lists = [np.flatnonzero(group == j) for j in range(group.max() + 1)]
  table = np.full((len(lists), max(map(len, lists))), len(group), np.int32)
  for j, members in enumerate(lists):
    table[j, : len(members)] = members
  return table


def _weight_codes(layer: Layer, q: rules.QLayer) -> tuple[np.ndarray, np.ndarray]:
  """Codes `[C, K, N/g]` and the scales `[C, N/g]` of the outputs that read each channel."""
  codes = layer.canonical(np.asarray(q.w))
  g, inner, window, n = codes.shape
  steps = np.asarray(q.w_scale, np.float64).reshape(g, 1, n)
  steps = np.broadcast_to(steps, (g, inner, n)).reshape(g * inner, n)
  return codes.reshape(g * inner, window, n), steps


def _weight_shifts(w, steps, channels, settings: LowSettings, shared: bool | None = None):
  """Weight shifts of groups of channels: `[J]`, or `[J, N/g]` when they are per output."""
  shared = settings.weight_shift_per == "group" if shared is None else shared
  top = _over(channels, np.abs(w).max(axis=1), np.max)  # [J, n]
  table = lowering.squared_errors(signed=True, half_even=True).astype(np.float64)
  index = w.astype(np.int16) + 128
  errors = np.stack([row[index].sum(axis=1) for row in table], axis=-1)  # [C, n, 5]
  errors = _over(channels, errors * np.square(steps)[:, :, None], np.sum)
  if shared:
    top, errors = top.max(axis=1), errors.sum(axis=1)
  return lowering.choose_shifts(settings.weight_shift, top, errors, signed=True)


def _over(channels: Sequence[np.ndarray], values: np.ndarray, reduce) -> np.ndarray:
  return np.stack([reduce(values[members], axis=0) for members in channels])


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_weights(w, bits, method, percentile):
  scale = quantizer.weight_scale(w, bits, method, percentile)
  codes = quantizer.quantize(w, scale[:, None, None, :], bits)
  return codes.astype(jnp.int8), scale


def _passes(run, params, batches, name: str, progress: Progress | None):
  """Runs a compiled `(params, x) -> (y, records)` over batches; yields records as NumPy arrays."""
  compiled = jax.jit(lambda params, x: run(params, x)[1])
  done = 0
  for x in batches:
    yield jax.device_get(compiled(params, x))
    done += len(x)
    if progress:
      progress(name, done)


def _accumulate(total: dict[str, np.ndarray], records: Mapping[str, np.ndarray]) -> None:
  for name, counts in records.items():
    total[name] = total.get(name, 0) + counts.astype(np.int64)


def _one_of(field: str, value: Any, accepted: Sequence[str]) -> None:
  if value not in accepted:
    raise ValueError(f"{field}: {value!r} is not one of {', '.join(accepted)}")
