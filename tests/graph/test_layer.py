"""`Layer`: every weight and channel in its place, whatever the contraction looks like."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import graph
from flexiq_jax.graph.describe import leaf_paths


def only_layer(contract, w, x):
  """The layer of a model that is one contraction."""
  shapes = (jax.ShapeDtypeStruct(w, jnp.float32), jax.ShapeDtypeStruct(x, jnp.float32))
  (layer,) = graph.layers(lambda p, x: contract(x, p["w"]), {"w": shapes[0]}, shapes[1])
  return layer


@st.composite
def einsums(draw):
  """An einsum `x, w -> y` with shuffled dimensions: (spec, sizes of each letter)."""
  shared, inner, outer = (
    draw(st.sampled_from(choices)) for choices in (("", "g", "gh"), ("c", "cd"), ("", "n", "nm"))
  )
  sizes = {letter: draw(st.integers(1, 4)) for letter in "tghcdnm"} | {"b": 2}
  x = "b" + "".join(draw(st.permutations("t" + shared + inner)))
  w = "".join(draw(st.permutations(shared + inner + outer)))
  y = "".join(draw(st.permutations("bt" + shared + outer)))
  left = draw(st.booleans())
  return (f"{w},{x}->{y}" if left else f"{x},{w}->{y}"), left, sizes


@settings(deadline=None, max_examples=40)
@given(einsums())
def test_any_einsum_is_the_canonical_matrix_product(case):
  spec, left, sizes = case
  operands, _ = spec.split("->")
  w_letters, x_letters = operands.split(",") if left else reversed(operands.split(","))
  shape = lambda letters: tuple(sizes[c] for c in letters)
  recorded = []

  def apply(p, x):
    return jnp.einsum(spec, *((p["w"], x) if left else (x, p["w"])))

  def rule(layer, x, w, contract):
    recorded.append((layer, x, w, contract(x, w)))
    return recorded[-1][-1]

  rng = np.random.default_rng(0)
  x = rng.integers(-9, 10, shape(x_letters)).astype(np.float32)
  w = rng.integers(-9, 10, shape(w_letters)).astype(np.float32)
  out = graph.with_rule(apply, rule)({"w": w}, x)
  np.testing.assert_array_equal(
    out, np.einsum(operands + "->" + spec.split("->")[1], *((w, x) if left else (x, w)))
  )
  layer, seen_x, seen_w, y = recorded[0]
  size = lambda letters: int(np.prod([sizes[c] for c in letters]))
  shared = set(x_letters) & set(w_letters) & set(spec.split("->")[1])
  inner = (set(x_letters) & set(w_letters)) - shared
  assert layer.groups == size(shared)
  assert layer.in_channels == size(shared | inner)
  assert layer.out_channels == size(set(w_letters) - inner)
  assert layer.macs == size("t" + "".join(set(w_letters)))
  assert layer.params == w.size
  # y[..., n] = sum over the channels of n's contraction group, in the layer's own numbering.
  kernel = layer.canonical(np.asarray(seen_w))
  assert kernel.shape == (
    layer.groups,
    layer.in_channels // layer.groups,
    1,
    layer.out_channels // layer.groups,
  )
  columns = np.asarray(layer.channels_last(np.asarray(seen_x)))
  columns = columns.reshape(-1, layer.groups, layer.in_channels // layer.groups)
  want = np.einsum("rgc,gcn->rgn", columns, kernel[:, :, 0]).reshape(-1, layer.out_channels)
  rest = [d for d in range(layer.y_ndim) if d not in layer.y_dims]
  got = np.asarray(y).transpose((*rest, *layer.y_dims)).reshape(-1, layer.out_channels)
  np.testing.assert_array_equal(got, want)
  check_vectors(layer, seen_x.shape, y.shape)


@settings(deadline=None, max_examples=30)
@given(
  st.integers(1, 3),
  st.integers(1, 3),
  st.integers(1, 3),
  st.sampled_from([(1,), (3,), (1, 1), (2, 3)]),
  st.booleans(),
)
def test_any_convolution_is_the_canonical_sum_over_its_window(groups, inner, outer, window, last):
  """Grouped or not, 1-D or 2-D, channels last or first: one output position by hand."""
  space = "HW"[: len(window)]
  numbers = (
    ("N" + space + "C", space + "IO", "N" + space + "C")
    if last
    else ("NC" + space, "OI" + space, "NC" + space)
  )
  rng = np.random.default_rng(0)
  shapes = {"I": inner, "O": groups * outer, "N": 2, "C": groups * inner} | dict(
    zip(space, window, strict=True)
  )
  w = rng.integers(-9, 10, [shapes[c] for c in numbers[1]]).astype(np.float32)
  x = rng.integers(-9, 10, [shapes[c] for c in numbers[0]]).astype(np.float32)
  conv = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (1,) * len(window), "VALID", dimension_numbers=numbers, feature_group_count=groups
  )
  layer = only_layer(conv, w.shape, x.shape)
  assert (layer.in_channels, layer.out_channels) == (groups * inner, groups * outer)
  assert (layer.groups, layer.window) == (groups, window)
  assert layer.kind == ("depthwise" if inner == 1 and groups > 1 else "conv")
  assert layer.macs == outer * groups * inner * int(np.prod(window))  # the window fits once
  kernel = layer.canonical(w)
  np.testing.assert_array_equal(layer.native(kernel), w)
  # [2, window, C]: positions of the window are in the same order in x and in w.
  patch = np.asarray(layer.channels_last(x)).reshape(2, -1, groups, inner)
  want = np.einsum("bkgc,gckn->bgn", patch, kernel).reshape(2, -1)
  y = np.asarray(conv(x, w))
  np.testing.assert_array_equal(y.reshape(2, -1), want)
  check_vectors(layer, x.shape, y.shape)


def check_vectors(layer, x_shape, y_shape):
  """Per-channel values land on their channels in x, w and y."""
  channels = np.arange(layer.in_channels)
  spread = np.broadcast_to(layer.x_vector(channels, x_shape), x_shape)
  assert np.all(np.asarray(layer.channels_last(spread)) == channels)
  if 0 not in layer.x_dims:
    rows = np.arange(x_shape[0])[:, None] * 100 + channels
    spread = np.broadcast_to(layer.x_rows_vector(rows, x_shape), x_shape)
    for i in range(x_shape[0]):
      assert np.all(np.asarray(layer.channels_last(spread))[i] == rows[i])
  spread = np.broadcast_to(layer.w_vector(jnp.asarray(channels)), layer.w_shape)
  canonical = layer.canonical(spread)
  want = channels.reshape(layer.groups, -1, 1, 1)
  np.testing.assert_array_equal(canonical, np.broadcast_to(want, canonical.shape))
  np.testing.assert_array_equal(layer.native(canonical), spread)
  outputs = np.arange(layer.out_channels)
  spread = np.broadcast_to(layer.y_vector(outputs, y_shape), y_shape)
  rest = [d for d in range(layer.y_ndim) if d not in layer.y_dims]
  last = spread.transpose((*rest, *layer.y_dims)).reshape(-1, layer.out_channels)
  assert np.all(last == outputs)


def test_macs_of_strided_dilated_and_padded_convolutions_count_every_position():
  numbers = ("NHWC", "HWIO", "NHWC")
  conv = lambda x, w: jax.lax.conv_general_dilated(
    x, w, (2, 1), ((1, 1), (0, 3)), rhs_dilation=(1, 2), dimension_numbers=numbers
  )
  layer = only_layer(conv, (3, 3, 5, 7), (4, 9, 8, 5))
  height, width = (9 + 2 - 3) // 2 + 1, 8 + 3 - 5 + 1
  assert layer.macs == height * width * 3 * 3 * 5 * 7
  assert layer.macs_per_channel * 5 == layer.macs
  assert layer.x_window_dims == (1, 2)


def test_layers_are_static_and_hashable():
  layer = only_layer(lambda x, w: x @ w, (3, 4), (2, 3))
  assert hash(layer) == hash(only_layer(lambda x, w: x @ w, (3, 4), (8, 3)))
  with pytest.raises(dataclasses.FrozenInstanceError):
    layer.macs = 1


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Attention:
  """Parameters whose names are those that Flax gives to a variable's content."""

  query: jax.Array
  value: jax.Array


def test_a_parameter_called_value_keeps_its_name():
  z = jnp.zeros(1)
  params = {"plain": {"key": z, "value": z}, "attn": Attention(z, z), "only": {"value": z}}
  keys = [keys for keys, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
  assert sorted(leaf_paths(keys)) == [
    "attn/query",
    "attn/value",
    "only/value",
    "plain/key",
    "plain/value",
  ]


def test_two_parameters_of_one_path_are_refused():
  keys = jax.tree_util.tree_flatten_with_path({"a": {"b": 1}, "a/b": 2})[0]
  with pytest.raises(ValueError, match="params: several leaves have the path 'a/b'"):
    leaf_paths([k for k, _ in keys])
