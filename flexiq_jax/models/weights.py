"""Pretrained weights: safetensors files with PyTorch names into our parameter trees.

    params = load("$FLEXIQ_DATA/cifar10_resnets/cifar10_resnet20.safetensors", "resnet20", params)
    params = load("hf:timm/deit_small_patch16_224.fb_in1k", "deit_s", params)

Files are read as torchvision and timm write them, and in the original names of a few well-known
checkpoints; `names` has the rules. Torch is not needed. What changes on the way:

| file                                   | tree                                                  |
|----------------------------------------|-------------------------------------------------------|
| convolution weight, OIHW               | kernel, HWIO                                          |
| linear weight, [out, in]               | kernel, [in, out]                                     |
| norm weight, running_mean, running_var | scale, mean, var                                      |
| int8 weight_q and weight_scale         | kernel = weight_q * weight_scale (per output channel) |
| float16, bfloat16, float64             | the dtype of the tree, float32                        |

A file has to fill the tree exactly: nothing keeps its random value in silence. Ignored are only
buffers that can be recomputed (batch counters, index tables, masks) and the activation quantizers
of integer checkpoints.
"""

import functools
import os
import pathlib
import re
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx

from flexiq_jax.models import hub, names, registry
from flexiq_jax.models.mobilenet import MobileNetV2
from flexiq_jax.models.pure import Params, flatten, functional, unflatten

_MAX_LISTED = 10
# What NumPy holds, as safetensors call it.
_DTYPES = {"BOOL", "BF16", "F16", "F32", "F64"} | {f"{u}{n}" for u in "IU" for n in (8, 16, 32, 64)}
_HEADS = re.compile(r"^(fc|classifier|head)/")
Tensors = dict[str, np.ndarray]


def load(source: str | os.PathLike[str], model: str | nnx.Module, params: Params) -> Params:
  """Reads weights from a file or from the Hugging Face hub.

  Args:
    source: path of a safetensors file, in which environment variables are expanded; or
      `hf:owner/repo`, optionally with `@revision` and `/file.safetensors` (default:
      model.safetensors), fetched once and then read from the local cache.
    model: the model, as a name or, where it was made with overrides, as the module itself.
    params: the tree to fill, as `functional` returns it; only its paths, shapes and dtypes are
      used.

  Returns:
    A tree like `params` with the values of the file.

  Raises:
    FileNotFoundError: no such file, or it cannot be fetched; the message says how to get it by
      hand.
    ValueError: the file is damaged, holds NaN or infinity, or does not fit the model; the message
      lists the tensors.
  """
  path = hub.resolve(source)
  label, family, padding = _describe(model)
  original = _read(path)
  # Known converters of TensorFlow weights; the paddings share all shapes, so only the names tell.
  from_tf = any(re.search(r"^_conv_stem\.|\.weight_q$", name) for name in original)
  if from_tf and padding == "torch":
    raise ValueError(
      f"{path} comes from TensorFlow, whose convolutions pad asymmetrically, but {label} has "
      "padding='torch'; use mobilenet_v2_tf or efficientnet_lite0_tf, or pass the module itself, "
      "made with padding='tf_same'"
    )
  tensors = _dequantize(path, original)
  flat = flatten(params)
  places = names.translate(family, tensors, flat)
  if from_tf:
    _drop_background_class(tensors, places, flat)
  _check_fit(path, label, family, tensors, places, flat)
  broken = [name for name, tensor in tensors.items() if not _is_finite(tensor)]
  if broken:
    raise ValueError(f"{path} holds NaN or infinity in {_listed(broken)}; fetch or export it again")
  names_by_place = {place: name for name, place in places.items()}
  return unflatten(
    {
      place: jnp.asarray(_to_ours(tensors[names_by_place[place]], place), leaf.dtype)
      for place, leaf in flat.items()
    }
  )


def _describe(model: str | nnx.Module) -> tuple[str, type, str | None]:
  """Label, class and padding (if it has one) of a model."""
  label = model if isinstance(model, str) else f"this {type(model).__name__}"
  if isinstance(model, str):
    model = nnx.eval_shape(functools.partial(registry.create, model))
  return label, type(model), getattr(model, "padding", None)


def _read(path: pathlib.Path) -> Tensors:
  """All tensors of a safetensors file, by name, but for those that are ignored."""
  try:
    with safetensors.safe_open(path, framework="numpy") as file:
      wanted = [key for key in list(file.keys()) if not names.IGNORED.search(key)]
      kinds = {key: file.get_slice(key).get_dtype() for key in wanted}
      foreign = [key for key in wanted if kinds[key] not in _DTYPES]
      tensors = {} if foreign else {key: file.get_tensor(key) for key in wanted}
  except (safetensors.SafetensorError, OSError, ValueError) as error:
    with open(path, "rb") as file:
      pickled = file.read(2) in (b"PK", b"\x80\x02")
    advice = (
      "it looks like a torch checkpoint; write its state_dict with safetensors.torch.save_file"
      if pickled
      else "it is damaged, cut short or of another format; fetch or export it again"
    )
    raise ValueError(f"{path} cannot be read as safetensors ({error}): {advice}") from error
  if foreign:
    raise ValueError(
      f"{path} holds {kinds[foreign[0]]} in {_listed(foreign)}; convert these to float32 (with "
      "their scales, where they have any) and save the file again"
    )
  return tensors


