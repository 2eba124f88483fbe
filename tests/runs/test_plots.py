"""The pictures show the numbers they were given and stay readable."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from flexiq_jax.runs import plots
from flexiq_jax.runs.plots import drawing, search


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


def steps(method, ratio, seed, forwards, best):
  """Rows of one search at one level; a pass over the images takes two seconds."""
  return [
    {"method": method, "ratio": ratio, "seed": seed, "forwards": x, "seconds": 2 * x, "best": y}
    for x, y in zip(forwards, best, strict=True)
  ]


def drawn(axes):
  """(colour, whether thick, points) of the lines of data, without horizontal lines."""
  lines = [line for line in axes.get_lines() if line.get_drawstyle() == "steps-post"]
  return [(line.get_color(), line.get_linewidth() > 1, line.get_xydata()) for line in lines]


SEARCHES = [
  *steps("evolution", 0.25, 0, [10, 20, 30], [8, 6, 4]),
  *steps("evolution", 0.25, 1, [15, 20, 25], [9, 4, 3]),
  *steps("surrogate", 0.3, 0, [40, 50], [7, 7]),
  *steps("evolution", 0.3, 0, [40, 50], [9, 5]),
]


def test_search_draws_seeds_and_their_mean_by_cost(tmp_path, figures):
  path = tmp_path / "search.png"
  assert plots.search_progress(path, SEARCHES, title="T", references={0.1 + 0.2: 9.5}) == path
  assert_is_picture(path)
  panels = figures[0].axes
  assert [axes.get_title("left") for axes in panels[:2]] == ["4-bit ratio 25 %", "4-bit ratio 30 %"]
  blue, red = plots.COLOURS[:2]
  for axes, scale in ((panels[0], 1), (panels[2], 2)):
    (c0, thick0, first), (c1, thick1, second), (c2, thick2, mean) = drawn(axes)
    assert (c0, c1, c2) == (blue,) * 3 and (thick0, thick1, thick2) == (False, False, True)
    np.testing.assert_allclose(first / (scale, 1), [[10, 8], [20, 6], [30, 4]])
    np.testing.assert_allclose(second / (scale, 1), [[15, 9], [20, 4], [25, 3]])
    np.testing.assert_allclose(mean / (scale, 1), [[15, 8.5], [20, 5], [25, 4.5], [30, 3.5]])
  for axes, scale in ((panels[1], 1), (panels[3], 2)):
    # One seed is its own mean; a method keeps its colour.
    found = {colour: points / (scale, 1) for colour, thick, points in drawn(axes) if thick}
    assert len(drawn(axes)) == 2
    np.testing.assert_allclose(found[blue], [[40, 9], [50, 5]])
    np.testing.assert_allclose(found[red], [[40, 7], [50, 7]])
  flat = [[line.get_ydata()[0] for line in a.get_lines() if line.get_ls() == "--"] for a in panels]
  assert flat == [[], [9.5], [], [9.5]]
  (legend,) = figures[0].legends
  texts = [text.get_text() for text in legend.get_texts()]
  assert texts == ["evolution", "surrogate", "greedy, no search"]
  handles = [line.get_color() for line in legend.get_lines()]
  assert handles == [blue, red, plots.GREY]
  title = figures[0].get_suptitle()
  assert "single seeds" in title and "earlier levels included" in title


def test_search_of_all_levels_at_once_is_one_column(tmp_path, figures):
  rows = steps("evolution", None, 0, [10, 20], [8, 6]) + steps("other", None, 1, [10, 20], [8, 7])
  plots.search_progress(
    tmp_path / "s.png", rows, title="T", references={None: 8, 0.25: 1}, ylabel="error"
  )
  upper, lower = figures[0].axes
  assert upper.get_title("left") == "all levels at once"
  assert (upper.get_xlabel(), lower.get_xlabel()) == (
    "forward passes over the search images",
    "seconds",
  )
  assert figures[0].get_supylabel() == "error"
  assert [line.get_ydata()[0] for line in upper.get_lines() if line.get_ls() == "--"] == [8]
  # One seed of each method: nothing is averaged.
  assert figures[0].get_suptitle() == "T"
  assert len(drawn(upper)) == 2


@pytest.mark.parametrize(
  ("forwards", "best", "reference", "scales"),
  [
    ([1, 99], [9, 1], 9, ("linear", "linear")),
    ([1, 100], [9, 1], 9, ("log", "linear")),
    ([1, 99], [10, 1], 9, ("linear", "log")),
    ([1, 99], [9, 1], 20, ("linear", "log")),
    ([0, 100], [10, 0], 9, ("linear", "linear")),
    ([0, 100], [10, -1], 9, ("linear", "linear")),
  ],
)
def test_search_is_logarithmic_where_values_span_decades(
  tmp_path, figures, forwards, best, reference, scales
):
  rows = steps("evolution", 0.5, 0, forwards, best)
  plots.search_progress(tmp_path / "s.png", rows, title="T", references={0.5: reference})
  for axes in figures[0].axes:
    assert (axes.get_xscale(), axes.get_yscale()) == scales


@pytest.mark.parametrize("fitness", [1e-6, 1, 1e4])
@pytest.mark.parametrize("cost", [0.01, 1, 100])
def test_search_is_readable(tmp_path, figures, fitness, cost):
  """Real figures: progressive levels, long names, costs over decades."""
  rows = []
  for i, level in enumerate((0.25, 0.5, 0.75)):
    x = cost * (8400 * i + 28 * np.arange(1, 300))
    y = fitness * 0.004 * 7**i * (1 + np.exp(-x / x[40]))
    rows += steps("flexiq_evolution_with_a_long_name", level, 0, x, y)
    rows += steps("quadratic_surrogate_with_a_long_name", level, 0, cost * np.r_[900, 950], y[:2])
  plots.search_progress(tmp_path / "s.png", rows, title="T")
  (figure,) = figures
  figure.draw_without_rendering()  # saving moved everything into a tight frame
  width, height = figure.canvas.get_width_height()
  texts = [figure._suptitle, figure._supylabel, *figure.legends[0].get_texts()]
  for axes in figure.axes:
    texts += [axes.xaxis.label, axes.yaxis.get_offset_text(), axes._left_title]
    for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
      ticks = zip(axis.get_ticklabels(), axis.get_majorticklocs(), strict=True)
      inside = [label for label, at in ticks if low <= at <= high]
      assert len(inside) >= 2
      texts += inside
  texts = [text for text in texts if text.get_text()]
  assert_apart(texts, figure)
  boxes = [Text.get_window_extent(text) for text in texts]
  # savefig makes room for tick labels that stand out a little.
  assert min(box.x0 for box in boxes) >= 0 and max(box.x1 for box in boxes) <= width + 20
  assert min(box.y0 for box in boxes) >= 0 and max(box.y1 for box in boxes) <= height


def test_search_of_many_methods_has_a_legend_as_wide_as_the_picture(tmp_path, figures):
  names = [f"a_method_with_a_rather_long_name_{i}" for i in range(5)]
  rows = [row for name in names for row in steps(name, 0.5, 0, [1, 2], [2, 1])]
  plots.search_progress(tmp_path / "s.png", rows, title="T", references={0.25: 1.0})
  (figure,) = figures
  figure.draw_without_rendering()
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == names  # no line for an absent level
  box = legend.get_window_extent()
  assert box.x0 >= 0 and box.x1 <= figure.canvas.get_width_height()[0]
  assert_apart(legend.get_texts(), figure)


def test_search_refuses(tmp_path):
  with pytest.raises(ValueError, match="rows is empty"):
    plots.search_progress(tmp_path / "s.png", [], title="T")
  assert not (tmp_path / "s.png").exists()


_CURVES = st.lists(
  st.dictionaries(st.integers(0, 9), st.integers(-9, 9), min_size=1), min_size=1, max_size=3
)


@given(_CURVES)
def test_mean_of_step_functions(curves):
  arrays = [np.array(sorted(curve.items()), float).T for curve in curves]
  places, mean = search._mean([(x, y) for x, y in arrays])
  begin = max(min(curve) for curve in curves)
  assert list(places) == sorted({x for curve in curves for x in curve if x >= begin})
  for place, value in zip(places, mean, strict=True):
    last = [curve[max(x for x in curve if x <= place)] for curve in curves]
    np.testing.assert_allclose(value, np.mean(last))


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
