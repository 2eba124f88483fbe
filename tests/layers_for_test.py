"""Single layers of every kind with an exact int64 contraction beside each, and random codes."""

import dataclasses
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.quant import rules


@dataclasses.dataclass(frozen=True)
class Case:
  """One contraction: the model's own, and the same in NumPy integers.

  Attributes:
    contract: `(x, w) -> y` in JAX.
    exact: `(x, w) -> y` on int64 arrays.
    x, w: shapes.
  """

  contract: Callable
  exact: Callable
  x: tuple[int, ...]
  w: tuple[int, ...]

  def apply(self, params, x):
    return self.contract(x, params["w"])

  @property
  def layer(self) -> graph.Layer:
    return self.given_to_a_rule[0]

  @property
  def given_to_a_rule(self) -> tuple[graph.Layer, graph.Contract]:
    """The layer and its contraction."""
    seen = []

    def rule(layer, x, w, contract):
      seen.append((layer, contract))
      return contract(x, w)

    params = {"w": jax.ShapeDtypeStruct(self.w, jnp.float32)}
    x = jax.ShapeDtypeStruct(self.x, jnp.float32)
    jax.eval_shape(graph.with_rule(self.apply, rule), params, x)
    (found,) = seen
    return found


def einsum(spec, x, w, left=False):
  order = (lambda x, w: (w, x)) if left else (lambda x, w: (x, w))
  return Case(
    lambda x, w: jnp.einsum(spec, *order(x, w)), lambda x, w: np.einsum(spec, *order(x, w)), x, w
  )


def conv(x, w, *, stride=1, padding=((0, 0), (0, 0)), dilation=1, groups=1, layout="NHWC"):
  """A 2-D convolution; `x` and the result are in `layout`, weights HWIO."""

  def contract(x, w):
    return jax.lax.conv_general_dilated(
      x,
      w,
      (stride, stride),
      padding,
      rhs_dilation=(dilation, dilation),
      dimension_numbers=(layout, "HWIO", layout),
      feature_group_count=groups,
    )

  def exact(x, w):
    to, back = [layout.index(c) for c in "NHWC"], ["NHWC".index(c) for c in layout]
    x = np.pad(x.transpose(to), ((0, 0), *padding, (0, 0)))
    inner, outer = w.shape[2], w.shape[3] // groups
    rows = range(0, x.shape[1] - dilation * (w.shape[0] - 1), stride)
    columns = range(0, x.shape[2] - dilation * (w.shape[1] - 1), stride)
    y = np.zeros((len(x), len(rows), len(columns), w.shape[3]), np.int64)
    for n in range(y.shape[-1]):
      start = n // outer * inner
      for (i, row), (j, column) in itertools.product(enumerate(rows), enumerate(columns)):
        patch = x[:, row:, column:, start : start + inner]
        patch = patch[:, : dilation * w.shape[0] : dilation, : dilation * w.shape[1] : dilation]
        y[:, i, j, n] = (patch[:, : w.shape[0], : w.shape[1]] * w[None, :, :, :, n]).sum((1, 2, 3))
    return y.transpose(back)

  return Case(contract, exact, x, w)


CASES = {
  "dense": einsum("bc,cn->bn", (3, 10), (10, 4)),
  "dense, two feature dimensions": einsum("bthd,hdn->btn", (3, 2, 3, 4), (3, 4, 5)),
  "dense, shared dimension": einsum("bhd,hde->hbe", (3, 2, 5), (2, 5, 3)),
  "dense, weights on the left": einsum("nc,btc->btn", (3, 2, 7), (4, 7), left=True),
  "convolution": conv((3, 5, 6, 5), (3, 3, 5, 4), stride=2, padding=((1, 1), (0, 2))),
  "dilated": conv((3, 6, 5, 5), (3, 2, 5, 3), padding=((2, 2), (1, 0)), dilation=2),
  "grouped": conv((3, 4, 4, 6), (3, 3, 3, 8), padding=((1, 1), (1, 1)), groups=2),
  "depthwise": conv((3, 4, 4, 5), (3, 3, 1, 10), stride=2, padding=((1, 1), (1, 1)), groups=5),
  "channels first": conv((3, 5, 4, 4), (3, 3, 5, 4), padding=((1, 1), (1, 1)), layout="NCHW"),
  "space first": conv((4, 4, 3, 5), (3, 3, 5, 4), padding=((1, 1), (1, 1)), layout="HWNC"),
}


