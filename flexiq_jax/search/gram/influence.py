r"""Influence of every channel group on the logits, all of them from one backward pass.

When group g of a layer changes sides (8 to 4 bits, or back), the layer's output changes by a known
`e_g = +-(X4_g W4_g - X_g W_g + bias_g)`, and the logits by about `d_g = J e_g`, with the Jacobian J
of the logits after that layer; roundings count as the identity in it, saturation as a stop
(straight-through). So `v' d_g`, for a vector v over the logits, comes for *all* groups of the model
from one backward pass of v. The squares of many such numbers give the Gram matrix of the effects,

    G = E_v[(v' D)' (v' D)] = D' D     if E[v v'] = 1, D = [d_1 .. d_T],

which predicts the distance of any mask (`surrogate.Quadratic`). Flipping each group and running the
model instead costs T forward passes and is *less* accurate: one group's flip disturbs the roundings
of all layers after it, and those disturbances, which make up most of a single small effect, do not
add up over groups as the effects do (docs/flexiq.md, step E).

| symbol | meaning |
|---|---|
| B, K | examples, logits |
| T, J | channel groups of the model, of one layer |
| k | probes v per example |
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import graph
from flexiq_jax.graph import Contract, Layer
from flexiq_jax.orders import Space
from flexiq_jax.quant import exact, lowering, quantizer, rules
from flexiq_jax.runs import distributed
from flexiq_jax.search.fitness import DISTANCES, Fitness
from flexiq_jax.search.gram.sums import Report, Sums
from flexiq_jax.search.gram.surrogate import Quadratic
from flexiq_jax.search.gram.ties import Ties
from flexiq_jax.search.memory import fit_block, memory_of

Array = Any


def influence_rule(
  model: rules.QModel,
  masks: Mapping[str, Array],
  gates: Mapping[str, Array],
  platform: str | None = None,
) -> rules.Rule:
  """`mixed_rule` with straight-through derivatives, also by what each group would change.

  The value is `mixed_rule`'s. The derivative by `gates[name]`, float32 `[B, J]`, of which the value
  does not depend, is that by a factor on each example's `e_g` (see above).

  Args:
    model: 8-bit layers, those in `masks` with their `low` side.
    masks: layer name -> bool `[J]`, true for groups in 4 bits.
    gates: layer name -> float32 `[B, J]`, any values, for each layer in `masks`.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.

  Raises:
    ValueError: as `mixed_rule`; or a layer's input does not keep examples apart.
  """

  def rule(layer: Layer, x: Array, w: Array, contract: Contract) -> Array:
    del w

    @jax.custom_vjp
    def compute(x, gate, q, mask):
      del gate
      chosen = {} if mask is None else {layer.name: mask}
      mixed = rules.mixed_rule({layer.name: q}, chosen, platform=platform)
      return mixed(layer, x, q.w, contract)

    def forward(x, gate, q, mask):
      return compute(x, gate, q, mask), (x, q, mask)

    def backward(saved, u):
      x, q, mask = saved
      return (*_backward(layer, contract, platform, x, q, mask, u), None, None)

    compute.defvjp(forward, backward)
    if layer.name not in masks:
      return compute(x, None, model[layer.name], None)
    if not layer.x_rows:
      raise ValueError(
        f"layer {layer.name}: the first dimension of its input is not known to hold the examples, "
        "so effects on one example cannot be told apart; write the model for one example and map "
        "it with `jax.vmap`, or search with effects='flips' or method='evolution'"
      )
    return compute(x, gates[layer.name], model[layer.name], masks[layer.name])

  return rule


def _backward(layer: Layer, contract, platform, x, q, mask, u) -> tuple[Array, Array | None]:
  """Derivatives by x and by the gate; `u` is the derivative by the layer's output."""
  u = u.astype(jnp.float32) * layer.y_vector(q.w_scale, u.shape)
  zero = jax.ShapeDtypeStruct(x.shape, jnp.float32)

  def transposed(w):
    forward = lambda a: exact.real_product(layer, a, w, contract, platform)
    return jax.linear_transpose(forward, zero)(u)[0]

  lo, hi = quantizer.code_range(8, q.signed)
  steps = x / q.x_scale
  inside = (steps >= lo - 0.5) & (steps <= hi + 0.5)
  high = transposed(q.w)
  if mask is None:
    return jnp.where(inside, high, 0).astype(x.dtype), None
  low = transposed(q.low.w)
  codes = quantizer.quantize(x, q.x_scale, 8, q.signed)
  shift = layer.x_vector(q.low.shift, x.shape)
  lowered = lowering.lower_activations(codes, shift, q.signed) << shift
  unsaturated = 2 * jnp.abs(lowered - codes) <= (1 << shift)
  in_low = layer.x_vector(mask[q.low.group], x.shape)
  dx = jnp.where(in_low, jnp.where(unsaturated, low, 0), high)
  # v' e_g: the inner product of u with X4_g W4_g - X_g W_g, taken at the input's side.
  change = layer.channels_last(lowered * low - codes * high)
  examples = x.shape[0] // layer.x_rows
  change = change.reshape(examples, -1, layer.in_channels).sum(axis=1)
  member = jax.nn.one_hot(q.low.group, len(mask), dtype=jnp.float32)
  outputs = jnp.moveaxis(u, layer.y_dims, range(-len(layer.y_dims), 0))
  outputs = outputs.reshape(examples, -1, layer.out_channels).sum(axis=1)
  highest = jax.lax.Precision.HIGHEST
  effect = jnp.matmul(change, member, precision=highest)
  effect += jnp.matmul(outputs, q.low.bias.T.astype(jnp.float32), precision=highest)
  effect *= q.x_scale * jnp.where(mask, -1.0, 1.0)[None]
  return jnp.where(inside, dx, 0).astype(x.dtype), effect


