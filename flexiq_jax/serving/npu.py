"""Cycles of a layer on a weight-stationary systolic array that switches precision within a layer.

FlexiQ's own NPU extends DNNWeaver's array; its details are not public. This is a model of its kind:
an R x C array holds a tile of weights, activations stream through, and one boundary for each layer
says how many of its feature channels, in the order of the schedule, run in 4 bits.

A fold, one tile of weights, takes R cycles to load the weights, and from the first activation in
to the last sum out T + R + C - 2. With `ceil(K / R) ceil(N / C)` folds this is, less one, what
SCALE-Sim 3 counts: `folds (2 R + C + T - 2) - 1`.

4 bits let a cell hold `factor` weights along K, so a fold covers `factor R` rows of K: 2 with two
narrow multipliers in place of a wide one, 4 as in Bit Fusion (ISCA 2018), whose cells split both
operands: (8 / 4) (8 / 4). The two parts of a layer share no fold. Whether such a fold also takes as
long to fill as one of an array with `factor R` rows depends on the cells: with `serial`, which is
the careful choice, it does; else a cell loads all of its weights, and adds up all of its products,
in one cycle.

DRAM traffic is double-buffered: what the next fold needs comes, and what the last one made goes,
while the present one runs. Only the first load and the last store are seen in full.

| symbol | meaning                                                       |
| ------ | ------------------------------------------------------------- |
| R, C   | rows and columns of the array                                 |
| K      | rows of a layer's weight matrix: feature channels x window    |
| N      | its columns: output channels                                  |
| T      | rows that stream through: output pixels of all examples       |
"""

