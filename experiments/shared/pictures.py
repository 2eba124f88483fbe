"""The pictures of a FlexiQ run: accuracy over ratio, who goes 4-bit when, unused bits."""

from pathlib import Path

import numpy as np

from flexiq_jax import search
from flexiq_jax.quant import lowering
from flexiq_jax.runs import plots, tables
from flexiq_jax.runs.workdir import Workdir

_DISTANCE = {
  "l2": "squared logit error to the 8-bit model, mean per image",
  "kl": "divergence from the 8-bit model's prediction, mean per image (nats)",
}
_REFERENCES = {"float": "float", "uniform_int8": "INT8", "uniform_int4": "INT4"}


def draw(
  workdir: Path, title: str, rows, network, chosen, groups, distance: str
) -> list[tuple[str, Path]]:
  """Draws what there is data for.

  Args:
    workdir: folder of the run.
    title: model and dataset.
    rows: result rows.
    network: the float model.
    chosen: the model whose schedule is shown.
    groups: layer name -> `grouping.Groups`, or None without calibration.
    distance: name of the search's fitness.

  Returns:
    (caption, path) of each picture.
  """
  references = {_REFERENCES[r["method"]]: r["top1"] for r in rows if r["method"] in _REFERENCES}
  drawn = [
    (
      "Top-1 accuracy over the share of MACs in 4 bits",
      plots.accuracy_against_ratio(
        workdir / "accuracy.png", tables.curves(rows), title=title, references=references
      ),
    )
  ]
  names = [layer.name for layer in network.layers]
  ratios = np.linspace(0, 1, 101)
  share = np.full((len(names), len(ratios)), np.nan)
  for column, ratio in enumerate(ratios):
    for name, mask in chosen.schedule.masks(ratio).items():
      share[names.index(name), column] = mask.mean()
  drawn.append(
    (
      "Share of each layer's channel groups in 4 bits",
      plots.layer_map(workdir / "layers.png", names, ratios, share, title=title),
    )
  )
  steps = search.steps(Workdir(workdir))
  # Steps without a finite fitness are not logged: greedy's rows may be alone.
  if searched := [row for row in steps if row["method"] != "greedy"]:
    greedy = {row["ratio"]: row["best"] for row in steps if row["method"] == "greedy"}
    path = plots.search_progress(
      workdir / "search.png", searched, title=title, references=greedy, ylabel=_DISTANCE[distance]
    )
    drawn.append(("Search: best distance to the 8-bit model's output so far", path))
  if groups is not None:
    chosen_names = [name for name in names if name in groups]
    signed = [chosen.model[name].signed for name in chosen_names]
    counts = {
      "x": _unused([groups[name].x_top for name in chosen_names], signed),
      "w": _unused([groups[name].w_top for name in chosen_names], [True] * len(chosen_names)),
    }
    path = plots.unused_bits(
      workdir / "unused_bits.png", chosen_names, counts["x"], counts["w"], title=title
    )
    caption = (
      "Unused top bits of the 8-bit codes: activations by channel group, weights by channel group "
      "and output channel"
    )
    drawn.append((caption, path))
  return drawn


def _unused(tops: list[np.ndarray], signed: list[bool]) -> np.ndarray:
  """How many groups (of weights: pairs of group and output) leave 0, 1, 2, 3, 4 bits unused.

  Args:
    tops: largest magnitude codes of each layer.
    signed: whether a layer's codes are signed.

  Returns:
    int `[L, 5]`.
  """
  layer = np.repeat(np.arange(len(tops)), [top.size for top in tops])
  flat = np.concatenate([np.asarray(top).ravel() for top in tops])
  # All layers at once: every shape is a compilation of its own.
  bits = np.where(
    np.array(signed)[layer], *(np.asarray(lowering.unused_bits(flat, s)) for s in (True, False))
  )
  counts = np.zeros((len(tops), 5), int)
  np.add.at(counts, (layer, bits), 1)
  return counts
