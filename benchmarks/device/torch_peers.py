"""Peers of a product in torch on the same GPU: its vendor's int8 product, bfloat16, and Triton.

A chain is a CUDA graph of calls, each on its own copy of the weights; where a call cannot be
captured, the calls themselves in a row, and `captured` says so.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import time
from collections.abc import Callable
from typing import Any

import numpy as np

Array = Any


def available() -> str:
  """Why there are no peers of torch here; empty where there are."""
  if os.environ.get("FLEXIQ_DEVICE_TORCH") == "0":
    return "left out: the step died with it before"
  if importlib.util.find_spec("torch") is None:
    return "torch is not installed"
  torch = importlib.import_module("torch")
  return "" if torch.cuda.is_available() else "torch sees no GPU"


class TorchRun:
  """A function of torch, alone and in a chain (see `timing.Run`)."""

  def __init__(self, function: Callable[..., Any], groups: list[tuple]):
    """Keeps what is called; nothing runs yet."""
    self._torch = importlib.import_module("torch")
    self._function, self._groups = function, groups
    self._graph: Any = None
    self._kept: list[Any] | None = None
    self.calls = len(groups)

  @property
  def captured(self) -> bool:
    """Whether chains are replays of a CUDA graph."""
    return self._graph is not None

  def warm(self) -> None:
    """Compiles and captures; on a machine without CUDA it only runs."""
    torch = self._torch
    self.single()
    if not torch.cuda.is_available():
      return
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
      for group in self._groups[:2]:
        self._function(*group)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
      # thread_local: JAX's threads may allocate meanwhile.
      with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        self._kept = [self._function(*group) for group in self._groups]
      self._graph = graph
    except RuntimeError as error:
      print(f"no graph, calls instead: {error}", flush=True)
      self._kept = None
    self.chain(1)

  def chain(self, repeats: int) -> None:
    """See `timing.Run`."""
    for _ in range(repeats):
      if self._graph is not None:
        self._graph.replay()
      else:
        for group in self._groups:
          self._function(*group)
    self._wait()

  def single(self) -> None:
    """See `timing.Run`."""
    self._function(*self._groups[0])
    self._wait()

  def _wait(self) -> None:
    if self._torch.cuda.is_available():
      self._torch.cuda.synchronize()


def products(m: int, k: int, n: int, copies: int) -> dict[str, TorchRun]:
  """The product's peers; name -> run that is not warm yet.

  `torch_int8` has int32 sums and no epilogue, which is what the library offers; `torch_bfloat16`
  none either; `triton_int8` has ours.
  """
  torch = importlib.import_module("torch")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  code = lambda *s: torch.randint(-127, 128, s, dtype=torch.int8, device=device)
  x, ws = code(m, k), [code(n, k) for _ in range(copies)]
  halves = [w.to(torch.bfloat16) for w in ws]
  half = x.to(torch.bfloat16)
  found = {
    # Weights with K along their rows, transposed by view: what its int8 kernels want.
    "torch_int8": TorchRun(lambda x, w: torch._int_mm(x, w.t()), [(x, w) for w in ws]),
    "torch_bfloat16": TorchRun(lambda x, w: torch.matmul(x, w.t()), [(half, w) for w in halves]),
  }
  if importlib.util.find_spec("triton") is not None:
    scale = torch.full((n,), 1e-5, device=device)
    bias = torch.zeros(n, device=device)
    groups = [(x, w, scale, bias) for w in ws]
    found["triton_int8"] = TritonRun(groups)
  return found


class TritonRun(TorchRun):
  """The Triton product with the fastest of a few block sizes."""

  def __init__(self, groups: list[tuple]):
    """Keeps operands; blocks are chosen by `warm`."""
    super().__init__(lambda *_: None, groups)
    self.blocks: Any = None

  def warm(self) -> None:
    """Tries the blocks, keeps the fastest, captures it."""
    kernel = importlib.import_module("benchmarks.device.triton_int8")
    found = []
    for blocks in kernel.choices(self._groups[0][0].shape[0]):
      self._function = functools.partial(_called, kernel.product, blocks)
      try:
        self.single()
        found.append((self._quick(), blocks))
      except Exception as error:  # more shared memory than there is, most often
        print(f"triton {blocks}: {str(error).splitlines()[:1]}", flush=True)
    if not found:
      raise RuntimeError("triton: none of the block sizes ran")
    self.blocks = min(found, key=lambda entry: entry[0])[1]
    self._function = functools.partial(_called, kernel.product, self.blocks)
    super().warm()

  def _quick(self) -> float:
    best = float("inf")
    for _ in range(3):
      start = time.perf_counter()
      for group in self._groups * 2:
        self._function(*group)
      self._wait()
      best = min(best, time.perf_counter() - start)
    return best


class TritonBlocks:
  """Compiles the Triton kernel with all its blocks, beside what else compiles; no run to time."""

  calls = 1

  def warm(self) -> None:
    """Runs each on little."""
    if importlib.util.find_spec("triton") is None:
      return
    torch = importlib.import_module("torch")
    kernel = importlib.import_module("benchmarks.device.triton_int8")
    x, w = (torch.zeros(64, 64, dtype=torch.int8, device="cuda") for _ in range(2))
    vector = torch.zeros(64, device="cuda")
    for blocks in kernel.CHOICES:
      # One that does not run is told where it is tried for a shape.
      with contextlib.suppress(Exception):
        kernel.product(x, w, vector, vector, blocks)

  def chain(self, repeats: int) -> None:
    """Nothing to time."""

  def single(self) -> None:
    """Nothing to time."""


def _called(product: Callable[..., Any], blocks: Any, *operands: Array) -> Array:
  return product(*operands, blocks)


def triton_is_exact(m: int = 100, k: int = 200, n: int = 72) -> bool:
  """Whether the Triton product equals NumPy's integer sums, at a shape that divides no block."""
  torch = importlib.import_module("torch")
  kernel = importlib.import_module("benchmarks.device.triton_int8")
  device = "cuda" if torch.cuda.is_available() else "cpu"
  rng = np.random.default_rng(0)
  x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((m, k), (n, k)))
  scale, bias = np.full(n, 2.0**-8, np.float32), rng.normal(size=n).astype(np.float32)
  operands = [torch.from_numpy(a).to(device) for a in (x, w, scale, bias)]
  sums = x.astype(np.int64) @ w.astype(np.int64).T
  expected = torch.from_numpy(sums.astype(np.float32) * scale + bias)
  # Small blocks suffice here, and an interpreter takes its time.
  for blocks in kernel.CHOICES[-2:]:
    if not torch.equal(kernel.product(*operands, blocks, torch.float32).cpu(), expected):
      return False
  return True
