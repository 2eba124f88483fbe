"""Where a weight file is: a local path, or a repository of the Hugging Face hub."""

import os
import pathlib
import re

import huggingface_hub

_DEFAULT_FILE = "model.safetensors"
_PROBE_SECONDS = 5.0
_BRIEF_SECONDS = 2.0
_REPOSITORY = re.compile(r"hf:([\w.-]+/[\w.-]+)(?:@([^/]+))?(?:/(.+))?")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


def resolve(source: str | os.PathLike[str]) -> pathlib.Path:
  """Finds the local file of a source and fetches it first where that is needed.

  Args:
    source: a path, in which `~` and environment variables are expanded; or `hf:owner/repo`,
      optionally with `@revision` and `/file.safetensors`. The hub's own environment variables
      (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE) apply.

  Returns:
    Path of a regular file.

  Raises:
    FileNotFoundError: there is no such file, or the hub cannot be reached or refuses.
    ValueError: an environment variable is not set, the path is a folder, or the hub source is
      malformed.
  """
  text = os.fspath(source)
  if text.startswith("hf:"):
    return _fetch(text)
  for match in _VARIABLE.finditer(text):
    name = match[1] or match[2]
    if name not in os.environ:
      raise ValueError(f"source {text!r}: the environment variable {name} is not set")
  path = pathlib.Path(os.path.expandvars(text)).expanduser()
  if path.is_dir():
    files = sorted(entry.name for entry in path.glob("*.safetensors"))
    hint = f"; it holds {', '.join(files)}" if files else ", without safetensors files in it"
    raise ValueError(f"source {text!r}: {path} is a folder{hint}; accepted: a safetensors file")
  if not path.is_file():
    raise FileNotFoundError(f"source {text!r}: there is no file {path.absolute()}")
  return path


def is_here(source: str | os.PathLike[str]) -> bool:
  """Whether a source's file is on this machine, without asking the hub."""
  text = os.fspath(source)
  if match := _REPOSITORY.fullmatch(text):
    found = huggingface_hub.try_to_load_from_cache(
      match[1], match[3] or _DEFAULT_FILE, revision=match[2]
    )
    return isinstance(found, str)
  try:
    return resolve(text).is_file() if not text.startswith("hf:") else False
  except (ValueError, OSError):
    return False


def answers() -> bool:
  """Whether the hub can be reached now."""
  if huggingface_hub.constants.HF_HUB_OFFLINE:
    return False
  try:
    huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=_BRIEF_SECONDS)
  except Exception:  # of whichever HTTP library
    return False
  return True


def _fetch(source: str) -> pathlib.Path:
  """Path of a hub file in the local cache, downloaded if it is not there or outdated."""
  match = _REPOSITORY.fullmatch(source)
  if match is None:
    raise ValueError(
      f"source {source!r} is malformed; accepted: hf:owner/repo[@revision][/file.safetensors]"
    )
  repository, revision, name = match[1], match[2], match[3] or _DEFAULT_FILE
  request = {"repo_id": repository, "filename": name, "revision": revision}
  try:
    # One plain request first: the hub's client retries for half a minute where there is no network.
    url = huggingface_hub.hf_hub_url(**request)
    huggingface_hub.get_session().head(url, timeout=_PROBE_SECONDS)
  except Exception as error:
    # Any failure to connect, of whichever HTTP library; an earlier download may still serve.
    reason, request["local_files_only"] = error, True
  else:
    reason = None
  try:
    return pathlib.Path(huggingface_hub.hf_hub_download(**request, etag_timeout=_PROBE_SECONDS))
  except Exception as error:
    # The hub's errors derive from those of its HTTP library, which differs between versions.
    reason = reason or error
    summary = (str(reason).strip().splitlines() or [""])[0]
    raise FileNotFoundError(
      f"source {source!r} cannot be fetched ({type(reason).__name__}: {summary}); where there is "
      f"network, run `hf download {repository} {name}`"
      + (f" with `--revision {revision}`" if revision else "")
      + " (or use a browser) and give the path of the file instead"
    ) from error
