"""What a user can get wrong: one message, at once, that names the field and what is accepted."""

import errno
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from sklearn.datasets import load_digits

from tests.runs_for_test import DIGITS, SMALL, compiled, start

__all__ = ["compiled"]


def refused(*arguments):
  ended = start(*arguments)
  assert ended.status == 1, ended
  assert ended.out == ""
  assert ended.error.startswith("error: ")
  assert "Traceback" not in ended.error
  return ended.error.removeprefix("error: ")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ((), "--config is missing: name a config file, as --config=configs/digits.py"),
    (("--config=",), "--config: there is no file (empty); "),
    (("--config=configs/digit.py",), "no file configs/digit.py; did you mean configs/digits.py? "),
    (("--config=configs",), "--config: there is no file configs; "),
    (
      ("--config", "xyzzy.py"),
      "--config: there is no file xyzzy.py; in configs/: ablation.py, clado.py, compare",
    ),
    ((DIGITS + ",foo",), "config argument 'foo' is unknown; accepted: runlocal"),
    ((DIGITS + "=maybe",), "config argument runlocal='maybe': true or false is accepted"),
    ((DIGITS, "extra"), "unexpected argument 'extra': flags begin with --"),
    ((DIGITS, "--wrkdir=x"), "Unknown command line flag 'wrkdir'. Did you mean: workdir ?"),
    (("--config.seed=1",), "--config.seed: overrides come after --config=FILE"),
    (
      (DIGITS, "--config.batchsize=3"),
      "--config.batchsize: there is no such field; did you mean batch_size? --dry_run lists all",
    ),
    (
      (DIGITS, "--config.data.rot=x"),
      "--config.data.rot: there is no such field; did you mean root?",
    ),
    (
      (DIGITS, "--config.batch_size=3", "--config.group_size=8"),
      "--config.group_size: there is no such field; did you mean groups? --dry_run lists all",
    ),
    ((DIGITS, "--config.colour=x"), "--config.colour: there is no such field; --dry_run lists all"),
    ((DIGITS, "--config.seed.x=1"), "--config.seed.x: there is no such field; --dry_run lists all"),
    ((DIGITS, "--config.batch_size=abc"), "--config.batch_size=abc: an integer is accepted"),
    ((DIGITS, "--config.train.warmup=abc"), "--config.train.warmup=abc: a number is accepted"),
    (
      (DIGITS, "--config.ratios=0.5"),
      "--config.ratios=0.5: a tuple of numbers or texts is accepted",
    ),
    ((DIGITS, "--config.keep8", "fc"), "for one value --config.keep8=\"('fc',)\""),
    (
      (DIGITS, "--config.search.levels=(nan,)"),
      "--config.search.levels=(nan,): a tuple of numbers",
    ),
    ((DIGITS, "--config.dynamic=2"), "--config.dynamic=2: true or false is accepted"),
  ],
)
def test_flags(arguments, message):
  error = refused(*arguments)
  assert error.startswith(message) or message in error
  assert "\n" not in error


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("def get_config(arg=None:\n", "line 1: invalid syntax"),
    ("import nosuch\n", "line 1: ModuleNotFoundError: No module named 'nosuch'"),
    ("def get_config(arg=None):\n  return 1 / 0\n", "line 2: ZeroDivisionError: division by zero"),
    (
      "def get_config(arg=None):\n  return open('/no/file')\n",
      "[Errno 2] No such file or directory: '/no/file'",
    ),
  ],
)
def test_config_files_that_raise_are_told_with_their_line(tmp_path, text, message):
  path = tmp_path / "own.py"
  path.write_text(text)
  error = refused(f"--config={path}")
  assert error.startswith(f"--config: {path}") and message in error
  assert "\n" not in error


