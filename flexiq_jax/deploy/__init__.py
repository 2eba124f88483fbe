"""Deployed models: packed integer weights, the mixed matmul, a ratio that is a number.

Code elsewhere may use these names and the modules `artifact` and `export`, which write models to
disk.
"""

from flexiq_jax.deploy.build import deploy
from flexiq_jax.deploy.layers import Mixed, Plain
from flexiq_jax.deploy.layouts import rows_before
from flexiq_jax.deploy.model import Deployed, apply, deployed_rule
from flexiq_jax.deploy.patches import windows
from flexiq_jax.deploy.place import place
from flexiq_jax.deploy.products import products
from flexiq_jax.deploy.runner import Runner, bucket
from flexiq_jax.deploy.sizes import Sizes, sizes
from flexiq_jax.deploy.wiring import Wiring, fold_shapes, wire

__all__ = [
  "Deployed",
  "Mixed",
  "Plain",
  "Runner",
  "Sizes",
  "Wiring",
  "apply",
  "bucket",
  "deploy",
  "deployed_rule",
  "fold_shapes",
  "place",
  "products",
  "rows_before",
  "sizes",
  "windows",
  "wire",
]
