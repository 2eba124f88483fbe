"""Finding weight files: paths, environment variables, and the hub with and without network."""

import pathlib
import time
import types

import huggingface_hub
import pytest

from flexiq_jax.models import hub


class Session:
  """Stands in for the hub's HTTP client: reachable, or not."""

  def __init__(self, error=None):
    self.error = error
    self.requests = []

  def head(self, url, timeout):
    self.requests.append((url, timeout))
    if self.error:
      raise self.error


@pytest.fixture
def downloads(monkeypatch, tmp_path):
  """Replaces the hub's download by one that records its requests and returns a file."""
  requests = []
  path = tmp_path / "model.safetensors"
  path.touch()

  def download(**request):
    requests.append(request)
    return str(path)

  monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
  monkeypatch.setattr(huggingface_hub, "get_session", Session)
  return requests


def test_a_path_is_taken_as_it_is(tmp_path):
  path = tmp_path / "a.safetensors"
  path.touch()
  assert hub.resolve(path) == hub.resolve(str(path)) == path


@pytest.mark.parametrize("form", ["$WEIGHTS_HERE/a.safetensors", "${WEIGHTS_HERE}/a.safetensors"])
def test_environment_variables_are_expanded(form, tmp_path, monkeypatch):
  (tmp_path / "a.safetensors").touch()
  monkeypatch.setenv("WEIGHTS_HERE", str(tmp_path))
  assert hub.resolve(form) == tmp_path / "a.safetensors"
  monkeypatch.delenv("WEIGHTS_HERE")
  with pytest.raises(ValueError, match="environment variable WEIGHTS_HERE is not set"):
    hub.resolve(form)


def test_missing_files_and_folders_are_named(tmp_path):
  with pytest.raises(FileNotFoundError, match=f"there is no file {tmp_path / 'no.safetensors'}"):
    hub.resolve(tmp_path / "no.safetensors")
  with pytest.raises(ValueError, match="is a folder, without safetensors files in it"):
    hub.resolve(tmp_path)
  (tmp_path / "b.safetensors").touch()
  with pytest.raises(ValueError, match=r"is a folder; it holds b.safetensors; accepted: a safe"):
    hub.resolve(str(tmp_path))


@pytest.mark.parametrize(
  ("source", "repository", "revision", "name"),
  [
    ("hf:timm/vit_tiny.a_in1k", "timm/vit_tiny.a_in1k", None, "model.safetensors"),
    ("hf:timm/vit@v1.0", "timm/vit", "v1.0", "model.safetensors"),
    ("hf:timm/vit/sub/w.safetensors", "timm/vit", None, "sub/w.safetensors"),
    ("hf:timm/vit@0a1b/w.safetensors", "timm/vit", "0a1b", "w.safetensors"),
  ],
)
def test_hub_sources_name_repository_revision_and_file(
  source, repository, revision, name, downloads
):
  assert hub.resolve(source).is_file()
  (request,) = downloads
  assert request["repo_id"] == repository
  assert request["revision"] == revision
  assert request["filename"] == name
  assert "local_files_only" not in request


@pytest.mark.parametrize("source", ["hf:vit", "hf:", "hf:a/b@", "hf:/a/b", "hf:a b/c"])
def test_malformed_hub_sources(source):
  with pytest.raises(ValueError, match=r"is malformed; accepted: hf:owner/repo\[@revision\]"):
    hub.resolve(source)


def test_without_network_the_cache_still_serves(downloads, monkeypatch):
  session = Session(ConnectionError("Name or service not known"))
  monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
  assert hub.resolve("hf:timm/vit").is_file()
  assert downloads[0]["local_files_only"]
  ((url, timeout),) = session.requests
  assert url.endswith("/timm/vit/resolve/main/model.safetensors") and timeout <= 5


def test_without_network_and_cache_the_message_says_what_to_do(tmp_path, monkeypatch):
  """The real download, with a client that cannot connect: nothing retries, nothing waits."""
  session = Session(ConnectionError("Name or service not known"))
  monkeypatch.setattr(huggingface_hub, "get_session", lambda: session)
  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
  start = time.monotonic()
  with pytest.raises(FileNotFoundError) as caught:
    hub.resolve("hf:timm/no-such-model-here@v2")
  assert time.monotonic() - start < 5
  message = str(caught.value)
  assert "ConnectionError: Name or service not known" in message
  assert "`hf download timm/no-such-model-here model.safetensors` with `--revision v2`" in message
  assert "\n" not in message


def test_a_refusal_of_the_hub_is_passed_on(monkeypatch):
  # As much of an HTTP response as the hub's errors look at.
  response = types.SimpleNamespace(headers={}, request=None, status_code=404)

  def refuse(**request):
    raise huggingface_hub.errors.RevisionNotFoundError("404: no revision v9", response=response)

  monkeypatch.setattr(huggingface_hub, "get_session", Session)
  monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
  with pytest.raises(FileNotFoundError, match=r"hf:a/b@v9.*RevisionNotFoundError: 404: no revis"):
    hub.resolve("hf:a/b@v9")


def test_home_is_expanded(tmp_path, monkeypatch):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "w.safetensors").touch()
  assert hub.resolve("~/w.safetensors") == pathlib.Path(tmp_path / "w.safetensors")
