"""Finetuned models of a run: each a stage that is kept in the workdir, below `finetuned/NAME/`.

| name | what it is |
|---|---|
| `reconstruct` | no training: weights are rounded by the outputs of their layers |
| `distill` | few training images, no labels |
| `finetune` | the training set, with labels where `label_weight` asks for them |

The last two begin with the first, kept once for both, unless their `reconstruct` is False.
A folder holds the checkpoints (`steps/`), and the recipe with its weights once they are complete.
Uniform INT4 with the same images, steps and loss stands beside them (`NAME_int4/`). The logits that
are wanted are the float model's, or those of the teacher that the config names.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.shared.checks import field
from experiments.shared.setup import Inputs
from flexiq_jax import adaptive, data, finetuning, models
from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.finetuning import ImageSettings
from flexiq_jax.network import Network
from flexiq_jax.orders import recipes
from flexiq_jax.quant import QModel
from flexiq_jax.runs.files import to_plain
from flexiq_jax.runs.progress import PassProgress, Progress
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.training import augment, random_crop

# Rows are named after what was done to their models; ways are those of `checks.TUNING`.
DONE = {"reconstruct": "reconstructed", "distill": "distilled", "finetune": "finetuned"}


@dataclasses.dataclass(frozen=True)
class Tuner:
  """One way of finetuning in one run.

  Attributes:
    name: a name in `DONE`.
    settings: what the config says of it.
    inputs: what else it says, and reads.
    workdir: of the run.
  """

  name: str
  settings: Any
  inputs: Inputs
  workdir: Workdir

  def adaptive(self, start: AdaptiveModel) -> AdaptiveModel:
    """A model finetuned over all ratios, kept as a recipe with its weights."""
    return self._trained(start) if trains(self.settings) else self._reconstructed(start)

  def _trained(self, start: AdaptiveModel) -> AdaptiveModel:
    settings, first = self.settings, start
    of: dict[str, Any] = {"recipe": self._digest(start)}
    if settings.reconstruct:
      # A stage of its own, which other ways share and a resumed run does not repeat.
      given = self.inputs.settings.reconstruction
      first = dataclasses.replace(self, name="reconstruct", settings=given).adaptive(start)
      of["reconstruct"] = to_plain(dataclasses.asdict(given))
    batches, _ = self.inputs.calibration_set
    settings = dataclasses.replace(settings, reconstruct=False)
    model = self._run(
      self.name,
      of,
      lambda **given: finetuning.finetune(
        *(first, self.examples, batches, settings),
        teacher=self.teacher or start.network,
        **given,
      ),
    )
    return self._kept(start, model)

  def _reconstructed(self, start: AdaptiveModel) -> AdaptiveModel:
    path, made = self._path, self._made(start)
    if path.is_file() and made.items() <= recipes.load(path).settings.items():
      return adaptive.load(path, start.network)
    begin, (batches, _) = time.monotonic(), self.inputs.calibration_set
    with (
      field(f"config.{self.name}", self.inputs.config[self.name]),
      PassProgress(sum(map(len, batches)), "reconstruction, ") as progress,
    ):
      model, errors = finetuning.reconstruct(start, batches, self.settings, progress)
    # Each layer's squared error, by ratio, over that of nearest rounding.
    plain = {name: {f"{r:g}": e for r, e in each.items()} for name, each in errors.items()}
    self.workdir.event("reconstructed", errors=plain, seconds=time.monotonic() - begin)
    return self._kept(start, model)

  @property
  def _path(self) -> Path:
    return self.workdir.path / "finetuned" / self.name / "recipe.json"

  @property
  def _about(self) -> dict[str, Any]:
    return {"model_name": self.inputs.config.model, "seed": self.inputs.config.seed}

  @property
  def _named_teacher(self) -> dict[str, Any]:
    """What the config says of another teacher than the model itself."""
    part = self.inputs.config.teacher
    return {"teacher": to_plain(part)} if part.model else {}

  def _digest(self, start: AdaptiveModel) -> str:
    recipe = recipes.dump(start.recipe(method="start", **self._about))
    return hashlib.sha256(recipe.encode()).hexdigest()

  def _made(self, start: AdaptiveModel) -> dict[str, Any]:
    """What a kept recipe says of how it came about."""
    made = {self.name: to_plain(dataclasses.asdict(self.settings)), "start": self._digest(start)}
    return made | (self._named_teacher if trains(self.settings) else {})

  def _kept(self, start: AdaptiveModel, model: AdaptiveModel) -> AdaptiveModel:
    kept, path = model.recipe(method=self.name, **self._about), self._path
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {**kept.settings, **self._made(start)}
    adaptive.save(path, dataclasses.replace(kept, settings=settings), model)
    return model

  def uniform(self, network: Network, model: QModel) -> tuple[Network, QModel]:
    """A uniformly quantized model, finetuned likewise."""
    return self._run(
      f"{self.name}_int4",
      {},
      lambda **given: finetuning.finetune_uniform(
        *(network, model, self.examples, self.settings), teacher=self.teacher, **given
      ),
    )

  @functools.cached_property
  def teacher(self) -> Network | None:
    """The float model that the config names as the teacher; None is the model itself."""
    given, shape = self.inputs.teacher, self.inputs.module.input_shape
    return Network(*given, jax.ShapeDtypeStruct((1, *shape), jnp.float32)) if given else None

  def _run(self, name: str, of: Mapping[str, Any], work: Callable[..., tuple[Any, Any]]) -> Any:
    config, done = self.inputs.config, 0
    with (
      field(f"config.{self.name}", config[self.name]),
      Progress(f"{name}, steps", self.settings.steps) as progress,
    ):

      def log(entry: dict[str, Any]) -> None:
        nonlocal done
        self.workdir.event("finetune", name=name, **entry)
        losses = [f"{k[5:]}: {v:.4f}" for k, v in entry.items() if k.startswith("loss_")]
        note = ", ".join(losses) if losses else f"{entry['loss']:.4f}"
        progress.update(entry["step"] - done, f"distance at {note}" if losses else note)
        done = entry["step"]

      begin = time.monotonic()
      found, _ = work(
        seed=config.seed,
        checkpoint_dir=self.workdir.path / "finetuned" / name / "steps",
        run={"model": config.model, "weights": config.weights, **self._named_teacher, **of},
        progress=log,
        mesh=finetuning.examples_mesh(self.settings.batch_size),
      )
    if done:  # else all of it was there
      seconds = time.monotonic() - begin
      self.workdir.event("finetuned", name=name, steps=self.settings.steps, seconds=seconds)
    return found

  @functools.cached_property
  def examples(self) -> finetuning.Examples:
    """What is trained on, images uint8 `[n, H, W, C]`, and how a batch of them is prepared."""
    source, preprocess = self.inputs.calibration, self.inputs.settings.preprocess
    settings = self.settings
    count = settings.images or len(source)
    indices = np.sort(data.calibration_indices(source, count, self.inputs.config.seed))
    labels = source.labels[indices].astype(np.int32) if settings.label_weight else None
    images: Any = _Images(source, preprocess, indices)
    if images.nbytes <= data.MEMORY_BUDGET:
      parts = []
      with Progress("images to train on", count) as progress:
        for rows in np.split(np.arange(count), range(1000, count, 1000)):
          parts.append(images[rows])
          progress.update(len(rows))
      images = np.concatenate(parts)

    def prepare(key, x):
      x = augment(key, x, settings.augmentation)
      if settings.crop:
        # Not 0 or 1, which are what `augment` splits the key into.
        x = random_crop(jax.random.fold_in(key, 2), x, (settings.crop, settings.crop))
      return preprocess.normalize(x)

    return finetuning.Examples(images, labels, prepare)


@dataclasses.dataclass(frozen=True)
class _Images:
  """Images that are decoded when they are needed, uint8 `[n, H, W, C]`."""

  source: data.Source
  preprocess: data.Preprocess
  indices: np.ndarray

  def __len__(self) -> int:
    return len(self.indices)

  def __getitem__(self, rows: np.ndarray) -> np.ndarray:
    size = min(len(rows), 256)
    found = data.raw_batches(self.source, self.preprocess, size, indices=self.indices[rows])
    return np.concatenate([images for images, _ in found])

  @property
  def nbytes(self) -> int:
    return self.preprocess.geometry(self.source.image(int(self.indices[0]))).nbytes * len(self)


def trains(settings: Any) -> bool:
  """Whether a way takes steps on images; reconstruction does not."""
  return isinstance(settings, ImageSettings)


def require(inputs: Inputs) -> None:
  """Refuses settings that the images or the model do not allow.

  Raises:
    ValueError: names the field.
  """
  source = inputs.calibration
  for name, settings in inputs.settings.tuning.items():
    if not trains(settings):
      continue
    if settings.images > len(source):
      raise ValueError(
        f"config.{name}.images: {settings.images}; 0..{len(source)} is accepted, {source}"
      )
    images = settings.images or len(source)
    if settings.batch_size > images:
      raise ValueError(
        f"config.{name}.batch_size: {settings.batch_size}; 1..{images} is accepted, the images "
        "trained on"
      )
    if settings.crop:
      _require_size(inputs, f"config.{name}.crop", settings.crop)


def _require_size(inputs: Inputs, name: str, size: int) -> None:
  """Refuses parts of images that the model or its teacher cannot take."""
  height, width, channels = inputs.module.input_shape
  if size > min(height, width):
    raise ValueError(f"{name}: {size}; 0..{min(height, width)} is accepted, the model's images")
  part = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32)
  taking = {"model": models.functional(inputs.module), "teacher": inputs.teacher}
  for whose, (apply, params) in ((k, v) for k, v in taking.items() if v):
    try:
      jax.eval_shape(apply, params, part)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{name}: {size}, but the {whose} takes images of {height} x {width} pixels alone; 0 is "
        "accepted"
      ) from error
