"""Deployed models: packed integer weights, the mixed matmul, a ratio that is a number."""

from flexiq_jax.deploy.model import Deployed, Plan, apply, deploy, deployed_rule, make_plan

__all__ = ["Deployed", "Plan", "apply", "deploy", "deployed_rule", "make_plan"]
