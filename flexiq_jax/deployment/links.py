"""Which layer feeds which: where a channel order folds into the producer, and where it gathers.

A layer's contraction is followed by its *tail*: a bias for each output channel, then an activation
function. A kernel's epilogue computes both. Where the tail's result is the input of one other layer
and of nothing else, the two layers are *linked*: the producer's output channels take the consumer's
order offline, and its epilogue emits the consumer's codes. Everywhere else the consumer's quantize
step gathers the channels.

In the models of this project, the inner convolutions of ResNet blocks are linked, fc1 -> fc2 of
MLPs, and the 1x1 convolutions of MobileNet blocks through the depthwise one. Attention's v -> proj
is not linked: its result stays real. But where channel groups are whole heads, the order folds into
queries, keys and values (`graph.reorder`), and nothing is gathered there either.
"""

import collections
import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend.core import JaxprEqn, Literal

from flexiq_jax.deployment import activations
from flexiq_jax.graph import Layer, Traced, aval, reorder
from flexiq_jax.kernels import Activation

_MOVES = ("reshape", "transpose", "squeeze", "slice", "convert_element_type")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
  """What follows a layer's contraction and is computed in its epilogue.

  Attributes:
    bias: static variable of N values, or None.
    activation: none, relu, relu6, gelu or gelu_tanh.
    steps: numbers of the equations that the epilogue replaces.
    out: variable that holds the tail's result.
  """

  bias: Any
  activation: Activation
  steps: tuple[int, ...]
  out: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Feed:
  """Where a layer's input comes from.

  Attributes:
    producer: the only layer that makes it, for this layer alone; None where there is no such layer.
    reason: why there is none, for people to read; empty where there is one.
  """

  producer: str | None
  reason: str = ""


def tails(traced: Traced) -> dict[str, Tail]:
  """Layer name -> its tail."""
  eqns, uses = traced.jaxpr.jaxpr.eqns, readers(traced)
  found = {}
  for i, layer in traced.layers.items():
    out, bias, steps = eqns[i].outvars[0], None, []
    if len(uses[out]) == 1 and uses[out][0] < len(eqns):
      number = uses[out][0]
      bias = reorder.bias(eqns[number], out, layer, traced)
      if bias is not None:
        steps, out = [number], eqns[number].outvars[0]
    matched = activations.match(eqns, uses, out)
    name: Activation = "none"
    if matched:
      name, more, out = matched
      steps += more
    found[layer.name] = Tail(bias=bias, activation=name, steps=tuple(steps), out=out)
  return found


def feeds(traced: Traced, tails: Mapping[str, Tail], producers: Collection[str]) -> dict[str, Feed]:
  """Layer name -> where its input comes from.

  Args:
    traced: the model.
    tails: from `tails`.
    producers: names of the layers that may emit another layer's codes.
  """
  eqns, uses = traced.jaxpr.jaxpr.eqns, readers(traced)
  makers = {v: eqn for eqn in eqns for v in eqn.outvars}
  layers = {layer.name: layer for layer in traced.layers.values()}
  ends = {tail.out: name for name, tail in tails.items()}
  found = {}
  for i, layer in traced.layers.items():
    v = eqns[i].invars[1 - traced.sides[i]]
    while v not in ends and v in makers and _keeps_channels(makers[v]):
      if len(uses[v]) > 1:
        break
      v = makers[v].invars[0]
    reason = _why_not(v, layer, makers, uses, ends, layers, producers)
    found[layer.name] = Feed(producer=None if reason else ends[v], reason=reason)
  return found


def readers(traced: Traced) -> dict[Any, list[int]]:
  """Variable -> numbers of the equations that read it; their count stands for the results."""
  uses: dict[Any, list[int]] = collections.defaultdict(list)
  jaxpr = traced.jaxpr.jaxpr
  for i, eqn in enumerate(jaxpr.eqns):
    for v in eqn.invars:
      if not isinstance(v, Literal):
        uses[v].append(i)
  for v in jaxpr.outvars:
    if not isinstance(v, Literal):
      uses[v].append(len(jaxpr.eqns))
  return uses


def _keeps_channels(eqn: JaxprEqn) -> bool:
  """Whether an equation hands on the last dimension as it is: reshapes of the others."""
  if eqn.primitive.name != "reshape" or eqn.params["dimensions"] is not None:
    return False
  before, after = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape
  return len(before) > 1 and len(after) > 1 and before[-1] == after[-1]


def _why_not(
  v: Any,
  layer: Layer,
  makers: Mapping[Any, JaxprEqn],
  uses: Mapping[Any, Sequence[int]],
  ends: Mapping[Any, str],
  layers: Mapping[str, Layer],
  producers: Collection[str],
) -> str:
  """Why the channels of a layer's input cannot come in its order; empty if they can."""
  if v not in ends:
    return _computed_by(v, makers)
  producer = layers[ends[v]]
  if len(uses[v]) > 1:
    return f"the result of {producer.name} is read elsewhere, too"
  if producer.name not in producers:
    what = "is depthwise" if producer.kind == "depthwise" else "has no kernel with an epilogue"
    return f"{producer.name}, which feeds it, {what}"
  if aval(v).dtype != jnp.float32:
    return f"the result of {producer.name} is rounded to {aval(v).dtype}"
  last = producer.y_dims == (producer.y_ndim - 1,) and layer.x_dims == (layer.x_ndim - 1,)
  if not last or producer.out_channels != layer.in_channels:
    return f"its channels are not the last dimension of the result of {producer.name}"
  return ""


def _computed_by(v: Any, makers: Mapping[Any, JaxprEqn]) -> str:
  """Names the operation whose result reaches the layer through reshapes and the like."""
  while v in makers and makers[v].primitive.name in _MOVES:
    v = makers[v].invars[0]
  if v not in makers:
    return "its input is the model's input"
  name = makers[v].primitive.name
  meaning = {
    "add": ", a residual sum or a normalisation",
    "dot_general": ": attention, across whose heads no order folds (groups.whole_heads keeps them)",
    "custom_jvp_call": ", an activation function of something other than a layer's result",
    "div": ", a mean over positions",
  }
  return f"its input comes from `{name}`{meaning.get(name, '')}"