def rademacher(key: Array, z: Array) -> Array:
  """Probes for squared distances: signs `[B, K]`, `E[v v'] = 1`."""
  return jax.random.rademacher(key, z.shape, jnp.float32)


def fisher(key: Array, z: Array) -> Array:
  """Probes for the divergence at logits z: `E[v v'] = (diag p - p p') / 2`, its second order.

  With a label y drawn from the prediction p, `one_hot(y) - p` has that covariance (twice).
  """
  labels = jax.random.categorical(key, z)
  return (jax.nn.one_hot(labels, z.shape[-1]) - jax.nn.softmax(z)) / np.float32(np.sqrt(2))


PROBES: dict[str, Callable[[Array, Array], Array]] = {"l2": rademacher, "kl": fisher}


class Influence:
  """Measures quadratic models of a fitness; compiled once for all masks.

  Attributes:
    ties: the groups that count as one.
    forwards_each: cost of one `measure` in forward passes over the search examples, at most. A
      forward and a backward pass count as three, a backward pass as two.
  """

  def __init__(
    self, fitness: Fitness, ties: Ties, *, probes: int = 4, memory: float = 4.0, block: int = 32
  ):
    """Compiles one forward and backward pass for a block of examples.

    Args:
      fitness: what is to be predicted.
      ties: groups that count as one.
      probes: k; with squared distances and K <= k logits, each logit is taken once (exact).
      memory: budget in GiB.
      block: most examples in one pass; the budget may lower it.

    Raises:
      ValueError: no probe, or a budget below what one example takes.
    """
    if probes < 1:
      raise ValueError(f"probes: {probes}; at least 1")
    self._fitness, self.ties = fitness, ties
    self._outputs = fitness.reference.shape[-1]
    flat = fitness.reference.ndim == 2
    self._exact = fitness.distance == "l2" and flat and self._outputs <= probes
    self._probes = self._outputs if self._exact else probes
    self.forwards_each = 3.0 * (self._probes + 1)
    largest = min(block, fitness.examples)
    self.block, self._run, self.bytes = fit_block(
      self._compile, largest, memory, "a backward pass of one example"
    )

  def describe(self) -> str:
    """What a measurement costs, for the user, in one line."""
    total, examples = self.ties.space.total, self._fitness.examples
    what = "channel groups" if self.ties.size == 1 else "ties of groups"
    kind = "(all logits)" if self._exact else "random"
    return (
      f"Gram matrix of {total} {what}: {self._probes} {kind} probes on {examples} examples, as "
      f"much as {self.forwards_each:g} forward passes of the {examples} examples; "
      f"{2 * 8 * total**2 / 2**20:.0f} MiB of matrices, blocks of {self.block} examples"
    )

  def measure(
    self, key: Array, base: np.ndarray, report: Report | None = None
  ) -> tuple[Quadratic, float]:
    """The quadratic model around a mask; several processes measure a part of the examples each.

    Args:
      key: typed random key of the probes.
      base: bool `[T]`, of ties.
      report: called with the share of the work that is done.

    Returns:
      The model, and the share by which its Gram matrix is better shrunk toward its diagonal.
    """
    fitness, total = self._fitness, self.ties.space.total
    examples, reference = fitness.host_examples, fitness.reference
    sums, groups = Sums(total), self.ties.expand(np.asarray(base))
    first = -1 if groups.any() else 0  # around the 8-bit model there is no residual
    for start in distributed.mine(range(0, fitness.examples, self.block)):
      # The last block repeats examples, so that no other shape is compiled.
      rows = np.arange(start, start + self.block) % fitness.examples
      used = min(self.block, fitness.examples - start)
      x, target = examples[rows], reference[rows]
      found = []
      for number in range(first, self._probes):
        probe = jax.random.fold_in(jax.random.fold_in(key, start), number + 1)
        distance, effects = self._run(groups, x, target, probe, number)
        effects = self.ties.sum(np.asarray(effects)[:used])
        if number < 0:
          distances = np.asarray(distance)[:used]
          sums.add_slope(distances, effects.sum(axis=0, dtype=np.float64))
        else:
          found.append(effects)
      effects = np.stack(found, axis=1)  # [b, k, T]
      if not self._exact:
        effects /= np.float32(np.sqrt(self._probes))
      flat = effects.reshape(-1, total)
      sums.add_gram(flat.T @ flat, _squares(effects))
      if report:
        report((start + used) / fitness.examples)
    fitness.forwards += 3.0 * (self._probes - first)
    return sums.model(base, fitness.examples)

  def _compile(self, block: int):
    """One pass over a block, and the memory it takes."""
    fitness = self._fitness
    run = influence_pass(
      fitness.apply,
      fitness.space,
      fitness.distance,
      exact_logits=self._exact,
      platform=fitness.platform,
    )
    examples = fitness.host_examples[:block]
    arguments = (
      *(fitness.model, fitness.params, np.zeros(fitness.space.total, bool), examples),
      *(fitness.reference[:block], jax.random.key(0), 0),
    )
    compiled = jax.jit(run).lower(*arguments).compile()
    used = memory_of(compiled)
    # NumPy scalars and arrays become device arrays of the types that were compiled for.
    call = lambda base, x, target, key, number: compiled(
      fitness.model, fitness.params, base, x, target, key, jnp.asarray(number, jnp.int32)
    )
    return call, used


