"""The pictures of a FlexiQ run: accuracy over ratio, who goes 4-bit when, unused bits."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from flexiq_jax import search
from flexiq_jax.quant import lowering
from flexiq_jax.runs import plots, tables
from flexiq_jax.runs.workdir import Workdir

_DISTANCE = {
  "l2": "squared logit error to the 8-bit model, mean per image",
  "kl": "divergence from the 8-bit model's prediction, mean per image (nats)",
}
# Fixed models of the experiments: method -> what they are called.
REFERENCES = {
  **{"float": "float", "uniform_int8": "INT8", "int8": "INT8", "uniform_int4": "INT4"},
  **{f"uniform_int4_{done}": f"INT4, {done}" for done in ("distilled", "finetuned")},
}


def accuracy(
  path: Path, title: str, rows, references: Mapping[str, Mapping[str, Any]]
) -> tuple[str, Path]:
  """Draws top-1 over the ratio; (caption, path).

  Args:
    path: PNG file.
    title: model, dataset and number of images.
    rows: result rows.
    references: name -> row of the fixed models.
  """
  caption, error = "Top-1 accuracy over the share of MACs in 4 bits", None
  row = references.get("INT8", {})
  if count := row.get("images"):
    share = row["top1"] / 100
    error = ("INT8", 100 * math.sqrt(share * (1 - share) / count))
    caption += (
      f". Grey band: INT8 ± one binomial standard error ({error[1]:.2f} points) of {count:,.0f} "
      "independent images; methods see the same images, so that differences between them are surer "
      "than the band"
    )
  drawn = plots.accuracy_against_ratio(
    path,
    tables.curves(rows),
    title=title,
    references={name: row["top1"] for name, row in references.items()},
    error=error,
  )
  return caption, drawn


def _completed(rows) -> list[dict[str, Any]]:
  """Rows, with those of the ends that are equal by construction and were evaluated once only.

  At 0 every method is the 8-bit model, and at 1 a random order is the same model as the others.
  """
  first = next((r["method"] for r in rows if r["ratio"] is not None), None)
  found = {(r["method"], r["ratio"]): r for r in rows if r["ratio"] is not None}
  added = []
  for method, seed in dict.fromkeys((r["method"], r["seed"]) for r in found.values()):
    ends = (0.0, 1.0) if method == "flexiq_random" else (0.0,)
    for ratio in ends:
      if (first, ratio) in found and (method, ratio) not in found:
        added.append({**found[first, ratio], "method": method, "seed": seed})
  return [*rows, *added]


def draw(
  workdir: Path,
  title: str,
  rows,
  network,
  chosen,
  groups,
  *,
  distance: str,
  images: int,
  search_images: int,
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
    images: how many evaluation images rows are measured on.
    search_images: how many training images a search measures on.

  Returns:
    (caption, path) of each picture.
  """
  references = {REFERENCES[r["method"]]: r for r in rows if r["method"] in REFERENCES}
  heading = f"{title}, {images:,} images"
  drawn = [accuracy(workdir / "accuracy.png", heading, _completed(rows), references)]
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
    of = f"{search_images:,} training images"
    path = plots.search_result(
      workdir / "search.png",
      searched,
      title=f"{title}, search on {of}",
      references=greedy,
      ylabel=_DISTANCE[distance],
    )
    caption = (
      f"Distance to the 8-bit model's output that the search reached on its {of}, lower is better; "
      f"accuracy is measured on {images:,} other images"
    )
    drawn.append((caption, path))
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
    drawn.append((_unused_caption(counts["x"], counts["w"]), path))
  return drawn


def _unused_caption(activations: np.ndarray, weights: np.ndarray) -> str:
  """What the picture shows, and what it means for the paper's observation.

  Args:
    activations: int `[L, 5]`, groups with 0, 1, 2, 3, 4 bits unused.
    weights: the same.
  """
  none = [counts[:, 0].sum() / max(counts.sum(), 1) for counts in (activations, weights)]
  if min(none) > 0.5:
    here = "Here they are the minority: in 4 bits most groups lose low bits"
  elif max(none) > 0.5:
    here = "Here that holds for one of the two"
  else:
    here = "Here most do"
  return (
    "Unused top bits of the 8-bit codes: activations by channel group, weights by channel group "
    f"and output channel. FlexiQ rests on groups that leave top bits unused. {here}. No bit is "
    f"unused in {tables.percent(none[0])} of the former and {tables.percent(none[1])} of the latter"
  )


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