def codes(q, scale, signed, bits=8):
  """Quantizes by NumPy: int64 codes."""
  lo, hi = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
  lo = -127 if signed and bits == 8 else lo
  return np.clip(np.rint(np.asarray(q, np.float64) / scale), lo, hi).astype(np.int64)


def lowered(q, e, signed, half_even):
  """Values of 4-bit codes in 8-bit steps, by NumPy."""
  exact = q / 2.0**e
  code = np.rint(exact) if half_even else np.floor(exact + 0.5)
  lo, hi = (-8, 7) if signed else (0, 15)
  return (np.clip(code, lo, hi) * 2.0**e).astype(np.int64)


@dataclasses.dataclass
class Random:
  """A quantized layer with random codes, groups and shifts, scales powers of two.

  Attributes:
    q: the layer for `flexiq_jax.quant.rules`.
    params, x: float operands; `x` holds some values beyond the range of the codes.
    w8, w4: int64 weights, as the contraction takes them.
    group: `[C]`, shift: `[J]`.
  """

  q: rules.QLayer
  params: dict
  x: np.ndarray
  w8: np.ndarray
  w4: np.ndarray
  group: np.ndarray
  shift: np.ndarray


def random_layer(case, signed=True, groups=3, seed=0) -> Random:
  rng = np.random.default_rng(seed)
  layer = case.layer
  w8 = rng.integers(-127, 128, case.w)
  shifts = rng.integers(0, 5, case.w)  # any weight shifts, one for each weight even
  w4 = lowered(w8, shifts, True, half_even=True)
  group = rng.permutation(np.arange(layer.in_channels) % groups)
  shift = np.array([4, 2, 0, 1, 3])[:groups]
  x = rng.integers(-280, 281, case.x) if signed else rng.integers(0, 561, case.x)
  x = x * 0.25  # of half steps: ties, and codes beyond the range
  w_scale = 2.0 ** rng.integers(-3, 4, layer.out_channels)
  q = rules.QLayer(
    w=jnp.asarray(w8, jnp.int8),
    w_scale=jnp.asarray(w_scale, jnp.float32),
    x_scale=jnp.float32(0.5),
    low=rules.Low(
      w=jnp.asarray(w4, jnp.int8),
      shift=jnp.asarray(shift[group], jnp.int32),
      group=jnp.asarray(group, jnp.int32),
      bias=jnp.zeros((groups, layer.out_channels), jnp.float32),
    ),
    signed=signed,
  )
  return Random(q, {"w": jnp.zeros(case.w)}, x.astype(np.float32), w8, w4, group, shift)


def scaled(layer, made, acc):
  """What a rule returns for an integer result; exact, since scales are powers of two."""
  assert np.abs(acc).max() < 2**24
  scale = np.asarray(made.q.w_scale, np.float64) * float(made.q.x_scale)
  return acc * np.asarray(layer.y_vector(scale, acc.shape))


# One of each kind whose inputs are few: every row holds all channels.
KINDS = {
  "dense": einsum("bc,cn->bn", (40, 11), (11, 4)),
  "two feature dimensions": einsum("bthd,hdn->btn", (20, 2, 3, 4), (3, 4, 5)),
  "shared": einsum("bhd,hde->hbe", (20, 2, 5), (2, 5, 3)),
  "grouped": conv((9, 3, 3, 6), (1, 1, 3, 8), groups=2),
  "depthwise": conv((9, 3, 3, 5), (1, 1, 1, 10), groups=5),
}
