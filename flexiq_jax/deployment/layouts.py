"""The layout of a layer's channels for the mixed matmul, and its weights packed in it.

Channels come in schedule order, shift block after shift block, so that what is in 4 bits at any
level is a prefix. Each channel stands for its window's rows of K:

    block 0                      block 1
    c7 c7 c7 c2 c2 c2 ... 0 0    c5 c5 c5 ...

Where a kernel slides windows over pixels itself (`kernels.windows`), a block is ordered by window
position instead, and each position has all channels of the block. A block of few channels holds
each channel several times, once for each of several positions side by side:

    block 0: c7 c2 ... | c7 c2 ... | ...

| symbol | meaning |
|---|---|
| S | places of a shift block: its channels, or copies of them; padded with zero channels |
| P | places for channels, S times the number of shift blocks |
| block | rows of K of a shift block: S times the window, padded to the kernel's granule |
| L | levels: the ratios at which a deployed model runs |
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
import numpy as np

from flexiq_jax import kernels
from flexiq_jax.graph import Layer
from flexiq_jax.kernels import Weights
from flexiq_jax.quant import Low, QLayer, lowering

Array = Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """Where a layer's channels lie.

  Attributes:
    groups: int `[J]`, the channel groups in schedule order.
    order: int32 `[P]`, the channel at each place, -1 for padding.
    places: int32 `[J + 1]`, how many places are in 4 bits when so many groups are.
    channels: S.
    window: rows of K per channel.
    block: rows of K per shift block.
    slides: whether blocks go position by position.
    copies: places of a channel, where blocks slide.
  """

  groups: np.ndarray
  order: np.ndarray
  places: np.ndarray
  channels: int
  window: int
  block: int
  slides: bool = False
  copies: int = 1

  @property
  def rows(self) -> int:
    """K."""
    return len(self.order) // self.channels * self.block

  @property
  def row_places(self) -> np.ndarray:
    """The place whose channel each row of K holds, int `[K]`; -1 for padding."""
    row = np.arange(self.block)
    place = row % self.channels if self.slides else row // self.window
    place = np.where(place < self.channels, place, -1)
    starts = np.arange(0, len(self.order), self.channels)[:, None]
    return np.where(place < 0, -1, starts + place).reshape(-1)


class Grouping(Protocol):
  """Which group, and which shift block (None: its group), each channel `[C]` lies in."""

  @property
  def group(self) -> Array: ...

  @property
  def block(self) -> Array: ...


def rows_before(place: Array, channels: int, window: int, block: int) -> Array:
  """How many rows of K lie before a place; takes traced and plain numbers."""
  return place // channels * block + place % channels * window


def lay_out(
  layer: Layer, low: Grouping, groups: np.ndarray, granule: int = 2, slides: bool = False
) -> Layout:
  """The layout of a layer.

  Args:
    layer: the layer; one contraction group.
    low: its 4-bit side, of which the groups and shift blocks of the channels are read.
    groups: int `[J]`, its channel groups in schedule order.
    granule: even number of rows of which a shift block holds a multiple.
    slides: whether a kernel can slide this layer's window over pixels; then the places of a block
      are a multiple of the granule, too.

  Raises:
    ValueError: an odd granule, a layer of several contraction groups, or groups of a shift block
      that do not lie next to each other.
  """
  if granule < 2 or granule % 2:
    raise ValueError(f"granule: {granule}; a positive even number of rows is accepted")
  if layer.groups != 1:
    raise ValueError(f"layer {layer.name}: {layer.groups} contraction groups; 1 is accepted")
  group = np.asarray(low.group)
  block = group if low.block is None else np.asarray(low.block)
  members = [np.flatnonzero(group == g) for g in groups]
  blocks = [int(block[channels[0]]) for channels in members]
  if any(len(np.unique(block[channels])) > 1 for channels in members):
    raise ValueError(f"layer {layer.name}: a channel group lies in two shift blocks")
  firsts = [j for j in range(len(blocks)) if j == 0 or blocks[j] != blocks[j - 1]]
  if len(firsts) != len(set(blocks)):
    raise ValueError(
      f"layer {layer.name}: the groups of a shift block do not lie next to each other in schedule "
      "order; was the schedule changed after `Grouped.ordered`?"
    )
  window = math.prod(layer.window)
  number = np.cumsum(np.isin(np.arange(len(blocks)), firsts)) - 1
  sizes = np.bincount(number, weights=[len(m) for m in members]).astype(int)
  slides = slides and window > 1
  step = granule if window == 1 or slides else 1
  copies = 1
  if slides:
    while copies < window and granule % (2 * copies) == 0 and 2 * copies * sizes.max() <= granule:
      copies *= 2
  channels = -(-int(sizes.max()) * copies // step) * step
  order = np.full((len(firsts), channels), -1, np.int32)
  places = []
  filled = np.zeros(len(firsts), int)
  for j, own in zip(number, members, strict=True):
    own = np.repeat(own, copies)
    places.append(j * channels + filled[j])
    order[j, filled[j] : filled[j] + len(own)] = own
    filled[j] += len(own)
  return Layout(
    groups=np.asarray(groups),
    order=order.reshape(-1),
    places=np.array([*places, order.size], np.int32),
    channels=channels,
    window=window,
    block=-(-channels * -(-window // copies) // granule) * granule,
    slides=slides,
    copies=copies,
  )


def pack(layer: Layer, q: QLayer, layout: Layout, outputs: np.ndarray | None = None) -> Weights:
  """A layer's weights in its layout.

  Args:
    layer: the layer.
    q: its codes, with a 4-bit side.
    layout: from `lay_out`.
    outputs: int `[N']`, the output channel of each column, -1 for a column of zeros; None for all
      in their own order.

  Raises:
    ValueError: channels of a shift block with different shifts.
  """
  low = _low(layer, q)
  x_shift = _shared(layer, np.asarray(low.shift), layout)
  w8 = _rows(layer, q.w, layout, outputs)
  value = _rows(layer, low.w, layout, outputs)
  w_shift = _weight_shift(value, layout)
  codes = value >> np.repeat(w_shift, layout.block, axis=0)
  return Weights(
    w8=jnp.asarray(w8, jnp.int8),
    w4=jnp.asarray(kernels.pack(codes)),
    x_shift=jnp.asarray(x_shift),
    w_shift=jnp.asarray(w_shift),
    block=layout.block,
    offset=0 if q.signed else 8,
    taps=layout.window if layout.slides else 1,
    copies=layout.copies,
  )


def corrections(
  layer: Layer,
  q: QLayer,
  layout: Layout,
  counts: Sequence[int],
  outputs: np.ndarray | None = None,
  dynamic: bool = False,
) -> np.ndarray:
  """What is added to the integer sum at each level.

  These are the bias corrections of the groups in 4 bits. Unsigned codes enter as `q - 128` and
  `code - 8`, so what this takes away is added too; with dynamic shifts the kernel adds its 4-bit
  part.

  Args:
    layer: the layer.
    q: its codes, with a 4-bit side.
    layout: from `lay_out`.
    outputs: as for `pack`.
    counts: for each level, how many groups are in 4 bits.
    dynamic: whether activation shifts are chosen at run time.

  Returns:
    int32 `[L, N']`.

  Raises:
    ValueError: more groups than there are, or a correction beyond int32.
  """
  low = _low(layer, q)
  total = len(layout.groups)
  bias = _columns(np.asarray(low.bias, np.int64), outputs)
  w8 = _rows(layer, q.w, layout, outputs).astype(np.int64)
  shift = np.repeat(_shared(layer, np.asarray(low.shift), layout), layout.block)[:, None]
  low_rows = _rows(layer, low.w, layout, outputs).astype(np.int64) << shift
  row_places, rows = layout.row_places, []
  for count in counts:
    if not 0 <= count <= total:
      raise ValueError(f"layer {layer.name}: boundary at group {count} of {total}")
    row = bias[layout.groups[:count]].sum(axis=0)
    if not q.signed:
      below = row_places < layout.places[count]
      row = row + 128 * w8[~below].sum(axis=0)
      row = row if dynamic else row + 8 * low_rows[below].sum(axis=0)
    rows.append(row)
  found = np.stack(rows)
  if np.abs(found).max(initial=0) >= 2**31:
    raise ValueError(f"layer {layer.name}: a correction of {np.abs(found).max()} is beyond int32")
  return found.astype(np.int32)


def _low(layer: Layer, q: QLayer) -> Low:
  if q.low is None:
    raise ValueError(f"layer {layer.name}: it has no 4-bit side (see grouping.lower)")
  return q.low


def _shared(layer: Layer, shift: np.ndarray, layout: Layout) -> np.ndarray:
  """The activation shift of each shift block, int32 `[J]`."""
  values = np.where(layout.order < 0, -1, shift[layout.order]).reshape(-1, layout.channels)
  top = values.max(axis=1)
  if ((values != top[:, None]) & (values >= 0)).any():
    raise ValueError(
      f"layer {layer.name}: activation shifts differ within a shift block; lower the model with "
      "groups.shift_block, so that blocks share them"
    )
  return top.astype(np.int32)


def _rows(layer: Layer, w: Array, layout: Layout, outputs: np.ndarray | None) -> np.ndarray:
  """Weights `w_shape` -> int32 `[K, N']` in layout order, zeros for padding."""
  (canonical,) = layer.canonical(np.asarray(w))  # [C, window, N]
  n = canonical.shape[-1]
  placed = np.where((layout.order < 0)[:, None, None], 0, canonical[layout.order])
  blocks = placed.reshape(-1, layout.channels, layout.window, n).astype(np.int32)
  blocks = _stepped(blocks, layout.copies) if layout.slides else blocks
  blocks = blocks.reshape(len(blocks), -1, n)
  blocks = np.pad(blocks, ((0, 0), (0, layout.block - blocks.shape[1]), (0, 0)))
  return _columns(blocks.reshape(-1, n), outputs)


def _stepped(blocks: np.ndarray, copies: int) -> np.ndarray:
  """`[J, S, window, N]` -> `[J, steps, S, N]`; copy i of a channel takes position i of a step."""
  j, places, window, n = blocks.shape
  steps = -(-window // copies)
  blocks = np.pad(blocks, ((0, 0), (0, 0), (0, steps * copies - window), (0, 0)))
  blocks = blocks.reshape(j, places // copies, copies, steps, copies, n)
  own = np.stack([blocks[:, :, i, :, i] for i in range(copies)], axis=2)
  return np.moveaxis(own, 3, 1).reshape(j, steps, places, n)


def _columns(values: np.ndarray, outputs: np.ndarray | None) -> np.ndarray:
  """Picks columns of `[..., N]`, zeros where the number is -1."""
  return values if outputs is None else np.where(outputs < 0, 0, values[..., outputs])


def _weight_shift(value: np.ndarray, layout: Layout) -> np.ndarray:
  """The smallest shift that makes 4-bit codes of each (block, output)'s values, int32 `[J, N']`.

  Values are codes shifted back (`rules.Low`): multiples of two to the shift they were made with. A
  smaller one that still reaches the largest of them gives the same values again.
  """
  blocks = value.reshape(-1, layout.block, value.shape[-1])
  lo, hi = lowering.low_range()
  shift = np.zeros((len(blocks), value.shape[-1]), np.int32)
  for e in range(lowering.MAX_SHIFT, -1, -1):
    fits = ((blocks >= lo << e) & (blocks <= hi << e)).all(axis=1)
    shift = np.where(fits, e, shift)
  if (blocks % (1 << shift)[:, None]).any():
    raise ValueError("low.w: values of a shift block and output that no 4-bit codes have")
  return shift.astype(np.int32)
