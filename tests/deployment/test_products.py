"""Shapes of products, against those that a run of the model asks for."""

import jax
import jax.numpy as jnp
import pytest

from flexiq_jax import deployment, kernels
from flexiq_jax.kernels.gpu.matmul import GpuWeights
from flexiq_jax.kernels.tile_files import Shape
from tests.deployment.deployed_for_test import RESNET, SWIN, VIT, made


@pytest.mark.parametrize("case", [RESNET, VIT, SWIN], ids=lambda case: case[0])
def test_products_are_those_of_a_run(case, monkeypatch):
  small = made(case)
  x = jax.ShapeDtypeStruct((3, *small.x.shape[1:]), jnp.float32)
  deployed = deployment.deploy(small.model, x)
  asked, run = [], kernels.mixed_matmul

  def spy(x, w, epilogue, **options):
    (m, k), n = x.x8.shape, w.w8.shape[1]
    asked.append(Shape(m=m, k=k, n=n, block=w.block))
    return run(x, w, epilogue, **options)

  monkeypatch.setattr(kernels, "mixed_matmul", spy)
  jax.eval_shape(deployment.apply, deployed, x, jnp.int32(0))
  found = deployment.products(deployed, x)
  assert found and sorted(found.values()) == sorted(asked)


def test_weights_laid_out_for_a_gpu_are_the_same_products():
  small = made(VIT)
  deployed = deployment.deploy(small.model, small.x[:1], granule=64)
  before = deployment.products(deployed, small.x)
  placed = deployment.place(deployed, "gpu")
  assert any(
    isinstance(d.weights, GpuWeights) for d in placed.layers.values() if hasattr(d, "weights")
  )
  assert deployment.products(placed, small.x) == before
