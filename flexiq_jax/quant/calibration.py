"""What calibration examples tell about a model: ranges, 8-bit scales, histograms, local errors.

Four of these steps pass over the examples, each by a compiled function applied batch by batch:

1. `observe_values`: range of every layer's input, then a histogram of it (two passes);
2. `quantize`: weight and activation scales, 8-bit codes (no pass);
3. `observe_codes`: histogram of every feature channel's 8-bit codes, in the 8-bit model;
4. `grouping`: channel groups and extraction shifts from those histograms (no pass);
5. `observe_errors`: exact local error of putting one group alone into 4 bits.

See docs/flexiq.md, steps A to D.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.graph import Apply, Layer, closest, with_rule
from flexiq_jax.quant import exact, lowering, quantizer, rules

Array = Any
PassListener = Callable[[str, int], None]
Pass = Callable[[Any, Array], tuple[Any, dict[str, Any]]]
BINS = 4096


@dataclasses.dataclass(frozen=True, kw_only=True)
class RangeSettings:
  """How clipping ranges are found.

  Attributes:
    activation: `max`, `percentile`, `mse` (least squared error), or `joint` (least squared error
      of the 8-bit codes and of the 4-bit codes inside them; see `quantizer.activation_scale`).
    weight: `max`, `percentile` or `mse`, per output channel.
    percentile: of magnitudes, 0 < p <= 100; read by `percentile` only.
    unsigned: use unsigned codes for inputs that calibration never saw negative.
  """

  activation: quantizer.RangeMethod = "joint"
  weight: quantizer.RangeMethod = "mse"
  percentile: float = 99.99
  unsigned: bool = True

  def __post_init__(self):
    quantizer.check_one_of("activation", self.activation, quantizer.ACTIVATION_RANGES)
    quantizer.check_one_of("weight", self.weight, quantizer.WEIGHT_RANGES)
    if not 0 < self.percentile <= 100:
      raise ValueError(f"percentile: {self.percentile} is not in (0, 100]")


@dataclasses.dataclass(frozen=True)
class Values:
  """What calibration saw of one layer's input: a histogram with ascending edges."""

  counts: np.ndarray  # int64 [BINS]
  edges: np.ndarray  # float64 [BINS + 1]

  @property
  def nonnegative(self) -> bool:
    """Whether no negative value was seen."""
    return bool(self.edges[0] >= 0)


def compiled(run: Pass) -> Callable[[Any, Array], dict[str, Any]]:
  """A pass under `jax.jit` that gives its records alone."""
  return jax.jit(lambda params, x: run(params, x)[1])


def range_pass(apply: Apply) -> Pass:
  """`(params, x) -> (y, records)`: float32 `[2]`, least and largest value of every input."""

  def span(layer, x):
    del layer
    return jnp.stack([x.min(), x.max()]).astype(jnp.float32)

  return rules.observing(apply, span)


def histogram_pass(apply: Apply, spans: Mapping[str, np.ndarray]) -> Pass:
  """`(params, x) -> (y, records)`: int32 `[BINS]` of every input, over ranges from `range_pass`."""

  def histogram(layer, x):
    low, high = spans[layer.name]
    width = max((float(high) - float(low)) / BINS, np.finfo(np.float32).tiny)
    index = jnp.clip(jnp.floor((x.astype(jnp.float32) - low) / width), 0, BINS - 1)
    return jnp.zeros(BINS, jnp.int32).at[index.astype(jnp.int32).ravel()].add(1)

  return rules.observing(apply, histogram)


