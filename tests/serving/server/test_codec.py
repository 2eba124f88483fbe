"""Requests and responses: round trips, exact layouts, and everything that is no request."""

import json
import struct

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flexiq_jax.serving.server import codec, tensors
from flexiq_jax.serving.server.model import Model, examples
from flexiq_jax.serving.server.refusals import Refused

MODEL = Model(name="toy", shape=(2, 2), classes=3, levels=(0.0, 1.0))
NUMBERS = [name for name in tensors.DTYPES if name != "BYTES"]


def body(*inputs, raw=b"", **more):
  head = json.dumps({"inputs": list(inputs), **more}).encode()
  return head + raw, str(len(head))


def tensor(data=None, shape=(1, 2, 2), datatype="FP32", name="input", **parameters):
  entry = {"name": name, "shape": list(shape), "datatype": datatype}
  if data is not None:
    entry["data"] = data
  return entry | ({"parameters": parameters} if parameters else {})


@given(st.data(), st.sampled_from(NUMBERS), hnp.array_shapes(max_dims=3, max_side=4))
def test_bytes_and_json_come_back(data, name, shape):
  dtype = tensors.DTYPES[name]
  count = int(np.prod(shape))
  raw = data.draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
  raw = bytes(b & 1 for b in raw) if name == "BOOL" else raw
  array = np.frombuffer(raw, dtype).reshape(shape)
  assert tensors.datatype(array.dtype) == name
  read = tensors.from_bytes(name, shape, tensors.to_bytes(array), "x")
  assert read.dtype == dtype and read.tobytes() == raw and read.shape == shape
  if name in ("FP16", "BF16", "FP32", "FP64"):
    with np.errstate(invalid="ignore"):
      array = np.nan_to_num(array.astype(np.float64), posinf=1, neginf=1).astype(dtype)
  nested = data.draw(st.booleans())
  text = json.dumps(array.tolist() if nested else tensors.to_json(array)).encode()
  again = tensors.from_json(name, shape, text, "x")
  assert again.dtype == dtype
  np.testing.assert_array_equal(again, array)


def test_strings_come_back():
  array = np.array([[b"", b"ab"], ["ü".encode(), b"\0"]], object)
  raw = tensors.to_bytes(array)
  assert raw[:10] == struct.pack("<I", 0) + struct.pack("<I", 2) + b"ab"
  np.testing.assert_array_equal(tensors.from_bytes("BYTES", (2, 2), raw, "x"), array)
  text = json.dumps(tensors.to_json(array)).encode()
  np.testing.assert_array_equal(tensors.from_json("BYTES", (2, 2), text, "x"), array)
  for bad in (raw[:-1], raw + b"\0", raw[:3], b"\xff\xff\xff\xff", raw * 2):
    with pytest.raises(Refused, match="4 elements of BYTES"):
      tensors.from_bytes("BYTES", (2, 2), bad, "x")


def test_several_binary_inputs_lie_in_their_order():
  a, b = np.arange(4, dtype=np.float32), np.arange(3, dtype=np.int16)
  entries = (
    tensor(shape=(4,), name="a", binary_data_size=16),
    tensor([True], shape=(1,), name="c", datatype="BOOL"),
    tensor(shape=(3,), name="b", datatype="INT16", binary_data_size=6),
  )
  content, length = body(*entries, raw=a.tobytes() + b.tobytes(), id="7")
  request = codec.read(content, length)
  assert request.id == "7"
  arrays = {t.name: t.array() for t in request.inputs}
  np.testing.assert_array_equal(arrays["a"], a)
  np.testing.assert_array_equal(arrays["b"], b)
  assert arrays["c"].tolist() == [True]


@pytest.mark.parametrize("binary", [False, True])
def test_response(binary):
  y = np.array([[0.25, 3.0, -1.0]], np.float32)
  output = {"name": "logits", "parameters": {"binary_data": binary}}
  request = codec.read(*body(tensor([0, 0, 0, 0]), id="a", outputs=[output]))
  content, headers = codec.write(request, "toy", "1", {"logits": y}, {"ratio": 0.5})
  length = int(headers.get(codec.LENGTH, len(content)))
  head = json.loads(content[:length])
  entry = {"name": "logits", "datatype": "FP32", "shape": [1, 3]}
  more = {"parameters": {"binary_data_size": 12}} if binary else {"data": [0.25, 3.0, -1.0]}
  assert head == {
    **{"model_name": "toy", "model_version": "1", "id": "a", "parameters": {"ratio": 0.5}},
    "outputs": [entry | more],
  }
  assert content[length:] == (y.tobytes() if binary else b"")
  assert (codec.LENGTH in headers) == binary


def test_all_outputs_are_binary_where_the_request_says_so():
  request = codec.read(*body(tensor([0, 0, 0, 0]), parameters={"binary_data_output": True}))
  content, headers = codec.write(request, "toy", "1", {"logits": np.ones((1, 3), "f")}, {})
  assert content[int(headers[codec.LENGTH]) :] == np.ones(3, "f").tobytes()


def test_classification():
  scores = np.array([[0.5, 2.0, -1.0], [3.0, 3.0, 4.0]], np.float32)
  assert codec.classification(scores, 2).tolist() == [
    [b"2.000000:1", b"0.500000:0"],
    [b"4.000000:2", b"3.000000:0"],
  ]
  assert codec.classification(scores[:1], 9, ("ant", "bee", "cat")).tolist() == [
    [b"2.000000:1:bee", b"0.500000:0:ant", b"-1.000000:2:cat"]
  ]


