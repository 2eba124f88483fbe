"""Weights laid out for the platform that a model runs on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from flexiq_jax import deploy
from flexiq_jax.deploy.layers import Mixed
from flexiq_jax.grouping import LowSettings
from flexiq_jax.kernels import Weights, windows
from flexiq_jax.kernels.gpu import GpuWeights
from tests.deploy.deployed_for_test import RESNET, WIDE, made

ON_GPU = {"platform": "gpu", "implementation": None}


def kinds(deployed):
  return {type(d.weights) for d in deployed.layers.values() if isinstance(d, Mixed)}


def test_weights_stay_as_they_are_where_a_kernel_reads_them_so():
  model = made(RESNET)
  deployed = deploy.deploy(model.model, model.x[:1], granule=128)
  assert kinds(deploy.place(deployed)) == kinds(deploy.place(deployed, "tpu")) == {Weights}


def test_weights_for_a_gpu_are_laid_out_once():
  model = made(RESNET)
  deployed = deploy.deploy(model.model, model.x[:1], granule=128)
  placed = deploy.place(deployed, "gpu")
  assert kinds(placed) == {GpuWeights}
  run = lambda d, x, level: deploy.apply(d, x, level, **ON_GPU)
  arguments = (jnp.asarray(model.x), jnp.int32(0))
  text = lambda d: jax.jit(run).trace(d, *arguments).lower(lowering_platforms=("cuda",)).as_text()
  kernels = text(placed).count("mosaic_gpu")
  assert kernels >= len(kinds(placed)) and kernels == text(deployed).count("mosaic_gpu")


def test_windows_that_slide_become_patches_for_a_gpu():
  model = made(WIDE, settings=LowSettings(group_size=64, shift_block=64))
  deployed = deploy.deploy(model.model, model.x[:1], granule=128)
  own = deployed.layers["layer1/0/conv2"]
  assert own.slides
  assert not deploy.place(deployed, "gpu").layers["layer1/0/conv2"].slides
  turned = dataclasses.replace(own, weights=windows.by_channel(own.weights))
  other = dataclasses.replace(deployed, layers=deployed.layers | {"layer1/0/conv2": turned})
  run = jax.jit(deploy.apply)
  for level in range(len(deployed.levels)):
    truth = run(deployed, model.x, jnp.int32(level))
    np.testing.assert_allclose(run(other, model.x, jnp.int32(level)), truth, atol=1e-5)
