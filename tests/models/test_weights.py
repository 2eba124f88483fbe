"""Weight files: each dialect fills the tree, and each fault has its message."""

import functools
import json
import re
import time

import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from flexiq_jax import models
from flexiq_jax.models import weights


@functools.lru_cache
def template(name, **overrides):
  """A model without arrays, and its tree of shapes."""
  overrides = {**models.MODELS[name].tiny, **overrides}
  module = nnx.eval_shape(lambda: models.create(name, **overrides))
  return module, models.functional(module)[1]


def torch_state(params, rename=lambda name: name):
  """Random values for a tree, as a torch state dict under its own names, and as a tree."""
  rng = np.random.default_rng(0)
  leaves = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
  state, tree = {}, {}
  for path, leaf in models.flatten(params).items():
    value = rng.normal(size=leaf.shape).astype(np.float32)
    tree[path] = value
    stem, _, kind = path.rpartition("/")
    name = f"{stem}/{leaves.get(kind, kind)}".strip("/").replace("/", ".")
    if kind == "kernel":
      value = np.moveaxis(value, (-1, -2), (0, 1))
    state[rename(name)] = np.ascontiguousarray(value)
  return state, tree


def save(tmp_path, state):
  path = tmp_path / "model.safetensors"
  save_file(state, path)
  return path


def assert_equal(params, tree):
  flat = models.flatten(params)
  assert flat.keys() == tree.keys()
  for path, value in tree.items():
    assert flat[path].dtype == np.float32, path
    np.testing.assert_array_equal(flat[path], value, err_msg=path)


def substitute(*rules):
  """A renaming by regular expressions, in order."""

  def rename(name):
    for pattern, replacement in rules:
      name = re.sub(pattern, replacement, name)
    return name

  return rename


