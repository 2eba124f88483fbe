"""ResNet: shortcut A by hand, and arguments that are refused."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from flexiq_jax.models.resnet import BasicBlock, ResNet


def test_shortcut_a_subsamples_and_pads_channels_on_both_sides():
  block = BasicBlock(4, 8, stride=2, shortcut="A", dtype=jnp.float32, rngs=nnx.Rngs(0))
  block.eval()
  # Without its residual branch the block is the shortcut alone.
  block.bn2.scale[...] = jnp.zeros(8)
  x = np.random.default_rng(0).random((2, 6, 6, 4), np.float32)
  y = np.asarray(block(x))
  assert block.downsample is None
  assert y.shape == (2, 3, 3, 8)
  np.testing.assert_array_equal(y[..., 2:6], x[:, ::2, ::2])
  assert not y[..., :2].any() and not y[..., 6:].any()


def test_strides_halve_the_image_from_stage_to_stage():
  module = ResNet(
    block="basic", depths=(1, 1, 1), width=4, stem="cifar", num_classes=3, rngs=nnx.Rngs(0)
  )
  shapes = []
  for stage in (1, 2, 3):
    conv = getattr(module, f"layer{stage}")[0].conv1
    shapes.append((conv.strides, conv.out_features))
  assert shapes == [((1, 1), 4), ((2, 2), 8), ((2, 2), 16)]


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"block": "wide"}, r"block='wide' is unknown; accepted: basic, bottleneck"),
    ({"stem": "tiny"}, r"stem='tiny' is unknown; accepted: imagenet, cifar"),
    ({"shortcut": "C"}, r"shortcut='C' is unknown; accepted: A, B"),
    ({"depths": ()}, r"depths=\(\) is refused"),
    ({"depths": (1, 0)}, r"depths=\(1, 0\) is refused; accepted: positive integers"),
    ({"depths": (1,) * 5}, r"depths=.* has 5 stages; accepted: one to four"),
    ({"width": 0}, r"width=0 is refused"),
    ({"width": 16.0}, r"width=16.0 is refused"),
    ({"width": 5, "shortcut": "A"}, r"width=5 is odd; shortcut A"),
    ({"in_channels": -3}, r"in_channels=-3 is refused"),
  ],
)
def test_refused_arguments(arguments, message):
  options = {"block": "basic", "depths": (1,), "rngs": nnx.Rngs(0), **arguments}
  with pytest.raises(ValueError, match=message):
    ResNet(**options)


@pytest.mark.parametrize("shape", [(2, 8, 8, 3), (8, 8, 1)])
def test_images_of_another_shape_are_refused(shape):
  build = functools.partial(
    ResNet, block="basic", depths=(1,), width=4, in_channels=1, input_size=8
  )
  with pytest.raises(ValueError, match=r"x has shape \[.*\]; this model takes .*\[B, H, W, 1\]"):
    nnx.eval_shape(lambda: build(rngs=nnx.Rngs(0))(jnp.zeros(shape)))
