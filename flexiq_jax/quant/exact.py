"""Exact products of integer codes: how each platform computes a layer's int32 sums.

No way of adding up 8-bit products is both exact and fast everywhere. NVIDIA's convolution library
has no int32 results, XLA's int8 convolution is slow on CPUs where channels are few, and a float32
sum counts exactly below 2^24 only. So there are several ways, and `ways` lists those that are exact
for a layer on a platform, the one to take first.

| way | what it does | exact |
|---|---|---|
| `integer` | one int8 contraction with an int32 result | always |
| `matrix` | dense layers: one int8 product of two matrices, the codes written first | always |
| `float32` | the same contraction of float32 operands | where no sum reaches 2^24 |
| `multiply_add` | depthwise: float32 multiply-adds of shifted slices | where no sum reaches 2^24 |
| `float_result` | int8 convolutions of parts of the channels, float32 results | in enough parts |
| `patches` | the window's positions beside each other and one int8 product | always |
| `bfloat16` | patches of bfloat16 operands, added in float32 | where no sum passes 2^24 |

A part's sum is at most 128 times the sum of its weights' magnitudes, so float32 counts it exactly
while those are at most 2^17 for every output. `parts` finds from the codes how many are needed.

`bfloat16` is listed after the integer ways: it relies on tensor cores that keep 24 bits while they
add, which is known for few. TensorFloat-32 and Winograd's algorithm, which a library may take for a
convolution of floats, would not be exact, so there is no way of that kind for GPUs.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax.graph import Contract, Layer, unfold

Array = Any
PLATFORMS = ("cpu", "gpu", "tpu")
EXACT = 2**24  # float32 counts so far
_MAGNITUDES = EXACT // 128  # of weights that one float32 sum may add up


def platform_of(platform: str | None) -> str:
  """A platform by its name; None is JAX's default backend.

  Raises:
    ValueError: an unknown name.
  """
  name = jax.default_backend() if platform is None else platform
  if name not in PLATFORMS:
    raise ValueError(f"platform: {name!r} is not one of {', '.join(PLATFORMS)}")
  return name


def parts(layer: Layer, w: np.ndarray, low: np.ndarray | None = None) -> int:
  """Into how many runs of input channels `float_result` has to cut a layer's sums.

  Args:
    layer: the layer.
    w: int8 `w_shape`, weight codes.
    low: the same in 4 bits and shifted back; each weight may be either.

  Returns:
    The number; 0 where one channel's sum alone may be too large.
  """
  size = np.abs(layer.canonical(np.asarray(w, np.int32)))
  if low is not None:
    size = np.maximum(size, np.abs(layer.canonical(np.asarray(low, np.int32))))
  each = size.sum(axis=2, dtype=np.int64)  # [g, C/g, N/g]
  inner = each.shape[1]
  for count in range(1, inner + 1):
    starts = [a for a, _ in _runs(inner, count)]
    if np.add.reduceat(each, starts, axis=1).max() <= _MAGNITUDES:
      return count
  return 0


def worst_parts(layer: Layer) -> int:
  """`parts` of a layer whose weights are not known: all -128."""
  window = math.prod(layer.window)
  inner = layer.in_channels // layer.groups
  most = _MAGNITUDES // (128 * window)
  return -(-inner // most) if most else 0


def ways(
  layer: Layer,
  contract: Contract,
  platform: str | None = None,
  *,
  signed: bool = True,
  parts: int | None = None,
) -> tuple[str, ...]:
  """The exact ways of computing a layer on a platform, the preferred one first.

  Args:
    layer: the layer.
    contract: its contraction.
    platform: cpu, gpu or tpu; None is JAX's default backend.
    signed: whether activation codes are signed.
    parts: see `parts`; None where the codes are not known.
  """
  platform, conv = platform_of(platform), contract.convolution
  count = worst_parts(layer) if parts is None else parts
  halves = ("bfloat16",) if count == 1 and platform != "cpu" else ()
  if conv is None:
    return ("matrix" if platform == "gpu" else "integer", *halves)
  terms = layer.params // layer.out_channels
  small = terms * 128 * (128 if signed else 255) < EXACT
  if layer.kind == "depthwise":
    first = ("multiply_add",) if terms * 128 * 255 < EXACT else ()
    if platform == "gpu":
      return (*first, "patches", *halves)
    return (*first, "integer", "patches") if platform == "cpu" else ("integer", *first, "patches")
  if platform == "cpu":
    return (*(("float32",) if small else ()), "integer", "patches")
  if platform == "tpu":
    return ("integer", "patches", *halves)
  # What cuDNN is known to convolve in int8: two dimensions, no groups, no dilation.
  plain = layer.groups == 1 and len(layer.window) == 2
  plain = plain and {*conv["lhs_dilation"], *conv["rhs_dilation"]} == {1}
  if not plain:
    return ("patches", *halves)
  in_parts = ("float_result",) if count else ()
  if math.prod(layer.window) == 1:  # a matrix product as it stands
    return ("patches", *in_parts, *halves)
  return (*in_parts, "patches", *halves)


def product(
  layer: Layer,
  codes: Array,
  w: Array,
  contract: Contract,
  *,
  signed: bool,
  bits: int = 8,
  parts: int | None = None,
  platform: str | None = None,
  way: str | None = None,
) -> Array:
  """Exact int32 contraction of activation codes with int8 weights.

  Unsigned 8-bit codes enter integer products as `code - 128`. The correction is the contraction of
  a constant 128, which meets the same padding, stride and groups (a constant would be wrong at
  padded borders).

  Args:
    layer: the layer.
    codes: activation codes of x's shape, in any integer dtype.
    w: int8 `w_shape`.
    contract: the layer's contraction.
    signed: whether the codes are signed.
    bits: their width.
    parts: see `parts`; None where the weights are not known.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.
    way: a name of the table above; None takes the first of `ways`.

  Raises:
    ValueError: an unknown platform, or a way that is not one of `ways`.
  """
  found = ways(layer, contract, platform, signed=signed, parts=parts)
  if way is not None and way not in found:
    raise ValueError(f"way: {way!r}; of layer {layer.name} {', '.join(found)} are exact")
  compute = _WAYS[way or found[0]]
  count = worst_parts(layer) if parts is None else parts
  if (way or found[0]) in _REAL or signed or bits < 8:
    return compute(layer, contract, codes, w, count)
  # One entry of a dimension that only repeats the contraction stands for all of them.
  one = codes if 0 in (*layer.x_dims, *layer.x_window_dims) else codes[:1]
  correction = compute(layer, contract, jnp.ones_like(one, jnp.int8), w, count)
  return compute(layer, contract, codes - 128, w, count) + 128 * correction


def real_product(
  layer: Layer, x: Array, w: Array, contract: Contract, platform: str | None = None
) -> Array:
  """Contraction of real values, float32; linear in both.

  XLA's CPU backend is slow at depthwise convolutions, and at derivatives by the weights of those
  whose window is one pixel; `graph.unfold` computes both there.
  """
  params, real = contract.convolution, jnp.issubdtype(w.dtype, jnp.floating)
  if params is not None and platform_of(platform) == "cpu":
    if layer.kind == "depthwise":
      product = unfold.differentiable_multiply_add if real else unfold.multiply_add
      return product(params, x, w)
    if real and layer.groups == 1 and math.prod(layer.window) == 1:
      convolve = lambda x, w: contract(x, w, jnp.float32)
      return unfold.differentiable_pointwise(params, convolve, x, w)
  return contract(x, w, jnp.float32)


def _runs(size: int, count: int) -> list[tuple[int, int]]:
  """`size` channels in `count` runs of nearly equal length."""
  edges = np.linspace(0, size, count + 1).round().astype(int)
  return [(int(a), int(b)) for a, b in itertools.pairwise(edges)]


def _params(contract: Contract) -> Mapping[str, Any]:
  found = contract.convolution
  assert found is not None, "a way for convolutions"
  return found


def _integer(layer, contract, x, w, count):
  del layer, count
  return contract(x.astype(jnp.int8), w, jnp.int32)


def _matrix(layer, contract, x, w, count):
  del contract, count
  last = layer.channels_last(x.astype(jnp.int8))
  # Left to itself, XLA fuses quantization and transposes into the product, for which it has no
  # tiles at some shapes.
  rows = jax.lax.optimization_barrier(last.reshape(-1, layer.in_channels))
  matrices = layer.canonical(w)[:, :, 0]  # [g, C/g, N/g]
  if layer.groups == 1:
    y = jnp.matmul(rows, matrices[0], preferred_element_type=jnp.int32)
  else:
    rows = rows.reshape(-1, layer.groups, layer.in_channels // layer.groups).transpose(1, 0, 2)
    y = jnp.matmul(rows, matrices, preferred_element_type=jnp.int32).transpose(1, 0, 2)
  return layer.outputs_in_place(y.reshape(*last.shape[:-1], layer.out_channels))


def _float32(layer, contract, x, w, count):
  del layer, count
  return contract(x.astype(jnp.float32), w.astype(jnp.float32), jnp.float32).astype(jnp.int32)


def _multiply_add(layer, contract, x, w, count):
  del layer, count
  return unfold.multiply_add(_params(contract), x, w).astype(jnp.int32)


def _patches(layer, contract, x, w, count):
  del layer, count
  return unfold.patch_product(_params(contract), x.astype(jnp.int8), w, jnp.int32)


def _bfloat16(layer, contract, x, w, count):
  del layer, count
  x, w = x.astype(jnp.bfloat16), w.astype(jnp.bfloat16)
  if contract.convolution is None:
    return contract(x, w, jnp.float32).astype(jnp.int32)
  return unfold.patch_product(_params(contract), x, w, jnp.float32).astype(jnp.int32)


def _float_result(layer, contract, x, w, count):
  x, total = x.astype(jnp.int8), None
  for start, stop in _runs(layer.in_channels, count):
    piece = x, w
    if count > 1:
      piece = (
        jax.lax.slice_in_dim(x, start, stop, axis=layer.x_dims[0]),
        jax.lax.slice_in_dim(w, start, stop, axis=layer.w_in_dims[0]),
      )
      # Else XLA makes slices of one convolution out of them, for which cuDNN has nothing.
      piece = jax.lax.optimization_barrier(piece)
    # The conversion that follows at once lets XLA take cuDNN's convolution.
    y = contract(*piece, jnp.int32).astype(jnp.float32).astype(jnp.int32)
    total = y if total is None else total + y
  return total


_Way = Callable[[Layer, Contract, Array, Array, int], Array]
_WAYS: Mapping[str, _Way] = {
  "integer": _integer,
  "matrix": _matrix,
  "float32": _float32,
  "multiply_add": _multiply_add,
  "float_result": _float_result,
  "patches": _patches,
  "bfloat16": _bfloat16,
}
_REAL = ("float32", "multiply_add")  # take unsigned codes as they are
