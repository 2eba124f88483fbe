"""How tensors are called in weight files, and where they belong in our parameter trees.

Our module names are torchvision's (ResNet, MobileNetV2, SqueezeNet, VGG) or timm's, so that most
names only change their separator: `layer1.0.conv1.weight` is `layer1/0/conv1/kernel`. Other
dialects are regular expressions, applied in order:

| model            | dialects                                                             |
|------------------|----------------------------------------------------------------------|
| ResNet           | torchvision and timm; `linear` for the head (CIFAR networks)         |
| MobileNetV2      | torchvision; timm                                                    |
| EfficientNetLite | timm; `_blocks.7._depthwise_conv` (ports of the TensorFlow code)     |
| SqueezeNet       | torchvision                                                          |
| VGG              | torchvision; timm (the head as convolutions)                         |
| ViT, DeiT        | timm; torchvision                                                    |
| Swin             | timm; the authors' (merging at the end of a stage); torchvision      |
"""

import re
from collections.abc import Callable, Collection, Sequence

from flexiq_jax.models.mobilenet import EfficientNetLite, MobileNetV2
from flexiq_jax.models.resnet import ResNet
from flexiq_jax.models.squeezenet import SqueezeNet
from flexiq_jax.models.swin import SwinTransformer
from flexiq_jax.models.vgg import VGG
from flexiq_jax.models.vit import VisionTransformer

# Buffers that are recomputed, and the activation quantizers of integer checkpoints.
IGNORED = re.compile(
  r"(^|\.)(num_batches_tracked|relative_position_index|attn_mask|in_act_scale|in_act_zero_point)$"
)
# What only one kind of network has, to recognise a file by.
FINGERPRINTS = {
  ResNet: r"^(module\.)?layer1\.0\.conv1\.",
  MobileNetV2: r"^features\.1\.conv\.0\.0\.|^blocks\.0\.0\.conv_dw\.",
  EfficientNetLite: r"^_blocks\.0\._|^blocks\.0\.0\.conv_dw\.",
  SqueezeNet: r"^features\.\d+\.squeeze\.",
  VGG: r"^features\.7\.weight$",
  VisionTransformer: r"^blocks\.0\.attn\.|^encoder\.layers\.encoder_layer_0\.",
  SwinTransformer: r"^layers\.0\.blocks\.0\.attn\.|^features\.1\.0\.attn\.",
}
_LEAVES = {"running_mean": ("mean",), "running_var": ("var",), "weight": ("kernel", "scale")}

Rules = Sequence[tuple[str, str | Callable[[re.Match[str]], str]]]


def translate(family: type, names: Collection[str], paths: Collection[str]) -> dict[str, str]:
  """Finds the place of each tensor.

  Args:
    family: class of the model.
    names: names of the tensors in the file.
    paths: paths of the leaves of the parameter tree.

  Returns:
    A path for each name. It is in `paths` if and only if the tensor belongs to the model.
  """
  paths = set(paths)
  rules = [
    (re.compile(pattern), replacement) for pattern, replacement in _rules(family, names, paths)
  ]
  result = {}
  for name in names:
    renamed = name
    for pattern, replacement in rules:
      renamed = pattern.sub(replacement, renamed)
    stem, _, leaf = renamed.replace(".", "/").rpartition("/")
    candidates = [f"{stem}/{ours}" if stem else ours for ours in _LEAVES.get(leaf, (leaf,))]
    result[name] = next((path for path in candidates if path in paths), candidates[0])
  return result


def _rules(family: type, names: Collection[str], paths: Collection[str]) -> Rules:
  """The regular expressions of a model; some depend on which dialect the file is in."""
  if issubclass(family, ResNet):
    return ((r"^module\.", ""), (r"^linear\.", "fc."))
  if issubclass(family, MobileNetV2):
    return _mobilenet_v2(names)
  if issubclass(family, EfficientNetLite):
    return _efficientnet_lite(names, paths)
  if issubclass(family, SqueezeNet):
    return ((r"^classifier\.1\.", "classifier."),)
  if issubclass(family, VGG):
    return _VGG
  if issubclass(family, VisionTransformer):
    return _VIT
  if issubclass(family, SwinTransformer):
    return _swin(names)
  return ()


