"""Our models compute the same logits as the torch ones, from the same weight file.

Weights are random, batch norm statistics included, and go the way that a user's go: a safetensors
file under the torch names, read by `weights.load`. Run with `make parity`; requirements-parity.txt
has what it needs.
"""

import importlib
import importlib.util
import sys
import warnings

import jax
import numpy as np
import pytest
from flax import nnx

from flexiq_jax import models

pytestmark = pytest.mark.parity

TOLERANCE = 1e-4

CASES = [
  ("resnet18", "torchvision", "resnet18"),
  ("resnet18", "timm", "resnet18"),
  ("resnet34", "torchvision", "resnet34"),
  ("resnet50", "torchvision", "resnet50"),
  ("resnet20", "here", "CifarResNet(3)"),
  ("resnet56", "here", "CifarResNet(9)"),
  ("mobilenet_v2", "torchvision", "mobilenet_v2"),
  ("mobilenet_v2", "timm", "mobilenetv2_100"),
  ("efficientnet_lite0", "timm", "efficientnet_lite0"),
  ("efficientnet_lite0_tf", "timm", "tf_efficientnet_lite0"),
  ("squeezenet1_0", "torchvision", "squeezenet1_0"),
  ("squeezenet1_1", "torchvision", "squeezenet1_1"),
  ("vgg16", "torchvision", "vgg16"),
  ("vgg16", "timm", "vgg16"),
  ("vgg16_bn", "torchvision", "vgg16_bn"),
  ("vgg16_bn", "timm", "vgg16_bn"),
  ("vit_s", "timm", "vit_small_patch16_224"),
  ("vit_b", "timm", "vit_base_patch16_224"),
  ("vit_b", "torchvision", "vit_b_16"),
  ("vit_cifar10", "timm", "VisionTransformer(width 192)"),
  ("deit_ti", "timm", "deit_tiny_patch16_224"),
  ("deit_s", "timm", "deit_small_patch16_224"),
  ("deit_b", "timm", "deit_base_patch16_224"),
  ("swin_t", "timm", "swin_tiny_patch4_window7_224"),
  ("swin_t", "torchvision", "swin_t"),
  ("swin_s", "timm", "swin_small_patch4_window7_224"),
  ("swin_b", "timm", "swin_base_patch4_window7_224"),
]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "library", "torch_name"), CASES)
def test_logits_equal_torch(name, library, torch_name, tmp_path, record_property):
  torch = pytest.importorskip("torch", reason="torch is not installed")
  safetensors_torch = pytest.importorskip("safetensors.torch")
  reference = _build(torch, library, torch_name).eval()
  state = _randomise(torch, reference)
  path = tmp_path / "model.safetensors"
  safetensors_torch.save_file({key: value.contiguous() for key, value in state.items()}, path)

  # Shapes alone are enough to load into, which saves the random initialisation.
  module = nnx.eval_shape(lambda: models.create(name))
  apply, params = models.functional(module)
  params = models.weights.load(path, name, params)
  x = np.random.default_rng(0).normal(size=(2, *module.input_shape)).astype(np.float32)
  x[1] *= 3  # averages of noise over an image hardly differ otherwise
  ours = np.asarray(jax.jit(apply)(params, x))
  with torch.no_grad():
    theirs = reference(torch.from_numpy(x.transpose(0, 3, 1, 2).copy())).numpy()

  error = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
  parameters = sum(p.numel() for p in reference.parameters())
  record_property("parity", (name, f"{library} {torch_name}", parameters, error))
  assert ours.shape == theirs.shape
  # A reference that ignores its input would prove nothing.
  assert np.abs(theirs[0] - theirs[1]).max() > 1e-2 * np.abs(theirs).max()
  assert error < TOLERANCE


def _randomise(torch, module):
  """Overwrites all weights and statistics with random values; returns the state dict.

  Weights keep activations of order one. The token embeddings are small, so that the epsilon of the
  first LayerNorm shows.
  """
  generator = torch.Generator().manual_seed(0)
  state = module.state_dict()
  for name, tensor in state.items():
    if not tensor.is_floating_point() or "attn_mask" in name:
      continue
    noise = torch.randn(tensor.shape, generator=generator)
    if name.endswith("running_var"):
      value = 0.5 + torch.rand(tensor.shape, generator=generator)
    elif any(
      part in name for part in ("pos_embed", "cls_token", "class_token", "patch_embed.proj")
    ):
      value = 0.01 * noise
    elif "relative_position_bias_table" in name:
      value = noise
    elif tensor.ndim >= 2:
      value = noise * (1.5 / (tensor.numel() / tensor.shape[0])) ** 0.5
    elif name.endswith("weight"):
      value = 1 + 0.2 * noise
    else:
      value = 0.2 * noise
    tensor.copy_(value)
  return state


def _build(torch, library, name):
  if library == "here":
    return _cifar_resnet(torch, {"CifarResNet(3)": 3, "CifarResNet(9)": 9}[name])
  if library == "torchvision":
    return _import("torchvision").models.get_model(name)
  if name == "VisionTransformer(width 192)":
    _import("timm")
    vit = importlib.import_module("timm.models.vision_transformer")
    return vit.VisionTransformer(
      img_size=32, patch_size=4, embed_dim=192, depth=8, num_heads=3, num_classes=10
    )
  return _import("timm").create_model(name)


def _import(name):
  """Imports timm or torchvision, also where torchvision's compiled operators do not load.

  None of the classifiers uses them, but torchvision insists on the schemas of two when it is
  imported.
  """
  torch = pytest.importorskip("torch", reason="torch is not installed")
  for library in ("torchvision", name):
    if importlib.util.find_spec(library) is None:
      pytest.skip(f"{library} is not installed")
  with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    try:
      return importlib.import_module(name)
    except RuntimeError as error:
      if "torchvision::nms" not in str(error):
        raise
    for module in [m for m in sys.modules if m.partition(".")[0] in ("torchvision", "timm")]:
      del sys.modules[module]
    schemas = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
      schemas.define(f"{operator}(Tensor boxes, Tensor scores, float iou_threshold) -> Tensor")
    torch.flexiq_torchvision_schemas = schemas  # They vanish with the object that defined them.
    return importlib.import_module(name)


def _cifar_resnet(torch, blocks):
  """The CIFAR ResNet of He et al. with shortcut A, in torch."""
  nn = torch.nn

  class Block(nn.Module):
    def __init__(self, inputs, outputs, stride):
      super().__init__()
      self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
      self.bn1 = nn.BatchNorm2d(outputs)
      self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
      self.bn2 = nn.BatchNorm2d(outputs)
      self.stride, self.missing = stride, (outputs - inputs) // 2

    def forward(self, x):
      y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
      x = x[:, :, :: self.stride, :: self.stride]
      x = nn.functional.pad(x, (0, 0, 0, 0, self.missing, self.missing))
      return (x + y).relu()

  class Network(nn.Module):
    def __init__(self):
      super().__init__()
      self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
      self.bn1 = nn.BatchNorm2d(16)
      inputs = 16
      for stage, outputs in enumerate((16, 32, 64)):
        strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
        widths = [inputs] + [outputs] * (blocks - 1)
        layer = [Block(w, outputs, s) for w, s in zip(widths, strides, strict=True)]
        setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        inputs = outputs
      self.linear = nn.Linear(64, 10)

    def forward(self, x):
      x = self.bn1(self.conv1(x)).relu()
      x = self.layer3(self.layer2(self.layer1(x)))
      return self.linear(x.mean(dim=(2, 3)))

  return Network()
