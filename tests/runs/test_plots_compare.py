"""The pictures of layer-wise methods show the numbers they were given."""

import numpy as np
import pytest
from PIL import Image

from flexiq_jax.runs import plots
from flexiq_jax.runs.plots import drawing


@pytest.fixture
def figures(monkeypatch):
  """The figures that were saved, to look into."""
  saved, save = [], drawing.save

  def keep(figure, path):
    saved.append(figure)
    return save(figure, path)

  monkeypatch.setattr(drawing, "save", keep)
  return saved


def test_accuracy_against_budget(tmp_path, figures):
  budgets, falling = np.array([4.0, 5.0]), np.array([5.0, 4.0])
  curves = {f"method {i}": (budgets, np.array([[80.0 + i, 85.0]])) for i in range(9)}
  curves["several"] = (falling, np.array([[90.0, 70.0], [np.nan, 74.0]]))
  path = plots.accuracy_against_budget(
    tmp_path / "a.png", curves, title="T", xlabel="average bits", references={"float": 91.0}
  )
  with Image.open(path) as image:
    assert min(image.size) > 300
  (axes,) = figures[0].axes
  lines = {c.get_label(): c.lines[0] for c in axes.containers}
  np.testing.assert_array_equal(lines["several"].get_xydata(), [[4.0, 72.0], [5.0, 90.0]])
  assert len({(x.get_color(), x.get_marker()) for x in lines.values()}) == 10
  texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
  assert "float 91.00" in texts


def test_cross_layer_matrix(tmp_path, figures):
  g = np.array([[4.0, -9.0], [-9.0, 0.0]]).repeat(2, 0).repeat(2, 1)
  plots.cross_layer_matrix(tmp_path / "g.png", ("a", "b"), (4, 8), g, title="T")
  axes = figures[0].axes[0]
  np.testing.assert_allclose(np.asarray(axes.images[0].get_array())[::2, ::2], [[2, -3], [-3, 0]])
  assert axes.images[0].get_clim() == (-3, 3)
  assert [t.get_text() for t in axes.get_yticklabels()] == ["a", "b"]


def test_bits_over_budgets(tmp_path, figures):
  bits = np.array([[2.0, 8.0], [4.0, np.nan], [4.0, 8.0]])
  plots.bits_over_budgets(
    tmp_path / "b.png", "abc", ("4", "5"), {"clado": bits, "hawq": bits}, title="T", xlabel="budget"
  )
  left, right = figures[0].axes
  assert [axes.get_title("left") for axes in (left, right)] == ["CLADO", "HAWQ-v3"]
  assert [t.get_text() for t in left.texts] == ["2", "8", "4", "4", "8"]
  assert figures[0].get_supxlabel() == "budget"


@pytest.mark.parametrize(
  ("draw", "message"),
  [
    (lambda p: plots.accuracy_against_budget(p, {}, title="", xlabel=""), "curves: empty"),
    (
      lambda p: plots.accuracy_against_budget(
        p, {"m": (np.arange(2.0), np.ones((1, 3)))}, title="", xlabel=""
      ),
      r"curves\['m'\]: budgets \(2,\), values \(1, 3\)",
    ),
    (
      lambda p: plots.cross_layer_matrix(p, ("a",), (4, 8), np.ones((3, 3)), title=""),
      r"g has shape \(3, 3\): expected \(2, 2\)",
    ),
    (lambda p: plots.bits_over_budgets(p, "ab", ("4",), {}, title="", xlabel=""), "plans: empty"),
    (
      lambda p: plots.bits_over_budgets(
        p, "ab", ("4",), {"m": np.ones((1, 1))}, title="", xlabel=""
      ),
      r"plans\['m'\] has shape \(1, 1\): expected \(2, 1\)",
    ),
  ],
)
def test_wrong_shapes(tmp_path, draw, message):
  with pytest.raises(ValueError, match=message):
    draw(tmp_path / "x.png")
