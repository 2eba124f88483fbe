"""Which dimension holds the examples: told by changing one example and seeing what changes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import graph

BATCH, TOKENS, WIDTH = 3, 6, 4


def attend(p, x):
  q = x @ p["q"]
  return jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, x)) @ x


def pool(p, x):
  x = x.reshape(BATCH, 2, 3, WIDTH)
  x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 1, 1), (1, 2, 1, 1), "VALID")
  return jnp.pad(x, ((0, 0), (0, 1), (1, 0), (0, 0))).sum(axis=1)


def roll(p, x):
  x = jnp.roll(x.reshape(BATCH, 2, 3, WIDTH), (1, -1), axis=(1, 2))
  return jnp.flip(x, axis=2)[:, :, ::2]


def windows(p, x):
  """Windows folded into the batch, four tokens each, as Swin transformers do."""
  x = jnp.concatenate([x, x[:, :2]], axis=1)
  return x.reshape(BATCH, 2, 2, 2, WIDTH).transpose(0, 2, 1, 3, 4).reshape(-1, 4, WIDTH)


def norm(p, x):
  x = (x - x.mean(axis=-1, keepdims=True)) * jax.lax.rsqrt(x.var(axis=-1, keepdims=True) + 1e-5)
  return jax.nn.gelu(x) * p["scale"][None, None] + jnp.where(x > 0, x, 0.1 * x)


def looked_up(p, x):
  table = p["scale"][jnp.array([0, 1, 1, 2])]
  return (x[:, np.array([0, 2, 4])] + table[None, None]).argsort(axis=1).astype(jnp.float32)


CONV = ("NHWC", "HWIO", "NHWC")


def tokens(x):
  """Numbers 0 and 1 of the input, `[BATCH, TOKENS]`."""
  return (x[..., 0] > 0).astype(jnp.int32)


def one_by_one(p, x):
  """Each example by itself: its tokens in a table, then those that it chooses itself."""

  def single(x):
    found = p["q"][tokens(x)]
    return jnp.take_along_axis(found, tokens(x)[:3, None], axis=0)

  return jax.vmap(single)(x)


def conv(p, x):
  x = x.reshape(BATCH, 2, 3, WIDTH)
  return jax.lax.conv_general_dilated(x, p["conv"], (1, 1), "SAME", dimension_numbers=CONV)


FOLLOWED = {  # preparation of x, and the entries per example it leaves
  "nothing": (lambda p, x: x, 1),
  "attention": (attend, 1),
  "pool": (pool, 1),
  "roll": (roll, 1),
  "windows": (windows, 2),
  "tokens folded": (lambda p, x: x.reshape(-1, WIDTH), TOKENS),
  "folded and back": (lambda p, x: x.reshape(-1, WIDTH).reshape(BATCH, 2, 3, WIDTH), 1),
  "there and back": (lambda p, x: jnp.tanh(x.transpose(1, 0, 2)).transpose(1, 2, 0)[..., :4], 1),
  "norm": (norm, 1),
  "stacked": (lambda p, x: jnp.stack([x, jnp.tanh(x)])[1], 1),
  "stacked behind": (lambda p, x: jnp.stack([x, jnp.tanh(x)], axis=1).sum(axis=1), 1),
  "gather and sort": (looked_up, 1),
  "convolution": (conv, 1),
  "tokens": (lambda p, x: p["q"][tokens(x)], 1),
  "tokens, checked": (lambda p, x: jnp.take(p["q"], tokens(x), axis=0), 1),
  "columns of a table": (lambda p, x: jnp.take(p["q"], tokens(x), axis=1).transpose(1, 2, 0), 1),
  "one token": (lambda p, x: jnp.take(p["q"], tokens(x)[:, 0], axis=0)[:, None], 1),
  "one-hot": (lambda p, x: jax.nn.one_hot(tokens(x), 4) @ p["q"], 1),
  "tokens folded, looked up": (lambda p, x: p["q"][tokens(x).reshape(-1)], TOKENS),
  "mapped": (one_by_one, 1),
  "scan over channels": (lambda p, x: jnp.cumsum(x, axis=2), 1),
  "token overwritten": (lambda p, x: jax.lax.dynamic_update_slice(x, x[:, :1], (0, 2, 0)), 1),
  "remat": (lambda p, x: jax.checkpoint(lambda x: jnp.sin(jnp.tanh(x)))(x), 1),
}
NOT_FOLLOWED = {
  "tokens first": lambda p, x: x.transpose(1, 0, 2),  # six tokens: a multiple of the batch
  "tokens major": lambda p, x: x.transpose(1, 0, 2).reshape(-1, WIDTH),
  "mixed over the batch": lambda p, x: x + x.sum(axis=0, keepdims=True),
  "summed over the batch": lambda p, x: x.sum(axis=0),
  "largest of the batch": lambda p, x: x.max(axis=(0, 1))[None],
  "added to its transpose": lambda p, x: (x[:, :3] + x[:, :3].transpose(1, 0, 2)).transpose(
    1, 0, 2
  ),
  "overwritten in part": lambda p, x: jax.lax.dynamic_update_slice(
    x.reshape(-1, WIDTH), x[:, 0], (5, 0)
  ),
  "reversed batch": lambda p, x: x[::-1] + x,
  "gathered batch": lambda p, x: x[np.array([0, 0, 1])],
  "looked up in other examples": lambda p, x: x[tokens(x)[:, 0]],
  "tokens first, looked up": lambda p, x: p["q"][tokens(x).T],
  "batch attends": lambda p, x: (
    jnp.einsum("bij,cij->bc", x, x)[:, :, None] * p["scale"][None, None]
  ),
  "running sum over examples": lambda p, x: jnp.cumsum(x, axis=0),
  "sorted over examples": lambda p, x: jnp.sort(x, axis=0),
  "shifted": lambda p, x: jnp.concatenate([x[1:], x[:1]]),
  "padded and cut": lambda p, x: jnp.pad(x, ((1, 0), (0, 0), (0, 0)))[:-1],
  "loop": lambda p, x: jax.lax.fori_loop(0, 2, lambda i, x: jnp.tanh(x), x),
}


def made():
  rng = np.random.default_rng(0)
  shapes = {"q": (4, 4), "scale": (4,), "conv": (3, 3, 4, 4), "last": (4, 5)}
  params = {k: jnp.asarray(rng.normal(size=s), jnp.float32) for k, s in shapes.items()}
  return params, jnp.asarray(rng.normal(size=(BATCH, TOKENS, WIDTH)), jnp.float32)


def last(prepare):
  return lambda p, x: prepare(p, x) @ p["last"]


@pytest.mark.parametrize(("prepare", "rows"), FOLLOWED.values(), ids=FOLLOWED)
def test_examples_are_followed(prepare, rows):
  params, x = made()
  layer = graph.layers(last(prepare), params, x)[-1]
  assert layer.x_rows == rows
  # Another middle example changes the rows said to be its own, and no other.
  one, other = prepare(params, x), prepare(params, x.at[1].set(-x[1] * 1.5))
  changed = np.any(np.asarray(one != other).reshape(len(one), -1), axis=1)
  np.testing.assert_array_equal(changed, np.arange(len(one)) // rows == 1)


@pytest.mark.parametrize("prepare", NOT_FOLLOWED.values(), ids=NOT_FOLLOWED)
def test_everything_else_is_unknown(prepare):
  params, x = made()
  assert graph.layers(last(prepare), params, x)[-1].x_rows == 0


@pytest.mark.parametrize("name", sorted(set(NOT_FOLLOWED) - {"gathered batch"}))
def test_a_single_example_owns_everything(name):
  prepare = NOT_FOLLOWED[name]
  params, x = made()
  layer = graph.layers(last(prepare), params, x[:1])[-1]
  assert layer.x_rows == jax.eval_shape(prepare, params, x[:1]).shape[0]


def test_channels_in_the_first_dimension_leave_no_room_for_examples():
  params, x = made()
  apply = lambda p, x: jnp.einsum("btc,cn->btn", x, p["last"])
  assert graph.layers(apply, params, x)[0].x_rows == 1
  first = lambda p, x: jnp.einsum("cbt,cn->btn", x.transpose(2, 0, 1), p["last"])
  assert graph.layers(first, params, x)[0].x_rows == 0
  assert graph.layers(first, params, x)[0].x_dims == (0,)


def test_inputs_of_another_length_are_not_followed():
  params, x = made()
  apply = lambda p, x: x["a"] @ p["last"] + x["b"].reshape(1, 3, 4).sum() + x["c"]
  given = {"a": x, "b": jnp.ones((12,)), "c": jnp.float32(1)}
  assert graph.layers(apply, params, given)[0].x_rows == 1
  late = lambda p, x: (x["a"] + x["b"].reshape(3, 1, 4) * x["c"]) @ p["last"]
  assert graph.layers(late, params, given)[0].x_rows == 0
