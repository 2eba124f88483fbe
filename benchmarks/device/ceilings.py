"""Ceilings of the device, measured: copy bandwidth, and product rates of the vendor's library.

| field | what |
|---|---|
| `copy` | GB/s read and written by `x + 1` on buffers far larger than any cache |
| `bfloat16`, `int8` | TFLOP/s and TOP/s of the fastest square product tried, by XLA and torch |

Operands are random: products of zeros take less power and run faster.
"""

import functools
import importlib
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.device import present, timing, torch_peers
from benchmarks.device.context import Context, claim


def run(context: Context) -> dict[str, Any]:
  """Measures; the largest of each kind is the ceiling."""
  present.device(context)
  sides = (256,) if context.small else (4096, 8192)
  megabytes = (16,) if context.small else (256, 2048)
  result: dict[str, Any] = {"copy": {}, "products": {}, "refused": {}}
  for size in megabytes:
    x = jnp.arange(size * 2**18, dtype=jnp.float32)
    _rate(result, "copy", f"{size} MiB", functools.partial(_add_one, x), 2 * x.nbytes / 1e9)
  context.save(_finished(result))
  why = torch_peers.available()
  if why:
    result["refused"]["torch"] = why
  for side in sides:
    for kind in ("bfloat16", "int8"):
      if context.left() < 2:
        return _finished(result) | {"complete": False}
      tera = 2 * side**3 / 1e12
      operands = _operands(kind, side)
      _rate(result, "products", f"{kind} xla {side}", functools.partial(_dot, *operands), tera)
      if not why:
        _rate_torch(result, f"{kind} torch {side}", kind, side, tera)
      context.save(_finished(result))
  return _finished(result)


@jax.jit
def _add_one(x):
  return x + 1


@jax.jit
def _dot(x, w):
  integer = x.dtype == jnp.int8
  return jnp.matmul(x, w, preferred_element_type=jnp.int32 if integer else x.dtype)


def _operands(kind: str, side: int):
  keys = jax.random.split(jax.random.key(0))
  if kind == "bfloat16":
    return [jax.random.normal(key, (side, side), jnp.bfloat16) for key in keys]
  return [jax.random.randint(key, (side, side), -127, 127, jnp.int8) for key in keys]


def _rate(result: dict, group: str, name: str, call: Any, amount: float) -> None:
  one = timing.Chains(rotate=0).run(call, 1 if group == "copy" else 2)
  runs, refused = timing.warm_all({name: one}, threads=1)
  result["refused"] |= refused
  for times in timing.measure(runs, 1.0, span=0.05).values():
    result[group][name] = {"rate": amount / (1e-6 * times.us), **vars(times)}


def _rate_torch(result: dict, name: str, kind: str, side: int, tera: float) -> None:
  torch = importlib.import_module("torch")
  if kind == "bfloat16":
    x, w = (torch.randn(side, side, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    call = torch_peers.TorchRun(lambda x, w: torch.matmul(x, w.t()), [(x, w)] * 2)
  else:
    shape = {"size": (side, side), "dtype": torch.int8, "device": "cuda"}
    x, w = (torch.randint(-127, 127, **shape) for _ in range(2))
    call = torch_peers.TorchRun(lambda x, w: torch._int_mm(x, w.t()), [(x, w)] * 2)
  runs, refused = timing.warm_all({name: call}, threads=1)
  result["refused"] |= refused
  for times in timing.measure(runs, 1.0, span=0.05).values():
    result["products"][name] = {"rate": tera / (1e-6 * times.us), **vars(times)}


def _finished(result: dict[str, Any]) -> dict[str, Any]:
  """The result with its ceilings and claims."""
  of = lambda kind: [v["rate"] for k, v in result["products"].items() if k.startswith(kind)]
  found: dict[str, float | None] = {
    "copy_gb_s": max((v["rate"] for v in result["copy"].values()), default=None),
    "bfloat16_tflop_s": max(of("bfloat16"), default=None),
    "int8_top_s": max(of("int8"), default=None),
  }
  names = {
    "copy_gb_s": ("copy bandwidth, read and written", "GB/s"),
    "bfloat16_tflop_s": ("bfloat16 product, vendor's library", "TFLOP/s"),
    "int8_top_s": ("int8 product, vendor's library", "TOP/s"),
  }
  claims = [
    claim(names[key][0], f"{value:,.4g} {names[key][1]}")
    for key, value in found.items()
    if value is not None
  ]
  return result | {"ceilings": found, "claims": claims}
