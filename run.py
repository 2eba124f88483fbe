"""Runs one experiment.

    python run.py --config=configs/NAME.py[:argument,...] [--workdir=DIR] [--config.field=value ...]

The same command with the same workdir resumes a run that was stopped; a finished one is left alone.
Every field of a config can be overridden, as --config.groups.group_size=8; --dry_run lists them,
configs/common.py says what they mean. Without --workdir a run goes below runs/; runs with other
overrides go to other folders.
"""

import ast
import difflib
import errno
import os
import re
import shlex
import sys
import textwrap
import traceback
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Config file of the run, as configs/digits.py or configs/digits.py:runlocal."
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run, made if missing; by default one below runs/."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Print the config's fields and the model's layers, run and write nothing."
)
_OVERRULE = flags.DEFINE_bool(
  "overrule", False, "Go on in a workdir of another config: its result rows stay as they are."
)
_DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of an error, too.")
_CACHE = flags.DEFINE_string(
  "compilation_cache", None, "Folder that keeps compiled programs for later runs."
)

_ROOT = Path(__file__).parent
_VALUES = {  # what the flag parsers say -> what is accepted
  "invalid literal for int": "an integer is accepted",
  "could not convert string to float": "a number is accepted",
  "Non-boolean argument": "true or false is accepted",
}


def main(argv: list[str]) -> None:
  """Checks the config, then hands over to the experiment."""
  if len(argv) > 1:
    raise ValueError(f"unexpected argument {argv[1]!r}: flags begin with --")
  # Here, not above: a wrong flag is told before a second of imports.
  import experiments
  from experiments.shared import checks
  from flexiq_jax.runs import distributed, interruption, process
  from flexiq_jax.runs.workdir import Workdir

  process.keep_memory()
  with distributed.together(), interruption.interruptible():
    config = _CONFIG.value
    command = shlex.join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    if config.experiment == experiments.SWEEP:
      _sweep(config, command)
      return
    if config.experiment not in experiments.EXPERIMENTS:
      known = ", ".join((*experiments.EXPERIMENTS, experiments.SWEEP))
      raise ValueError(f"config.experiment: {config.experiment!r} is not one of {known}")
    checks.check(config)  # before the imports of a job and of what it reads
    experiment = experiments.job(config.experiment)
    if _DRY_RUN.value:
      layers = experiment.describe(config)
      print("\n".join((*_fields(config.to_dict(), "config"), "", layers)))
      return
    from experiments.shared import identity, setup

    process.enable_compilation_cache(_CACHE.value)
    process.full_precision()
    overrides = config_flags.get_override_values(flags.FLAGS["config"])
    named = Path(_WORKDIR.value or setup.default_workdir(config, overrides))
    with distributed.folder(named) as folder:
      workdir = Workdir(folder)
      plain = identity.plain(config)
      # A workdir that is finished, or of another run, is told at once; --overrule may change it, so
      # that comes after all checks. A run whose inputs are wrong leaves no config behind.
      begun = (folder / "config.json").is_file()
      if begun and _OVERRULE.value:
        _require_same_model(folder, plain)
      if distributed.agree(begun and not _OVERRULE.value and _finished(workdir, plain)):
        return
      inputs = experiment.prepare(config)
      with workdir.held():
        if distributed.agree(_finished(workdir, plain)):
          return
        if not _WORKDIR.value:
          print(f"workdir: {folder}", flush=True)
        workdir.about = setup.provenance(config)
        path = experiment.run(inputs, workdir, command)
        print(f"report: {path}")


def _sweep(config, command: str) -> None:
  """Plans, runs or watches a sweep."""
  import experiments
  from flexiq_jax.runs import process

  if _OVERRULE.value:
    raise ValueError("--overrule: a sweep's runs keep their configs; give it to a run of its own")
  sweep = experiments.job(experiments.SWEEP)
  folder = Path(_WORKDIR.value or Path("runs") / config.name)
  if Path.cwd() != _ROOT.resolve():
    folder = folder.absolute()  # the runs start in the folder of this file
  process.share_compilation_cache(_CACHE.value)
  if _DRY_RUN.value:
    print(sweep.describe(config, folder))
  elif path := sweep.run(config, folder, command):
    print(f"report: {path}")


def parse(argv: list[str]) -> list[str]:
  """Reads the flags and the config file.

  Args:
    argv: name of the program and its arguments.

  Returns:
    The name and what is no flag.

  Raises:
    SystemExit: help was asked for; or something is wrong, and one line says what.
  """
  if any(re.fullmatch("-h|--?help(short|full)?", argument) for argument in argv[1:]):
    print(_help())
    raise SystemExit(0)
  try:
    rest = flags.FLAGS(argv)
    if _CONFIG.value is None:
      raise ValueError("--config is missing: name a config file, as --config=configs/digits.py")
    # A config file that cannot be read is an object that raises whenever it is touched.
    _ = _CONFIG.value.experiment
    _require_tuples(argv)
    return rest
  except OSError as error:
    message = _raised_in_config(error, argv) or _unreadable_config(argv)
  except Exception as error:  # a config file is code, which may raise anything
    message = _raised_in_config(error, argv) or _flag_error(error, argv)
  raise SystemExit(f"error: {message}")


def entry(argv: list[str]) -> None:
  """Runs `main`; errors that a user can mend end in one message."""
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)  # Orbax logs every file it writes
  try:
    main(argv)
  except (ValueError, OSError) as error:
    if _DEBUG.value:
      traceback.print_exc()
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
      where = error.filename or _WORKDIR.value or "runs"
      sys.exit(f"error: {where}: {error.strerror}; free some, then run the same command to resume")
    sys.exit(f"error: {error}")
  except KeyboardInterrupt:  # while modules are imported; later `main` itself takes care
    sys.exit(130)
  except RuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error) or _DEBUG.value:
      raise
    sys.exit(
      "error: the device is out of memory; lower config.batch_size (rows) or "
      f"config.calibration.batch_size ({str(error).splitlines()[0]})"
    )