BAD = [
  (b"", None, "no inference request"),
  (b"{", None, "no inference request"),
  (b"[]", None, "no inference request"),
  (b"\xff\xfe", None, "no inference request"),
  (b'{"inputs": ' + b"[" * 100_000, None, "no inference request"),
  (b"{}", None, "missing required field `inputs`"),
  (b"{}", "-1", "'-1'; a number of bytes"),
  (b"{}", "²", "'²'; a number of bytes"),
  (b"{}", "3", "3, but the body has 2 bytes"),
  (b"{}", "9" * 400, "a number of bytes"),
  (*body(tensor([0, 0, 0, 0]), raw=b"xy"), "2 bytes after the JSON part"),
  (*body(tensor()), "one of data and binary_data_size"),
  (*body(tensor([0] * 4, binary_data_size=0)), "one of data and binary_data_size"),
  (*body(tensor(binary_data_size=17), raw=b"\0" * 16), "binary_data_size 17, and 16 bytes"),
  (*body(tensor(binary_data_size=-1)), "binary_data_size -1"),
  (*body(tensor(binary_data_size=True)), "binary_data_size True"),
  (*body(tensor([0], datatype="FP31")), "datatype 'FP31'; BOOL"),
  (*body(tensor([0], shape=(-1, 2))), "up to 8 sides from 0 on"),
  (*body(tensor([0], shape=(2**40, 2**40))), "up to 8 sides"),
  (*body(tensor([0], shape=(2**70,))), "up to 8 sides"),
  (*body(tensor([0], shape=[1] * 100_000)), "up to 8 sides"),
]


@pytest.mark.parametrize(("content", "length", "text"), BAD)
def test_what_is_no_request(content, length, text):
  with pytest.raises(Refused) as refused:
    codec.read(content, length)
  assert refused.value.status == 400
  assert text in refused.value.text
  assert len(refused.value.text) < 300


WRONG = [
  (tensor([0] * 4, name="x"), "inputs: ['x']; 'input' of shape [-1, 2, 2], up to 2 examples"),
  (tensor([0] * 3), "data of shape [3], 3 values; shape [1, 2, 2] takes 4"),
  (tensor([[[0, 0], [0]]]), "data is not FP32 of shape [1, 2, 2]"),
  (tensor([[[0, 0, 0, 0]]]), "data of shape [1, 1, 4]"),
  (tensor([0] * 4, shape=(1, 4)), "shape [1, 4]; 'input' of shape [-1, 2, 2]"),
  (tensor([0] * 12, shape=(3, 2, 2)), "shape [3, 2, 2]"),
  (tensor([], shape=(0, 2, 2)), "shape [0, 2, 2]"),
  (tensor([0] * 4, shape=(2, 2)), "shape [2, 2]"),
  (tensor([0] * 4, datatype="INT64"), "datatype INT64; FP32, FP16"),
  (tensor([""] * 4, datatype="BYTES"), "datatype BYTES; FP32"),
  (tensor(["0"] * 4), "data is not FP32"),
  (tensor([True] * 4), "data is not FP32"),
  (tensor([None] * 4), "data is not FP32"),
  (tensor([0.5] * 4, datatype="UINT8"), "data is not UINT8"),
  (tensor([256] * 4, datatype="UINT8"), "data is not UINT8"),
  (tensor([1e39, 0, 0, 0]), "1 values are not finite as FP32"),
  (tensor([1e300, 0, 0, 0], datatype="FP64"), "1 values are not finite as FP32"),
  (tensor("x" * 2000), "data has more text than 4 values"),
]


@pytest.mark.parametrize(("entry", "text"), WRONG)
@pytest.mark.filterwarnings("ignore:overflow")
def test_what_the_model_does_not_take(entry, text):
  with pytest.raises(Refused) as refused:
    examples(codec.read(*body(entry)), MODEL, 2)
  assert refused.value.status == 400
  assert text in refused.value.text


def test_nan_is_refused_in_json_and_in_bytes():
  with pytest.raises(Refused, match="malformed"):
    codec.read(
      b'{"inputs": [{"name": "input", "shape": [1], "datatype": "FP32", "data": [NaN]}]}', None
    )
  raw = np.array([0, np.nan, np.inf, 0], np.float32).tobytes()
  with pytest.raises(Refused, match="2 values are not finite"):
    examples(codec.read(*body(tensor(binary_data_size=16), raw=raw)), MODEL, 2)


@pytest.mark.parametrize(
  "name", ["FP32", "FP16", "BF16", "FP64", "INT8", "UINT8", "INT16", "UINT16"]
)
def test_accepted_datatypes_are_converted(name):
  values = np.array([[[0, 1], [2, 100]]]).astype(tensors.DTYPES[name])
  entry = tensor(datatype=name, binary_data_size=values.nbytes)
  x = examples(codec.read(*body(entry, raw=values.tobytes())), MODEL, 2)
  assert x.dtype == np.float32
  assert x.tolist() == [[[0, 1], [2, 100]]]


def test_bfloat16_is_its_own_format():
  raw = np.array([1.5], ml_dtypes.bfloat16).tobytes()
  assert tensors.from_bytes("BF16", (1,), raw, "x")[0] == 1.5
  assert raw == b"\xc0\x3f"


def test_outputs_are_checked_before_the_model_runs():
  request = codec.read(*body(tensor([0] * 4), outputs=[{"name": "scores"}]))
  with pytest.raises(Refused, match="'scores' is not one of 'logits'"):
    codec.require_outputs(request, ("logits",))
  output = {"name": "logits", "parameters": {"classification": -1}}
  request = codec.read(*body(tensor([0] * 4), outputs=[output]))
  with pytest.raises(Refused, match="classification -1"):
    codec.require_outputs(request, ("logits",))