import dataclasses
import math

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Array:
  """An array and its memory.

  Attributes:
    rows, columns: R and C.
    factor: weights of 4 bits that a cell holds along K.
    bandwidth: bytes from or to DRAM in a cycle.
    buffer: bytes of activations that stay on the chip from one column fold to the next; inputs of
      a layer that are larger are read again for each.
    serial: whether the weights of a cell are filled in and added up one after the other.
    low_bytes: bytes of DRAM for a 4-bit weight: 0.5 with a packed copy beside the 8-bit one, 1
      where 4 bits are taken out of the 8-bit weight on the chip, as the paper keeps them.
    clock: cycles a second.
    words: instruction words that say a layer's boundary; one is written in a cycle.
  """

  rows: int = 64
  columns: int = 64
  factor: int = 2
  serial: bool = True
  bandwidth: float = 32.0
  buffer: int = 512 * 1024
  low_bytes: float = 0.5
  clock: float = 2e8
  words: int = 1

  def __post_init__(self) -> None:
    """Checks the fields; raises ValueError."""
    for name in ("rows", "columns", "factor", "bandwidth", "clock", "words"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}: {getattr(self, name)}; a positive number is accepted")
    if self.buffer < 0 or not 0 < self.low_bytes <= 1:
      raise ValueError(
        f"buffer, low_bytes: {self.buffer}, {self.low_bytes}; at least 0 and 0..1 are accepted"
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
  """A layer as a matrix product.

  Attributes:
    name: of the layer.
    channels: feature channels.
    window: window positions, 1 for dense; K = channels x window.
    outputs: N.
    pixels: output pixels of one example.
    inputs: elements of one example's input.
  """

  name: str
  channels: int
  window: int
  outputs: int
  pixels: int
  inputs: int

  @property
  def macs(self) -> int:
    """Multiply-accumulates of one example."""
    return self.channels * self.window * self.outputs * self.pixels


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cycles:
  """What a layer costs.

  Attributes:
    compute: cycles of the array alone.
    dram: cycles of the traffic alone.
    total: cycles of both, overlapped.
  """

  compute: int
  dram: int
  total: int

  @property
  def bound(self) -> str:
    """Which resource binds."""
    return "compute" if self.compute >= self.dram else "DRAM"


def folds(array: Array, work: Work, low: int) -> tuple[int, int, int]:
  """Row folds of the 8-bit part and of the 4-bit part, and column folds.

  Args:
    array: the array.
    work: the layer.
    low: feature channels that run in 4 bits, its boundary.

  Raises:
    ValueError: a boundary that the layer has not.
  """
  if not 0 <= low <= work.channels:
    raise ValueError(f"low: {low}; {work.name} has channels 0..{work.channels}")
  narrow = math.ceil(low * work.window / (array.factor * array.rows))
  wide = math.ceil((work.channels - low) * work.window / array.rows)
  return wide, narrow, math.ceil(work.outputs / array.columns)


def compute_cycles(array: Array, work: Work, low: int, batch: int = 1) -> int:
  """Cycles of the array alone, as SCALE-Sim counts them.

  Args:
    array: the array.
    work: the layer.
    low: feature channels in 4 bits.
    batch: examples that stream through together.
  """
  wide, narrow, columns = folds(array, work, low)
  slow, quick = _fold(array, work, batch)
  return (wide * slow + narrow * quick) * columns - 1


def cycles(array: Array, work: Work, low: int, batch: int = 1) -> Cycles:
  """Cycles of a layer with its DRAM traffic.

  A batch runs in as many equal parts as is quickest: smaller parts fit into the buffer, but load
  the weights again.

  Args:
    array: the array.
    work: the layer.
    low: feature channels in 4 bits.
    batch: examples.
  """
  ways = []
  for parts in range(1, batch + 1):
    if batch % parts == 0:
      one = _at_once(array, work, low, batch // parts)
      compute = parts * (one.compute + 1) - 1
      total = parts * (one.total + 1) - 1
      ways.append(Cycles(compute=compute, dram=parts * one.dram, total=total))
  return min(ways, key=lambda way: way.total)


def _at_once(array: Array, work: Work, low: int, batch: int) -> Cycles:
  """The same for a batch that streams through together."""
  wide, narrow, columns = folds(array, work, low)
  rows = _spread((work.channels - low) * work.window, wide, array.rows)
  rows += _spread(low * work.window, narrow, array.factor * array.rows)
  each = [1.0] * wide + [array.low_bytes] * narrow
  widths = np.array(_spread(work.outputs, columns, array.columns))
  size = work.inputs * batch
  share = np.array(rows) / (work.channels * work.window)
  # Activations keep 8 bits in memory: how many of them count is decided when they are used.
  loads = np.outer(widths, np.array(rows) * np.array(each))
  loads[0] += size * share
  if size > array.buffer:
    loads[1:] += size * share
  stores = np.zeros_like(loads)
  stores[:, -1] = widths * work.pixels * batch
  loads, stores = loads.ravel() / array.bandwidth, stores.ravel() / array.bandwidth
  slow, quick = _fold(array, work, batch)
  runs = np.tile([slow] * wide + [quick] * narrow, columns)
  beside = np.append(loads[1:], 0.0) + np.append(0.0, stores[:-1])
  total = loads[0] + np.maximum(runs, beside).sum() + stores[-1]
  return Cycles(
    compute=compute_cycles(array, work, low, batch),
    dram=math.ceil(loads.sum() + stores.sum()),
    total=math.ceil(total) - 1,
  )


def switch_cycles(array: Array, layers: int) -> int:
  """Cycles of a change of the ratio: the boundaries of all layers are written again.

  Args:
    array: the array.
    layers: how many may have 4-bit channels.
  """
  return array.words * layers


def _fold(array: Array, work: Work, batch: int) -> tuple[int, int]:
  """Cycles of a fold of 8-bit weights and of one of 4-bit weights."""
  narrow = array.rows * (array.factor if array.serial else 1)
  beside = array.columns + work.pixels * batch - 2
  return 2 * array.rows + beside, 2 * narrow + beside


def _spread(total: int, parts: int, most: int) -> list[int]:
  """Sizes of folds: all full but the last."""
  return [min(most, total - i * most) for i in range(parts)]
