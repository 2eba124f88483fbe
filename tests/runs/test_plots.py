"""The pictures show the numbers they were given and stay readable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgba
from matplotlib.text import Text
from PIL import Image

from experiments import ablation
from experiments.curve import VARIANTS
from flexiq_jax.methods import METHODS
from flexiq_jax.runs import plots
from flexiq_jax.runs.plots import drawing


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
  assert path.with_suffix(".pdf").read_bytes().startswith(b"%PDF")


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
  assert (
    plots.accuracy_against_ratio(
      path, CURVES, references=references, title="T", error=("INT8", 0.25)
    )
    == path
  )
  assert_is_picture(path)
  (axes,) = figures[0].axes
  lines = [line.get_xydata() for line in axes.get_lines()]
  np.testing.assert_allclose([line[0, 1] for line in lines[:3]], [91.5, 91.4, 88.9])
  np.testing.assert_allclose(lines[3], [[0, 91.4], [50, 91.3], [100, 88.9]])
  np.testing.assert_allclose(lines[4], [[0, 91.4], [50, 90.5], [100, 88.9]])
  (band,) = axes.collections
  middle = [y for x, y in band.get_paths()[0].vertices if x == 50]
  assert (min(middle), max(middle)) == (90.0, 91.0)
  (grey,) = axes.patches
  assert (grey.get_y(), grey.get_height()) == pytest.approx((91.15, 0.5))
  # No line of a label can be taken for data: they are faint and as short as the margin.
  assert {text.get_text() for text in axes.texts} == {"float 91.50", "INT8 91.40", "INT4 88.90"}
  assert {text.arrow_patch.get_edgecolor() for text in axes.texts} == {to_rgba(drawing.FAINT)}
  assert all(text.xy[0] == axes.get_xlim()[1] for text in axes.texts)
  assert_apart(axes.texts, figures[0])
  names = [text.get_text() for text in figures[0].legends[0].get_texts()]
  assert names == ["INT8 ± 1 standard error", "FlexiQ, greedy order", "random order"]
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


def steps(method, ratio, seed, forwards, best):
  """Rows of one search at one level; a pass over the images takes two seconds."""
  return [
    {"method": method, "ratio": ratio, "seed": seed, "forwards": x, "seconds": 2 * x, "best": y}
    for x, y in zip(forwards, best, strict=True)
  ]


SEARCHES = [
  *steps("evolution", 0.25, 0, [10, 20, 30], [8, 6, 4]),
  *steps("evolution", 0.25, 1, [15, 20, 25], [9, 4, 3]),
  *steps("gram", 0.3, 0, [40, 50], [7, 7]),
  *steps("evolution", 0.3, 0, [40, 50], [9, 5]),
]


def test_search_draws_what_each_level_reached(tmp_path, figures):
  path = tmp_path / "search.png"
  given = {0.1 + 0.2: 10.0, 0.9: 1.0}  # a level that was not searched is not drawn
  assert plots.search_result(path, SEARCHES, title="T", references=given, ylabel="error") == path
  assert_is_picture(path)
  (axes,) = figures[0].axes
  assert [label.get_text() for label in axes.get_xticklabels()] == ["25 %", "30 %"]
  looks = plots.looks(("greedy", "evolution", "gram"))
  colours = {to_rgba(look.colour): name for name, look in looks.items()}
  bars = [(colours[b.get_facecolor()], round(b.get_x()), b.get_height()) for b in axes.patches]
  assert bars == [("greedy", 1, 10), ("evolution", 0, 3.5), ("evolution", 1, 5), ("gram", 1, 7)]
  assert [text.get_text() for text in axes.texts] == ["10", "3.5", "5\n-50 %", "7\n-30 %"]
  (points,) = axes.get_lines()
  assert list(points.get_ydata()) == [4, 3]
  assert [text.get_text() for text in figures[0].legends[0].get_texts()] == [
    "FlexiQ, greedy order",
    "FlexiQ, evolutionary search: 38 forward passes, 75 s",
    "FlexiQ, Gram search: 50 forward passes, 100 s",
  ]
  assert axes.get_ylabel() == "error"
  assert axes.get_title("left") == "T\nbars: mean over seeds; points: single seeds"


def test_search_of_all_levels_at_once_is_one_column(tmp_path, figures):
  rows = steps("evolution", None, 0, [10, 20], [8, 6])
  plots.search_result(tmp_path / "s.png", rows, title="T", references={None: 8, 0.25: 1})
  (axes,) = figures[0].axes
  assert [label.get_text() for label in axes.get_xticklabels()] == ["all levels at once"]
  assert [bar.get_height() for bar in axes.patches] == [8, 6]
  assert axes.get_title("left") == "T"


@pytest.mark.parametrize("fitness", [1e-6, 1, 1e6])
def test_search_is_readable(tmp_path, figures, fitness):
  """Three levels, two searches, values over decades."""
  rows, greedy = [], {}
  for i, level in enumerate((0.25, 0.5, 0.75)):
    greedy[level] = fitness * 0.0123 * 7**i
    for method in ("evolution", "gram"):
      rows += steps(method, level, 0, [1e4 * i], [0.8765 * greedy[level]])
  plots.search_result(tmp_path / "s.png", rows, title="T", references=greedy)
  (figure,) = figures
  figure.draw_without_rendering()  # saving moved everything into a tight frame
  (axes,) = figure.axes
  assert_apart([*axes.texts, axes._left_title, axes.xaxis.label], figure)


def test_search_refuses(tmp_path):
  with pytest.raises(ValueError, match="rows is empty"):
    plots.search_result(tmp_path / "s.png", [], title="T")
  assert not (tmp_path / "s.png").exists()


@pytest.mark.parametrize(
  "methods",
  [
    [f"flexiq_{name}" for name in ("gram", "greedy", "evolution", "random", "gram_dynamic")]
    + [f"flexiq_greedy_{variant}" for variant in VARIANTS if variant != "dynamic"],
    ablation.METHODS,
    [*METHODS, "package.module:Class"],
    [f"method {i}" for i in range(30)],
  ],
)
def test_methods_of_a_picture_look_different(methods):
  looks = plots.looks(methods)
  assert list(looks) == list(methods)
  pairs = {(look.colour, look.marker) for look in looks.values()}
  assert len(pairs) == len(looks) == len({look.name for look in looks.values()})
  if len(methods) < 12:
    assert len({look.colour for look in looks.values()}) == len(looks)
    assert len({look.marker for look in looks.values()}) == len(looks)


def test_a_method_looks_the_same_in_every_picture():
  for name in ("gram", "greedy", "evolution"):
    alone = plots.looks([name])[name]
    assert plots.looks(["x", f"flexiq_{name}", "uniform"])[f"flexiq_{name}"] == alone


def test_pictures_do_not_depend_on_the_time(tmp_path):
  first, second = (
    plots.accuracy_against_ratio(tmp_path / name, CURVES, title="T") for name in ("1.png", "2.png")
  )
  assert first.read_bytes() == second.read_bytes()
  assert first.with_suffix(".pdf").read_bytes() == second.with_suffix(".pdf").read_bytes()


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
