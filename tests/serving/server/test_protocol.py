"""The protocol over real sockets: what a client gets, and what each refusal is."""

import gzip
import json
import threading
import zlib

import numpy as np
import pytest

from flexiq_jax.serving.server import Limits, codec, protocol
from flexiq_jax.serving.server.refusals import Refused
from tests.serving.server.served_for_test import (
  LEVELS,
  PATH,
  SHAPE,
  Gate,
  logits,
  request,
  served,
  sleeping,
  until,
)

X = np.random.default_rng(0).random((2, *SHAPE), np.float32)


@pytest.fixture(scope="module")
def client():
  with served(limits=Limits(batch=8, body=100_000), priorities=(5.0, 1e-6)) as client:
    yield client


def test_metadata_and_health(client):
  assert client.get("/v2").json == {
    "name": "flexiq_jax",
    "version": client.get("/v2").json["version"],
    "extensions": ["binary_tensor_data", "classification", "parameters", "schedule_policy"],
  }
  assert client.get("/v2/health/live").json == {"live": True}
  assert client.get("/v2/health/ready").json == {"live": True, "ready": True}
  described = {
    "name": "toy",
    "versions": ["1"],
    "platform": "flexiq_jax",
    "inputs": [{"name": "input", "datatype": "FP32", "shape": [-1, *SHAPE]}],
    "outputs": [{"name": "logits", "datatype": "FP32", "shape": [-1, 3]}],
  }
  for path in ("/v2/models/toy", "/v2/models/toy/versions/1"):
    assert client.get(path).json == described
    assert client.get(f"{path}/ready").json == {"name": "toy", "ready": True}


@pytest.mark.parametrize("path", [PATH, "/v2/models/toy/versions/1/infer"])
def test_json_and_binary_give_what_the_model_computes(client, path):
  wanted = logits(X, 0.0)
  reply = client.post(path, request(X) | {"id": "7"})
  assert reply.status == 200 and reply.json["id"] == "7"
  (output,) = reply.json["outputs"]
  assert (output["shape"], output["datatype"]) == ([2, 3], "FP32")
  np.testing.assert_array_equal(np.float32(output["data"]).reshape(2, 3), wanted)
  entry = {"name": "input", "shape": X.shape, "datatype": "FP32"}
  entry["parameters"] = {"binary_data_size": X.nbytes}
  head = json.dumps({"inputs": [entry], "parameters": {"binary_data_output": True}}).encode()
  reply = client.post(path, head + X.tobytes(), {codec.LENGTH: str(len(head))})
  length = int(reply.headers[codec.LENGTH.lower()])
  np.testing.assert_array_equal(np.frombuffer(reply.body[length:], "f4").reshape(2, 3), wanted)


def test_an_answer_says_its_ratio_and_timings(client):
  reply = client.infer(X)
  parameters = reply.json["parameters"]
  assert parameters["ratio"] in LEVELS and parameters["batch"] >= 0
  assert 0 <= parameters["queued_ms"] < 1e4 and 0 < parameters["computed_ms"] < 1e4
  assert reply.headers["flexiq-ratio"] == f"{parameters['ratio']:g}"
  assert "queue;dur=" in reply.headers["server-timing"]


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
def test_compressed_bodies(client, encoding):
  compress = {"gzip": gzip.compress, "deflate": zlib.compress}[encoding]
  content, headers = compress(json.dumps(request(X)).encode()), {"Content-Encoding": encoding}
  assert client.post(PATH, content, headers).status == 200
  assert client.post(PATH, content[:-9], headers).status == 400
  assert client.post(PATH, b"plain", headers).status == 400
  assert client.post(PATH, compress(b" " * 10**7), headers).status == 413
  assert client.post(PATH, content, {"Content-Encoding": "br"}).status == 415


REFUSALS = [
  ("GET", "/v2/models/other", None, 404, "'other' is unknown; 'toy' is served"),
  ("GET", "/v2/models/toy/versions/2", None, 404, "version '2' is unknown; '1' is served"),
  ("POST", "/v2/models/other/infer", b"{}", 404, "'other' is unknown"),
  ("GET", "/v2/models/..%2f..%2fetc%2fpasswd", None, 404, "there is nothing at"),
  ("GET", "/v2/models/../../etc/passwd", None, 404, "there is nothing at"),
  ("GET", "/v2/models/%00", None, 404, "unknown"),
  ("GET", "/page.html", None, 404, "there is nothing at '/page.html'"),
  ("GET", PATH, None, 405, "GET is not accepted"),
  ("POST", PATH, b"", 400, "no inference request"),
  ("POST", PATH, b"x" * 100_001, 413, "up to 100000 bytes are accepted"),
  ("POST", PATH, request(X[:, :2]), 400, "shape [2, 2, 4, 1]; 'input' of shape [-1, 4, 4, 1]"),
  ("POST", PATH, request(np.zeros((9, *SHAPE))), 400, "up to 8 examples"),
  ("POST", PATH, request(X, timeout=-1), 400, "timeout: -1; microseconds"),
  ("POST", PATH, request(X, priority=3), 400, "priority: 3; 0..2 is accepted"),
  ("POST", PATH, request(X) | {"outputs": [{"name": "y"}]}, 400, "'y' is not one of 'logits'"),
  ("POST", "/classify", b"", 404, "there is nothing at"),  # this model takes no images
]


