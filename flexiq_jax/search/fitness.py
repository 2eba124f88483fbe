"""Fitness of masks: how far a mixed model's logits are from the 8-bit model's on search examples.

A population is evaluated in one compiled call: a loop over individuals, and in it one over blocks
of examples. How many are evaluated and on which blocks are run-time values, so nothing compiles
again. Several devices share the individuals. Three forms compute the same distances:

| form | individuals in a forward pass |
|---|---|
| `loop` | one, on a block of many examples |
| `masks` | several under `jax.vmap`, each with weights of its own |
| `split` | several under `jax.vmap`, with weights in common: precisions apart, twice the products |

Distances (`z8`: logits of the 8-bit model, `p8` their softmax):

| name | per example |
|---|---|
| `l2` | `sum (z - z8)^2` |
| `kl` | `sum p8 (log p8 - log p)` |

Any other function of `(z, z8)` will do, or, with labels, a loss of `(z, labels)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexiq_jax import graph
from flexiq_jax.network import Network
from flexiq_jax.orders import Space
from flexiq_jax.quant import check_one_of, rules
from flexiq_jax.search.memory import GIB, fit_block, memory_of

Array = Any

AXIS = "population"  # name of the mesh axis
FORMS = ("loop", "masks", "split")
# Platform -> form, and how many blocks of examples one of its forward passes takes. On a CPU a
# block fills the cores and batched weights are slow. Batched weights make a convolution of as many
# groups as individuals, which NVIDIA's library has not in int8, and a GPU needs more examples than
# a CPU to be busy. The forms were never measured on an accelerator.
DEFAULTS = {"cpu": ("loop", 1), "gpu": ("loop", 16), "tpu": ("masks", 1)}


def l2(z: Array, z8: Array) -> Array:
  """Squared distance of logits `[..., K]` -> `[...]`."""
  return jnp.square(z - z8).sum(axis=-1)


def kl(z: Array, z8: Array) -> Array:
  """Kullback-Leibler divergence from the 8-bit model's prediction, logits `[..., K]` -> `[...]`."""
  log_p8 = jax.nn.log_softmax(z8)
  rise = jax.nn.log_softmax(z) - log_p8
  # The sum of p8 (exp(rise) - 1) is 0; with it no term is negative and rounding stays small.
  return (jnp.exp(log_p8) * (jnp.expm1(rise) - rise)).sum(axis=-1)


Distance = Callable[[Array, Array], Array]
DISTANCES: dict[str, Distance] = {"l2": l2, "kl": kl}


