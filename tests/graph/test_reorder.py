"""Orders that fold into the layers before: the model with all of them moved is the same model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax import deployment, graph, models
from flexiq_jax.graph import reorder
from flexiq_jax.graph.reorder import Fixed
from flexiq_jax.graph.tracing import trace

HEADS, WIDTH, TOKENS, IN = 4, 3, 5, 6
C = HEADS * WIDTH


def plus(y, bias):
  return y + bias.reshape((1,) * (y.ndim - bias.ndim) + bias.shape)


def dense(p, x):
  return plus(x @ p["kernel"], p["bias"])


def attend(q, k, v, bias=0.0):
  """`[B, T, H, D]` each."""
  scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(WIDTH) + bias
  return jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores), v)


def split_heads(x):
  return x.reshape(*x.shape[:2], -1, WIDTH)


def joined(x):
  return x.reshape(*x.shape[:2], -1)


def separate(p, x):
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  return dense(p["proj"], joined(attend(q, k, v)))


def fused(p, x):
  q, k, v = jnp.moveaxis(dense(p["qkv"], x).reshape(*x.shape[:2], 3, HEADS, WIDTH), 2, 0)
  return dense(p["proj"], joined(attend(q, k, v)))


def heads_outside(p, x):
  """Queries, keys and values as `[heads, 3, channels]`, cut by `split`."""
  parts = dense(p["qkv"], x).reshape(*x.shape[:2], HEADS, 3 * WIDTH)
  return dense(p["proj"], joined(attend(*jnp.split(parts, 3, axis=-1))))


def layer_norm(x, p):
  x = x - x.mean(-1, keepdims=True)
  x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True))
  return x * p["gain"].reshape((1,) * (x.ndim - 1) + (-1,))


def masked(p, x):
  """Normalized queries and keys, a causal mask, scores in a call of their own."""
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  q, k = (layer_norm(a, p) for a in (q, k))
  y = jax.nn.dot_product_attention(q, k, v, is_causal=True)
  return dense(p["proj"], joined(y))


def several_kernels(p, x):
  """Kernels with dimensions of their own for heads, as Flax's attention has them."""
  q, k, v = (plus(jnp.einsum("btc,chd->bthd", x, p[n]["kernel"]), p[n]["bias"]) for n in "qkv")
  return plus(jnp.tensordot(attend(q, k, v), p["proj"]["kernel"], 2), p["proj"]["bias"])


def inside_out(p, x):
  """The channels of proj's input are the heads of each position inside a head, then the next."""
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  return dense(p["proj"], joined(attend(q, k, v).swapaxes(2, 3)))


def grouped_queries(p, x):
  """Two heads of keys and values for four of queries."""
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  q = q.reshape(*q.shape[:2], 2, 2, WIDTH)
  scores = jax.nn.softmax(jnp.einsum("btgrd,bsgd->bgrts", q, k))
  y = jnp.einsum("bgrts,bsgd->btgrd", scores, v)
  return dense(p["proj"], y.reshape(*y.shape[:2], -1))


def one_key(p, x):
  """One head of keys and values for all queries."""
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  scores = jax.nn.softmax(jnp.einsum("bthd,bskd->bhts", q, k))
  return dense(p["proj"], joined(jnp.einsum("bhts,bskd->bthd", scores, v)))


def gated(p, x):
  return dense(p["proj"], jax.nn.silu(dense(p["gate"], x)) * dense(p["up"], x))


def single(p, x):
  """One head of one dimension of its own, and dimensions of one entry after the channels."""
  q, k, v = (dense(p[name], x)[:, :, None] for name in "qkv")
  y = attend(q, k, v)[..., None].transpose(0, 1, 3, 2, 4)
  return dense(p["proj"], jnp.squeeze(y, 4).reshape(*x.shape[:2], -1))


def pooled(p, x):
  return dense(p["proj"], jax.nn.relu(dense(p["up"], x)).mean(axis=1))


def relative(p, x):
  """A learned bias for each distance and head, as Swin's."""
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  distance = np.abs(np.arange(TOKENS)[:, None] - np.arange(TOKENS))
  bias = p["gain"][distance].transpose(2, 0, 1)[None]
  return dense(p["proj"], joined(attend(q, k, v, bias)))


