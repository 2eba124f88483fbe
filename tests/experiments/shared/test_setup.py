"""From a config to a checked described."""

import dataclasses

import numpy as np
import pytest

from configs import common
from experiments.shared import setup
from flexiq_jax import models


def config(**changes):
  made = common.defaults("test", "resnet8")
  made.weights = "random"
  made.data.name = made.calibration.name = "digits"
  made.calibration.images = 16
  made.update_from_flattened_dict(changes)
  return made.lock()


def test_plan_is_the_model_without_weights():
  described = setup.describe(config())
  names = [layer.name for layer in described.layers]
  assert names[0] == "conv1" and names[-1] == "fc"
  assert described.selectable == tuple(names[1:-1])
  assert described.module.input_shape == (8, 8, 1)
  leaves = models.flatten(models.functional(described.module)[1]).values()
  assert not any(hasattr(leaf, "device") and hasattr(leaf, "block_until_ready") for leaf in leaves)


def test_model_arguments_are_python_values():
  described = setup.describe(config(model_args="width=4, depths=(1,1)"))
  assert described.settings.model_args == {"width": 4, "depths": (1, 1)}
  assert [layer.out_channels for layer in described.layers] == [4, 4, 4, 8, 8, 10]
  assert setup.describe(config(model_args="tiny,depths=(1,)")).settings.model_args == {
    "width": 8,
    "depths": (1,),
  }
  stages = ((1, 8, 1, 1), (4, 16, 2, 1))
  nested = config(model="mobilenet_digits", model_args=f"stages={stages},last_channels=32")
  found = setup.describe(nested).settings.model_args
  assert found == {"stages": stages, "last_channels": 32}


def test_keep8_and_friends():
  described = setup.describe(config(keep8=("^layer2/", "conv2$"), keep_first_last=False))
  assert described.selectable == ("conv1", "layer1/0/conv1", "layer3/0/conv1", "fc")


def test_images_have_to_fit_the_model():
  with pytest.raises(ValueError, match=r"give images 8x8x1; model 'resnet8' takes 16x16x1"):
    setup.describe(config(model_args="input_size=16"))
  setup.describe(config(model_args="input_size=16", **{"preprocess.crop": 16}))


def test_inputs_are_opened():
  inputs = setup.prepare(config(**{"data.limit": 30}))
  assert (len(inputs.evaluation), len(inputs.calibration)) == (445, 1352)
  assert inputs.params is None and inputs.recipe is None
  of = lambda **changes: dataclasses.replace(inputs, config=config(**changes))
  assert inputs.evaluated == 30
  assert of(**{"data.limit": 9999}).evaluated == 445
  drawn, labels = of(**{"calibration.batch_size": 10}).calibration_set
  assert [images.shape for images in drawn] == [(10, 8, 8, 1), (6, 8, 8, 1)]
  assert (labels.shape, labels.dtype) == ((16,), np.int32)
  batches = of(batch_size=100).evaluation_batches()
  assert [int(batch.mask.sum()) for batch in batches] == [100, 100, 100, 100, 45]
  # A batch is not padded beyond all there is.
  batches = of(batch_size=10**6).evaluation_batches()
  assert [batch.images.shape for batch in batches] == [(445, 8, 8, 1)]


def test_all_that_is_missing_is_one_message(tmp_path):
  missing = config(
    weights="/no/weights",
    recipe="/no/recipe.json",
    **{"data.name": "folder", "data.root": "/no/images", "calibration.name": "imagenet"},
    **{"calibration.root": str(tmp_path)},
  )
  with pytest.raises(ValueError) as error:
    setup.prepare(missing)
  names = [line.partition(": ")[0] for line in str(error.value).split("\n")]
  assert names == [
    "config.data",
    "config.calibration",
    "config.weights",
    "config.recipe",
    "to try the pipeline with neither",
  ]


def test_groups_are_counted_layer_by_layer():
  """Behind attention groups are whole heads; elsewhere they have the size that was asked for."""
  made = common.imagenet("test", "vit_cifar10", "random", "runlocal")
  made.groups.update(group_size=4, whole_heads=True)
  described = setup.describe(made)
  attention = described.module.blocks[0].attn
  channels = {layer.name: layer.in_channels for layer in described.layers}
  head = channels["blocks/0/attn/proj"] // attention.heads
  for name, groups in described.groups.items():
    size = max(4, head) if name.endswith("attn/proj") else 4
    assert groups == -(-channels[name] // size), name
  assert described.groups["blocks/0/attn/proj"] < described.groups["blocks/0/attn/qkv"]
