"""Weights laid out for the platform that a model runs on."""

import jax
import jax.numpy as jnp
import pytest

from flexiq_jax import deployment
from flexiq_jax.deployment.layers import Mixed
from flexiq_jax.kernels import Weights
from flexiq_jax.kernels.gpu.matmul import GpuWeights
from tests.deployment.deployed_for_test import RESNET, made

ON_GPU = {"platform": "gpu", "implementation": None}


def kinds(deployed):
  return {type(d.weights) for d in deployed.layers.values() if isinstance(d, Mixed)}


def test_weights_stay_as_they_are_where_a_kernel_reads_them_so():
  model = made(RESNET)
  deployed = deployment.deploy(model.model, model.x[:1], granule=128)
  assert kinds(deployment.place(deployed)) == kinds(deployment.place(deployed, "tpu")) == {Weights}


def test_weights_for_a_gpu_are_laid_out_once():
  model = made(RESNET)
  deployed = deployment.deploy(model.model, model.x[:1], granule=64)
  placed = deployment.place(deployed, "gpu")
  assert kinds(placed) == {GpuWeights}
  run = lambda d, x, level: deployment.apply(d, x, level, **ON_GPU)
  arguments = (jnp.asarray(model.x), jnp.int32(0))
  text = lambda d: jax.jit(run).trace(d, *arguments).lower(lowering_platforms=("cuda",)).as_text()
  kernels = text(placed).count("mosaic_gpu")
  assert kernels >= len(kinds(placed)) and kernels == text(deployed).count("mosaic_gpu")


def test_what_was_laid_out_for_a_tpu_is_refused_on_a_gpu():
  model = made(RESNET)
  deployed = deployment.deploy(model.model, model.x[:1], granule=128)
  with pytest.raises(ValueError, match=r"layer layer1/0/conv1 is laid out for TPUs.*granule=64"):
    deployment.place(deployed, "gpu")