def scaled(p, x):
  return dense(p["proj"], dense(p["up"], x) * p["gain"].reshape(1, 1, -1))


def sizes(**outputs):
  return {name: (IN, n) if isinstance(n, int) else n for name, n in outputs.items()}


QKV = sizes(q=C, k=C, v=C)
# Model: what it does, its kernels but for proj, the run of channels that moves as one.
MODELS = {
  "separate": (separate, QKV, WIDTH),
  "fused": (fused, sizes(qkv=3 * C), WIDTH),
  "heads_outside": (heads_outside, sizes(qkv=3 * C), WIDTH),
  "masked": (masked, QKV, WIDTH),
  "several_kernels": (several_kernels, sizes(**dict.fromkeys("qkv", (IN, HEADS, WIDTH))), WIDTH),
  "inside_out": (inside_out, QKV, HEADS),
  "grouped_queries": (grouped_queries, sizes(q=C, k=C // 2, v=C // 2), 2 * WIDTH),
  "one_key": (one_key, sizes(q=C, k=WIDTH, v=WIDTH), WIDTH),
  "gated": (gated, sizes(gate=C, up=C), 1),
  "relative": (relative, QKV, WIDTH),
  "scaled": (scaled, sizes(up=C), 1),
  "single": (single, QKV, 1),
  "pooled": (pooled, sizes(up=C), 1),
}


# Parameters beside kernels and biases.
GAINS = {"masked": WIDTH, "relative": (TOKENS, HEADS), "scaled": C}


@functools.cache
def network(name):
  """`apply, params, x, traced`."""
  apply, kernels, _ = MODELS[name]
  rng = np.random.default_rng(0)
  last = (HEADS, WIDTH, 7) if name == "several_kernels" else (C, 7)
  params = {
    layer: {
      "kernel": jnp.asarray(rng.normal(size=shape) / 2, jnp.float32),
      "bias": jnp.asarray(rng.normal(size=shape[1:] if layer != "proj" else 7), jnp.float32),
    }
    for layer, shape in {**kernels, "proj": last}.items()
  }
  if name in GAINS:
    params["gain"] = jnp.asarray(rng.normal(size=GAINS[name]), jnp.float32)
  x = jnp.asarray(rng.normal(size=(2, TOKENS, IN)), jnp.float32)
  return apply, params, x, trace(apply, params, x)


def moved(params, traced, change, consumer, order):
  """The same model with the outputs of some layers and the inputs of one in other orders."""
  layers = {layer.name: layer for layer in traced.layers.values()}
  params = {name: dict(p) if isinstance(p, dict) else p for name, p in params.items()}
  for name, outputs in change.outputs.items():
    p, layer = params[name], layers[name]
    p["kernel"] = layer.native(layer.canonical(p["kernel"])[..., outputs])
    p["bias"] = p["bias"].reshape(-1)[outputs].reshape(p["bias"].shape)
  for name, moves in change.params.items():
    params[name] = moves.apply(params[name])
  kernel = layers[consumer].canonical(params[consumer]["kernel"])
  params[consumer]["kernel"] = layers[consumer].native(kernel[:, order])
  return params


def check(name, order):
  apply, params, x, traced = network(name)
  change = reorder.reorder(traced, "proj", order)
  found = apply(moved(params, traced, change, "proj", order), x)
  np.testing.assert_allclose(found, apply(params, x), rtol=1e-4, atol=1e-5)
  return change.outputs


@pytest.mark.parametrize("name", MODELS)
def test_runs_of_channels_that_move_as_one(name):
  apply, params, x, _ = network(name)
  assert graph.run_lengths(apply, params, x)["proj"] == MODELS[name][-1]


@pytest.mark.parametrize("name", MODELS)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_the_model_in_another_order_is_the_same_model(name, seed):
  runs = np.arange(C).reshape(-1, MODELS[name][-1])
  order = np.random.default_rng(seed).permutation(runs).reshape(-1)
  orders = check(name, order)
  assert {*orders} <= {*MODELS[name][1]}
  assert bool(orders) == (not np.array_equal(order, np.arange(C)))


@pytest.mark.parametrize("name", ["separate", "fused", "heads_outside", "several_kernels"])
def test_channels_inside_heads_move_with_the_values_alone(name):
  rng = np.random.default_rng(0)
  heads = [rng.permutation(WIDTH) + WIDTH * h for h in rng.permutation(HEADS)]
  check(name, np.concatenate(heads))
  inside = np.concatenate([rng.permutation(WIDTH) + WIDTH * h for h in range(HEADS)])
  orders = check(name, inside)
  if name in ("separate", "several_kernels"):
    assert {*orders} == {"v"}


@pytest.mark.parametrize("name", ["separate", "fused", "masked", "one_key"])
def test_an_order_across_heads_is_refused(name):
  *_, traced = network(name)
  order = np.arange(C)
  order[[0, WIDTH]] = order[[WIDTH, 0]]
  with pytest.raises(Fixed, match="as those of a head"):
    reorder.reorder(traced, "proj", order)


def test_one_heads_values_that_all_queries_share_keep_their_order():
  *_, traced = network("one_key")
  order = np.arange(C)
  order[[0, 1]] = order[[1, 0]]  # inside the first head alone
  with pytest.raises(Fixed, match="as those of a head"):
    reorder.reorder(traced, "proj", order)
  check("one_key", (np.arange(C).reshape(HEADS, WIDTH)[:, ::-1]).reshape(-1))


def explained(p, x):
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  return dense(p["proj"], joined(attend(q, k, v))), q


def constant(p, x):
  """A distance's weight for each head that is no parameter."""
  bias = np.arange(HEADS * TOKENS**2, dtype=np.float32).reshape(1, HEADS, TOKENS, TOKENS)
  q, k, v = (split_heads(dense(p[name], x)) for name in "qkv")
  return dense(p["proj"], joined(attend(q, k, v, bias)))


REFUSED = {
  "constant": (constant, "a constant would have to move"),
  "taken": (
    lambda p, x: dense(p["proj"], dense(p["v"], x)[..., np.arange(C)[::-1].copy()]),
    "`gather` takes channels by their numbers",
  ),
  "also_a_result": (explained, "read elsewhere"),
  "residual": (
    lambda p, x: (y := dense(p["v"], x)).sum() + dense(p["proj"], jnp.tanh(y)) + y[..., :7],
    "read elsewhere",
  ),
  "input": (
    lambda p, x: dense(p["proj"], jnp.tile(x, 2)) + dense(p["v"], x)[..., :7],
    "`tile`",
  ),
  "sorted": (lambda p, x: dense(p["proj"], jnp.sort(dense(p["v"], x))), "`sort`"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_where_an_order_cannot_be_brought_about(name):
  apply, why = REFUSED[name]
  params = network("separate")[1]
  traced = trace(apply, params, network("separate")[2])
  with pytest.raises(Fixed, match=why):
    reorder.reorder(traced, "proj", np.roll(np.arange(C), WIDTH))
  assert reorder.run_length(traced, "proj") == 0


def test_two_readers_of_one_order():
  """Both would have to take it: one alone cannot."""

  def apply(p, x):
    y = jax.nn.relu(dense(p["v"], x))
    return dense(p["proj"], y) + y @ p["q"]["kernel"].T @ p["k"]["kernel"][:, :7]

  params = network("separate")[1]
  traced = trace(apply, params, network("separate")[2])
  with pytest.raises(Fixed, match="read elsewhere"):
    reorder.reorder(traced, "proj", np.arange(C)[::-1])


@pytest.mark.parametrize(
  ("name", "runs"),
  [
    ("deit_ti", {"attn/proj": 64, "mlp/fc2": 1, "attn/qkv": 0, "mlp/fc1": 0}),
    pytest.param("swin_s", {"attn/proj": 32, "mlp/fc2": 1}, marks=pytest.mark.slow),
    ("resnet20", {"/conv2": 1, "/conv1": 0}),
  ],
)
def test_models(name, runs):
  module = models.create(name)
  x = jax.ShapeDtypeStruct((1, *module.input_shape), jnp.float32)
  apply, params = deployment.fold_shapes(*models.functional(module), x)
  found = graph.run_lengths(apply, params, x)
  for end, run in runs.items():
    own = {r for layer, r in found.items() if layer.endswith(end)}
    assert own == {run}, end
