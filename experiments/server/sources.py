"""What a server reads: an artifact and its run, a profile, accuracies, names of classes."""

import copy
import dataclasses
import socket
from pathlib import Path
from typing import Any

from experiments import curve
from experiments.shared import accuracies as shared
from experiments.shared import checks, setup
from experiments.shared.checks import field
from flexiq_jax import data, models, serving
from flexiq_jax.deployment import artifact
from flexiq_jax.runs import files
from flexiq_jax.serving import profile_files, server

_OF_RUN = ("model", "model_args", "dtype", "preprocess", "seed")  # what says which model it is


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sources:
  """All of it, opened.

  Attributes:
    config: with the model of the artifact.
    described: of it.
    folder: of the artifact; None where it is yet to be made.
    made: what to make it from, then.
    limits: of the server.
    profile: that was given, or None.
    accuracies: ratio -> top-1 in %; empty where none are known yet.
    class_names: one for each class, or empty.
    sock: the port.
  """

  config: Any
  described: setup.Described
  folder: Path | None
  made: setup.Inputs | None
  limits: server.Limits
  profile: serving.Profile | None
  accuracies: dict[float, float]
  class_names: tuple[str, ...]
  sock: socket.socket


def open_all(config) -> Sources:
  """Opens everything; what is wrong or missing is told with its field.

  Raises:
    ValueError: names the field.
  """
  part = config.serve
  own = adopted(config)
  folder = Path(data.expand_path(config.artifact)) if config.artifact else None
  if folder is None and (deployed_at(own) / "finished").is_file():
    folder = deployed_at(own) / "artifact"
  described = setup.describe(own)
  with field("config.limits", config.limits):
    limits = server.Limits(batch=max(part.sizes), **config.limits)
  given = None
  if part.profile:
    with field("config.serve.profile"):
      given = profile_files.read(data.expand_path(part.profile), own.model)
  known = accuracies(part, folder)
  with field("config.serve.classes"):
    names = class_names(part.classes, described.module.num_classes)
  made = curve.prepare(deploying(own)) if folder is None else None
  with field("config.serve", part):
    sock = server.bind(part.host, part.port)  # last: who is refused above holds no port
  return Sources(
    config=own,
    described=described,
    folder=folder,
    made=made,
    limits=limits,
    profile=given,
    accuracies=known,
    class_names=names,
    sock=sock,
  )


def adopted(config) -> Any:
  """The config with the model of its artifact, as far as the artifact says which.

  The run that wrote it left its config beside it. One that `flexiq_jax.deploy` wrote has its
  folder's name where the model's would be; the config says which model it is.

  Raises:
    ValueError: there is no such artifact.
  """
  if not config.artifact:
    return config
  config = copy.deepcopy(config)
  with field("config.artifact"):
    folder = Path(data.expand_path(config.artifact))
    document = artifact.read(folder)
  beside = folder.parent / "config.json"
  if beside.is_file():
    run = files.read_json(beside)
    for name in _OF_RUN:
      if name in run and name != "preprocess":
        config[name] = run[name]
    for name, value in run.get("preprocess", {}).items():
      if name in config.preprocess and value is not None:
        config.preprocess[name] = tuple(value) if isinstance(value, list) else value
  elif document.model in models.MODELS:
    config.model = document.model
  checks.check(config)
  return config


def deploying(config) -> Any:
  """The config of the experiment `deploy` that makes the artifact."""
  config = copy.deepcopy(config)
  config.experiment = "deploy"
  config.name = config.name.replace("serve_", "deploy_", 1)
  with config.unlocked():
    for name in ("serve", "limits", "artifact"):
      del config[name]
  return config


def deployed_at(config) -> Path:
  """Where that run goes: another config goes elsewhere, another port does not."""
  return Path("runs") / "deployed" / setup.provenance(deploying(config))["config"]


def preprocessing(described: setup.Described) -> data.Preprocess:
  """The model's preprocessing for images of any size.

  A data set whose images are stored at the right size is not resized; what clients send is.
  """
  found, spec = described.settings.preprocess, models.get(described.config.model)
  return dataclasses.replace(found, resize=found.resize or spec.resize or found.crop)


def accuracies(part: Any, folder: Path | None) -> dict[float, float]:
  """Top-1 in % by ratio: of the file that is named, or of the run that wrote the artifact.

  Args:
    part: `config.serve`.
    folder: of the artifact, None where it is yet to be made.

  Returns:
    Of the rows of `config.serve.method`; empty where there is no file.

  Raises:
    FileNotFoundError: there is no such file as is named.
    ValueError: it has no such rows.
  """
  path = data.expand_path(part.accuracies) if part.accuracies else None
  if path is None and folder is not None and (folder.parent / "results.csv").is_file():
    path = folder.parent / "results.csv"
  with field("config.serve.accuracies"):
    return shared.by_ratio(path, part.method, ends=False)[0] if path else {}


def class_names(path: str, classes: int) -> tuple[str, ...]:
  """Names from a text file, one a line; none without a path.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: another number of names than of classes.
  """
  if not path:
    return ()
  file = Path(data.expand_path(path))
  if not file.is_file():
    raise FileNotFoundError(f"{file}: no such file")
  names = tuple(line.strip() for line in file.read_text("utf-8").splitlines() if line.strip())
  if len(names) != classes:
    raise ValueError(f"{file} has {len(names)} names; {classes} are accepted, one a line")
  return names