def influence_pass(
  apply: graph.Apply,
  space: Space,
  distance: str,
  *,
  exact_logits: bool,
  platform: str | None = None,
) -> Callable[..., tuple[Array, Array]]:
  """One forward and one backward pass: distances, and one probe's inner products with all effects.

  Args:
    apply: the float model.
    space: the channel groups.
    distance: a name in `DISTANCES`.
    exact_logits: probe number i is logit i instead of a random vector.
    platform: cpu, gpu or tpu, for which the program is compiled; None is JAX's default backend.

  Returns:
    `(model, params, base, x, target, key, number)`: layers; parameters; bool `[T]`; `[B, ...]`;
    `[B, ..., K]`; typed random key; int32 `[]`, of the probe, negative for the distance's slope ->
    float32 `[B]` and `[B, T]`.
  """
  metric, draw = DISTANCES[distance], PROBES[distance]

  def run(model, params, base, x, target, key, number):
    masks = space.split(base)
    gates = {
      name: jnp.zeros((len(x), size), jnp.float32)
      for name, size in zip(space.names, space.sizes, strict=True)
    }

    def logits(gates):
      rule = influence_rule(model, masks, gates, platform)
      return graph.with_rule(apply, rule)(params, x)

    z, pull = jax.vjp(logits, gates)
    if exact_logits:
      probe = jnp.broadcast_to(jax.nn.one_hot(number, z.shape[-1]), z.shape)
    else:
      probe = draw(key, z)
    slope = jax.grad(lambda z: metric(z, target).sum() / 2)(z)
    (effects,) = pull(jnp.where(number < 0, slope, probe).astype(z.dtype))
    return metric(z, target), jnp.concatenate([effects[n] for n in space.names], axis=1)

  return run


def _squares(effects: np.ndarray) -> np.ndarray:
  """`sum_b a_b * a_b` (elementwise) of `a_b = sum_k p_k p_k'`, effects `[b, k, T]`."""
  k = effects.shape[1]
  first, second = np.triu_indices(k)
  weight = np.where(first == second, 1.0, np.sqrt(2.0)).astype(np.float32)
  # a_b * a_b = sum over k, l of (p_k p_l)(p_k p_l)', so pairs of probes take the probes' place.
  pairs = effects[:, first] * effects[:, second] * weight[None, :, None]
  flat = pairs.reshape(-1, effects.shape[-1])
  return flat.T @ flat
