"""The tables and pictures of a comparison, from what its workdir holds."""

from pathlib import Path
from typing import Any

import numpy as np

from experiments.comparison import sections
from experiments.comparison.sections import Section
from experiments.shared import reporting, setup
from flexiq_jax.methods import fusion, quantune_plan
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.runs import files, plots, report, tables
from flexiq_jax.runs.progress import duration
from flexiq_jax.runs.workdir import Workdir

_CLADO = ("clado", "clado_block", "clado_diagonal")
_COLUMNS = (  # column, heading, decimals
  ("avg_bits", "average bits", 2),
  ("top1", "top-1 (%)", 2),
  ("drop_float", "drop from float", 2),
  ("relative", "relative (%)", 2),
  ("bitops", "BitOPs (G)", 2),
  ("size", "size (MB)", 3),
  ("seconds", "selection (s)", 0),
  ("forwards", "forwards", 0),
)

_FORMS = ("form", "budget", "nodes", "boundaries", "predicted error", "with penalty", "chosen")


def quantune_lists(planner, budgets) -> dict[str, Any]:
  """QuantuneV2's sensitivity lists and plans, plain values for a JSON file.

  Args:
    planner: `bit_plans.Planner` of a section with two widths.
    budgets: of the section.
  """
  runs, names, pair = planner.runs(), planner.names, planner.quantune_pair
  lists, plans = {}, []
  for grouping in fusion.GROUPINGS:
    listed = quantune_plan.sensitivity(runs, grouping, names)
    lists[grouping] = [
      {
        "node": node.name,
        "operations": [runs.operations[i].kind for i in node.operations],
        "sqnr": listed.sqnr[v],
        "delta": listed.delta[v],
        "nmse": listed.nmse[v],
        "score": listed.score.get(node.layer or ""),
      }
      for v, node in enumerate(listed.nodes)
    ]
  for budget in budgets:
    for rank, plan in enumerate(planner.quantune_forms(budget)):
      plans.append(
        {
          "budget": budget,
          "grouping": plan.grouping,
          "chosen": rank == 0,
          "nodes": len(plan.node_bits),
          "boundaries": plan.boundaries,
          "error": plan.error,
          "value": plan.value,
          "node_bits": plan.node_bits,
        }
      )
  return files.to_plain({"pair": pair, "lists": lists, "plans": plans})


def write(config, inputs: setup.Inputs, workdir: Workdir, command: str, seconds: float) -> Path:
  """Draws the pictures and writes `report.md`; returns its path."""
  rows, chosen = workdir.rows(), sections.of(config)
  title = f"Comparison, {reporting.title(config).removeprefix('FlexiQ: ')}"
  parts, pictures, notes = [], [], []
  for section in chosen:
    own = _rows(rows, section)
    parts.append((f"{section.name}: {section.title}", _table(own, section)))
    pictures += _pictures(config, inputs, workdir.path, title, rows, own, section)
    if text := _differences(config, workdir.path, section):
      parts.append((f"{section.name}: differences", text))
    notes += _checks(config, workdir.path, section)
  for section in chosen:
    if text := _quantune(config, workdir.path, rows, section):
      front = "" if section.name == "main" else f"{section.name}: "
      parts.append((f"{front}QuantuneV2", text))
  return report.write(
    workdir.path,
    title=title,
    summary={
      "model": config.model,
      "evaluation images": setup.evaluation_count(config, inputs),
      "calibration images": config.calibration.images,
      "sensitivity images": config.comparison.images or config.calibration.images,
      "seeds": len(config.comparison.seeds),
      "wall time": duration(seconds),
    },
    rows=[row for row in rows if row["method"] == "float"],
    layers=reporting.layer_rows(inputs.layers, inputs.groups),
    plots=pictures,
    notes=[
      "Mean ± standard deviation over seeds. Average bits are the MAC-weighted mean over the "
      "layers that may be lowered, where floating point counts as 32 bits. An asterisk: more than "
      "0.05 away from the budget (5 points of a share in 8 bits), because single layers are larger "
      "than that, or the method sees no gain in more bits.",
      "Forwards: passes over the calibration images that a selection took; calibration itself, "
      "which all methods share, is not counted. CLADO's variants share one measurement, of pairs.",
      *(
        ["Weights are random: the figures show that the pipeline runs, no accuracy."]
        if config.weights == "random"
        else []
      ),
      *notes,
    ],
    command=command,
    sections=parts,
  )


