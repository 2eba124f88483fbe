"""Deployed models: packed integer weights, the mixed matmul, a ratio that is a number.

Code elsewhere may use these names and the modules `artifact` and `export`, which write models to
disk.
"""

from flexiq_jax.deployment.build import deploy
from flexiq_jax.deployment.layers import Mixed, Plain
from flexiq_jax.deployment.layouts import rows_before
from flexiq_jax.deployment.model import Deployed, apply, deployed_rule
from flexiq_jax.deployment.padding import Padded, padded
from flexiq_jax.deployment.patches import windows
from flexiq_jax.deployment.place import place
from flexiq_jax.deployment.products import products
from flexiq_jax.deployment.runner import SIZES, Runner, bucket
from flexiq_jax.deployment.sizes import Sizes, sizes
from flexiq_jax.deployment.wiring import Wiring, fold_shapes, wire

__all__ = [
  "SIZES",
  "Deployed",
  "Mixed",
  "Padded",
  "Plain",
  "Runner",
  "Sizes",
  "Wiring",
  "apply",
  "bucket",
  "deploy",
  "deployed_rule",
  "fold_shapes",
  "padded",
  "place",
  "products",
  "rows_before",
  "sizes",
  "windows",
  "wire",
]