def _dequantize(path: pathlib.Path, tensors: Tensors) -> Tensors:
  """Turns each pair of weight_q (int8, output channels first) and weight_scale into a weight."""
  result = {}
  for name, tensor in tensors.items():
    stem, _, leaf = name.rpartition(".")
    scale = tensors.get(f"{stem}.weight_scale")
    if leaf == "weight_q" and scale is not None:
      outputs = tensor.shape[0] if tensor.ndim else 1
      if scale.size not in (1, outputs):
        raise ValueError(
          f"{path}: {stem}.weight_scale has {scale.size} values; 1 or {outputs} are accepted, as "
          f"{name} is {list(tensor.shape)}, output channels first; export the file again"
        )
      scale = scale.reshape(-1, *(1,) * (tensor.ndim - 1))
      result[f"{stem}.weight"] = tensor.astype(np.float32) * scale
    elif leaf != "weight_scale" or f"{stem}.weight_q" not in tensors:
      result[name] = tensor
  return result


def _drop_background_class(tensors: Tensors, places: Mapping[str, str], flat: Params) -> None:
  """Removes TensorFlow's class 0, "background", from a head with one class more than the model."""
  for name, path in places.items():
    if _HEADS.match(path) and path in flat and len(tensors[name]) == flat[path].shape[-1] + 1:
      tensors[name] = tensors[name][1:]


def _to_ours(tensor: np.ndarray, path: str) -> np.ndarray:
  """A tensor in our layout: OIHW to HWIO, [out, in] to [in, out], all else unchanged."""
  if path.rpartition("/")[2] != "kernel" or tensor.ndim not in (2, 4):
    return tensor
  if tensor.ndim == 4 and _HEADS.match(path):  # A head that was stored as a 1 x 1 convolution.
    tensor = tensor.reshape(len(tensor), -1)
  return tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T


def _is_finite(tensor: np.ndarray) -> bool:
  # In float32: NumPy has no isfinite for bfloat16 without help, and float64 would overflow unseen.
  with np.errstate(over="ignore"):
    return bool(np.isfinite(tensor.astype(np.float32)).all())


def _check_fit(
  path: pathlib.Path,
  label: str,
  family: type,
  tensors: Tensors,
  places: Mapping[str, str],
  flat: Params,
) -> None:
  """Refuses a file that does not fill the tree exactly.

  Raises:
    ValueError: lists tensors that are missing, surplus or of another shape, with a hint where the
      file belongs.
  """
  filled: dict[str, str] = {}
  surplus, misshapen = [], []
  for name, place in places.items():
    tensor = tensors[name]
    if place not in flat or place in filled:
      surplus.append(name)
      continue
    filled[place] = name
    shape = _to_ours(tensor, place).shape
    if shape != tuple(flat[place].shape):
      misshapen.append(f"{name} ({list(shape)}, model: {list(flat[place].shape)} at {place})")
    elif np.issubdtype(tensor.dtype, np.integer) or tensor.dtype == bool:
      misshapen.append(f"{name} ({tensor.dtype}, model: {flat[place].dtype} at {place})")
  missing = [place for place in flat if place not in filled]
  faults = {"missing": missing, "surplus": surplus, "of another shape or type": misshapen}
  if any(faults.values()):
    summary = "; ".join(
      f"{len(items)} {kind}: {_listed(items)}" for kind, items in faults.items() if items
    )
    raise ValueError(
      f"{path} does not fit {label}: {summary}. {_hint(tensors, family, filled, flat)}"
    )


def _hint(tensors: Tensors, family: type, filled: Mapping[str, str], flat: Params) -> str:
  """Says which model a file belongs to, or what else may be wrong."""
  heads = [path for path in filled if _HEADS.match(path) and path.endswith("/bias")]
  if len(filled) == len(flat) == len(tensors):
    for head in heads:
      classes = len(tensors[filled[head]])
      if classes != flat[head].shape[0]:
        return f"The file has {classes} classes; make the model with num_classes={classes}."
  fitting = [candidate for candidate in registry.MODELS if _fits(candidate, tensors)]
  if fitting:
    return f"The file fits {' or '.join(fitting)}."
  kinds = [
    kind.__name__
    for kind, pattern in names.FINGERPRINTS.items()
    if any(re.search(pattern, name) for name in tensors)
  ]
  has_norms = any(place.endswith("/mean") for place in flat)
  if family is MobileNetV2 and has_norms and not any(n.endswith("running_mean") for n in tensors):
    return "The file has batch norm folded in; make the model with norm=False (mobilenet_v2_tf)."
  if kinds and family.__name__ not in kinds:
    return f"The file seems to be of a {' or '.join(kinds)}, the model is a {family.__name__}."
  if any(re.search(r"\.(attention\.attention|attention\.self)\.query\.", name) for name in tensors):
    return "The file has the names of the transformers library; accepted: timm's or torchvision's."
  return "Depth, width or input size of the model may differ from the file's."


def _fits(candidate: str, tensors: Tensors) -> bool:
  """Whether a file fills a registered model, number of classes apart."""
  family = registry.family(candidate)
  # Before the shapes, which take a part of a second for each model.
  if not any(re.search(names.FINGERPRINTS[family], name) for name in tensors):
    return False
  shapes = _shapes(candidate)
  places = names.translate(family, tensors, shapes)
  return len(places) == len(shapes) and all(
    place in shapes
    and (_HEADS.match(place) or _to_ours(tensors[name], place).shape == shapes[place])
    for name, place in places.items()
  )


@functools.lru_cache
def _shapes(name: str) -> dict[str, tuple[int, ...]]:
  """Shapes of a registered model's leaves, by path."""
  module = nnx.eval_shape(functools.partial(registry.create, name))
  return {path: tuple(leaf.shape) for path, leaf in flatten(functional(module)[1]).items()}


def _listed(items: Sequence[str]) -> str:
  """The first few items and how many follow."""
  rest = len(items) - _MAX_LISTED
  return ", ".join(items[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")
