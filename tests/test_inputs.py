"""What users give, as they give it: accepted where the meaning is clear, else told what to give."""

import functools

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import flexiq_jax as fq
from flexiq_jax import inputs

X = np.ones((6, 4), np.float32)
LABELS = np.arange(6)


@pytest.mark.parametrize(
  ("data", "shapes", "labelled"),
  [
    (X, [(6, 4)], False),
    (jnp.asarray(X), [(6, 4)], False),
    (np.ones((300, 2)), [(128, 2), (128, 2), (44, 2)], False),
    ([X, X[:2]], [(6, 4), (2, 4)], False),
    ((X, X[:2]), [(6, 4), (2, 4)], False),
    ((x for x in (X, X[:2])), [(6, 4), (2, 4)], False),
    ((X, LABELS), [(6, 4)], True),
    ([X, list(range(6))], [(6, 4)], True),
    ([(X, LABELS), (X, LABELS)], [(6, 4), (6, 4)], True),
    ([[X, LABELS], [X, LABELS]], [(6, 4), (6, 4)], True),
    ([X.astype(int), X.astype(int)], [(6, 4), (6, 4)], False),  # two batches of tokens
    ((X.astype(int), X.astype(int)), [(6, 4)], True),  # tokens, and a label for each
    ([X.tolist()], [(6, 4)], False),
  ],
)
def test_examples(data, shapes, labelled):
  found = list(inputs.pairs(data))
  assert [x.shape for x, _ in found] == shapes
  assert all((y is not None) == labelled and (y is None or len(y) == len(x)) for x, y in found)
  assert all(x.dtype in (np.float32, np.int32) for x, _ in found)


def exhausted():
  batches = iter([X])
  next(batches)
  return batches


@pytest.mark.parametrize(
  ("data", "message"),
  [
    (None, r"batches: None; an array \[n, ...\] or an iterable of arrays is accepted"),
    ({"image": X}, "batches: a dict; an array"),
    ("images", "batches: a str; an array"),
    (3, "batches: an int; an array"),
    (len, "batches: the function len; an array"),
    ([], "batches: nothing in it; a generator that was read before"),
    (exhausted(), "batches: nothing in it; a generator that was read before"),
    ([1.0, 2.0], r"batches: number 0: an array of shape \[\]; \[B, ...\] is accepted"),
    (X[:0], r"batches: an array of shape \[0, 4\]"),
    (
      [X, X[:, :3]],
      r"batches: number 1 has no labels, .* of \[3\]; those .* \[4\]",
    ),
    ([X, (X, LABELS)], "batches: number 1 has labels, .* have no labels"),
    ([{"image": X}], r"batches: number 0: a dict; arrays \[B, ...\] of numbers are"),
  ],
)
def test_examples_that_are_refused(data, message):
  with pytest.raises(ValueError, match=message):
    list(inputs.pairs(data))


class Dense(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x)


def dense(params, x):
  return x @ params["w"]


PARAMS = {"w": np.ones((4, 3), np.float32)}


def test_models():
  linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
  _, own = inputs.as_function(linear)
  zero = jax.tree.map(jnp.zeros_like, nnx.state(linear))
  for params in (zero, jax.tree.map(jnp.zeros_like, own)):
    apply, given = inputs.as_function(linear, params)
    assert not np.any(apply(given, X))
  assert np.any(linear(X))  # it is not changed
  net = Dense()
  variables = net.init(jax.random.key(0), X)
  for params in (variables, variables["params"]):
    apply, given = inputs.as_function(net, params)
    np.testing.assert_array_equal(apply(given, X), net.apply(variables, X))
  bound = functools.partial(lambda scale, params, x: scale * dense(params, x), 2.0)
  for function in (dense, jax.jit(dense), jax.tree_util.Partial(dense), bound, net.apply):
    assert inputs.as_function(function, PARAMS) == (function, PARAMS)


MLP = equinox.nn.MLP(4, 3, 2, 1, key=jax.random.key(0))


@pytest.mark.parametrize(
  ("net", "params", "message"),
  [
    (PARAMS, dense, "net: a dict; an NNX module, .* are net and params swapped?"),
    (X, dense, r"net: an array of shape \[6, 4\]; .* are net and params swapped?"),
    (Dense, PARAMS, "net: the class Dense; an NNX module, a Linen module or a function"),
    (dense, None, "params: missing; give the parameters of the function dense"),
    (Dense(), None, "params: missing; give the parameters of a Dense"),
    (dense, dense, "params: the function dense; the model's parameters are accepted"),
    (MLP, PARAMS, r"net: a MLP cannot be called as net\(params, x\) .* as lambda params, x:"),
    (lambda x: x, PARAMS, r"net: the function <lambda> cannot be called as net\(params, x\)"),
  ],
)
def test_models_that_are_refused(net, params, message):
  with pytest.raises(ValueError, match=message):
    inputs.as_function(net, params)


def two(params, x):
  return jax.nn.relu(x @ params["a"]) @ params["b"]


TWO = {"a": np.eye(4, dtype=np.float32), "b": np.ones((4, 3), np.float32)}


@pytest.mark.parametrize(
  ("arguments", "options", "message"),
  [
    ((X, two, TWO), {}, r"net: an array of shape \[6, 4\]; .* are net and params swapped?"),
    ((two, X, TWO), {}, "batches: a dict; an array"),
    ((two, TWO), {}, "batches: None; an array"),
    ((fq.Network(two, TWO, X), TWO, X), {}, r"params: a Network has its own; quantize\(network"),
    ((two, TWO, X), {}, r"names: none of the 2 layers is left .* name some, as names=\('a',\)"),
    ((two, TWO, X), {"names": ()}, "names: empty"),
    ((two, TWO, X), {"names": "c"}, "name: no layer 'c'; closest names"),
  ],
)
def test_quantize_refuses(arguments, options, message):
  with pytest.raises(ValueError, match=message):
    fq.quantize(*arguments, progress=False, **options)


@pytest.fixture(scope="module")
def quantized():
  """A model with two results, on bytes."""

  def apply(params, x):
    z = two(params, x.astype(jnp.float32) / 255)
    return {"logits": z, "scores": (z.sum(axis=-1), jax.nn.softmax(z))}

  x = np.random.default_rng(0).integers(0, 256, (6, 4), np.uint8)
  return fq.quantize(apply, TWO, x, names="b", progress=False), x


def test_bytes_and_several_results(quantized):
  model, x = quantized
  assert model.network.example.dtype == np.uint8
  found, exact = model(x, 0.0), model.network.float(x)
  assert jax.tree.structure(found) == jax.tree.structure(exact)
  np.testing.assert_allclose(found["logits"], exact["logits"], atol=0.05)
  assert model.drops == {}
  assert str(model).endswith("not measured")
  assert {*fq.deploy(model, sizes=(6,))(x)} == {"logits", "scores"}


@pytest.mark.parametrize("use", [fq.improve, lambda model: fq.evaluate(model, X.astype(np.uint8))])
def test_logits_are_asked_for_where_they_are_needed(quantized, use):
  with pytest.raises(ValueError, match=r"its result is a? ?dict.*returns them alone"):
    use(quantized[0])


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan"), "half", None])
def test_ratios_that_are_none(quantized, ratio):
  with pytest.raises(ValueError, match=r"ratio: .*0\.\.1"):
    quantized[0](quantized[1], ratio)