@pytest.mark.parametrize(
  ("field", "value", "message"),
  [
    ("experiment", "flexi", "experiment: 'flexi' is not one of curve"),
    ("model", "resnet9", "model: model 'resnet9' is unknown; did you mean resnet8"),
    ("model_args", "width", "model_args: 'width' is not name=value with a Python number"),
    ("model_args", "width=8)", "model_args: 'width=8)' is not name=value"),
    ("model_args", "width=wide", "model_args: 'width=wide' is not name=value"),
    ("model_args", "width=8)(", "model_args: 'width=8)(' is not name=value"),
    ("model_args", "**{'width': 8}", "model_args: \"**{'width': 8}\" is not name=value"),
    (
      "model_args",
      "depth=3",
      "model_args: depth=3 is no argument of model 'resnet8'; did you mean",
    ),
    ("dtype", "float8", "dtype: 'float8' is not one of float32, bfloat16"),
    ("seed", "-1", "seed: -1 is not in 0..2147483647"),
    (
      "weights",
      "",
      "weights: empty; give a safetensors file, hf:owner/repository, train or random",
    ),
    ("weights", "hf:resnet", "weights: source 'hf:resnet' is malformed; accepted: hf:owner/repo"),
    ("batch_size", "0", "batch_size: 0 is not a positive number"),
    ("calibration.batch_size", "-1", "calibration.batch_size: -1 is not a positive number"),
    ("calibration.images", "0", "calibration.images: 0 is not a positive number"),
    ("calibration.images", "5000", "calibration.images: 5000; 1..1352 is accepted, digits (train"),
    ("calibration.split", "test", "calibration: calibration and evaluation both read digits (test"),
    ("data.split", "val", "data: split 'val' is unknown; accepted: test, train"),
    ("data.name", "digit", "data: dataset 'digit' is unknown; did you mean 'digits'? accepted: "),
    ("data.root", "/data", "data.root is '/data', but dataset 'digits' is embedded"),
    ("data.limit", "-1", "data.limit: -1 is negative; 0 takes all images"),
    (
      "preprocess.crop",
      "16",
      "preprocess: crop 16 and 1 values of mean and std give images 16x16x1",
    ),
    ("preprocess.crop", "-1", "preprocess.crop is -1; a positive number of pixels or None"),
    ("ratios", "(0.5, 1.2)", "ratios: 1.2 is not a number in 0..1"),
    ("ratios", "('a',)", "ratios: 'a' is not a number in 0..1"),
    ("ratios", "()", "ratios: empty; give numbers in 0..1, as (0.0, 0.5, 1.0)"),
    ("data", "{'name': 'digits', 'root': ''}", "data.split: missing; configs/common.py has all"),
    ("random_seeds", "(True,)", "random_seeds: True is not an integer from 0"),
    ("random_seeds", "(-1,)", "random_seeds: -1 is not an integer from 0"),
    ("random_seeds", "(4294967296,)", "random_seeds: 4294967296 is not an integer from 0 to 214"),
    ("experiment", "deploy", "experiment: 'deploy' reads config.deploy, which this config lacks"),
    ("experiment", "ablation", "experiment: 'ablation' reads config.ablation, which this config"),
    ("experiment", "table", "experiment: 'table' reads config.table, which this config lacks; tak"),
    ("name", "../../x", "name: '../../x' names a folder below runs/; letters, digits, _, - and ."),
    ("batch_size", "99999999999999999999", "batch_size: 99999999999999999999; 1..2147483647 is"),
    ("variants", "('nave',)", "variants: 'nave' is not one of naive, range, per_output"),
    ("score", "best", "score: 'best' is not one of exact, range"),
    ("groups.group_size", "0", "groups.group_size: 0 is not a positive number of channels"),
    ("groups.shift_block", "9", "groups.shift_block: 9; 0, a multiple or a divisor of group_size"),
    ("groups.weight_shift", "x", "groups.weight_shift: 'x' is not one of "),
    ("ranges.activation", "minmax", "ranges.activation: 'minmax' is not one of max, percentile"),
    ("ranges.percentile", "0", "ranges.percentile: 0.0 is not in (0, 100]"),
    ("keep8", "('layer9/conv',)", "keep8: 'layer9/conv' matches no layer; closest names: layer"),
    ("keep8", "(1,)", "keep8: 1 is not a regular expression"),
    ("search.levels", "('a',)", "search.levels: ('a',); increasing numbers between 0 and 1"),
    ("search.probes", "9999999999", "search.probes: 9999999999; at most 2147483647 is accepted"),
    ("data.limit", "9999999999", "data.limit: 9999999999; 0..2147483647 is accepted"),
    ("keep8", "('layer(',)", "keep8: 'layer(' is not a regular expression (missing )"),
    ("keep8", "('.',)", "keep8: none of the 8 layers is left for 4 bits"),
    ("train.epochs", "0", "train.epochs is 0; an integer from 1 is accepted"),
    ("train.batch_size", "5000", "train.batch_size: 5000; 1..1217 is accepted: so many images"),
    ("train.optimizer", "lion", "train.optimizer is 'lion'; sgd or adamw is accepted"),
    ("recipe", "$NOT_SET/r.json", "recipe: path '$NOT_SET/r.json' uses the environment variable"),
    ("recipe", "no.json", "recipe: no.json does not exist"),
    ("recipe", "README.md", "recipe: README.md is not JSON"),
  ],
)
def test_values(field, value, message, tmp_path):
  error = refused(DIGITS, f"--config.{field}={value}", f"--workdir={tmp_path}")
  assert error.startswith(f"config.{message}")
  assert "\n" not in error
  # The next start with a better value is not refused for this one.
  assert list(tmp_path.iterdir()) == []


