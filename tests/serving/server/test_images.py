"""The image endpoint: right classes for whole images, a clear refusal for all others."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from flexiq_jax.data import Preprocess
from flexiq_jax.serving.server import Limits, Model, classify, images
from flexiq_jax.serving.server.refusals import Refused
from tests.serving.server.served_for_test import LEVELS, logits, served

PREPARE = Preprocess(resize=8, crop=8, mean=(0.5,) * 3, std=(0.5,) * 3)
MODEL = Model(
  name="toy",
  shape=(8, 8, 3),
  classes=3,
  levels=LEVELS,
  class_names=("ant", "bee", "cat"),
  preprocess=PREPARE,
  geometry=(8, 8),
)
LIMITS = Limits(batch=8, body=200_000, pixels=10_000)


def picture(width=20, height=12, mode="RGB", form="PNG", **options) -> bytes:
  rng = np.random.default_rng(0)
  image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).convert(mode)
  out = io.BytesIO()
  image.save(out, form, **options)
  return out.getvalue()


def bomb(width, height) -> bytes:
  """A PNG of a few bytes that says it has so many pixels."""
  chunk = lambda kind, data: (
    struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
  )
  head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
  return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 99))


def form(*files: bytes, end=b"--x--\r\n") -> tuple[bytes, dict]:
  parts = [
    b'--x\r\nContent-Disposition: form-data; name="f%d"; filename="../../a.png"\r\n\r\n' % i
    + content + b"\r\n"
    for i, content in enumerate(files)
  ]  # fmt: skip
  return b"".join(parts) + end, {"Content-Type": "multipart/form-data; boundary=x"}


@pytest.fixture(scope="module")
def client():
  with served(limits=LIMITS, model=MODEL, shape=(8, 8, 3)) as client:
    yield client


@pytest.mark.parametrize("path", ["/classify", "/v2/models/toy/classify"])
def test_raw_bodies_and_forms(client, path):
  content = picture()
  y = logits(PREPARE(Image.open(io.BytesIO(content)))[None], 0.0)[0].astype(float)
  share = np.exp(y) / np.exp(y).sum()
  curl = {"Content-Type": "application/x-www-form-urlencoded"}
  for reply in (
    client.post(f"{path}?top=2", content, curl),
    client.post(f"{path}?top=2", *form(content)),
  ):
    assert reply.status == 200, reply.body
    assert [(c["class"], c["name"]) for c in reply.json["classes"]] == [(2, "cat"), (1, "bee")]
    np.testing.assert_allclose([c["probability"] for c in reply.json["classes"]], share[[2, 1]])
    assert reply.json["parameters"]["ratio"] == 0.0
    assert reply.headers["flexiq-ratio"] == "0"


@pytest.mark.parametrize(
  ("mode", "kind"), [("L", "PNG"), ("RGBA", "PNG"), ("P", "PNG"), ("1", "PNG"), ("L", "JPEG")]
)
def test_modes_are_converted(mode, kind):
  assert images.example(picture(mode=mode, form=kind), MODEL, LIMITS).shape == (1, 8, 8, 3)


def test_photographs_are_turned_upright():
  exif = Image.Exif()
  exif[0x0112] = 6  # a quarter turn
  turned = images.example(picture(form="JPEG", exif=exif, quality=95), MODEL, LIMITS)
  plain = images.example(picture(form="JPEG", quality=95), MODEL, LIMITS)
  wanted = np.rot90(plain, -1, axes=(1, 2))
  assert np.abs(turned - wanted).mean() < 0.1 < np.abs(turned - plain).mean()


BAD = [
  (b"", 415, "0 bytes that are neither a JPEG nor a PNG"),
  (b"GIF89a" + bytes(50), 415, "neither a JPEG nor a PNG"),
  (picture(form="BMP"), 415, "neither a JPEG nor a PNG"),
  (picture()[:200], 400, "is the file complete"),
  (picture(form="JPEG")[:200], 400, "image:"),
  (picture()[:8], 400, "image: its header is damaged"),
  (picture()[:8] + bytes(100), 400, "image:"),
  (b"\xff\xd8\xff" + bytes(100), 400, "image: its header is damaged"),
  (bomb(20_000, 20_000), 413, "20000 x 20000 pixels; up to 10000 pixels"),
  (bomb(2**31 - 1, 2**31 - 1), 413, "pixels"),
  (bomb(1, 2_000), 413, "shorter side resized to 8"),
  (bomb(2_000, 1), 413, "shorter side resized to 8"),
  (bomb(50, 50), 400, "does not decode"),
  (bytes(200_001), 413, "up to 200000 bytes"),
  (picture(mode="I;16"), 400, "more than 8 bits a channel"),
]


@pytest.mark.parametrize(("content", "status", "text"), BAD)
def test_refusals(client, content, status, text):
  reply = client.post("/classify", content)
  assert (reply.status, list(reply.json)) == (status, ["error"])
  assert text in reply.json["error"]
  assert client.post("/classify", picture()).status == 200


def test_nothing_is_decoded_before_its_size_is_known(monkeypatch):
  monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
  for size in ((20_000, 20_000), (1, 2_000), (101, 100)):
    with pytest.raises(Refused):
      images.example(bomb(*size), MODEL, LIMITS)


def test_forms_that_are_none(client):
  content = picture()
  for body, headers in (
    form(),
    form(content, content),
    form(content, end=b""),
    (content, {"Content-Type": "multipart/form-data"}),
    (b"--x\r\nContent-Disposition: form-data; name=a\r\n\r\nb\r\n--x--\r\n", form()[1]),
  ):
    reply = client.post("/classify", body, headers)
    assert reply.status == 400, reply.body
    assert "file" in reply.json["error"]


@pytest.mark.parametrize("query", ["top=0", "top=4", "top=x", "top=-1", "timeout_ms=0"])
def test_queries(client, query):
  reply = client.post(f"/classify?{query}", picture())
  assert reply.status == 400
  assert "is accepted" in reply.json["error"]
  assert client.post("/v2/models/other/classify", picture()).status == 404


def test_best_is_a_softmax():
  found = classify.best(np.array([1000.0, 999.0, -1000.0]), MODEL, 2)
  assert [f["class"] for f in found] == [0, 1]
  assert sum(f["probability"] for f in found) == pytest.approx(1)