def _rows(rows, section: Section) -> list[dict[str, Any]]:
  """The rows of a section, under the plain names of methods."""
  return [
    {**row, "method": row["method"].rpartition("/")[2]}
    for row in rows
    if row.get("section") == section.name
  ]


def _table(rows, section: Section) -> str:
  joined = tables.aggregate(rows)
  joined.sort(key=lambda row: section.budget(row["ratio"]))  # stable: methods keep their order
  budget_name = "budget" if section.unit == "average bits" else section.unit
  header = ["method", budget_name, *(c[1] for c in _COLUMNS)]
  cells = []
  for row in joined:
    budget = _shown(section, section.budget(row["ratio"]))
    star = " *" if row.get("missed") else ""
    cells.append(
      [
        row["method"],
        budget + star,
        *(tables.mean_spread(row.get(n), row.get(f"{n}_spread"), d) for n, _, d in _COLUMNS),
      ]
    )
  return tables.markdown_table(header, cells)


def _shown(section: Section, budget: float) -> str:
  """A budget as text."""
  return f"{budget:g}" if section.unit == "average bits" else tables.percent(budget, 1)


def _pictures(config, inputs, workdir: Path, title: str, rows, own, section: Section):
  """(caption, path) of a section's pictures."""
  if not own:
    return []
  heading = f"{title}\n{section.title}"
  xlabel, factor = {
    "average bits": ("average bits", 1),
    "size": ("size (% of 8-bit weights)", 100),
    "share in 8 bits": ("MACs in 8 bits (%)", 100),
  }[section.unit]
  curves = {
    method: (np.array([section.budget(r) for r in ratios]) * factor, top1)
    for method, (ratios, top1) in tables.curves(own).items()
  }
  references = {r["method"]: r["top1"] for r in rows if r["method"] == "float"}
  path = plots.accuracy_against_budget(
    workdir / f"{section.name}.png", curves, title=heading, xlabel=xlabel, references=references
  )
  drawn = [(f"Top-1 over the budget, {section.title}", path)]
  folder = workdir / f"seed{config.comparison.seeds[0]}" / section.name
  plans = files.read_json(folder / "plans.json") if (folder / "plans.json").is_file() else {}
  names = [layer.name for layer in inputs.layers if layer.name in inputs.selectable]
  if plans:
    labels = [f"{budget:g}" for budget in section.budgets]
    bits = {
      method: np.array([[of.get(b, {}).get(name, np.nan) for b in labels] for name in names])
      for method, of in plans.items()
    }
    path = plots.bits_over_budgets(
      workdir / f"{section.name}_bits.png", names, labels, bits, title=heading
    )
    drawn.append((f"Bits of each layer over the budget, first seed, {section.title}", path))
  if (folder / "clado.npz").is_file():
    g = np.load(folder / "clado.npz")["g"]
    path = plots.cross_layer_matrix(
      workdir / f"{section.name}_matrix.png", names, section.bits, g, title=heading
    )
    drawn.append((f"CLADO's matrix, first seed, {section.title}", path))
  return drawn


