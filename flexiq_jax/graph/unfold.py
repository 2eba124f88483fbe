"""Convolutions written out over the positions of their window.

At one position of its window a convolution reads a slice of the padded image. Two ways of putting
the slices together replace a backend's own convolution where that one is slow or missing:

* `multiply_add`, for depthwise convolutions: the sum of `slice * w[position]`, one fused loop;
* `patch_product`, for all others: the slices beside each other times all weights, one matrix
  product (im2col).

The derivative by the images of a depthwise convolution is one, too, with the weights mirrored. The
derivative by the weights is slices times the result's derivative: of a depthwise convolution a
sum of products, of one pixel a matrix product (`differentiable_multiply_add`,
`differentiable_pointwise`).
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Array = Any


def slices(params: Mapping[str, Any], x: Array, window: Sequence[int]) -> list[Array]:
  """What a convolution reads at each position of its window, row-major.

  Args:
    params: of `conv_general_dilated`.
    x: `[B, *space, C]`, padded and dilated already (see `padded`).
    window: its sizes.

  Returns:
    Arrays `[B, *out, C]`.
  """
  strides, dilation = params["window_strides"], params["rhs_dilation"]
  reach = [(k - 1) * d for k, d in zip(window, dilation, strict=True)]
  sizes = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[1:-1], reach, strides, strict=True)]
  pieces = []
  for position in itertools.product(*map(range, window)):
    starts = [i * d for i, d in zip(position, dilation, strict=True)]
    stops = [a + (n - 1) * s + 1 for a, n, s in zip(starts, sizes, strides, strict=True)]
    limits = (x.shape[0], *stops, x.shape[-1])
    pieces.append(lax.slice(x, (0, *starts, 0), limits, (1, *strides, 1)))
  return pieces


def padded(params: Mapping[str, Any], x: Array) -> Array:
  """`[B, *space, C]` with zeros around the image and between its pixels; cut where negative."""
  config = [
    (low, high, dilation - 1)
    for (low, high), dilation in zip(params["padding"], params["lhs_dilation"], strict=True)
  ]
  return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *config, (0, 0, 0)])


def multiply_add(params: Mapping[str, Any], x: Array, w: Array) -> Array:
  """A depthwise convolution as float32 multiply-adds.

  Args:
    params: of `conv_general_dilated`, with as many groups as channels.
    x: codes or real values.
    w: codes or real values, `N / C` outputs for each channel.
  """
  x, w = _channels_last(params, x.astype(jnp.float32), w.astype(jnp.float32))
  window = w.shape[:-2]
  x = padded(params, x)
  outputs = w.shape[-1] // x.shape[-1]
  x = jnp.repeat(x, outputs, axis=-1) if outputs > 1 else x
  y = None
  for position, piece in zip(
    itertools.product(*map(range, window)), slices(params, x, window), strict=True
  ):
    term = piece * w[position].reshape((1,) * (x.ndim - 1) + (-1,))
    y = term if y is None else y + term
  return _in_place(params, y)


def differentiable_multiply_add(params: Mapping[str, Any], x: Array, w: Array) -> Array:
  """`multiply_add` of real values, whose derivatives are as fast as it is.

  Left to itself, XLA's CPU backend sums up each position of the window alone and slowly for the
  weights, and writes a padded image for each position for x.
  """

  @jax.custom_vjp
  def run(x, w):
    return multiply_add(params, x, w)

  def backward(saved, g):
    x, w = saved
    return _by_images(params, x, w, g), _by_weights(params, x, w, g)

  run.defvjp(lambda x, w: (run(x, w), (x, w)), backward)
  return run(x, w)


def differentiable_pointwise(
  params: Mapping[str, Any], convolve: Callable[[Array, Array], Array], x: Array, w: Array
) -> Array:
  """A convolution of one pixel, without groups; its derivative by the weights is a matrix product.

  Left to itself, XLA's CPU backend computes that as a convolution whose window is the whole image,
  which takes up to fifty times as long. For larger windows it is the faster way.

  Args:
    params: of `conv_general_dilated`.
    convolve: the convolution, `(x, w) -> y`.
    x: real values.
    w: real values.
  """

  @jax.custom_vjp
  def run(x, w):
    return convolve(x, w)

  def backward(saved, g):
    x, w = saved
    (by_x,) = jax.vjp(lambda x: convolve(x, w), x)[1](g)
    last, g, window = _operands_of_weights(params, x, w, g)
    (seen,) = slices(params, last, window)
    product = jnp.matmul(seen.reshape(-1, seen.shape[-1]).T, g.reshape(-1, g.shape[-1]))
    return by_x, _as_weights(params, product.reshape(*window, *product.shape), w)

  run.defvjp(lambda x, w: (run(x, w), (x, w)), backward)
  return run(x, w)


def _by_images(params: Mapping[str, Any], x: Array, w: Array, g: Array) -> Array:
  """Derivative of a depthwise convolution by x: one of g with the weights mirrored."""
  numbers = params["dimension_numbers"]
  lhs, rhs, out = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
  reach = lambda sizes, steps: [(n - 1) * d + 1 for n, d in zip(sizes, steps, strict=True)]
  spatial = lambda array, spec: [array.shape[d] for d in spec[2:]]
  image = reach(spatial(x, lhs), params["lhs_dilation"])
  window = reach(spatial(w, rhs), params["rhs_dilation"])
  result = reach(spatial(g, out), params["window_strides"])
  before = [k - 1 - low for k, (low, _) in zip(window, params["padding"], strict=True)]
  sizes = zip(image, window, result, before, strict=True)
  after = [n + k - 1 - m - b for n, k, m, b in sizes]
  mirrored = dict(params) | {
    "window_strides": params["lhs_dilation"],
    "lhs_dilation": params["window_strides"],
    "padding": [*zip(before, after, strict=True)],
    "dimension_numbers": lax.ConvDimensionNumbers(out, rhs, lhs),
  }
  # Every output as a channel of its own; those of one input channel are added up.
  each = multiply_add(mirrored, g, lax.rev(w, rhs[2:]))
  inputs = x.shape[lhs[1]]
  shape = (*each.shape[: lhs[1]], inputs, -1, *each.shape[lhs[1] + 1 :])
  return each.reshape(shape).sum(axis=lhs[1] + 1).astype(x.dtype)


def _by_weights(params: Mapping[str, Any], x: Array, w: Array, g: Array) -> Array:
  """Derivative of a depthwise convolution by its weights, of w's shape and dtype."""
  numbers = params["dimension_numbers"]
  outputs, feature = w.shape[numbers.rhs_spec[0]], numbers.lhs_spec[1]
  repeats = outputs // x.shape[feature]
  x = jnp.repeat(x, repeats, axis=feature) if repeats > 1 else x
  last, g, window = _operands_of_weights(params, x, w, g)
  add = lambda a, b: tuple(i + j for i, j in zip(a, b, strict=True))
  zero, count = jnp.zeros((), jnp.float32), math.prod(window)

  def of_one(sums, example):
    x, g = example
    products = [piece[0] * g for piece in slices(params, x[None], window)]
    # All positions in one loop over the first dimension, whose inner loops are long.
    return add(sums, lax.reduce(tuple(products), (zero,) * count, add, (0,))), None

  # One example at a time, which stays in the cache while all positions are visited.
  start = (jnp.zeros(g.shape[2:], jnp.float32),) * count
  sums, _ = lax.scan(of_one, start, (last, g))
  sums = jnp.stack(sums).reshape(*window, -1, outputs).sum(axis=-2, keepdims=True)
  return _as_weights(params, sums, w)


