"""The pictures show the numbers they were given and stay readable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from flexiq_jax import plots
from flexiq_jax.plots import drawing


@pytest.fixture
def figures(monkeypatch):
  """The figures that were saved, laid out, to look into."""
  saved, save = [], drawing.save

  def keep(figure, path):
    result = save(figure, path)
    saved.append(figure)
    return result

  monkeypatch.setattr(drawing, "save", keep)
  return saved


def assert_is_picture(path):
  with Image.open(path) as image:
    assert image.format == "PNG"
    assert min(image.size) > 300
    assert len(image.convert("RGB").getcolors(1 << 20)) > 20


def assert_apart(texts, figure):
  """No two texts overlap."""
  # Not the method of an annotation, which counts the line to its point as well.
  renderer = figure.canvas.get_renderer()
  boxes = [Text.get_window_extent(text, renderer) for text in texts]
  for i, box in enumerate(boxes):
    assert not any(box.overlaps(other) for other in boxes[i + 1 :]), texts[i].get_text()


CURVES = {
  "flexiq_greedy": (np.array([1.0, 0.0, 0.5]), np.array([88.9, 91.4, 91.3])),
  "flexiq_random": (
    np.array([0.0, 0.5, 1.0]),
    np.array([[91.4, 90.0, 88.9], [91.4, np.nan, 88.9], [91.4, 91.0, 88.9]]),
  ),
}


def test_accuracy_draws_means_and_references(tmp_path, figures):
  path = tmp_path / "accuracy.png"
  references = {"float": 91.5, "INT8": 91.4, "INT4": 88.9}
  assert plots.accuracy_against_ratio(path, CURVES, references=references, title="T") == path
  assert_is_picture(path)
  (axes,) = figures[0].axes
  lines = [line.get_xydata() for line in axes.get_lines()]
  np.testing.assert_allclose([line[0, 1] for line in lines[:3]], [91.5, 91.4, 88.9])
  np.testing.assert_allclose(lines[3], [[0, 91.4], [50, 91.3], [100, 88.9]])
  np.testing.assert_allclose(lines[4], [[0, 91.4], [50, 90.5], [100, 88.9]])
  (band,) = axes.collections
  middle = [y for x, y in band.get_paths()[0].vertices if x == 50]
  assert (min(middle), max(middle)) == (90.0, 91.0)
  labels = {text.get_text() for text in axes.texts}
  assert labels == {"float 91.50", "INT8 91.40", "INT4 88.90", *CURVES}
  assert_apart(axes.texts, figures[0])
  assert "lowest to highest seed" in axes.get_title("left")


def test_accuracy_of_one_seed_has_no_band(tmp_path, figures):
  curves = {"flexiq_greedy": CURVES["flexiq_greedy"]}
  plots.accuracy_against_ratio(tmp_path / "a.png", curves, title="T")
  assert len(figures[0].axes[0].collections) == 0
  assert figures[0].axes[0].get_title("left") == "T"


@pytest.mark.parametrize(
  ("curves", "message"),
  [
    ({}, "both empty"),
    ({"m": (np.zeros(2), np.zeros(3))}, r"curves\['m'\] has ratios \(2,\) and values \(1, 3\)"),
    ({"m": (np.zeros(2), np.full(2, np.nan))}, r"curves\['m'\]"),
  ],
)
def test_accuracy_refuses(tmp_path, curves, message):
  with pytest.raises(ValueError, match=message):
    plots.accuracy_against_ratio(tmp_path / "a.png", curves, title="T")


@pytest.mark.parametrize("rows", [20, 75])
def test_layer_map_is_readable(tmp_path, figures, rows):
  ratios = np.linspace(0, 1, 101)
  share = np.minimum(1, ratios * np.linspace(1, 2, rows)[:, None])
  share[0] = np.nan
  names = [f"blocks/{i}/mlp/fc1" for i in range(rows)]
  path = plots.layer_map(tmp_path / "map.png", names, ratios, share, title="T")
  assert_is_picture(path)
  fine, table = figures[0].axes[:2]
  texts = [text.get_text() for text in table.texts]
  assert texts[:5] == ["8-bit", *(f"{100 * share[1, i]:.0f}" for i in (25, 50, 75, 100))]
  assert len(texts) == 1 + 4 * (rows - 1)
  assert [label.get_text() for label in fine.get_yticklabels()] == names
  assert_apart(fine.get_yticklabels(), figures[0])
  assert_apart(table.texts, figures[0])
  np.testing.assert_array_equal(fine.collections[0].get_array()[1:], share[1:])
  # The first layer is the uppermost.
  assert fine.get_ylim()[0] > fine.get_ylim()[1]
  assert min(text.get_fontsize() for text in table.texts) >= 7


def test_layer_map_refuses(tmp_path):
  with pytest.raises(ValueError, match=r"share has shape \(2, 3\): expected \(1, 3\)"):
    plots.layer_map(tmp_path / "m.png", ["a"], np.arange(3) / 2, np.zeros((2, 3)), title="T")
  with pytest.raises(ValueError, match="ascending"):
    plots.layer_map(tmp_path / "m.png", ["a"], np.zeros(3), np.zeros((1, 3)), title="T")


@pytest.mark.parametrize("rows", [20, 75])
def test_unused_bits_are_shares(tmp_path, figures, rows):
  rng = np.random.default_rng(0)
  activations, weights = rng.integers(0, 9, (2, rows, 5)).astype(float)
  activations[:, 0], weights[:, 0] = 1, 1
  activations[1] = np.nan
  names = [f"blocks/{i}/mlp/fc1" for i in range(rows)]
  path = plots.unused_bits(tmp_path / "u.png", names, activations, weights, title="T")
  assert_is_picture(path)
  for axes, counts in zip(figures[0].axes, (activations, weights), strict=True):
    widths = np.array([bar.get_width() for bar in axes.patches]).reshape(5, rows).T
    starts = np.array([bar.get_x() for bar in axes.patches]).reshape(5, rows).T
    expected = 100 * counts / counts.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(widths, np.nan_to_num(expected), atol=1e-9)
    np.testing.assert_allclose(starts[:, 1:], (starts + widths)[:, :-1], atol=1e-9)
  left, right = figures[0].axes
  assert [text.get_text() for text in left.texts] == ["no data"] and not right.texts
  assert_apart(left.get_yticklabels(), figures[0])
  (legend,) = figures[0].legends
  labels = [text.get_text() for text in legend.get_texts()]
  assert labels == ["0", "1", "2", "3", "4 and more"]


def test_unused_bits_refuses(tmp_path):
  with pytest.raises(ValueError, match=r"weights has shape \(1, 4\): expected \(1, 5\)"):
    plots.unused_bits(tmp_path / "u.png", ["a"], np.ones((1, 5)), np.ones((1, 4)), title="T")


def test_pictures_do_not_depend_on_the_time(tmp_path):
  first = plots.accuracy_against_ratio(tmp_path / "1.png", CURVES, title="T").read_bytes()
  assert plots.accuracy_against_ratio(tmp_path / "2.png", CURVES, title="T").read_bytes() == first


@given(st.lists(st.floats(0, 100), min_size=1, max_size=12).map(sorted))
def test_spread_keeps_labels_apart_and_inside(values):
  places = plots.spread(values, 5, 0, 100)
  assert (np.diff(places) >= 5 - 1e-9).all()
  assert places[0] >= -1e-9 and places[-1] <= 100 + 1e-9


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_spread_moves_nothing_without_need(steps):
  values = list(np.cumsum(np.array(steps) + 5))
  np.testing.assert_allclose(plots.spread(values, 5, 0, 100), values)


def test_spread_of_too_many_goes_beyond_the_top():
  assert plots.spread([1.0, 1.0, 1.0], 5, 0, 6) == [0, 5, 10]