def test_workdir_below_a_file(tmp_path):
  (tmp_path / "file").touch()
  error = refused(DIGITS, f"--workdir={tmp_path / 'file' / 'w'}")
  assert error.startswith(f"workdir '{tmp_path / 'file' / 'w'}' cannot be written")
  error = refused(DIGITS, f"--workdir={tmp_path / 'w'}", f"--compilation_cache={tmp_path / 'file'}")
  assert "compilation cache" in error and "name another folder" in error


def test_out_of_memory(tmp_path, monkeypatch):
  def run(*_):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes.\nmore")

  monkeypatch.setattr("experiments.curve.run", run)
  error = refused(*SMALL, f"--workdir={tmp_path}")
  assert error.startswith("the device is out of memory; lower config.batch_size (rows) or ")
  assert "\n" not in error


def test_full_disk(tmp_path, monkeypatch, compiled):
  """In the search: one line with the folder, and no field is blamed."""
  asked = []

  def full(*_):
    asked.append(0)
    if len(asked) > 1:  # the calibration is kept
      raise OSError(errno.ENOSPC, "No space left on device")

  monkeypatch.setattr("os.posix_fallocate", full)
  ended = start(*SMALL, f"--workdir={tmp_path}", compiled)
  why = "No space left on device; free some, then run the same command to resume"
  assert (ended.status, ended.error) == (1, f"error: {tmp_path / 'search/gram'}: {why}")


def test_bugs_keep_their_traceback(tmp_path, monkeypatch):
  def run(*_):
    raise RuntimeError("a bug")

  monkeypatch.setattr("experiments.curve.run", run)
  with pytest.raises(RuntimeError, match="a bug"):
    start(*SMALL, f"--workdir={tmp_path}")


def weights(tmp_path, **tensors):
  path = tmp_path / "weights.safetensors"
  safetensors.numpy.save_file(tensors, path)
  return path


@pytest.mark.parametrize("kind", ["missing", "folder", "truncated", "pickled", "other"])
def test_weight_files(kind, tmp_path):
  path = tmp_path / "w.safetensors"
  if kind == "folder":
    path.mkdir()
  elif kind == "truncated":
    whole = weights(tmp_path, **{"conv1.weight": np.zeros((16, 1, 3, 3), np.float32)})
    path.write_bytes(whole.read_bytes()[:100])
  elif kind == "pickled":
    path.write_bytes(b"PK\x03\x04 and so on")
  elif kind == "other":
    path = weights(tmp_path, **{"blocks.0.norm1.weight": np.zeros(8, np.float32)})
  message = {
    "missing": "there is no file",
    "folder": "is a folder, without safetensors files in it; accepted: a safetensors file",
    "truncated": "it is damaged, cut short or of another format",
    "pickled": "write its state_dict with safetensors.torch.save_file",
    "other": "does not fit resnet8: ",
  }[kind]
  error = refused(DIGITS, f"--config.weights={path}", f"--workdir={tmp_path / 'w'}")
  assert error.startswith("config.weights: ")
  assert message in error and str(path) in error
  assert "\n" not in error