def _operands_of_weights(
  params: Mapping[str, Any], x: Array, w: Array, g: Array
) -> tuple[Array, Array, list[int]]:
  """What the derivative by the weights multiplies.

  Returns:
    x, float32 `[B, *space, C]` and padded; g as `[B, *out, N]`; the window.
  """
  numbers = params["dimension_numbers"]
  window = [w.shape[d] for d in numbers.rhs_spec[2:]]
  last, _ = _channels_last(params, x.astype(jnp.float32), w)
  g = g.transpose(numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
  return padded(params, last), g, window


def _as_weights(params: Mapping[str, Any], found: Array, w: Array) -> Array:
  """`[*window, C/g, N]` in the dimensions and the dtype of the weights."""
  spec = params["dimension_numbers"].rhs_spec
  order = (*spec[2:], spec[1], spec[0])
  return found.transpose(np.argsort(order)).astype(w.dtype)


def patch_product(params: Mapping[str, Any], x: Array, w: Array, out: Any) -> Array:
  """A convolution as one matrix product over patches; with groups, one product a group.

  Args:
    params: of `conv_general_dilated`.
    x: any dtype.
    w: of the same dtype.
    out: dtype of the sums.
  """
  x, w = _channels_last(params, x, w)
  *window, inner, outputs = w.shape
  pieces = slices(params, padded(params, x), window)
  groups = params["feature_group_count"]
  shape = pieces[0].shape[:-1]
  if groups == 1:
    rows = pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=-1)
    y = lax.dot(
      rows.reshape(-1, rows.shape[-1]), w.reshape(-1, outputs), preferred_element_type=out
    )
    return _in_place(params, y.reshape(*shape, outputs))
  # [g, M, K, C/g] times [g, K, C/g, N/g], the groups in front as matrix products want them.
  rows = jnp.stack(pieces, axis=-2).reshape(-1, len(pieces), groups, inner)
  rows = rows.transpose(2, 0, 1, 3).reshape(groups, -1, len(pieces) * inner)
  w = w.reshape(len(pieces) * inner, groups, outputs // groups).transpose(1, 0, 2)
  y = lax.dot_general(rows, w, (((2,), (1,)), ((0,), (0,))), preferred_element_type=out)
  return _in_place(params, y.transpose(1, 0, 2).reshape(*shape, outputs))


def _channels_last(params: Mapping[str, Any], x: Array, w: Array) -> tuple[Array, Array]:
  """Operands as `[B, *space, C]` and `[*window, C/g, N]`."""
  numbers = params["dimension_numbers"]
  x = x.transpose(numbers.lhs_spec[0], *numbers.lhs_spec[2:], numbers.lhs_spec[1])
  return x, w.transpose(*numbers.rhs_spec[2:], numbers.rhs_spec[1], numbers.rhs_spec[0])


def _in_place(params: Mapping[str, Any], y: Array) -> Array:
  """`[B, *space, N]` in the dimensions that the convolution's result has."""
  batch, feature, *spatial = params["dimension_numbers"].out_spec
  order = [0] * y.ndim
  order[batch], order[feature] = 0, y.ndim - 1
  for i, d in enumerate(spatial):
    order[d] = i + 1
  return y.transpose(order)
