"""Models by name: published sizes, options, and the messages for what does not exist."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import models

# Learned parameters, as torchvision, timm and the CIFAR checkpoints' author publish them (resnet8,
# mobilenet_digits, the folded MobileNetV2 and vit_cifar10: counted by hand).
PARAMETERS = {
  "resnet8": 75_002,
  "resnet20": 269_722,
  "resnet32": 464_154,
  "resnet44": 658_586,
  "resnet56": 853_018,
  "resnet18": 11_689_512,
  "resnet34": 21_797_672,
  "resnet50": 25_557_032,
  "mobilenet_digits": 19_674,
  "mobilenet_v2": 3_504_872,
  "mobilenet_v2_tf": 3_504_872 - 17_056,  # Each norm has two vectors, each bias is one.
  "efficientnet_lite0": 4_652_008,
  "efficientnet_lite0_tf": 4_652_008,
  "squeezenet1_0": 1_248_424,
  "squeezenet1_1": 1_235_496,
  "vgg16": 138_357_544,
  "vgg16_bn": 138_365_992,
  "vit_s": 22_050_664,
  "vit_b": 86_567_656,
  "deit_ti": 5_717_416,
  "deit_s": 22_050_664,
  "deit_b": 86_567_656,
  "vit_cifar10": 3_583_306,
  "swin_t": 28_288_354,
  "swin_s": 49_606_258,
  "swin_b": 87_768_224,
}


@functools.cache
def whole(name):
  return nnx.eval_shape(functools.partial(models.create, name))


@pytest.mark.parametrize("name", models.MODELS)
def test_parameter_count_and_spec(name):
  spec = models.MODELS[name]
  module = whole(name)
  leaves = jax.tree.leaves(nnx.state(module, nnx.Param))
  assert sum(math.prod(leaf.shape) for leaf in leaves) == PARAMETERS[name]
  assert module.input_shape == spec.input_shape
  assert module.num_classes == spec.num_classes
  assert len(spec.mean) == len(spec.std) == spec.input_shape[2]
  assert all(0 < value < 1 for value in spec.mean + spec.std)
  assert spec.crop == spec.input_shape[0] and (spec.resize is None or spec.resize >= spec.crop)


@pytest.mark.parametrize("name", models.MODELS)
def test_tiny_variant_is_small_and_of_the_same_class(name):
  spec = models.MODELS[name]
  full = whole(name)
  tiny = nnx.eval_shape(functools.partial(models.create, name, **spec.tiny))
  size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(tiny)))
  assert type(tiny) is type(full)
  assert size < 40_000
  assert {p.rpartition("/")[2] for p in models.flatten(models.functional(tiny)[1])} == {
    p.rpartition("/")[2] for p in models.flatten(models.functional(full)[1])
  }


def test_spec_is_frozen():
  with pytest.raises(dataclasses.FrozenInstanceError):
    models.get("resnet20").crop = 5


def test_overrides_reach_the_model():
  module = nnx.eval_shape(
    lambda: models.create("deit_s", depth=2, width=64, heads=2, input_size=32, num_classes=7)
  )
  _, params = models.functional(module)
  assert sorted(params["blocks"]) == ["0", "1"]
  assert params["head"]["kernel"].shape == (64, 7)
  assert params["pos_embed"].shape == (1, 5, 64)
  assert module.input_shape == (32, 32, 3)


def test_seed_decides_the_weights():
  def kernels(seed):
    module = models.create("resnet8", seed=seed, width=4, depths=(1,))
    return models.functional(module)[1]["conv1"]["kernel"]

  np.testing.assert_array_equal(kernels(1), kernels(1))
  assert not np.array_equal(kernels(1), kernels(2))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "bfloat16"])
def test_bfloat16_computes_in_bfloat16_and_keeps_float32_weights_and_logits(dtype):
  options = {"width": 8, "depths": (1, 1)}
  low = models.create("resnet8", dtype=dtype, **options)
  apply, params = models.functional(low)
  apply_high, _ = models.functional(nnx.eval_shape(lambda: models.create("resnet8", **options)))
  x = jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  logits, exact = apply(params, x), apply_high(params, x)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
  assert logits.dtype == jnp.float32
  error = np.abs(logits - exact).max() / np.abs(exact).max()
  assert 1e-6 < error < 5e-2  # Not float32 after all, yet close.


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"name": "resnet21"}, r"model 'resnet21' is unknown; did you mean .*resnet20"),
    ({"name": "mobilenetv2"}, r"model 'mobilenetv2' is unknown; did you mean mobilenet_v2"),
    ({"name": "xyz"}, r"model 'xyz' is unknown; accepted: resnet8, .*swin_b"),
    ({"name": "deit_s", "widht": 64}, r"widht=64 .*'deit_s'; did you mean 'width'\? accepted: .*"),
    ({"name": "resnet20", "heads": 2}, r"heads=2 is no argument of model 'resnet20'.*depths"),
    ({"name": "resnet20", "dtype": "float16"}, r"dtype='float16' is refused; accepted: float32"),
    ({"name": "resnet20", "dtype": "half-ish"}, r"dtype='half-ish' is refused"),
    ({"name": "resnet20", "num_classes": 0}, r"num_classes=0 is refused; accepted: positive"),
  ],
)
def test_create_refuses(arguments, message):
  with pytest.raises(ValueError, match=message):
    models.create(**arguments)
