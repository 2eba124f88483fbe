"""Methods that spend a budget of bits on a calibrated model; see base.py for what one is.

| method | what it is |
|---|---|
| `uniform` | every layer at the same bits |
| `random` | random layers at more bits while the budget lasts; mean of several plans |
| `clado` | CLADO: pairs of layers by their measured losses, projected, solved |
| `clado_block`, `clado_diagonal` | the same with interactions inside of blocks only; with none |
| `mpqco` | MPQCO's gradient metric |
| `hawq` | HAWQ-v3's traces of the Hessian; layers that meet in an addition are tied |
| `quantune` | QuantuneV2: two runs, the best form of the graph |
| `flexiq_greedy`, `flexiq` | FlexiQ's channel groups, greedily and by the config's own search |
| `ptmq` | PTMQ: rounding and scales of several widths, reconstructed block by block |
| `robustquant` | RobustQuant: the float model finetuned to weights of low kurtosis, then uniform |
| `anyprecision` | any-precision networks: weights in common, a norm for each width, trained |
"""

import importlib

from flexiq_jax.methods.anyprecision import AnyPrecision
from flexiq_jax.methods.base import Details, Method, Plan, Runnable, Shown
from flexiq_jax.methods.channel_groups import FlexiQ, FlexiQGreedy
from flexiq_jax.methods.clado import Clado, CladoBlock, CladoDiagonal
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.hawq import Hawq
from flexiq_jax.methods.mpqco import Mpqco
from flexiq_jax.methods.ptmq import Ptmq
from flexiq_jax.methods.quantune import Quantune
from flexiq_jax.methods.random_plans import Random
from flexiq_jax.methods.robustquant import RobustQuant
from flexiq_jax.methods.start import Start
from flexiq_jax.methods.task import Task
from flexiq_jax.methods.uniform import Uniform

__all__ = [
  "METHODS",
  "Details",
  "Examples",
  "Method",
  "Plan",
  "Runnable",
  "Shown",
  "Start",
  "Task",
  "find",
]

_ALL: tuple[type[Method], ...] = (
  *(FlexiQGreedy, FlexiQ, Uniform, Quantune, Random),
  *(Clado, CladoBlock, CladoDiagonal, Mpqco, Hawq),
  *(Ptmq, RobustQuant, AnyPrecision),
)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


def find(name: str) -> type[Method]:
  """A method by its name in `METHODS`, or by its place, as `package.module:Class`.

  Raises:
    ValueError: there is none.
  """
  if name in METHODS:
    return METHODS[name]
  module, _, attribute = name.partition(":")
  if not attribute:
    raise ValueError(f"{name!r} is not one of {', '.join(METHODS)}, nor package.module:Class")
  try:
    found = getattr(importlib.import_module(module), attribute)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"{name!r} cannot be imported ({error})") from None
  if not (isinstance(found, type) and issubclass(found, Method)):
    raise ValueError(f"{name!r} is no subclass of flexiq_jax.methods.Method")
  return found
