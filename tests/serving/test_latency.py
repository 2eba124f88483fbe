"""The roofline against its formula row by row, its laws, and JAX's own table of chips."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from flexiq_jax.serving import latency, npu
from flexiq_jax.serving.npu import Work

TOY = latency.Device(name="toy", int8=100.0, int4=200.0, bandwidth=10.0, source="", note="")


@st.composite
def works(draw):
  size = lambda most: draw(st.integers(1, most))
  return Work(
    **{"name": "w", "channels": size(40), "window": size(9), "outputs": size(40)},
    **{"pixels": size(50), "inputs": size(500)},
  )


def brute_force(device, work, low, batch):
  """The same, weight by weight and input by input."""
  operations, weights = np.zeros(2), 0.0
  for channel in range(work.channels):
    narrow = channel < low
    rows = work.window * work.outputs
    operations[int(narrow)] += 2 * rows * work.pixels * batch
    weights += rows * (device.low_weight if narrow else 1.0)
  compute = operations[0] / device.int8 + operations[1] / device.int4
  each = work.inputs * batch / work.channels
  inputs = sum(each * (device.low_input if c < low else 1.0) for c in range(work.channels))
  moved = weights + inputs + device.output * work.outputs * work.pixels * batch
  return compute, moved / device.bandwidth, weights


@settings(max_examples=60, deadline=None)
@given(works(), st.sampled_from([TOY, *latency.DEVICES.values()]), st.data())
def test_is_the_longer_of_operations_and_bytes(work, device, data):
  low, batch = data.draw(st.integers(0, work.channels)), data.draw(st.integers(1, 8))
  found = latency.layer(device, work, low, batch)
  compute, memory, weights = brute_force(device, work, low, batch)
  assert found.compute == pytest.approx(compute) and found.memory == pytest.approx(memory)
  assert found.seconds == max(found.compute, found.memory)
  assert found.weights == pytest.approx(weights)
  assert found.bound == ("compute" if found.compute >= found.memory else "memory")
  # 4 bits never cost time, and never gain more than twice.
  high = latency.layer(device, work, 0, batch)
  assert high.seconds / 2 <= found.seconds * (1 + 1e-12) <= high.seconds * (1 + 1e-9)


def test_of_an_npu_are_its_cycles():
  array = npu.Array(rows=16, columns=16, clock=1e6)
  work = Work(name="w", channels=64, window=9, outputs=48, pixels=49, inputs=49 * 64)
  for low, batch in ((0, 1), (20, 4), (64, 4)):
    found, cycles = latency.layer(array, work, low, batch), npu.cycles(array, work, low, batch)
    assert found.seconds == pytest.approx(cycles.total / 1e6)
    assert found.bound == {"compute": "compute", "DRAM": "memory"}[cycles.bound]
    assert found.weights == (64 - low) * 9 * 48 + 0.5 * low * 9 * 48
    assert found.activations == batch * (49 * 64 + 48 * 49)


def test_layers_add_up_and_the_longer_part_binds():
  one = Work(name="a", channels=8, window=1, outputs=8, pixels=1000, inputs=8)
  two = Work(name="b", channels=8, window=1, outputs=8, pixels=1, inputs=80_000)
  first, second = (latency.layer(TOY, work, 0) for work in (one, two))
  whole = first + second
  assert whole.seconds == first.seconds + second.seconds
  assert (first.bound, second.bound) == ("memory", "memory")
  quick = dataclasses.replace(TOY, bandwidth=1e4)
  both = [latency.layer(quick, work, 0) for work in (one, two)]
  assert [one.bound for one in both] == ["compute", "memory"]
  assert sum(both, latency.NOTHING).bound == "compute"


@pytest.mark.parametrize(("name", "cores"), [("v5e", 1), ("v5p", 2), ("v6e", 1)])
def test_chips_are_those_of_jax(name, cores):
  chip, ours = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(name), 1), latency.DEVICES[name]
  assert cores * chip.int8_ops_per_second == pytest.approx(ours.int8, rel=0.01)
  assert cores * chip.int4_ops_per_second == pytest.approx(ours.int4, rel=0.01)
  # Of v5p's memory JAX says 11 % less than Google's page does.
  assert cores * chip.mem_bw_bytes_per_second == pytest.approx(ours.bandwidth, rel=0.12)


def test_wrong_numbers_are_named():
  work = Work(name="w", channels=3, window=1, outputs=1, pixels=1, inputs=3)
  with pytest.raises(ValueError, match=r"low: 4; w has channels 0\.\.3"):
    latency.layer(TOY, work, 4)
  with pytest.raises(ValueError, match="batch: 0"):
    latency.layer(TOY, work, 0, 0)
  with pytest.raises(ValueError, match=r"bandwidth: 0\.0"):
    dataclasses.replace(TOY, bandwidth=0.0)