DIALECTS = {
  "resnet as torchvision": ("resnet18", substitute()),
  "resnet for CIFAR": ("resnet20", substitute((r"^fc\.", "linear."))),
  "resnet saved parallel": ("resnet20", substitute((r"^", "module."), (r"fc", "linear"))),
  "mobilenet as torchvision": ("mobilenet_v2", substitute((r"^classifier", "classifier.1"))),
  "mobilenet as timm": (
    "mobilenet_v2",
    substitute(
      (r"^features\.0\.0", "conv_stem"),
      (r"^features\.0\.1", "bn1"),
      (r"^features\.4\.0", "conv_head"),
      (r"^features\.4\.1", "bn2"),
      (r"^features\.1\.conv\.0\.0", "blocks.0.0.conv_dw"),
      (r"^features\.1\.conv\.0\.1", "blocks.0.0.bn1"),
      (r"^features\.1\.conv\.1", "blocks.0.0.conv_pw"),
      (r"^features\.1\.conv\.2", "blocks.0.0.bn2"),
      (r"^features\.2\.", "blocks.1.0."),
      (r"^features\.3\.", "blocks.1.1."),
      (r"\.conv\.0\.0", ".conv_pw"),
      (r"\.conv\.0\.1", ".bn1"),
      (r"\.conv\.1\.0", ".conv_dw"),
      (r"\.conv\.1\.1", ".bn2"),
      (r"\.conv\.2", ".conv_pwl"),
      (r"\.conv\.3", ".bn3"),
    ),
  ),
  "efficientnet as timm": ("efficientnet_lite0", substitute()),
  "efficientnet in TensorFlow's order": (
    "efficientnet_lite0_tf",
    substitute(
      (r"^blocks\.0\.0\.conv_dw", "_blocks.0._depthwise_conv"),
      (r"^blocks\.0\.0\.conv_pw", "_blocks.0._project_conv"),
      (r"^blocks\.0\.0\.bn", "_blocks.0._bn"),
      (r"^blocks\.1\.(\d)\.bn1", r"blocks.1.\1._bn0"),
      (r"^blocks\.1\.(\d)\.bn2", r"blocks.1.\1._bn1"),
      (r"^blocks\.1\.(\d)\.bn3", r"blocks.1.\1._bn2"),
      (r"^blocks\.1\.0\.", "_blocks.1."),
      (r"^blocks\.1\.1\.", "_blocks.2."),
      (r"\.conv_pwl", "._project_conv"),
      (r"\.conv_pw", "._expand_conv"),
      (r"\.conv_dw", "._depthwise_conv"),
      (r"^conv_stem", "_conv_stem"),
      (r"^conv_head", "_conv_head"),
      (r"^bn1", "_bn0"),
      (r"^bn2", "_bn1"),
      (r"^classifier", "_fc"),
    ),
  ),
  "squeezenet as torchvision": (
    "squeezenet1_0",
    substitute((r"^classifier", "classifier.1")),
  ),
  "vgg as torchvision": ("vgg16", substitute()),
  "vit as timm": ("deit_s", substitute()),
  "vit as torchvision": (
    "vit_b",
    substitute(
      (r"^patch_embed\.proj", "conv_proj"),
      (r"^cls_token", "class_token"),
      (r"^pos_embed", "encoder.pos_embedding"),
      (r"^blocks\.(\d+)\.", r"encoder.layers.encoder_layer_\1."),
      (r"\.norm([12])\.", r".ln_\1."),
      (r"attn\.qkv\.", "self_attention.in_proj_"),
      (r"attn\.proj", "self_attention.out_proj"),
      (r"mlp\.fc1", "mlp.0"),
      (r"mlp\.fc2", "mlp.3"),
      (r"^norm\.", "encoder.ln."),
      (r"^head", "heads.head"),
    ),
  ),
  "swin as timm": ("swin_t", substitute((r"^head", "head.fc"))),
  "swin as its authors": ("swin_t", substitute((r"^layers\.1\.down", "layers.0.down"))),
  "swin as torchvision": (
    "swin_t",
    substitute(
      (r"^patch_embed\.proj", "features.0.0"),
      (r"^patch_embed\.norm", "features.0.2"),
      (r"^layers\.0\.blocks", "features.1"),
      (r"^layers\.1\.blocks", "features.3"),
      (r"^layers\.1\.downsample", "features.2"),
      (r"mlp\.fc1", "mlp.0"),
      (r"mlp\.fc2", "mlp.3"),
    ),
  ),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_dialects_fill_the_tree(dialect, tmp_path):
  name, rename = DIALECTS[dialect]
  module, params = template(name)
  state, tree = torch_state(params, rename)
  # Buffers that are recomputed are no surplus, whatever they hold.
  state["layers.0.blocks.0.attn.relative_position_index"] = np.zeros(3, np.int64)
  state["layers.0.blocks.1.attn_mask"] = np.full(3, np.nan, np.float32)
  state["bn1.num_batches_tracked"] = np.zeros((), np.int64)
  assert_equal(weights.load(save(tmp_path, state), module, params), tree)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_other_precisions_become_float32(dtype, tmp_path):
  module, params = template("resnet20")
  state, tree = torch_state(params)
  path = save(tmp_path, {name: value.astype(dtype) for name, value in state.items()})
  assert_equal(
    weights.load(path, module, params),
    {leaf: value.astype(dtype).astype(np.float32) for leaf, value in tree.items()},
  )


def test_int8_weights_are_dequantized_and_the_background_class_is_dropped(tmp_path):
  module, params = template("mobilenet_v2_tf")
  state, tree = torch_state(params, substitute((r"^classifier", "classifier.1")))
  rng = np.random.default_rng(1)
  codes = {}
  for name in [name for name in state if name.endswith(".weight")]:
    stem = name.removesuffix(".weight")
    weight = state.pop(name)
    if stem == "classifier.1":
      weight = np.concatenate([weight[:1], weight])[:, :, None, None]
    codes[stem] = rng.integers(-127, 128, weight.shape).astype(np.int8)
    state[f"{stem}.weight_q"] = codes[stem]
    state[f"{stem}.weight_scale"] = rng.random(len(weight), np.float32)
    state[f"{stem}.in_act_scale"] = np.ones(1, np.float32)
    state[f"{stem}.in_act_zero_point"] = np.zeros(1, np.int32)
  state["classifier.1.bias"] = np.concatenate([[7.0], state["classifier.1.bias"]], dtype=np.float32)
  loaded = models.flatten(weights.load(save(tmp_path, state), module, params))
  np.testing.assert_array_equal(loaded["classifier/bias"], tree["classifier/bias"])
  for stem, code in codes.items():
    scale = state[f"{stem}.weight_scale"]
    kernel = loaded[
      stem.removesuffix(".1" if stem.startswith("cl") else "").replace(".", "/") + "/kernel"
    ]
    for channel in (0, len(scale) - 1 - (stem == "classifier.1")):
      row = channel + (stem == "classifier.1")
      expected = code[row].astype(np.float32) * scale[row]  # [in, height, width]
      actual = np.asarray(kernel[..., channel])
      if actual.ndim == 1:
        expected = expected[:, 0, 0]
      else:
        actual = actual.transpose(2, 0, 1)
      np.testing.assert_allclose(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("length", [0, 2, 15, 17])
def test_scales_of_another_length_are_refused(tmp_path, length):
  module, params = template("resnet20")
  state, _ = torch_state(params)
  outputs = len(state["conv1.weight"])
  state["conv1.weight_q"] = state.pop("conv1.weight").astype(np.int8)
  state["conv1.weight_scale"] = np.ones(length, np.float32)
  message = (
    rf"conv1.weight_scale has {length} values; 1 or {outputs} are accepted, as conv1.weight_q"
  )
  with pytest.raises(ValueError, match=message):
    weights.load(save(tmp_path, state), module, params)


@pytest.mark.parametrize("kind", ["F8_E4M3", "F8_E5M2", "C64"])
def test_types_that_numpy_has_not_are_refused_by_name(tmp_path, kind):
  module, params = template("resnet20")
  size = 2 * (8 if kind == "C64" else 1)
  entry = {"dtype": kind, "shape": [2], "data_offsets": [0, size]}
  head = json.dumps({"conv1.weight": entry}).encode()
  path = tmp_path / "model.safetensors"
  path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(size))
  with pytest.raises(ValueError, match=f"holds {kind} in conv1.weight; convert these to float32"):
    weights.load(path, module, params)


def test_a_name_is_as_good_as_a_module(tmp_path):
  module, params = template("vit_cifar10", depth=8, width=192, heads=3)
  state, tree = torch_state(params)
  assert_equal(weights.load(save(tmp_path, state), "vit_cifar10", params), tree)
  with pytest.raises(ValueError, match="model 'vit_cifar' is unknown; did you mean vit_cifar10"):
    weights.load(tmp_path / "model.safetensors", "vit_cifar", params)
  assert isinstance(module, nnx.Module)


def refusal(tmp_path, state, name="resnet20", **overrides):
  module, params = template(name, **overrides)
  path = save(tmp_path, state)
  with pytest.raises(ValueError) as caught:
    weights.load(path, module, params)
  message = str(caught.value)
  assert str(path) in message and "\n" not in message
  return message


def test_missing_surplus_and_misshapen_tensors_are_listed(tmp_path):
  _, params = template("resnet20")
  state, _ = torch_state(params)
  del state["layer1.0.bn1.running_mean"]
  state["layer9.weight"] = np.zeros(3, np.float32)
  state["conv1.weight"] = np.zeros((8, 3, 5, 5), np.float32)
  message = refusal(tmp_path, state)
  assert "1 missing: layer1/0/bn1/mean;" in message
  assert "1 surplus: layer9.weight;" in message
  assert "conv1.weight ([5, 5, 3, 8], model: [3, 3, 3, 8] at conv1/kernel)" in message


def test_long_lists_are_cut_with_a_count(tmp_path):
  _, params = template("resnet20")
  message = refusal(tmp_path, {"fc.bias": np.zeros(10, np.float32)})
  count = len(models.flatten(params)) - 1
  assert f"{count} missing: " in message and f" and {count - 10} more" in message


def test_two_tensors_for_one_place(tmp_path):
  _, params = template("resnet20")
  state, _ = torch_state(params)
  state["linear.bias"] = state["fc.bias"]
  assert re.search(r"1 surplus: (linear|fc)\.bias\.", refusal(tmp_path, state))


def test_integers_are_no_weights(tmp_path):
  _, params = template("resnet20")
  state, _ = torch_state(params)
  state["fc.weight"] = state["fc.weight"].astype(np.int8)
  assert "fc.weight (int8, model: float32 at fc/kernel)" in refusal(tmp_path, state)


def test_a_head_that_timm_has_as_convolutions(tmp_path):
  module, params = template("vgg16_bn")
  state, tree = torch_state(
    params,
    substitute(
      (r"^classifier\.0", "pre_logits.fc1"),
      (r"^classifier\.3", "pre_logits.fc2"),
      (r"^classifier\.6", "head.fc"),
    ),
  )
  for name, shape in {"fc1": (16, 16, 3, 3), "fc2": (16, 16, 1, 1)}.items():
    state[f"pre_logits.{name}.weight"] = state[f"pre_logits.{name}.weight"].reshape(shape)
  assert_equal(weights.load(save(tmp_path, state), module, params), tree)


def test_another_number_of_classes_behind_hidden_layers(tmp_path):
  _, params = template("vgg16", num_classes=7)
  module, wanted = template("vgg16")
  state, _ = torch_state(params)
  with pytest.raises(ValueError, match="7 classes; make the model with num_classes=7"):
    weights.load(save(tmp_path, state), module, wanted)


def test_another_number_of_classes(tmp_path):
  _, params = template("resnet20", num_classes=100)
  state, _ = torch_state(params)
  assert "The file has 100 classes; make the model with num_classes=100." in refusal(
    tmp_path, state
  )


def test_weights_of_another_registered_model(tmp_path):
  _, params = template("resnet20", depths=(5, 5, 5), width=16)
  state, _ = torch_state(params, substitute((r"^fc", "linear")))
  start = time.monotonic()
  message = refusal(tmp_path, state, depths=(3, 3, 3), width=16)
  assert "surplus: layer1.3.bn1.bias" in message and "The file fits resnet32." in message
  assert time.monotonic() - start < 20


def test_weights_of_another_family(tmp_path):
  state, _ = torch_state(template("deit_s")[1])
  message = refusal(tmp_path, state)
  assert "seems to be of a VisionTransformer, the model is a ResNet." in message


def test_weights_of_another_size(tmp_path):
  state, _ = torch_state(template("resnet20", width=4)[1])
  assert "Depth, width or input size of the model may differ" in refusal(tmp_path, state)


def test_weights_of_the_transformers_library(tmp_path):
  name = "vit.encoder.layer.0.attention.attention.query.weight"
  message = refusal(tmp_path, {name: np.zeros((4, 4), np.float32)}, "deit_s")
  assert "names of the transformers library; accepted: timm's or torchvision's" in message


def test_tensorflow_weights_need_tensorflow_padding(tmp_path):
  _, rename = DIALECTS["efficientnet in TensorFlow's order"]
  state, _ = torch_state(template("efficientnet_lite0")[1], rename)
  message = refusal(tmp_path, state, "efficientnet_lite0")
  assert "pad asymmetrically" in message and "padding='torch'" in message
  assert "efficientnet_lite0_tf" in message


def test_folded_weights_need_the_model_without_norms(tmp_path):
  state, _ = torch_state(template("mobilenet_v2_tf")[1])
  message = refusal(tmp_path, state, "mobilenet_v2")
  assert "batch norm folded in; make the model with norm=False" in message


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_nan_and_infinity_are_refused(value, tmp_path):
  state, _ = torch_state(template("resnet20")[1])
  state["layer1.0.conv2.weight"][0, 0, 0, 0] = value
  assert "holds NaN or infinity in layer1.0.conv2.weight;" in refusal(tmp_path, state)


@pytest.mark.parametrize(
  ("damage", "advice"),
  [
    (lambda content: content[:-5], "damaged, cut short or of another format"),
    (lambda content: content[:40], "damaged, cut short or of another format"),
    (lambda content: b"", "damaged, cut short or of another format"),
    (lambda content: b"PK\x03\x04" + content, "it looks like a torch checkpoint"),
    (lambda content: b"\x80\x02\x8a" + content, "it looks like a torch checkpoint"),
  ],
)
def test_damaged_files(damage, advice, tmp_path):
  module, params = template("resnet20")
  path = save(tmp_path, torch_state(params)[0])
  path.write_bytes(damage(path.read_bytes()))
  with pytest.raises(ValueError, match=f"{path} cannot be read as safetensors .*{advice}"):
    weights.load(path, module, params)
