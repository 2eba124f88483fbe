"""`Layer`: the static facts of one contraction of an activation with a parameter.

Every rule, statistic and packing step speaks of a layer's channels, whichever contraction it is.
The common ground is the *canonical* form of its weights:

| symbol | meaning |
|---|---|
| g | contraction groups: `feature_group_count` of a convolution, or the size of the batch
  dimensions that a dot_general shares between x and w |
| C | feature (input) channels, `c = group * C/g + position`; the unit lowered to 4 bits |
| K | window positions (`kh * kw`; 1 for dense) |
| N | output channels, `n = group * N/g + position` |

`canonical(w)` is `[g, C/g, K, N/g]`. `x_vector`, `w_vector` and `y_vector` spread one value per
channel over the operands and the result, ready to broadcast.
"""

import dataclasses
import math
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

Array = Any
Kind = Literal["dense", "conv", "depthwise"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
  """One quantizable contraction; hashable and free of arrays.

  Attributes:
    name: path of the layer, `blocks/3/mlp/fc1`; unique in the model.
    param: path of the weights, `blocks/3/mlp/fc1/kernel`: that of a parameter, or one of their own
      where a parameter holds the weights of several layers (see `graph.parts`).
    kind: dense, conv, or depthwise (a convolution with one input channel per group).
    in_channels: C, all feature channels of x.
    out_channels: N.
    groups: g, contraction groups; 1 for ordinary layers.
    window: kernel size of a convolution, `()` for dense.
    macs: multiply-accumulates for one example.
    x_dims: dimensions of x that hold the feature channels, most significant first.
    y_dims: dimensions of y that hold the output channels, most significant first, ascending.
    x_window_dims: dimensions of x that a convolution's window moves over, `()` for dense.
    x_ndim, y_ndim: ranks of x and y.
    x_rows: how many entries of x's first dimension belong to one example (a Swin transformer may
      fold windows into the batch); 0 where it is not known to hold the examples. All of them when
      the model was traced with a single example.
    w_shape: shape of w as the contraction takes it.
    w_group_dims, w_in_dims, w_window_dims, w_out_dims: what each dimension of w is. A grouped
      convolution keeps its groups in the output dimension and has no group dimension.
  """

  name: str
  param: str
  kind: Kind
  in_channels: int
  out_channels: int
  groups: int
  window: tuple[int, ...]
  macs: int
  x_dims: tuple[int, ...]
  y_dims: tuple[int, ...]
  x_window_dims: tuple[int, ...]
  x_ndim: int
  y_ndim: int
  x_rows: int
  w_shape: tuple[int, ...]
  w_group_dims: tuple[int, ...]
  w_in_dims: tuple[int, ...]
  w_window_dims: tuple[int, ...]
  w_out_dims: tuple[int, ...]

  @property
  def params(self) -> int:
    """Number of weights."""
    return math.prod(self.w_shape)

  @property
  def macs_per_channel(self) -> int:
    """MACs of one example that read one feature channel."""
    return self.macs // self.in_channels

  def canonical(self, w: Array) -> Array:
    """Weights `w_shape` -> `[g, C/g, K, N/g]` (NumPy in, NumPy out)."""
    dims = self.w_group_dims + self.w_in_dims + self.w_window_dims + self.w_out_dims
    w = w.transpose(dims)
    inner, window = self.in_channels // self.groups, math.prod(self.window)
    if self.w_group_dims or self.groups == 1:
      return w.reshape(self.groups, inner, window, self.out_channels // self.groups)
    w = w.reshape(inner, window, self.groups, self.out_channels // self.groups)
    return w.transpose(2, 0, 1, 3)

  def native(self, w: Array) -> Array:
    """Inverse of `canonical`: `[g, C/g, K, N/g]` -> `w_shape`."""
    dims = self.w_group_dims + self.w_in_dims + self.w_window_dims + self.w_out_dims
    if not self.w_group_dims and self.groups > 1:
      w = w.transpose(1, 2, 0, 3)
    w = w.reshape([self.w_shape[d] for d in dims])
    return w.transpose(tuple(int(i) for i in np.argsort(dims)))

  def x_vector(self, v: Array, sizes: tuple[int, ...]) -> Array:
    """Per-channel values `[C]` -> an array that broadcasts against x.

    Args:
      v: `[C]`.
      sizes: the shape of x (only the feature dimensions are read).
    """
    return _spread(v, [sizes[d] for d in self.x_dims], self.x_dims, self.x_ndim)

  def x_rows_vector(self, v: Array, sizes: tuple[int, ...]) -> Array:
    """Per-row, per-channel values `[x.shape[0], C]` -> an array that broadcasts against x."""
    dims = (0, *self.x_dims)
    return _spread(v, [sizes[d] for d in dims], dims, self.x_ndim)

  def w_vector(self, v: Array) -> Array:
    """Per-feature-channel values `[C]` -> an array that broadcasts against w."""
    if self.w_group_dims or self.groups == 1:
      dims = self.w_group_dims + self.w_in_dims
      return _spread(v, [self.w_shape[d] for d in dims], dims, len(self.w_shape))
    v = jnp.repeat(v.reshape(self.groups, -1).T, self.out_channels // self.groups, axis=1)
    dims = self.w_in_dims + self.w_out_dims
    return _spread(v, [self.w_shape[d] for d in dims], dims, len(self.w_shape))

  def y_vector(self, v: Array, sizes: tuple[int, ...]) -> Array:
    """Per-output-channel values `[N]` -> an array that broadcasts against y of shape `sizes`."""
    return _spread(v, [sizes[d] for d in self.y_dims], self.y_dims, self.y_ndim)

  def channels_last(self, x: Array) -> Array:
    """Turns x into `[..., C]`, feature channels flattened into the last dimension."""
    rest = tuple(d for d in range(self.x_ndim) if d not in self.x_dims)
    x = x.transpose(rest + self.x_dims)
    return x.reshape(*x.shape[: len(rest)], self.in_channels)

  def outputs_in_place(self, y: Array) -> Array:
    """Turns `[..., N]` into a dense layer's result; the reverse of `channels_last`, for y."""
    sizes = [self.w_shape[d] for d in self.w_group_dims + self.w_out_dims]
    y = y.reshape(*y.shape[:-1], *sizes)
    rest = tuple(d for d in range(self.y_ndim) if d not in self.y_dims)
    return y.transpose(tuple(int(i) for i in np.argsort((*rest, *self.y_dims))))


def _spread(v: Array, sizes: list[int], dims: tuple[int, ...], ndim: int) -> Array:
  """Reshapes `v` (row-major over `sizes`) so that axis i lies at dimension `dims[i]` of `ndim`."""
  v = v.reshape(sizes).transpose(tuple(int(i) for i in np.argsort(dims)))
  shape = [1] * ndim
  for size, dim in zip(v.shape, sorted(dims), strict=True):
    shape[dim] = size
  return v.reshape(shape)