def observe_values(
  apply: Apply, params: Any, batches: Iterable[Array], progress: PassListener | None = None
) -> dict[str, Values]:
  """Histogram of every layer's input in the float model.

  Args:
    apply: pure function `(params, x) -> y`.
    params: its parameters.
    batches: calibration inputs `[B, ...]`; iterated over twice, so an iterator will not do.
    progress: called as `progress(pass name, examples done)`.

  Raises:
    ValueError: there are no batches, or a layer's input is not finite.
  """
  spans: dict[str, np.ndarray] = {}
  for records in _passes(compiled(range_pass(apply)), params, batches, "ranges", progress):
    for name, (low, high) in records.items():
      old = spans.get(name, np.array([np.inf, -np.inf], np.float32))
      # fmin would hide NaN, np.minimum keeps it
      spans[name] = np.array([np.minimum(old[0], low), np.maximum(old[1], high)])
  if bad := [name for name, s in spans.items() if not np.isfinite(s).all()]:
    raise ValueError(f"batches: the input of layer {bad[0]} is not finite during calibration")

  counts: dict[str, np.ndarray] = {}
  run = compiled(histogram_pass(apply, spans))
  for records in _passes(run, params, batches, "histograms", progress):
    _accumulate(counts, records)
  return {
    name: Values(counts[name], np.linspace(float(low), float(high), BINS + 1))
    for name, (low, high) in spans.items()
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
    weights: from `graph.weights`, with batch norm folded in.
    values: from `observe_values`.
    settings: how clipping ranges are found.
    bits: width of weights and activations, 2..8.
    keep8: names of layers that stay 8-bit whatever `bits` is.

  Raises:
    ValueError: `keep8` names no layer, or a layer was not calibrated.
  """
  names = [layer.name for layer in layers]
  if unknown := [name for name in keep8 if name not in names]:
    raise ValueError(f"keep8: no layer {unknown[0]!r}; closest names: {closest(unknown[0], names)}")
  if missing := [name for name in names if name not in values]:
    raise ValueError(f"values: layer {missing[0]} was not calibrated")
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
  w = layer.canonical(np.asarray(w, np.float32))
  codes, scale = _quantize_weights(w, bits, settings.weight, settings.percentile)
  q = rules.QLayer(
    w=jnp.asarray(layer.native(np.asarray(codes))),
    w_scale=scale.reshape(-1),
    x_scale=jnp.asarray(x_scale, jnp.float32),
    bits=bits,
    signed=signed,
  )
  return dataclasses.replace(q, parts=exact.parts(layer, np.asarray(q.w)))


def code_pass(apply: Apply, platform: str | None = None) -> Pass:
  """`((model, params), x) -> (y, records)`: int32 `[C, 256]` of codes in the 8-bit model."""

  def run(args, x):
    model, params = args

    def count(layer, x):
      q = model[layer.name]
      codes = quantizer.quantize(x, q.x_scale, 8, q.signed) + (128 if q.signed else 0)
      codes = layer.channels_last(codes).reshape(-1, layer.in_channels)
      index = codes + 256 * jnp.arange(layer.in_channels)[None]
      flat = jnp.zeros(256 * layer.in_channels, jnp.int32).at[index.ravel()].add(1)
      return flat.reshape(layer.in_channels, 256)

    return rules.observing(apply, count, rules.int8_rule(model, platform))(params, x)

  return run


def observe_codes(
  apply: Apply,
  params: Any,
  model: rules.QModel,
  batches: Iterable[Array],
  progress: PassListener | None = None,
  platform: str | None = None,
  run: Callable[[Any, Array], dict[str, Any]] | None = None,
) -> dict[str, np.ndarray]:
  """Histograms of every feature channel's 8-bit codes in the 8-bit model, int64 `[C, 256]`.

  Column i counts code `i - 128` (signed) or `i` (unsigned). `run` is a `compiled`
  `code_pass`, for several calls.
  """
  counts: dict[str, np.ndarray] = {}
  run = run or compiled(code_pass(apply, platform))
  for records in _passes(run, (model, params), batches, "codes", progress):
    _accumulate(counts, records)
  return counts


def group_members(model: rules.QModel) -> dict[str, np.ndarray]:
  """Layer name -> int32 `[J, G]`, channels of each of its groups, padded with C."""
  return {name: _members(np.asarray(q.low.group)) for name, q in model.items() if q.low is not None}


def error_pass(apply: Apply, platform: str | None = None) -> Pass:
  """`((model, group_members, params), x) -> (y, records)`: what `observe_errors` adds up."""

  def run(args, x):
    model, members, params = args
    records = {}
    base = rules.int8_rule(model, platform)

    def measure(layer, x, w, contract):
      y = base(layer, x, w, contract)
      if layer.name in members:
        errors = _group_errors(layer, x, model[layer.name], members[layer.name], contract)
        records[layer.name] = (errors, jnp.square(y).sum())
      return y

    y = with_rule(apply, measure)(params, x)
    return y, records

  return run


def observe_errors(
  apply: Apply,
  params: Any,
  model: rules.QModel,
  batches: Iterable[Array],
  progress: PassListener | None = None,
  platform: str | None = None,
) -> dict[str, tuple[np.ndarray, float]]:
  """Exact local error of every channel group, measured in the 8-bit model.

  Returns:
    layer name -> (float64 `[J]`, float): `sum |X_g W_g - X4_g W4_g - bias_g|^2` and the layer's
    `sum |X W|^2`, both over examples, positions and outputs, in real units
    (docs/flexiq.md, step D; the bias correction of the group counts, because it goes with it).
  """
  run, args = compiled(error_pass(apply, platform)), (model, group_members(model), params)
  total: dict[str, tuple[np.ndarray, float]] = {}
  for records in _passes(run, args, batches, "errors", progress):
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
  bias = low.bias.astype(jnp.float32) * q.w_scale[None]
  if layer.kind == "dense" and layer.groups == 1:
    wide = [layer.channels_last(a).reshape(-1, layer.in_channels) for a in (dx, x4)]
    tall = [layer.canonical(a).reshape(layer.in_channels, -1) * q.w_scale[None] for a in (w8, dw)]

    def gram(group):
      index, bias = group
      a = jnp.concatenate([_pick(v, index, 1) for v in wide], axis=1)
      b = jnp.concatenate([_pick(v, index, 0) for v in tall], axis=0)
      aa = jnp.matmul(a.T, a, precision="highest")
      bb = jnp.matmul(b, b.T, precision="highest")  # sum (a b)^2 is the trace of b^T a^T a b
      mean = jnp.matmul(a.sum(axis=0), b, precision="highest")
      return (aa * bb).sum() + (bias * (len(a) * bias - 2 * mean)).sum()

    errors = jax.lax.map(gram, (members, bias))
  elif layer.groups == 1:
    axis, w_axis = layer.x_dims[0], layer.w_in_dims[0]

    def alone(group):
      index, bias = group
      a = jnp.concatenate([_pick(v, index, axis) for v in (dx, x4)], axis=axis)
      b = jnp.concatenate([_pick(v, index, w_axis) for v in (w8, dw)], axis=w_axis)
      return _squares(layer, contract(a, b, jnp.float32), q.w_scale, bias)

    errors = jax.lax.map(alone, (members, bias))
  else:  # groups of channels may straddle contraction groups: mask instead of picking

    def masked(group):
      j, bias = group
      keep = layer.x_vector((low.group == j).astype(jnp.float32), x.shape)
      diff = contract(dx * keep, w8, jnp.float32) + contract(x4 * keep, dw, jnp.float32)
      return _squares(layer, diff, q.w_scale, bias)

    errors = jax.lax.map(masked, (jnp.arange(len(members)), bias))
  return errors * jnp.square(q.x_scale)


def _squares(layer: Layer, diff: Array, scale: Array, bias: Array) -> Array:
  real = diff * layer.y_vector(scale, diff.shape) - layer.y_vector(bias, diff.shape)
  return jnp.square(real).sum()


def _pick(a: Array, index: Array, axis: int) -> Array:
  return jnp.take(a, index, axis=axis, mode="fill", fill_value=0)


def _members(group: np.ndarray) -> np.ndarray:
  """`[J, G]` channels of each group, padded with C."""
  lists = [np.flatnonzero(group == j) for j in range(group.max() + 1)]
  table = np.full((len(lists), max(map(len, lists))), len(group), np.int32)
  for j, members in enumerate(lists):
    table[j, : len(members)] = members
  return table


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize_weights(w, bits, method, percentile):
  scale = quantizer.weight_scale(w, bits, method, percentile)
  codes = quantizer.quantize(w, scale[:, None, None, :], bits)
  return codes.astype(jnp.int8), scale


def _passes(run, params, batches, name: str, progress: PassListener | None):
  """Runs a `compiled` pass over batches; yields records as NumPy arrays."""
  done = 0
  for x in batches:
    yield jax.device_get(run(params, x))
    done += len(x)
    if progress:
      progress(name, done)
  if not done:
    raise ValueError(
      f"batches: no calibration batch in pass {name!r}; give a list, or something else that can be "
      "iterated over anew for every pass"
    )


def _accumulate(total: dict[str, np.ndarray], records: Mapping[str, np.ndarray]) -> None:
  for name, counts in records.items():
    total[name] = total.get(name, 0) + counts.astype(np.int64)