class Fitness:
  """Mean distance of mixed models from the 8-bit model; call it with masks.

  Attributes:
    examples: number of search examples.
    forwards: evaluations so far, in passes over all search examples.
    traces: how often the population's function was traced.
    apply, params, model, layers: what is evaluated.
    distance: name of the distance by which a quadratic model may be measured: the one evaluated,
      `l2` where that is a function.
    host_examples, reference: search examples, and the 8-bit model's logits `[n, ..., K]` of them.
    target: what logits are compared with: the reference, or labels.
    platform, form: for which the function is compiled, and how (see above).
    block, blocks: examples in one forward pass, and how many passes they make.
    width: individuals in one forward pass, on each device.
    bytes: device memory of one call, arguments and temporaries, as the compiler counts it.
  """

  def __init__(
    self,
    network: Network,
    model: rules.QModel,
    space: Space,
    examples: Array,
    *,
    distance: str | Distance = "l2",
    labels: Array | None = None,
    memory: float = 4.0,
    capacity: int = 32,
    block: int = 64,
    width: int | None = None,
    form: str | None = None,
    mesh: Mesh | None = None,
  ):
    """Compiles the evaluation and finds block and width that fit the memory budget.

    Args:
      network: the float model.
      model: its quantized layers, those of the space with their 4-bit side.
      space: the channel groups.
      examples: `[n, ...]` search examples, training data.
      distance: a name in `DISTANCES`, or a function `(z [B, ..., K], z8 [B, ..., K]) -> [B, ...]`.
      labels: `[n, ...]`, which the function is given in place of z8.
      memory: budget in GiB for one call on each device.
      capacity: individuals in one call; more are split over calls.
      block: most examples in one forward pass; the budget may lower it. With no form given, a
        platform may take several blocks at once (`DEFAULTS`).
      width: individuals in one forward pass on each device; None: 1 in a loop, else as many as fit.
      form: a name of the table above; None: the platform's (`DEFAULTS`), or, with a width above 1,
        `masks`.
      mesh: devices that share the individuals, with one axis `population`; None: one device.

    Raises:
      ValueError: an unknown distance or form, a distance that is not `[B, ...]`, a loop of several
        individuals, no examples, a count below 1, logits that are not finite, or a budget below
        what one individual on one example takes.
    """
    if not callable(distance):
      check_one_of("distance", distance, tuple(DISTANCES))
    self.platform = network.platform
    self.form, blocks = DEFAULTS[self.platform] if form is None else (form, 1)
    check_one_of("form", self.form, FORMS)
    if width is not None and width > 1 and self.form == "loop":
      if form is not None:
        raise ValueError(f"width: {width}; a loop takes 1, or None")
      self.form = "masks"
    if min(len(examples), capacity, block, 1 if width is None else width) < 1:
      raise ValueError(
        f"examples, capacity, block, width: {len(examples)}, {capacity}, {block}, {width}; at "
        "least 1 of each is accepted"
      )
    self.space, self.examples = space, len(examples)
    self.distance, self.mesh = "l2" if callable(distance) else distance, mesh
    self._metric = distance if callable(distance) else DISTANCES[distance]
    self.forwards, self.traces = 0.0, 0
    self._devices = mesh.devices.size if mesh else 1
    self.capacity = -(-capacity // self._devices) * self._devices
    self.apply, self.params, self.model = network.apply, network.params, model
    self.layers = network.layers
    self.host_examples = np.asarray(examples)
    block = min(block * blocks, self.examples)
    self.reference = self._reference(network, block)
    self.target = self.reference if labels is None else np.asarray(labels)
    given = jax.eval_shape(self._metric, self.reference[:3], self.target[:3])
    if getattr(given, "shape", ())[:1] != self.reference[:3].shape[:1]:
      raise ValueError(
        f"distance: its result for 3 examples has shape {list(getattr(given, 'shape', []))}; "
        "[3] is accepted, a number for each example and no mean over them"
      )
    self._compile(memory, block, width)

  def __call__(self, masks: Array, part: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Fitness of masks.

    Args:
      masks: bool `[P, T]`.
      part: the share of the examples to look at, from and to, in 0..1; rounded to whole blocks.

    Returns:
      float64 `[P]`, mean distance per example; NaN where logits are not finite.
    """
    values = self.per_example(masks, part)
    return values.mean(axis=1, dtype=np.float64)

  def per_example(self, masks: Array, part: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
    """Distance of each mask on each example of `part`, float32 `[P, n]`; see `__call__`."""
    masks = np.asarray(masks)
    if masks.ndim != 2 or masks.shape[1] != self.space.total or masks.dtype != bool:
      raise ValueError(
        f"masks: {masks.dtype} {list(masks.shape)}, expected bool [P, {self.space.total}]"
      )
    if not 0 <= part[0] < part[1] <= 1:
      raise ValueError(f"part: {part}, expected 0 <= from < to <= 1")
    first = min(round(part[0] * self.blocks), self.blocks - 1)
    last = max(round(part[1] * self.blocks), first + 1)
    seen = slice(first * self.block, min(last * self.block, self.examples))
    out = [np.zeros((0, seen.stop - seen.start), np.float32)]
    for start in range(0, len(masks), self.capacity):
      chunk = masks[start : start + self.capacity]
      out.append(self._call(chunk, first, last)[:, seen])
    self.forwards += len(masks) * (seen.stop - seen.start) / self.examples
    return np.concatenate(out)

  def _call(self, masks: np.ndarray, first: int, last: int) -> np.ndarray:
    """One compiled call for up to `capacity` masks, all blocks in `first..last`; `[P, n']`."""
    padded = np.zeros((self.capacity, self.space.total), bool)
    padded[: len(masks)] = masks
    each = self.capacity // self._devices
    # Individual i goes to device i mod D, so that a short population keeps all devices busy.
    spread = np.arange(self.capacity).reshape(each, self._devices).T.ravel()
    counts = np.array([len(range(d, len(masks), self._devices)) for d in range(self._devices)])
    out = self._run(
      self._put(padded[spread], sharded=True),
      self._put(counts.astype(np.int32), sharded=True),
      self._put(np.array([first, last], np.int32)),
      *self._constants,
    )
    if self.mesh is not None and jax.process_count() > 1:
      out = multihost_utils.process_allgather(out, tiled=True)
    result = np.empty((self.capacity, self.blocks * self.block), np.float32)
    result[spread] = np.asarray(out).reshape(self.capacity, -1)
    return result[: len(masks)]

  def _reference(self, network: Network, step: int) -> np.ndarray:
    """Logits `[n, ..., K]` of the 8-bit model on the search examples."""
    none = self.space.split(np.zeros(self.space.total, bool))
    examples = self.host_examples[np.arange(-(-self.examples // step) * step) % self.examples]
    parts = [
      network.mixed(self.model, none, examples[i : i + step]) for i in range(0, len(examples), step)
    ]
    if not hasattr(parts[0], "ndim") or parts[0].ndim < 2:
      what = getattr(parts[0], "shape", type(parts[0]).__name__)
      raise ValueError(
        f"network: its result is {what}, expected logits [n, ..., K]; quantize a function that "
        "returns them alone"
      )
    reference = np.concatenate([np.asarray(part) for part in parts])[: self.examples]
    if not np.isfinite(reference).all():
      raise ValueError("model: the 8-bit model's logits are not finite on the search examples")
    return reference

  def _put(self, value: Any, sharded: bool = False) -> Array:
    """A value on the device, or on all devices of the mesh."""
    if self.mesh is None:
      return jnp.asarray(value)
    sharding = NamedSharding(self.mesh, PartitionSpec(AXIS) if sharded else PartitionSpec())
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

  def _compile(self, memory: float, block: int, width: int | None) -> None:
    """Finds block and width and compiles `_run`."""
    budget, each = memory * GIB, self.capacity // self._devices
    wide = min(width or 1, each)

    def attempt(block: int):
      nonlocal wide
      while True:
        run, constants, used = self._attempt(block, wide)
        if used <= budget or wide == 1:
          return (run, constants), used
        wide //= 2

    what = f"one individual on one example, with the {self.examples} search examples,"
    block, (run, constants), used = fit_block(attempt, block, memory, what)
    if width is None and self.form != "loop":
      arguments = sum(a.nbytes for a in jax.tree.leaves(constants))
      guess = int((budget - arguments) // max(used - arguments, 1))
      while (wide := min(guess, each)) > 1:
        run_wide, constants_wide, used_wide = self._attempt(block, wide)
        if used_wide <= budget:
          run, constants, used = run_wide, constants_wide, used_wide
          break
        guess = wide // 2
    self._run, self._constants, self.bytes = run, constants, int(used)
    self.block, self.width = block, max(wide, 1)
    self.blocks = -(-self.examples // block)

  def _attempt(self, block: int, width: int) -> tuple[Any, tuple, int]:
    """The compiled function for a block and a width, its constant arguments, and its memory."""
    blocks = -(-self.examples // block)
    rows = np.arange(blocks * block) % self.examples  # the last block repeats examples
    examples, target = (
      a[rows].reshape(blocks, block, *a.shape[1:]) for a in (self.host_examples, self.target)
    )
    values = (examples, target, self.model, self.params)
    constants = jax.tree.map(self._put, values)
    one = distance_of(
      self.apply, self.space, self._metric, split=self.form == "split", platform=self.platform
    )
    population = population_of(one, width=width, mesh=self.mesh)

    def run(*arguments):
      self.traces += 1
      return population(*arguments)

    arguments = (
      self._put(np.zeros((self.capacity, self.space.total), bool), sharded=True),
      self._put(np.zeros(self._devices, np.int32), sharded=True),
      self._put(np.zeros(2, np.int32)),
      *constants,
    )
    compiled = jax.jit(run).lower(*arguments).compile()
    return compiled, constants, memory_of(compiled)


def distance_of(
  apply: graph.Apply,
  space: Space,
  distance: str | Distance,
  *,
  split: bool = False,
  platform: str | None = None,
) -> Callable[..., Array]:
  """`(mask bool [T], examples [B, ...], target [B, ..., K], model, params) -> float32 [B]`.

  For the arguments see `Fitness`; for `split` and `platform` `rules.mixed_rule`.
  """
  metric = distance if callable(distance) else DISTANCES[distance]

  def one(mask, examples, target, model, params):
    rule = rules.mixed_rule(model, space.split(mask), split=split, platform=platform)
    d = metric(graph.with_rule(apply, rule)(params, examples), target)
    return d.reshape(len(examples), -1).sum(axis=1)  # of maps of logits each place counts

  return one


def population_of(
  one: Callable[..., Array], *, width: int, mesh: Mesh | None = None
) -> Callable[..., Array]:
  """All individuals of a population on all blocks of examples, in one function.

  Args:
    one: from `distance_of`.
    width: individuals in one forward pass.
    mesh: devices that share the individuals; None: one device.

  Returns:
    `(masks, counts, span, examples, target, model, params)`: bool `[P, T]`; int32 `[D]`,
    individuals on each device that count; int32 `[2]`, first block and the one after the last;
    `[J, B, ...]`; `[J, B, ..., K]`; layers; parameters -> float32 `[P, J, B]`, zero elsewhere.
  """
  many = jax.vmap(one, (0, None, None, None, None)) if width > 1 else None

  def run(masks, counts, span, examples, target, model, params):
    # Loops of whole widths: the last one may be evaluated partly for nothing.
    padding = -len(masks) % width
    masks = jnp.concatenate([masks, jnp.zeros((padding, masks.shape[1]), bool)])
    out = jnp.zeros((len(masks), *examples.shape[:2]), jnp.float32)

    def individuals(i, out):
      chosen = jax.lax.dynamic_slice_in_dim(masks, i * width, width)

      def block_of(j, out):
        if many is None:
          d = one(chosen[0], examples[j], target[j], model, params)[None]
        else:
          d = many(chosen, examples[j], target[j], model, params)
        return jax.lax.dynamic_update_slice(out, d[:, None], (i * width, j, 0))

      return jax.lax.fori_loop(span[0], span[1], block_of, out)

    loops = (counts[0] + width - 1) // width
    out = jax.lax.fori_loop(0, loops, individuals, out)
    return out[: len(out) - padding]

  if mesh is None:
    return run
  sharded, same = PartitionSpec(AXIS), PartitionSpec()
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(sharded, sharded, same, same, same, same, same),
    out_specs=sharded,
    check_vma=False,
  )


def population_mesh() -> Mesh | None:
  """All devices of all processes, for `Fitness`; None where there is one."""
  if jax.device_count() == 1:
    return None
  return jax.make_mesh((jax.device_count(),), (AXIS,))