def _differences(config, workdir: Path, section: Section) -> str:
  """CLADO beside its diagonal, and all beside random plans, on the same images."""
  pairs = [("clado", "clado_diagonal")]
  pairs += [(m, "random") for m in section.methods if m not in ("random", "uniform")]
  cells = []
  for a, b in pairs:
    if not {a, b} <= {*section.methods}:
      continue
    for budget in section.budgets:
      found = []
      for seed in config.comparison.seeds:
        folder = workdir / f"seed{seed}" / section.name / "correct"
        paths = [folder / f"{m}_{section.ratio(budget):.6f}.npy" for m in (a, b)]
        if all(path.is_file() for path in paths):
          found.append(np.subtract(*(np.load(p).astype(np.float64) for p in paths)))
      if not found:
        continue
      # Seeds share the images, so their differences are averaged for each image first.
      per_image = 100 * np.mean(found, axis=0)
      error = per_image.std(ddof=1) / np.sqrt(len(per_image)) if len(per_image) > 1 else None
      means = ", ".join(f"{100 * one.mean():+.2f}" for one in found)
      spread = tables.mean_spread(float(per_image.mean()), error)
      cells.append([f"{a} - {b}", _shown(section, budget), spread, means])
  if not cells:
    return ""
  note = "Points of top-1 on the same images: mean over seeds ± standard error over images."
  header = ["difference", "budget", "points", "of each seed"]
  return f"{note}\n\n{tables.markdown_table(header, cells)}"


def _checks(config, workdir: Path, section: Section) -> list[str]:
  """What CLADO's matrix says of all layers at the highest bits."""
  notes = []
  for seed in config.comparison.seeds:
    for event in Workdir(workdir / f"seed{seed}").events("unconstrained"):
      if event["section"] != section.name:
        continue
      lower = ", ".join(f"`{n}` to {b}" for n, b in event["disagree"].items())
      said = f"would lower {lower}, though bits cost nothing" if lower else "is 8 bits everywhere"
      notes.append(
        f"CLADO, {section.name}, seed {seed}: the unconstrained optimum {said}; the projection "
        f"clipped {100 * event['clipped']:.1f} % of the eigenvalues' magnitude."
      )
  return list(dict.fromkeys(notes))


def _quantune(config, workdir: Path, rows, section: Section) -> str:
  """The list, the forms of the graph at each budget, and what selecting takes."""
  path = workdir / f"seed{config.comparison.seeds[0]}" / section.name / "quantune.json"
  if not path.is_file():
    return ""
  found = files.read_json(path)
  plans, (low, high) = found["plans"], found["pair"]
  form = max(fusion.GROUPINGS, key=[p["grouping"] for p in plans if p["chosen"]].count)
  own = [p for p in plans if p["grouping"] == form]
  header = ["node", "operations", "SQNR (dB)", "delta (dB)", "NMSE", "score"]
  header += [f"bits at {_shown(section, p['budget'])}" for p in own]
  nodes = [
    [
      node["node"],
      " + ".join(node["operations"]),
      *(tables.number(node[n], 4 if n == "nmse" else 1) for n in ("sqnr", "delta", "nmse")),
      tables.number(node["score"], 2),
      *(str(p["node_bits"][v]) for p in own),
    ]
    for v, node in enumerate(found["lists"][form])
  ]
  forms = [
    [
      p["grouping"],
      _shown(section, p["budget"]),
      str(p["nodes"]),
      str(p["boundaries"]),
      tables.number(p["error"], 4),
      tables.number(p["value"], 4),
      "yes" if p["chosen"] else "",
    ]
    for p in plans
  ]
  cost = {
    row["method"]: row["seconds"]
    for row in tables.aggregate(_rows(rows, section))
    if row.get("seconds")
  }
  named = {"quantune": "QuantuneV2's list", "clado": "CLADO", "flexiq": "one search of FlexiQ"}
  if not section.pairs:
    named["clado_diagonal"] = "CLADO's diagonal"
  times = [f"{said} {cost[m]:.1f} s" for m, said in named.items() if m in cost]
  return "\n\n".join(
    [
      f"The sensitivity list of the first seed in the form `{form}`, {low} and {high} "
      f"bits{' (floating point)' if high == FLOAT else ''}:",
      tables.markdown_table(header, nodes, left=2),
      "The forms of the graph, the best first at each budget:",
      tables.markdown_table(_FORMS, forms),
      f"Time to select, compilation included, mean over seeds: {', '.join(times)}.",
    ]
  )
