"""The cycle model against an array run cell by cell, SCALE-Sim's total, and folds one by one."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexiq_jax.serving import npu
from flexiq_jax.serving.npu import Array, Work

# SCALE-Sim's topologies/conv_nets/Resnet18.csv: input size, window, channels, filters, stride. It
# pads nothing.
RESNET18 = (
  (224, 7, 3, 64, 2),
  *((56, 3, 64, 64, 1),) * 4,
  *((56, 3, 64, 128, 2), (28, 3, 128, 128, 1), (56, 1, 64, 128, 2)),
  *((28, 3, 128, 128, 1),) * 2,
  *((28, 3, 128, 256, 2), (14, 3, 256, 256, 1), (28, 1, 128, 256, 2)),
  *((14, 3, 256, 256, 1),) * 2,
  *((14, 3, 256, 512, 2), (7, 3, 512, 512, 1), (14, 1, 256, 512, 2)),
  *((7, 3, 512, 512, 1),) * 2,
  (1, 1, 512, 1000, 1),
)


def resnet18(padded):
  works = []
  for i, (size, window, channels, filters, stride) in enumerate(RESNET18):
    side = math.ceil((size if padded else size - window + stride) / stride)
    works.append(
      Work(
        name=str(i),
        **{"channels": channels, "window": window**2, "outputs": filters},
        **{"pixels": side**2, "inputs": size**2 * channels},
      )
    )
  return works


def test_total_is_that_of_scale_sim():
  """2,519,815 cycles: SCALE-Sim 3.0.0 on a 32 x 32 weight-stationary array, all 21 layers."""
  array = Array(rows=32, columns=32)
  assert sum(npu.compute_cycles(array, work, 0) for work in resnet18(False)) == 2_519_815


def test_a_cell_that_takes_its_weights_at_once_saves_folds_and_fill():
  work = resnet18(True)[5]
  at = lambda low, **more: npu.compute_cycles(Array(rows=32, columns=32, **more), work, low) + 1
  once = 2 * 32 + 32 + work.pixels - 2
  columns = work.outputs // 32
  k = work.channels * work.window
  assert at(0) == k // 32 * columns * once
  assert at(64, serial=False) == k // 64 * columns * once
  assert at(64) == k // 64 * columns * (once + 2 * 32)
  assert at(64, factor=4) == math.ceil(k / 128) * columns * (once + 6 * 32)


def test_serial_cells_are_an_array_with_more_rows():
  """All in 4 bits at factor 2 is what an 8-bit array of twice the rows takes."""
  for work in resnet18(True):
    half, whole = Array(rows=16, columns=32), Array(rows=32, columns=32)
    assert npu.compute_cycles(half, work, work.channels) == npu.compute_cycles(whole, work, 0)


def run_array(x, w, rows, columns):
  """Runs one fold cell by cell; returns the product and the cycles until it is out."""
  t, k = x.shape
  n = w.shape[1]
  held = np.zeros((rows, columns))
  held[:k, :n] = w
  cycle = rows  # the weights are shifted in, a row a cycle
  moving, sums = np.zeros((rows, columns)), np.zeros((rows, columns))
  out, left = np.full((t, columns), np.nan), t * columns
  step = 0
  while left:
    # Activations come from the left, row r one cycle later than row r - 1, and move on.
    entering = np.zeros(rows)
    for r in range(k):
      if 0 <= step - r < t:
        entering[r] = x[step - r, r]
    moving = np.concatenate([entering[:, None], moving[:, :-1]], axis=1)
    sums = np.concatenate([np.zeros((1, columns)), sums[:-1]]) + moving * held
    for c in range(columns):
      row = step - (rows - 1) - c
      if 0 <= row < t:
        out[row, c], left = sums[-1, c], left - 1
    step += 1
  return out[:, :n], cycle + step


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 5), st.integers(1, 5), st.data())
def test_a_fold_takes_what_the_array_takes(rows, columns, data):
  t = data.draw(st.integers(1, 6))
  k, n = data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns))
  rng = np.random.default_rng(0)
  x, w = rng.integers(-9, 9, (t, k)).astype(float), rng.integers(-9, 9, (k, n)).astype(float)
  product, cycles = run_array(x, w, rows, columns)
  np.testing.assert_array_equal(product, x @ w)
  array = Array(rows=rows, columns=columns)
  work = Work(name="w", channels=k, window=1, outputs=n, pixels=t, inputs=t * k)
  assert npu.compute_cycles(array, work, 0) == cycles - 1


def by_folds(array, work, low, batch):
  """Folds one by one: what is loaded, what runs, what is stored."""
  parts = [
    (work.channels - low, array.rows, 1.0),
    (low, array.factor * array.rows, array.low_bytes),
  ]
  loads, stores, runs = [], [], []
  beside = array.columns + work.pixels * batch - 2
  for column in range(0, work.outputs, array.columns):
    wide = min(array.columns, work.outputs - column)
    for i, (channels, height, each) in enumerate(parts):
      for row in range(0, channels * work.window, height):
        k = min(height, channels * work.window - row)
        bytes_in = k * wide * each
        if column == 0 or work.inputs * batch > array.buffer:
          bytes_in += work.inputs * batch * k / (work.channels * work.window)
        loads.append(bytes_in / array.bandwidth)
        runs.append(beside + 2 * (height if i == 0 or array.serial else array.rows))
        stores.append(0.0)
    stores[-1] = wide * work.pixels * batch / array.bandwidth
  total = loads[0]
  for i in range(len(loads)):
    meanwhile = (loads[i + 1] if i + 1 < len(loads) else 0) + (stores[i - 1] if i else 0)
    total += max(runs[i], meanwhile)
  return sum(runs) - 1, sum(loads) + sum(stores), total + stores[-1] - 1


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_traffic_is_that_of_fold_after_fold(data):
  draw = lambda low, high: data.draw(st.integers(low, high))
  array = Array(
    serial=data.draw(st.booleans()),
    **{"rows": draw(1, 6), "columns": draw(1, 6), "factor": data.draw(st.sampled_from([2, 4]))},
    **{"bandwidth": draw(1, 8), "buffer": draw(0, 300)},
    low_bytes=data.draw(st.sampled_from([0.5, 1.0])),
  )
  work = Work(
    **{"name": "w", "channels": draw(1, 20), "window": draw(1, 9), "outputs": draw(1, 20)},
    **{"pixels": draw(1, 20), "inputs": draw(1, 100)},
  )
  low, batch = draw(0, work.channels), draw(1, 4)
  found = npu.cycles(array, work, low, batch)
  ways = []
  for parts in (p for p in (1, 2, 3, 4) if batch % p == 0):
    one = by_folds(array, work, low, batch // parts)
    ways.append([parts * (one[0] + 1) - 1, parts * one[1], parts * (one[2] + 1) - 1])
  assert found.total == pytest.approx(min(way[2] for way in ways), abs=4.1)
  near = [w for w in ways if w[0] == found.compute and abs(w[2] - found.total) < 4.1]
  assert any(found.dram == pytest.approx(way[1], abs=4.1) for way in near)
  assert found.total >= max(found.compute, found.dram - 8)
  assert found.bound == ("compute" if found.compute >= found.dram else "DRAM")


def test_a_boundary_within_one_fold_costs_one_more():
  array = Array(rows=64, columns=64)
  small = Work(name="s", channels=32, window=1, outputs=64, pixels=100, inputs=3200)
  at = lambda low: npu.compute_cycles(array, small, low)
  assert at(0) == (2 * 64 + 64 + 100 - 2) - 1
  # And more than that, where its cells are filled one after the other.
  assert at(32) == at(0) + 2 * 64
  assert at(16) == at(0) + 1 + at(32)


def test_a_change_of_the_ratio_is_a_few_words():
  array = Array(clock=2e8)
  assert npu.switch_cycles(array, 52) / array.clock < 0.3e-6


@pytest.mark.parametrize(
  "wrong", [{"rows": 0}, {"factor": 0}, {"bandwidth": 0}, {"low_bytes": 2}, {"buffer": -1}]
)
def test_wrong_fields_are_named(wrong):
  (name,) = wrong
  with pytest.raises(ValueError, match=name):
    Array(**wrong)
  with pytest.raises(ValueError, match=r"w has channels 0\.\.3"):
    work = Work(name="w", channels=3, window=1, outputs=1, pixels=1, inputs=3)
    npu.compute_cycles(Array(), work, 4)
