"""Latency of a layer with a share of its channels in 4 bits, modelled for described devices.

A roofline: a layer takes as long as its operations at the device's peak, or as its bytes at the
bandwidth of its memory, whichever is longer. Launches, tiles, epilogues and shift blocks are not in
it, which make real kernels slower, nor that a layer may hand on codes to the next, which are fewer
bytes. Schedules of the kernels for TPUs are estimated by `benchmarks/kernels.py` (docs/kernels.md).
Of an NPU the cycles are `npu.cycles`.

    seconds = max(2 M8 / P8 + 2 M4 / P4,  (weights + inputs + outputs) / bandwidth)

| symbol     | meaning                                                              |
| ---------- | -------------------------------------------------------------------- |
| M8, M4     | multiply-accumulates with 8-bit and with 4-bit channels              |
| P8, P4     | peak operations a second, a multiply-accumulate being two            |
| weights    | a byte each in 8 bits, `low_weight` bytes in 4                       |
| inputs     | each once; a byte of an 8-bit channel, `low_input` of a 4-bit one    |
| outputs    | `output` bytes each                                                  |
"""

import dataclasses

from flexiq_jax.serving import npu
from flexiq_jax.serving.npu import Array, Work


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
  """A device, by its data sheet and by what this project's kernels do on it.

  Attributes:
    name: as configs and tables have it.
    int8, int4: P8 and P4; P4 is that of the kernel, not of the data sheet.
    bandwidth: bytes a second from and to its memory.
    low_weight, low_input: bytes that a 4-bit weight or input is read as.
    output: bytes of a result; bfloat16.
    source: of the numbers.
    note: what 4 bits save there.
  """

  name: str
  int8: float
  int4: float
  bandwidth: float
  low_weight: float = 0.5
  low_input: float = 0.5
  output: float = 2.0
  source: str
  note: str

  def __post_init__(self) -> None:
    """Checks the numbers; raises ValueError."""
    for name in ("int8", "int4", "bandwidth", "low_weight", "low_input", "output"):
      if not getattr(self, name) > 0:
        raise ValueError(f"{name}: {getattr(self, name)}; a positive number is accepted")


_TPU = "4-bit products at twice the rate, half the bytes of weights and inputs"
_CLOUD = "Google Cloud's pages of the TPU; int4 is twice int8 by JAX's table of chips"
DEVICES = {
  device.name: device
  for device in (
    Device(name="v5e", int8=394e12, int4=788e12, bandwidth=819e9, source=_CLOUD, note=_TPU),
    Device(name="v5p", int8=918e12, int4=1836e12, bandwidth=2765e9, source=_CLOUD, note=_TPU),
    Device(name="v6e", int8=1840e12, int4=3680e12, bandwidth=1640e9, source=_CLOUD, note=_TPU),
    Device(
      **{"name": "h100", "int8": 1979e12, "int4": 1979e12, "bandwidth": 3350e9, "low_input": 1.0},
      source="NVIDIA's data sheet of the H100 SXM, without sparsity",
      note="half the bytes of weights; the tensor cores have no int4, so weights are widened",
    ),
    Device(
      **{"name": "a100", "int8": 624e12, "int4": 624e12, "bandwidth": 2039e9},
      **{"low_weight": 1.0, "low_input": 1.0},
      source="NVIDIA's data sheet of the A100 80 GB SXM, without sparsity",
      note="nothing: there is no kernel for it here, all codes are multiplied as int8",
    ),
  )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Latency:
  """What a layer, or a sequence of layers, costs.

  Attributes:
    seconds: of all of it.
    compute, memory: seconds of the arithmetic alone and of the traffic alone.
    weights, activations: bytes; inputs and outputs are activations.
    bound_by_compute: seconds of layers that the arithmetic binds.
  """

  seconds: float
  compute: float
  memory: float
  weights: float
  activations: float
  bound_by_compute: float

  @property
  def bound(self) -> str:
    """Which resource binds, for most of the time."""
    return "compute" if 2 * self.bound_by_compute >= self.seconds else "memory"

  def __add__(self, other: "Latency") -> "Latency":
    """One after the other."""
    names = [f.name for f in dataclasses.fields(self)]
    return Latency(**{name: getattr(self, name) + getattr(other, name) for name in names})


NOTHING = Latency(
  seconds=0.0, compute=0.0, memory=0.0, weights=0.0, activations=0.0, bound_by_compute=0.0
)


def layer(device: Device | Array, work: Work, low: int, batch: int = 1) -> Latency:
  """Latency of a layer.

  Args:
    device: one of `DEVICES`, or an NPU.
    work: the layer.
    low: feature channels in 4 bits.
    batch: examples.

  Raises:
    ValueError: a boundary that the layer has not, or no batch.
  """
  if not 0 <= low <= work.channels:
    raise ValueError(f"low: {low}; {work.name} has channels 0..{work.channels}")
  if batch < 1:
    raise ValueError(f"batch: {batch}; at least 1 is accepted")
  narrow, wide = low * work.window * work.outputs, (work.channels - low) * work.window
  wide *= work.outputs
  results = work.outputs * work.pixels * batch
  if isinstance(device, Array):
    found = npu.cycles(device, work, low, batch)
    seconds, compute, memory = (
      cycles / device.clock for cycles in (found.total, found.compute, found.dram)
    )
    weights = wide + device.low_bytes * narrow
    activations = work.inputs * batch + results  # both keep 8 bits in memory
  else:
    rows = work.pixels * batch
    compute = 2 * rows * (wide / device.int8 + narrow / device.int4)
    weights = wide + device.low_weight * narrow
    share = low / work.channels
    inputs = work.inputs * batch * (1 - share + share * device.low_input)
    activations = inputs + device.output * results
    memory = (weights + activations) / device.bandwidth
    seconds = max(compute, memory)
  return Latency(
    **{"seconds": seconds, "compute": compute, "memory": memory},
    **{"weights": weights, "activations": activations},
    bound_by_compute=seconds if compute >= memory else 0.0,
  )
