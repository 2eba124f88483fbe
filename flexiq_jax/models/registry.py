"""The models that can be made by name, with the preprocessing that their usual weights expect.

Preprocessing belongs to weights rather than to architectures: ViT-S and DeiT-S are one network,
trained on differently normalised images. An entry describes the weights that `source` names; other
weights may want other numbers.
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from flexiq_jax.models.mobilenet import EfficientNetLite, MobileNetV2
from flexiq_jax.models.resnet import ResNet
from flexiq_jax.models.squeezenet import SQUEEZENET_1_0, SQUEEZENET_1_1, SqueezeNet
from flexiq_jax.models.swin import SwinTransformer
from flexiq_jax.models.vgg import VGG
from flexiq_jax.models.vit import VisionTransformer

DTYPES = ("float32", "bfloat16")

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
_CIFAR10 = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2470, 0.2435, 0.2616)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSpec:
  """One model that `create` can build.

  Attributes:
    build: makes the module from keyword arguments (num_classes, dtype, rngs and overrides).
    input_shape: (height, width, channels) of the images.
    num_classes: outputs of the head.
    resize: length of the shorter side of an image after resizing, None to leave it.
    crop: side of the central crop.
    interpolation: filter of the resize, 'bilinear' or 'bicubic'.
    mean: per channel, on the scale where pixels are 0..1; subtracted.
    std: per channel, on the same scale; divided by.
    tiny: overrides that make a small network of the same family, for tests and dry runs.
    source: where architecture and usual weights come from.
  """

  build: Callable[..., nnx.Module]
  input_shape: tuple[int, int, int]
  num_classes: int
  resize: int | None
  crop: int
  interpolation: str
  mean: tuple[float, ...]
  std: tuple[float, ...]
  tiny: Mapping[str, Any]
  source: str


def _imagenet(build, tiny, source, *, resize=256, interpolation="bicubic", **normalisation):
  """A model for 224 x 224 crops of ImageNet images."""
  return ModelSpec(
    build=build,
    input_shape=(224, 224, 3),
    num_classes=1000,
    resize=resize,
    crop=224,
    interpolation=interpolation,
    tiny=tiny,
    source=source,
    **(normalisation or _IMAGENET),
  )


def _cifar(build, tiny, source, *, input_size=32, channels=3, **normalisation):
  """A model for small images that are not resized."""
  return ModelSpec(
    build=functools.partial(build, input_size=input_size, in_channels=channels),
    input_shape=(input_size, input_size, channels),
    num_classes=10,
    resize=None,
    crop=input_size,
    interpolation="bilinear",
    tiny=tiny,
    source=source,
    **normalisation,
  )


def _resnet(block, *depths):
  tiny = {"depths": (1, 1), "width": 8, "input_size": 32, "num_classes": 10}
  source = "torchvision (IMAGENET1K_V1)"
  build = functools.partial(ResNet, block=block, depths=depths)
  return _imagenet(build, tiny, source, interpolation="bilinear")


def _cifar_resnet(blocks):
  build = functools.partial(
    ResNet, block="basic", depths=(blocks,) * 3, width=16, stem="cifar", shortcut="A"
  )
  tiny = {"depths": (1, 1), "width": 8}
  source = "He et al. 2016, section 4.2; weights: akamaster/pytorch_resnet_cifar10"
  return _cifar(build, tiny, source, **_IMAGENET)


def _mobilenet(source, *, interpolation, normalisation, **options):
  tiny = {
    "stages": ((1, 8, 1, 1), (6, 16, 2, 2)),
    "width_mult": 0.5,
    "last_channels": 32,
    "input_size": 32,
    "num_classes": 10,
  }
  build = functools.partial(MobileNetV2, **options)
  return _imagenet(build, tiny, source, interpolation=interpolation, **normalisation)


def _efficientnet_lite(source, *, normalisation, **options):
  tiny = {
    "stages": ((1, 8, 1, 1, 3), (6, 16, 2, 2, 5)),
    "last_channels": 32,
    "input_size": 32,
    "num_classes": 10,
  }
  return _imagenet(functools.partial(EfficientNetLite, **options), tiny, source, **normalisation)


def _squeezenet(stages, width, kernel):
  tiny = {
    "stages": (((4, 8), (4, 8)), ((8, 8),)),
    "width": 8,
    "kernel": 3,
    "input_size": 32,
    "num_classes": 10,
  }
  build = functools.partial(SqueezeNet, stages=stages, width=width, kernel=kernel)
  return _imagenet(build, tiny, "torchvision (IMAGENET1K_V1)", interpolation="bilinear")


def _vgg(source, **options):
  tiny = {
    "depths": (1, 2),
    "widths": (8, 16),
    "pool": 3,
    "hidden": 16,
    "input_size": 32,
    "num_classes": 10,
  }
  build = functools.partial(VGG, **options)
  return _imagenet(build, tiny, source, interpolation="bilinear")


def _vit(width, heads, source, *, resize, normalisation):
  tiny = {
    "width": 32,
    "depth": 2,
    "heads": 2,
    "patch_size": 8,
    "input_size": 32,
    "num_classes": 10,
  }
  build = functools.partial(VisionTransformer, width=width, depth=12, heads=heads)
  return _imagenet(build, tiny, source, resize=resize, **normalisation)


def _swin(width, depths, heads, source):
  tiny = {
    "width": 16,
    "depths": (2, 2),
    "heads": (2, 4),
    "window": 4,
    "input_size": 32,
    "num_classes": 10,
  }
  build = functools.partial(SwinTransformer, width=width, depths=depths, heads=heads)
  return _imagenet(build, tiny, source, resize=248)


_AUGREG = "timm vit_*_patch16_224.augreg_in21k_ft_in1k"
# The authors' evaluation resizes to 256, which their published accuracies refer to (timm: 248).
_DEIT = "timm deit_*_patch16_224.fb_in1k"
_SWIN = "timm swin_*_patch4_window7_224.ms_in1k, or torchvision's"

MODELS: dict[str, ModelSpec] = {
  "resnet8": _cifar(
    functools.partial(
      ResNet, block="basic", depths=(1, 1, 1), width=16, stem="cifar", shortcut="A"
    ),
    {"width": 8},
    "He et al. 2016, section 4.2, at n = 1; set for the 8 x 8 digits of scikit-learn",
    input_size=8,
    channels=1,
    mean=(0.305,),
    std=(0.376,),
  ),
  "resnet20": _cifar_resnet(3),
  "resnet32": _cifar_resnet(5),
  "resnet44": _cifar_resnet(7),
  "resnet56": _cifar_resnet(9),
  "resnet18": _resnet("basic", 2, 2, 2, 2),
  "resnet34": _resnet("basic", 3, 4, 6, 3),
  "resnet50": _resnet("bottleneck", 3, 4, 6, 3),
  "mobilenet_digits": _cifar(
    functools.partial(
      MobileNetV2, stages=((1, 8, 1, 1), (4, 16, 3, 2), (4, 24, 2, 1)), last_channels=64
    ),
    {"stages": ((1, 8, 1, 1),), "last_channels": 16},
    "Sandler et al. 2018 at six blocks; set for scikit-learn's digits, distorted",
    input_size=8,
    channels=1,
    mean=(0.25,),
    std=(0.27,),
  ),
  "mobilenet_v2": _mobilenet(
    "torchvision (IMAGENET1K_V1), or timm mobilenetv2_100",
    interpolation="bilinear",
    normalisation=_IMAGENET,
  ),
  "mobilenet_v2_tf": _mobilenet(
    "TensorFlow's MobileNetV2 1.0 224, batch norm folded (padding 'tf_same', norm False)",
    interpolation="bilinear",
    normalisation=_HALF,
    padding="tf_same",
    norm=False,
  ),
  "efficientnet_lite0": _efficientnet_lite(
    "timm efficientnet_lite0.ra_in1k", normalisation=_IMAGENET
  ),
  "efficientnet_lite0_tf": _efficientnet_lite(
    "TensorFlow's EfficientNet-Lite0 (padding 'tf_same', eps 1e-3), or timm tf_efficientnet_lite0",
    # (x - 127) / 128 on the scale 0..255.
    normalisation={"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3},
    padding="tf_same",
    eps=1e-3,
  ),
  "squeezenet1_0": _squeezenet(SQUEEZENET_1_0, 96, 7),
  "squeezenet1_1": _squeezenet(SQUEEZENET_1_1, 64, 3),
  "vgg16": _vgg("torchvision (IMAGENET1K_V1), or timm vgg16.tv_in1k"),
  "vgg16_bn": _vgg("torchvision (IMAGENET1K_V1), or timm vgg16_bn.tv_in1k", norm=True),
  "vit_s": _vit(384, 6, _AUGREG, resize=248, normalisation=_HALF),
  "vit_b": _vit(768, 12, _AUGREG, resize=248, normalisation=_HALF),
  "deit_ti": _vit(192, 3, _DEIT, resize=256, normalisation=_IMAGENET),
  "deit_s": _vit(384, 6, _DEIT, resize=256, normalisation=_IMAGENET),
  "deit_b": _vit(768, 12, _DEIT, resize=256, normalisation=_IMAGENET),
  "vit_cifar10": _cifar(
    functools.partial(VisionTransformer, width=192, depth=8, heads=3, patch_size=4),
    {"width": 32, "depth": 2, "heads": 2},
    "timm's VisionTransformer at width 192, depth 8, 3 heads, patch 4, 32 x 32 images",
    **_CIFAR10,
  ),
  "swin_t": _swin(96, (2, 2, 6, 2), (3, 6, 12, 24), _SWIN),
  "swin_s": _swin(96, (2, 2, 18, 2), (3, 6, 12, 24), _SWIN),
  "swin_b": _swin(128, (2, 2, 18, 2), (4, 8, 16, 32), _SWIN),
}


def get(name: str) -> ModelSpec:
  """Looks a model up.

  Raises:
    ValueError: no model has this name; the message lists the closest, or all of them.
  """
  if name in MODELS:
    return MODELS[name]
  close = difflib.get_close_matches(name, MODELS, n=3, cutoff=0.5)
  hint = f"did you mean {' or '.join(close)}?" if close else f"accepted: {', '.join(MODELS)}"
  raise ValueError(f"model {name!r} is unknown; {hint}")


def family(name: str) -> type:
  """The class of a model, which is not made for it.

  Raises:
    ValueError: no model has this name.
  """
  return _class(get(name).build)


def create(
  name: str,
  *,
  seed: int = 0,
  num_classes: int | None = None,
  dtype: Any = jnp.float32,
  **overrides: Any,
) -> nnx.Module:
  """Makes a model with random weights.

  Args:
    name: a key of `MODELS`.
    seed: of the initial weights; the same seed gives the same weights.
    num_classes: outputs of the head, None for the usual ones of the model.
    dtype: compute dtype, float32 or bfloat16; parameters and logits are float32 in any case.
    **overrides: arguments of the model's class, such as depth=2 or input_size=32.

  Returns:
    The module, in training mode as Flax makes it. Its attribute `input_shape` is (H, W, C).

  Raises:
    ValueError: unknown name, override or dtype, or a value that the class refuses.
  """
  spec = get(name)
  accepted = sorted(set(_arguments(spec.build)) - {"self", "rngs", "dtype"})
  for key in overrides:
    if key not in accepted:
      close = difflib.get_close_matches(key, accepted, n=1)
      hint = f"did you mean {close[0]!r}? " if close else ""
      raise ValueError(
        f"{key}={overrides[key]!r} is no argument of model {name!r}; {hint}"
        f"accepted: {', '.join(accepted)}"
      )
  try:
    dtype_name = jnp.dtype(dtype).name
  except TypeError:
    dtype_name = None
  if dtype_name not in DTYPES:
    raise ValueError(f"dtype={dtype!r} is refused; accepted: {', '.join(DTYPES)}")
  num_classes = spec.num_classes if num_classes is None else num_classes
  return spec.build(
    num_classes=num_classes, dtype=jnp.dtype(dtype_name), rngs=nnx.Rngs(seed), **overrides
  )


def _arguments(build: Callable[..., nnx.Module]) -> tuple[str, ...]:
  """Names of the arguments of a model's class; NNX hides them from `signature(cls)`."""
  return tuple(inspect.signature(_class(build).__init__).parameters)


def _class(build: Callable[..., nnx.Module]) -> type:
  """The class that a partial calls."""
  while isinstance(build, functools.partial):
    build = build.func
  assert isinstance(build, type)
  return build
