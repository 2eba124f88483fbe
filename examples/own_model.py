"""Quantizes a Flax model that this project knows nothing of, and has it run at any ratio."""

import jax
from flax import nnx

import flexiq_jax as fq

net = nnx.Sequential(
  nnx.Conv(3, 16, (3, 3), rngs=nnx.Rngs(0)),
  nnx.relu,
  nnx.Conv(16, 32, (3, 3), strides=2, rngs=nnx.Rngs(1)),
  nnx.relu,
  nnx.Conv(32, 10, (1, 1), rngs=nnx.Rngs(2)),
  lambda maps: maps.mean(axis=(1, 2)),
)
images = jax.random.normal(jax.random.key(0), (64, 16, 16, 3))  # training images, or batches

model = fq.quantize(net, images)  # or (linen_module, variables, images), (apply, params, images)
model = fq.improve(model)  # searches a better order
print(model)
logits = model(images, 0.5)  # half of the MACs in 4 bits; the ratio may be traced
print(fq.evaluate(model, images))  # with labels: fq.evaluate(model, (images, labels))
model.save("my_model")
model = fq.load("my_model", net)
