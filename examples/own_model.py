"""Quantizes a Flax model that this project knows nothing of; prints its error at each ratio."""

import jax
import jax.numpy as jnp
from flax import nnx

from flexiq_jax import flexiq, models
from flexiq_jax.network import Network

net = nnx.Sequential(
  nnx.Conv(3, 32, (3, 3), rngs=nnx.Rngs(0)),
  nnx.relu,
  nnx.Conv(32, 64, (3, 3), strides=2, rngs=nnx.Rngs(1)),
  nnx.relu,
  nnx.Conv(64, 10, (1, 1), rngs=nnx.Rngs(2)),
)
apply, params = models.functional(net)  # or any pure apply(params, x), as Linen's
images = jax.random.normal(jax.random.key(0), (64, 32, 32, 3))  # training images

network = Network(apply, params, images[:1])
model = flexiq.quantize(network, [images])
model = flexiq.improve(model, images)
for ratio in (0.0, 0.5, 1.0):
  error = jnp.linalg.norm(model(images, ratio) - network.float(images))
  print(f"{ratio:4.0%} 4-bit: relative error {error / jnp.linalg.norm(network.float(images)):.4f}")
