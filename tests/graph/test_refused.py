"""What is no layer: refused in control flow, listed with the reason elsewhere."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph
from flexiq_jax.quant.rules import float_rule


def loop_while(p, x):
  return jax.lax.while_loop(lambda c: c.sum() < 9, lambda c: c @ p["w"][0], x)


def branch(p, x):
  return jax.lax.cond(x.sum() > 0, lambda x: x @ p["w"][0], lambda x: x, x)


def loop_in_jit(p, x):
  return jax.jit(loop_while)(p, jax.jit(jnp.tanh)(x))


def over_examples(p, x):
  return jax.lax.map(lambda x: x @ p["w"][0], x)


def branch_in_scan(p, x):
  return jax.lax.scan(lambda c, _: (branch(p, c), None), x, length=2)[0]


@pytest.mark.parametrize(
  ("apply", "where"),
  [
    (loop_while, "`while`. How many steps"),
    (loop_in_jit, "`while`. .* a scan or a Python loop"),
    (branch, "`cond`. .* compute both and choose"),
    (branch_in_scan, "`cond`. "),
    (over_examples, "`scan`. It runs over the input .* write it with `jax.vmap`"),
  ],
)
def test_layers_in_control_flow_are_refused(apply, where):
  with pytest.raises(ValueError, match=f"parameter w is contracted inside {where}"):
    graph.layers(apply, {"w": jnp.zeros((4, 3, 3))}, jnp.zeros((2, 3)))


def test_loops_without_layers_are_left_alone():
  def apply(p, x):
    w = jax.lax.fori_loop(0, 2, lambda i, w: w @ w, p["w"])  # parameters alone
    y = jax.lax.scan(lambda c, _: (jnp.tanh(c), None), x @ w, length=2)[0]
    return jax.lax.cond(y.sum() > 1e9, lambda y: y @ y.T @ y, lambda y: y, y)

  params, x = {"w": jnp.eye(3) / 2}, jnp.ones((2, 3))
  (layer,) = graph.layers(apply, params, x)
  assert layer.name == "w"
  run = graph.with_rule(apply, float_rule)
  np.testing.assert_array_equal(run(params, x), apply(params, x))


@pytest.mark.parametrize(
  ("apply", "message"),
  [
    (lambda p, x: x + p["w"], "apply: no layer found: no contraction"),
    (lambda p, x: x @ jnp.ones((3, 3)) + p["w"], r"1 contraction\(s\) use arrays .* closes over"),
    (lambda p, x: x @ x.T, "apply: no layer found"),
    (
      lambda p, x: jnp.einsum("bi,jk->bijk", x, p["w"]),
      "no layer found.* Skipped w: an outer product",
    ),
  ],
)
def test_models_without_layers_are_refused(apply, message):
  with pytest.raises(ValueError, match=message):
    graph.layers(apply, {"w": jnp.zeros((2, 3))}, jnp.zeros((2, 3)))


@pytest.mark.parametrize("x", [jnp.float32(3), {}])
def test_inputs_without_a_batch_are_refused(x):
  with pytest.raises(ValueError, match="x: expected an array with a leading batch dimension"):
    graph.layers(lambda p, x: p["w"] * 2, {"w": jnp.zeros((2, 3))}, x)


def conv(x, w, **kwargs):
  numbers = ("NHWC", "HWIO", "NHWC")
  return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, **kwargs)


SKIPPED = [
  (
    "outer product",
    lambda w, x: jnp.einsum("bhwc,n->bhwcn", x, w),
    (6,),
    "an outer product: no dimension is summed over",
  ),
  (
    "parameter as image",
    lambda w, x: conv(w, x),
    (1, 4, 4, 4),
    "the parameter is the convolution's input, not its kernel",
  ),
  (
    "batch groups",
    lambda w, x: conv(x, w, batch_group_count=2),
    (3, 3, 4, 2),
    "batch_group_count is not 1",
  ),
  (
    "integer codes",
    lambda w, x: jnp.floor(x).astype(jnp.int32) @ w.astype(jnp.int32),
    (4, 3),
    "its activation is int32, not floating point",
  ),
  (
    "ragged",
    lambda w, x: jax.lax.ragged_dot(x[:, 0, 0], w, jnp.array([1, 1], jnp.int32)),
    (2, 4, 3),
    "`ragged_dot_general` is not supported",
  ),
]


@pytest.mark.parametrize(
  ("apply", "shape", "reason"), [s[1:] for s in SKIPPED], ids=[s[0] for s in SKIPPED]
)
def test_skipped_contractions_are_listed_with_their_reason(apply, shape, reason):
  params = {"odd": jnp.ones(shape), "w": jnp.ones((4, 4))}
  both = lambda p, x: (x @ p["w"], apply(p["odd"], x))
  x = jnp.ones((2, 4, 4, 4))
  if shape == (1, 4, 4, 4):
    x = jnp.ones((4, 4, 4, 4))
  assert [layer.name for layer in graph.layers(both, params, x)] == ["w"]
  assert graph.skipped(both, params, x) == (graph.Skipped("odd", reason),)
  got = graph.with_rule(both, float_rule)(params, x)  # computed as the model wrote them
  jax.tree.map(np.testing.assert_array_equal, got, both(params, x))