def _help() -> str:
  """What there is to give: flags, configs and models."""
  from flexiq_jax import models

  listed = lambda names: textwrap.fill(
    ", ".join(names), 92, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False
  )
  given = [flag for flag in flags.FLAGS.get_key_flags_for_module(__name__) if flag.name != "config"]
  return "\n".join(
    (
      f"{__doc__}\nFlags:",
      *(f"  --{flag.name}: {flag.help}" for flag in given),
      "\nConfigs, in configs/; each file says what it reproduces and which arguments it takes:",
      listed(_configs()),
      "\nModels, for --config.model; other sizes by --config.model_args, as width=32:",
      listed(sorted(models.MODELS)),
    )
  )


def _configs() -> list[str]:
  return sorted(p.name for p in (_ROOT / "configs").glob("*.py") if p.stem != "common")


def _require_tuples(argv: list[str]) -> None:
  """Refuses single values for fields that hold several: the flag parser would take them so."""
  for name, text in re.findall(r"\n--?config\.([\w.]+)[=\n](.*)", "\n".join(["", *argv])):
    value = _CONFIG.value
    for part in name.split("."):
      value = value[part]
    if not isinstance(value, tuple):
      continue
    try:
      given = ast.literal_eval(text)
    except (ValueError, SyntaxError):
      given = None if text[:1] in ("(", "[") else text
    if not isinstance(given, tuple | list):
      example = f'; for one value --config.{name}="({given!r},)"' if given is not None else ""
      raise ValueError(f"--config.{name}={text}: a tuple of numbers or texts is accepted{example}")


def _require_same_model(folder: Path, plain: dict) -> None:
  """Refuses to add rows of another model to a table: --overrule does not go that far."""
  from flexiq_jax.runs import files

  old = files.read_json(folder / "config.json")
  for name in ("experiment", "model", "model_args"):
    if old.get(name) != plain[name]:
      raise ValueError(
        f"config.{name}: {plain[name]!r}, but workdir {str(folder)!r} holds rows of "
        f"{old.get(name)!r}; name another workdir"
      )


def _finished(workdir, plain: dict) -> bool:
  """Writes or compares the workdir's config; says so where the run is complete."""
  workdir.config(plain, overrule=_OVERRULE.value)
  message = workdir.finished_message()
  if message:
    print(message)
  return bool(message)


def _fields(value, name: str) -> list[str]:
  """`name=value` lines of a nested config, as they can be given on the command line."""
  if isinstance(value, dict):
    return [line for key in sorted(value) for line in _fields(value[key], f"{name}.{key}")]
  return [f"--{name}={shlex.quote(str(value))}"]


def _config_path(argv: list[str]) -> str:
  """The config file that was named, as --config=x or --config x."""
  given = re.search(r"\n--?config[=\n](.*)", "\n".join(["", *argv]))
  return given[1].partition(":")[0] if given else ""


def _raised_in_config(error: Exception, argv: list[str]) -> str | None:
  """Where in the config file an exception comes from; None for one that is not its own."""
  path = _config_path(argv)
  if isinstance(error, SyntaxError):
    return f"--config: {error.filename}, line {error.lineno}: {error.msg}"
  lines = [
    frame.lineno
    for frame in traceback.extract_tb(error.__traceback__)
    if path and os.path.abspath(frame.filename) == os.path.abspath(path)
  ]
  if isinstance(error, OSError) and not lines and os.path.isfile(path):
    return f"--config: {path}: {type(error).__name__}: {error}"
  # What a config says itself about its argument is a ValueError, which needs no place.
  if not lines or isinstance(error, ValueError):
    return None
  return f"--config: {path}, line {lines[-1]}: {type(error).__name__}: {error}"


def _unreadable_config(argv: list[str]) -> str:
  path = _config_path(argv)
  names = _configs()
  close = difflib.get_close_matches(os.path.basename(path), names, n=1)
  hint = f"did you mean configs/{close[0]}? " if close else ""
  return f"--config: there is no file {path or '(empty)'}; {hint}in configs/: {', '.join(names)}"


def _flag_error(error: Exception, argv: list[str]) -> str:
  """What a flag parser's exception means, in one line."""
  text = str(error)
  if isinstance(error, AttributeError | KeyError):  # an override of a field that is not there
    wrong = re.search(r"['\"\\]+(\w+)", text)  # in the quotes of one KeyError or of two
    name = wrong[1] if wrong else text
    # The override that has that component, whole.
    field = rf"--config(\.\w+)*\.{name}(\.\w+)*"
    overrides = [flag for a in argv if (flag := a.partition("=")[0]).startswith("--config.")]
    near = [flag for flag in overrides if re.fullmatch(field, flag)] or overrides
    given = near[0] if near else name
    better = re.search(r'Did you mean "(\w+)"', text)
    hint = f"did you mean {better[1]}? " if better else ""
    return f"{given}: there is no such field; {hint}--dry_run lists all fields"
  if "whilst parsing config file" in text:
    return text.strip().split("\n")[-1].partition("Error: ")[2]
  text = text.strip().removeprefix("flag ")
  for said, accepted in _VALUES.items():
    if said in text:
      return text[: text.index(said)].removesuffix("('") + accepted
  unknown = re.match(r"Unknown command line flag '(config\..*)'", text)
  if unknown:
    return f"--{unknown[1]}: overrides come after --config=FILE"
  return " ".join(text.split())


if __name__ == "__main__":
  app.run(entry, flags_parser=parse)
