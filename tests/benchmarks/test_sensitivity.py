"""The benchmark of sensitivities: its two ways agree, and what it counts."""

import json

import numpy as np
import pytest

from benchmarks import sensitivity


@pytest.fixture(scope="module")
def tiny():
  return sensitivity.random("resnet20", 8, (2, 8), depths=(1, 1), width=8, input_size=8)


def test_ways_agree_and_the_result_is_json(tiny, tmp_path):
  lines = []
  document = sensitivity.measure(tiny, rounds=2, sample=5, say=lines.append)
  layers = len(tiny.names)
  assert (document["layers"], document["singles"], document["sampled"]) == (layers, 2 * layers, 5)
  assert document["pairs"] == 4 * layers * (layers - 1) // 2
  assert document["forwards"]["ordinary"] == 1 + document["singles"] + document["pairs"]
  assert document["forwards"]["sensitivity"] < document["forwards"]["ordinary"]
  assert [len(times) for times in document["seconds"].values()] == [2, 2]
  one, other = document["seconds"].values()
  ratios = [b / a for a, b in zip(one, other, strict=True)]
  assert document["ratio"]["min"] == pytest.approx(min(ratios))
  assert len(lines) == 4  # the cost, then the rounds
  assert "pairs/s" in sensitivity.line(document)
  json.dumps(document, allow_nan=False)


def test_ways_that_differ_are_refused(tiny, monkeypatch):
  right = sensitivity.ordinary(tiny)
  monkeypatch.setattr(sensitivity, "ordinary", lambda loaded: lambda k: right(np.zeros_like(k)))
  with pytest.raises(RuntimeError, match="losses differ"):
    sensitivity.measure(tiny, rounds=1, sample=3, say=lambda line: None)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--bits", "2,four"], "--bits: '2,four'"),
    (["--rounds", "0"], "--rounds: 0; at least 1"),
    (["--sample", "0"], "--sample: 0; at least 1"),
  ],
)
def test_wrong_arguments_are_named(arguments, message, capsys):
  with pytest.raises(SystemExit) as ended:
    sensitivity.parse(arguments)
  assert ended.value.code == 2
  assert message in capsys.readouterr().err
