"""Deployed models: packed integer weights, the mixed matmul, a ratio that is a number."""

from flexiq_jax.deploy.build import deploy
from flexiq_jax.deploy.model import Deployed, apply, deployed_rule
from flexiq_jax.deploy.place import place
from flexiq_jax.deploy.plan import Plan, fold_shapes, make_plan
from flexiq_jax.deploy.products import products
from flexiq_jax.deploy.runner import Runner, bucket
from flexiq_jax.deploy.sizes import Sizes, sizes

__all__ = [
  "Deployed",
  "Plan",
  "Runner",
  "Sizes",
  "apply",
  "bucket",
  "deploy",
  "deployed_rule",
  "fold_shapes",
  "make_plan",
  "place",
  "products",
  "sizes",
]