@pytest.mark.parametrize(("method", "path", "content", "status", "text"), REFUSALS)
def test_refusals(client, method, path, content, status, text):
  content = json.dumps(content).encode() if isinstance(content, dict) else content
  reply = client.send(method, path, content)
  assert reply.status == status
  assert text in reply.json["error"]
  assert list(reply.json) == ["error"]
  assert client.infer(X).status == 200


@pytest.mark.parametrize("length", ["\xb2", "9" * 50, "", "0x1"])
def test_wrong_lengths_of_large_bodies(client, length):
  reply = client.post(PATH, b" " * 90_000, {codec.LENGTH: length})
  assert reply.status == 400


def test_large_bodies_are_read_in_a_worker():
  """More JSON than the event loop reads itself."""
  with served() as client:
    content = json.dumps(request(X)).encode() + b" " * 100_000
    reply = client.post(PATH, content)
    y = np.float32(reply.json["outputs"][0]["data"]).reshape(2, 3)
    np.testing.assert_array_equal(y, logits(X, 0.0))


def test_deadlines(client):
  assert client.infer(X, timeout=5_000_000).status == 200
  assert client.infer(X, timeout=1).status == 504
  assert client.infer(X, priority=1).status == 200
  assert client.infer(X, priority=2).status == 504
  assert client.infer(X, priority=1, timeout=1).status == 504


def test_deadline_is_the_earlier_of_time_out_and_priority():
  of = lambda **parameters: protocol.deadline(parameters, (0.1, 0.5))
  assert of() is None
  assert of(timeout=0, priority=0) is None
  assert of(timeout=200_000) == 0.2
  assert of(priority=2) == 0.5
  assert of(priority=1, timeout=200_000) == 0.1
  assert of(priority=2, timeout=200_000) == 0.2
  for bad in ({"timeout": "1"}, {"timeout": True}, {"timeout": float("nan")}, {"priority": 1.0}):
    with pytest.raises(Refused):
      of(**bad)


def test_what_the_engine_refuses():
  """Overload is 429 at once; a batch that raises is 500, and the next one is answered."""
  gate = Gate()

  def run(x, ratio):
    if (x == 9).any():
      raise RuntimeError("broken")
    return gate(x, ratio)

  with served(run, queue=8) as client:
    gate.closed.set()
    replies = []
    send = lambda: replies.append(client.infer(np.repeat(X, 2, axis=0)).status)
    threads = [threading.Thread(target=send) for _ in range(8)]
    threads[0].start()
    until(gate.waits.is_set)
    for thread in threads[1:]:
      thread.start()
    until(lambda: len(replies) == 5)  # one runs and two wait
    gate.let(8)
    for thread in threads:
      thread.join()
    assert sorted(replies) == [200] * 3 + [429] * 5
    reply = client.infer(np.full_like(X, 9))
    assert reply.status == 500 and "RuntimeError: broken" in reply.json["error"]
    assert client.infer(X).status == 200
    text = client.get("/metrics").body.decode()
    assert 'flexiq_requests_total{kind="infer",outcome="failed"} 1.0' in text
    assert f'outcome="overloaded"}} {replies.count(429):.1f}' in text


def test_a_server_that_does_not_answer_says_so():
  with served(sleeping(0.5), limits=Limits(batch=8, answer_seconds=0.2)) as client:
    reply = client.infer(X)
    assert (reply.status, reply.json["error"]) == (504, "no answer in 0.2 s")


def test_triton_client_works_unchanged(client):
  triton = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
  with triton.InferenceServerClient(f"127.0.0.1:{client.port}") as other:
    assert other.is_server_live() and other.is_server_ready() and other.is_model_ready("toy", "1")
    assert other.get_server_metadata()["name"] == "flexiq_jax"
    assert other.get_model_metadata("toy")["inputs"][0]["shape"] == [-1, *SHAPE]
    for binary in (False, True):
      given = triton.InferInput("input", X.shape, "FP32")
      given.set_data_from_numpy(X, binary_data=binary)
      wanted = triton.InferRequestedOutput("logits", binary_data=binary)
      for outputs in (None, [wanted]):
        result = other.infer("toy", [given], outputs=outputs, request_id="3", timeout=10**6)
        np.testing.assert_array_equal(result.as_numpy("logits"), logits(X, 0.0))
        assert result.get_response()["id"] == "3"
    result = other.infer("toy", [given], request_compression_algorithm="gzip")
    np.testing.assert_array_equal(result.as_numpy("logits"), logits(X, 0.0))
    best = triton.InferRequestedOutput("logits", class_count=1)
    label = other.infer("toy", [given], outputs=[best]).as_numpy("logits")[0, 0]
    assert label.endswith(b":2:cat")
    with pytest.raises(triton.InferenceServerException, match="'other' is unknown"):
      other.infer("other", [given])