def test_what_is_missing_is_told_at_once(tmp_path, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  monkeypatch.setenv("HF_HOME", str(tmp_path))
  for flag in ("data", "calibration"):
    assert not (tmp_path / flag).exists()
  error = refused(
    "--config=configs/deit_s.py",
    f"--config.data.root={tmp_path}",
    f"--config.calibration.root={tmp_path}",
    f"--workdir={tmp_path / 'w'}",
  )
  images, network, hint = error.split("\n")
  assert images.startswith("config.data and config.calibration: root of dataset 'imagenet'") or (
    images.startswith("config.data and config.calibration: dataset 'imagenet' is not prepared")
  )
  assert "download_and_prepare()" in images and "ILSVRC2012_img_val.tar" in images
  assert network.startswith("config.weights: source 'hf:timm/deit_small_patch16_224.fb_in1k' ")
  assert "`hf download timm/deit_small_patch16_224.fb_in1k model.safetensors`" in network
  assert hint == "to try the pipeline with neither: --config=FILE.py:runlocal"


def test_environment_variable_that_is_not_set(tmp_path, monkeypatch):
  monkeypatch.delenv("FLEXIQ_DATA", raising=False)
  error = refused("--config=configs/vit_cifar10.py", f"--workdir={tmp_path}")
  assert error.count("FLEXIQ_DATA, which is not set; set it (export FLEXIQ_DATA=...)") == 1
  assert "config.weights: source '$FLEXIQ_DATA/vit_cifar10/vit_cifar10.safetensors': the" in error


@pytest.fixture
def folder(tmp_path):
  """Forty digits as PNG files with a labels.csv, for both splits."""
  digits = load_digits()
  for split, first in (("train", 0), ("test", 40)):
    (tmp_path / "data" / split).mkdir(parents=True)
    lines = ["file,label"]
    for i in range(first, first + 40):
      pixels = np.rint(digits.images[i] * (255 / 16)).astype(np.uint8)
      Image.fromarray(pixels).save(tmp_path / "data" / split / f"{i}.png")
      lines.append(f"{i}.png,{digits.target[i]}")
    (tmp_path / "data" / split / "labels.csv").write_text("\n".join(lines) + "\n")
  return tmp_path / "data"


def on_folder(folder):
  return (
    *SMALL,
    "--config.data.name=folder",
    f"--config.data.root={folder}",
    "--config.calibration.name=folder",
    f"--config.calibration.root={folder}",
    "--config.data.limit=0",
    f"--workdir={folder.parent / 'w'}",
  )


def test_folders(folder):
  empty = folder.parent / "empty"
  empty.mkdir()
  at = on_folder(folder)
  error = refused(*at, f"--config.data.root={empty}")
  assert error.startswith(f"config.data: root of dataset 'folder': folder {empty} is empty")
  error = refused(*at, f"--config.data.root={folder / 'no'}")
  assert f"folder {folder / 'no'} does not exist" in error
  table = folder / "test/labels.csv"
  table.write_text(re.sub(r"41\.png,\d", "41.png,10", table.read_text()))
  error = refused(*at)
  assert error.startswith("config.data: label 10 of 41.png")
  assert "0..9 is accepted for 10 classes" in error


def test_image_that_does_not_decode_deep_in_a_run(folder, compiled):
  at = (*on_folder(folder), compiled)
  image, workdir = folder / "test/75.png", folder.parent / "w"
  whole = image.read_bytes()
  image.write_bytes(whole[:60])
  ended = start(*at)
  assert ended.status == 1
  assert ended.error.startswith(f"error: config.data: image {image} does not decode as an image: ")
  assert "\n" not in ended.error
  # What was complete is kept, and the same command goes on once the file is whole.
  assert (workdir / "recipe.json").is_file()
  assert not (workdir / "results.csv").exists()
  image.write_bytes(whole)
  assert start(*at).status == 0
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  names = [json.loads(line)["event"] for line in lines]
  assert (names.count("calibrated"), names.count("selected")) == (1, 2)
  assert names.count("start") == 2
