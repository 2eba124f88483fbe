"""Exports a deployed model to StableHLO: it then runs wherever JAX runs, without this package.

    export.save("exported", deployed, jax.ShapeDtypeStruct((8, 32, 32, 3), jnp.float32))

and elsewhere

    import jax, numpy as np
    from jax import export
    run = export.deserialize(open("exported/model.bin", "rb").read()).call
    weights = dict(np.load("exported/weights.npz"))
    logits = run(weights, x, np.float32(0.5))

One file serves CPU, CUDA and TPU. The ratio is an input, so that one executable serves all ratios.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export as jax_export

from flexiq_jax.deployment.model import Deployed, apply

PLATFORMS = ("cpu", "cuda", "tpu")


def export(
  deployed: Deployed,
  x: jax.ShapeDtypeStruct,
  *,
  platforms: Sequence[str] = PLATFORMS,
  implementation: str = "reference",
  kind: str | None = None,
) -> jax_export.Exported:
  """A deployed model as `call(weights, x, ratio) -> y`.

  Args:
    deployed: the model.
    x: shape and dtype of the batch; its size is fixed.
    platforms: of `cpu`, `cuda` and `tpu`.
    implementation: of the mixed matmul. The reference runs on all platforms; a kernel can only be
      exported for its own platform.
    kind: the TPU that kernels are exported for (see `kernels.mixed_matmul`).

  Returns:
    The export; `weights` are those of `flat`.

  Raises:
    ValueError: an unknown platform, or a kernel for several.
  """
  if unknown := [p for p in platforms if p not in PLATFORMS] or not platforms:
    raise ValueError(f"platforms: {unknown or platforms}; of {', '.join(PLATFORMS)}, one or more")
  if implementation != "reference" and len(platforms) > 1:
    raise ValueError(
      f"implementation: {implementation!r} for platforms {', '.join(platforms)}; one is accepted"
    )
  kernel: dict[str, str | None] = {"implementation": implementation}
  if implementation != "reference":
    kernel |= {"platform": {"cuda": "gpu"}.get(platforms[0], platforms[0]), "kind": kind}
  _, tree = jax.tree.flatten(deployed)
  names = list(flat(deployed))

  def run(weights, x, ratio):
    model = jax.tree.unflatten(tree, [weights[name] for name in names])
    return apply(model, x, model.level(ratio), **kernel)

  shapes = {name: jax.ShapeDtypeStruct(a.shape, a.dtype) for name, a in flat(deployed).items()}
  ratio = jax.ShapeDtypeStruct((), jnp.float32)
  return jax_export.export(jax.jit(run), platforms=tuple(platforms))(shapes, x, ratio)


def flat(deployed: Deployed) -> dict[str, Any]:
  """A deployed model's arrays by their paths."""
  paths, _ = jax.tree_util.tree_flatten_with_path(deployed)
  return {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in paths}


def save(
  directory: str | os.PathLike,
  deployed: Deployed,
  x: jax.ShapeDtypeStruct,
  *,
  platforms: Sequence[str] = PLATFORMS,
  implementation: str = "reference",
  kind: str | None = None,
) -> Path:
  """Writes `model.bin` (serialized StableHLO) and `weights.npz`; arguments as for `export`.

  Args:
    directory: made if missing.
    deployed: the model.
    x: shape and dtype of the batch.
    platforms: of `cpu`, `cuda` and `tpu`.
    implementation: of the mixed matmul.
    kind: the TPU that kernels are exported for.

  Returns:
    The folder.
  """
  exported = export(deployed, x, platforms=platforms, implementation=implementation, kind=kind)
  directory = Path(directory)
  directory.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {name: np.asarray(a) for name, a in flat(deployed).items()}
  np.savez(directory / "weights.npz", **arrays)
  (directory / "model.bin").write_bytes(exported.serialize())
  return directory
