"""A training loop that can be killed at any time: parameters, a loss, an optimizer, epochs of data.

A run is a function of the initial state, the data and the seed: the batches of epoch e depend on e
only, the random numbers of step t on (seed, t) only. A killed run that is started again with the
same `checkpoint_dir` therefore ends with the same bits as one that was never stopped.

The loop knows neither models nor labels: what a batch is, which loss it has and what an epoch's
entry in the log says is up to its user.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct

from flexiq_jax.runs.checkpoint import Checkpoints

# (params, rest, key, batch) -> (loss, (rest, metrics)): the batch's mean loss, float32 []; the rest
# after the step; metrics by name, float32 [], which add up over the batches of an epoch.
Loss = Callable[[Any, Any, jax.Array, Any], tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]]
# (key, batch) -> what the loss takes.
Prepare = Callable[[jax.Array, Any], Any]


class Data(Protocol):
  """Batches in epochs, as `data.Epochs` has them.

  An epoch is what lies between two entries of the log; it need not be the whole training set.
  """

  @property
  def steps(self) -> int:
    """Batches in an epoch."""
    ...

  def epoch(self, epoch: int) -> Iterable[Any]:
    """The batches of an epoch, 1 for the first: pytrees of arrays, the same at each call."""
    ...


@struct.dataclass
class State:
  """What training changes and a checkpoint holds.

  Attributes:
    params: pytree of arrays that are trained.
    rest: pytree of arrays that are carried along, as batch statistics.
    optimizer: the optimizer's state.
  """

  params: Any
  rest: Any
  optimizer: optax.OptState


@dataclasses.dataclass(frozen=True, kw_only=True)
class Epoch:
  """What the steps of one epoch gave.

  Attributes:
    epoch: 1 for the first.
    step: optimizer steps so far.
    loss: mean over the epoch's steps.
    totals: the loss function's metrics, summed over the epoch's steps.
  """

  epoch: int
  step: int
  loss: float
  totals: Mapping[str, float]


class DivergedError(ValueError):
  """The loss is no longer finite."""


def train(
  loss: Loss,
  params: Any,
  rest: Any,
  optimizer: optax.GradientTransformation,
  data: Data,
  *,
  epochs: int,
  seed: int,
  entry: Callable[[Epoch, State], dict[str, Any]],
  run: Mapping[str, Any],
  checkpoint_dir: str | os.PathLike[str] | None = None,
  checkpoint_every: int = 1,
  progress: Callable[[dict[str, Any]], None] | None = None,
  before: Callable[[int, State], State] | None = None,
  prepare: Prepare | None = None,
  parts: int = 1,
) -> tuple[State, list[dict[str, Any]]]:
  """Trains up to a number of epochs, from the last checkpoint on where there is one.

  Args:
    loss: the loss function; it is compiled with the optimizer into one step.
    params: initial values of what is trained.
    rest: initial values of what is carried along.
    optimizer: with its schedule.
    data: the batches.
    epochs: how many in all.
    seed: of the random numbers of the steps, a non-negative integer.
    entry: makes the log's entry of an epoch from the state after it, values that JSON holds.
    run: what has to be equal for a checkpoint to be of the same run, as JSON gives it back.
    checkpoint_dir: folder of checkpoints.
    checkpoint_every: epochs between checkpoints; the last epoch is always saved.
    progress: called with each entry of the log once its checkpoint is written.
    before: called with an epoch's number before its steps, gives the state that they start from; a
      function of its arguments, so that a resumed run gets the same.
    prepare: see `make_step`.
    parts: see `make_step`.

  Returns:
    The trained state, and the log of all epochs, those before a resume too.

  Raises:
    DivergedError: an epoch's loss is not finite; the epoch before is saved.
    ValueError: checkpoint_dir belongs to another run.
  """
  state = State(params=params, rest=rest, optimizer=optimizer.init(params))
  log: list[dict[str, Any]] = []
  step_fn = make_step(loss, optimizer, seed, prepare, parts)
  checkpoints = Checkpoints(checkpoint_dir) if checkpoint_dir is not None else None

  def save(epoch: int, state: State) -> None:
    if checkpoints is not None and epoch not in checkpoints.steps():
      checkpoints.save(epoch, state, {"run": dict(run), "log": log})

  with checkpoints or contextlib.nullcontext():
    found = None if checkpoints is None else checkpoints.restore_latest(state)
    if checkpoints is not None and found is not None:
      _require_same_run(found.metadata["run"], run, checkpoints.directory)
      state, log = found.tree, found.metadata["log"]
    for epoch in range(len(log) + 1, epochs + 1):
      last_good, first = state, (epoch - 1) * data.steps
      if before is not None:
        state = before(epoch, state)
      sums: Any = None
      for step, batch in enumerate(data.epoch(epoch), first):
        state, values = step_fn(state, batch, np.int32(step))
        sums = values if sums is None else jax.tree.map(jnp.add, sums, values)
      total, totals = jax.tree.map(float, sums)
      value, last = total / data.steps, epoch * data.steps
      if not math.isfinite(value):
        if epoch > 1:
          save(epoch - 1, last_good)
        raise DivergedError(f"loss is {value} in epoch {epoch}: training diverged")
      log.append(entry(Epoch(epoch=epoch, step=last, loss=value, totals=totals), state))
      if epoch % checkpoint_every == 0 or epoch == epochs:
        save(epoch, state)
      if progress is not None:
        progress(log[-1])
  return state, log


def make_step(
  loss: Loss,
  optimizer: optax.GradientTransformation,
  seed: int,
  prepare: Prepare | None = None,
  parts: int = 1,
) -> Callable[[State, Any, Any], tuple[State, tuple[jax.Array, dict[str, jax.Array]]]]:
  """The training step: (state, batch, step) -> (state, (loss, metrics)).

  Args:
    loss: as in `train`.
    optimizer: as in `train`.
    seed: as in `train`.
    prepare: what is done to a batch once, whatever its parts.
    parts: above 1, the loss is taken of `(part, batch)` for each part 0, 1, ... and the step goes
      by the mean of their gradients; losses are averaged, metrics added up. A part's forward and
      backward pass end before those of the next begin, so memory holds one part at a time; one
      program of all parts would hold several.
  """

  def key_of(step):
    return jax.random.fold_in(jax.random.key(seed), step)

  @jax.jit
  def gradient_fn(state, key, batch):
    return jax.value_and_grad(loss, has_aux=True)(state.params, state.rest, key, batch)

  @jax.jit
  def update(state, gradient, rest):
    gradient = jax.tree.map(lambda g: g / parts, gradient)
    updates, moments = optimizer.update(gradient, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    return State(params=params, rest=rest, optimizer=moments)

  @jax.jit
  def whole(state, batch, step):
    key = key_of(step)
    batch = batch if prepare is None else prepare(key, batch)
    (value, (rest, metrics)), gradient = gradient_fn(state, key, batch)
    return update(state, gradient, rest), (value, metrics)

  prepared = jax.jit(prepare) if prepare is not None else lambda key, batch: batch

  def in_parts(state, batch, step):
    key = key_of(step)
    batch = prepared(key, batch)
    of = lambda part: gradient_fn(state, key, (np.int32(part), batch))
    (value, (rest, metrics)), gradient = of(0)
    for part in range(1, parts):
      (more, (rest, further)), slope = of(part)
      value, metrics, gradient = _add((value, metrics, gradient), (more, further, slope))
    return update(state, gradient, rest), (value / parts, metrics)

  return whole if parts == 1 else in_parts


@jax.jit
def _add(a, b):
  return jax.tree.map(jnp.add, a, b)


def _require_same_run(saved: Mapping[str, Any], run: Mapping[str, Any], directory: Path) -> None:
  for field in saved.keys() | run.keys():
    if saved.get(field) != run.get(field):
      raise ValueError(
        f"checkpoint_dir {directory} is of a run with {field} = {saved.get(field)}; this one "
        f"has {run.get(field)}: give the same value, or another folder"
      )