_VGG: Rules = (
  (r"^pre_logits\.fc1\.", "classifier.0."),
  (r"^pre_logits\.fc2\.", "classifier.3."),
  (r"^head\.fc\.", "classifier.6."),
)
_VIT: Rules = (
  (r"^conv_proj\.", "patch_embed.proj."),
  (r"^class_token$", "cls_token"),
  (r"^encoder\.pos_embedding$", "pos_embed"),
  (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
  (r"\.ln_([12])\.", r".norm\1."),
  (r"\.self_attention\.in_proj_(weight|bias)$", r".attn.qkv.\1"),
  (r"\.self_attention\.out_proj\.", ".attn.proj."),
  (r"\.mlp\.(0|linear_1)\.", ".mlp.fc1."),
  (r"\.mlp\.(3|linear_2)\.", ".mlp.fc2."),
  (r"^encoder\.ln\.", "norm."),
  (r"^heads\.head\.", "head."),
)


def _swin(names: Collection[str]) -> Rules:
  if any(name.startswith("layers.0.downsample.") for name in names):
    # The authors merge patches at the end of a stage, timm at the beginning of the next one.
    return ((r"^layers\.(\d+)\.downsample\.", lambda m: f"layers.{int(m[1]) + 1}.downsample."),)
  return (
    (r"^head\.fc\.", "head."),
    # torchvision numbers patch embedding, stages and mergings in one list: 0, 1, 2 ... 7.
    (r"^features\.0\.0\.", "patch_embed.proj."),
    (r"^features\.0\.2\.", "patch_embed.norm."),
    (
      r"^features\.(\d+)\.(norm|reduction)\.",
      lambda m: f"layers.{int(m[1]) // 2}.downsample.{m[2]}.",
    ),
    (r"^features\.(\d+)\.(\d+)\.", lambda m: f"layers.{int(m[1]) // 2}.blocks.{m[2]}."),
    (r"\.mlp\.0\.", ".mlp.fc1."),
    (r"\.mlp\.3\.", ".mlp.fc2."),
  )


def _mobilenet_v2(names: Collection[str]) -> Rules:
  if "conv_stem.weight" not in names:
    return ((r"^classifier\.1\.", "classifier."),)
  # timm counts blocks within stages and has a class of its own for expansion 1.
  block = re.compile(r"^blocks\.(\d+)\.(\d+)\.")
  places = sorted({(int(m[1]), int(m[2])) for m in map(block.match, names) if m})
  expands = {(s, i) for s, i in places if f"blocks.{s}.{i}.conv_pwl.weight" in names}
  short = {"conv_dw": "0.0", "bn1": "0.1", "conv_pw": "1", "bn2": "2"}
  full = {
    "conv_pw": "0.0",
    "bn1": "0.1",
    "conv_dw": "1.0",
    "bn2": "1.1",
    "conv_pwl": "2",
    "bn3": "3",
  }

  def rename(match: re.Match[str]) -> str:
    place = (int(match[1]), int(match[2]))
    inner = (full if place in expands else short).get(match[3], match[3])
    return f"features.{places.index(place) + 1}.conv.{inner}."

  last = f"features.{len(places) + 1}"
  return (
    (r"^blocks\.(\d+)\.(\d+)\.(\w+)\.", rename),
    (r"^conv_stem\.", "features.0.0."),
    (r"^bn1\.", "features.0.1."),
    (r"^conv_head\.", f"{last}.0."),
    (r"^bn2\.", f"{last}.1."),
  )


def _efficientnet_lite(names: Collection[str], paths: Collection[str]) -> Rules:
  if "_conv_stem.weight" not in names:
    return ()
  # The original numbers blocks through; which stage a block is in, our own tree knows.
  block = re.compile(r"^blocks/(\d+)/(\d+)/")
  places = sorted({(int(m[1]), int(m[2])) for m in map(block.match, paths) if m})
  short = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
  full = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2",
    "_project_conv": "conv_pwl", "_bn2": "bn3",
  }  # fmt: skip

  def rename(match: re.Match[str]) -> str:
    index = int(match[1])
    inner = full if f"_blocks.{index}._expand_conv.weight" in names else short
    if index >= len(places) or match[2] not in inner:
      return match[0]  # Of a deeper network; left as it is, it is reported as surplus.
    return "blocks.{}.{}.".format(*places[index]) + inner[match[2]] + "."

  return (
    (r"^_blocks\.(\d+)\.(\w+)\.", rename),
    (r"^_conv_stem\.", "conv_stem."),
    (r"^_bn0\.", "bn1."),
    (r"^_conv_head\.", "conv_head."),
    (r"^_bn1\.", "bn2."),
    (r"^_fc\.", "classifier."),
  )
