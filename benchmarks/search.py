"""What the default search costs beside the plain evolutionary search, for the same true fitness.

    python benchmarks/search.py --json build/search.json --model vit_cifar10

Both run on the same model, images and seeds in one process: first `evolution` (Algorithm 1, level
by level), then the default, `gram`. At each level the question is when `gram` first had a mask
whose fitness, evaluated truly, is no worse than the best that `evolution` ended with. Cost is
counted from the start of a search: levels below are in it, and so are the measurements of effects
(a backward pass counts as two forward passes).

| column | meaning |
|---|---|
| seconds, forwards | of `evolution`: until it first had its final fitness of the level |
| reached | the same of `gram`, until it first had that fitness |
| ratio | the one by the other: how many times less the default search took |

Seconds do not include compiling the fitness, which both need, but they do include what else is
compiled (operators, backward pass, annealing). JSON has the whole calls' (`wall`), the cost to each
level's end, and all steps. Needs FLEXIQ_DATA: on random weights no search has
anything to find.
"""

import argparse
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import loading
from flexiq_jax.runs import process
from flexiq_jax.runs.workdir import Workdir
from flexiq_jax.search import SearchSettings, search, steps

Rows = Sequence[Mapping[str, Any]]
_ROUNDING = 1e-6  # fitness of one mask, kept in float32 by one search and in float64 by the other


@dataclasses.dataclass(frozen=True)
class Cost:
  """What a search had spent at some point, since it began.

  Attributes:
    seconds: time searching.
    forwards: passes over the search images.
  """

  seconds: float
  forwards: float


def reached(rows: Rows, level: float, target: float) -> Cost | None:
  """Cost at which a search first was at a fitness.

  Args:
    rows: of one search, oldest first (`search.steps`).
    level: ratio.
    target: fitness.

  Returns:
    Of the first row of that level whose best is no worse than the target; None if there is none.
  """
  for row in rows:
    if row["ratio"] == round(level, 6) and row["best"] <= target * (1 + _ROUNDING):
      return Cost(row["seconds"], row["forwards"])
  return None


def ended(rows: Rows, level: float) -> tuple[float, Cost]:
  """Best fitness at a level, and the cost when the search left it."""
  row = [row for row in rows if row["ratio"] == round(level, 6)][-1]
  return row["best"], Cost(row["seconds"], row["forwards"])


def compare(plain: Rows, ours: Rows, levels: Sequence[float]) -> dict[float, dict[str, Any]]:
  """Level by level, both searches' fitness, and the cost of the plain one's.

  Args:
    plain: rows of the plain search.
    ours: rows of the search that is compared with it.
    levels: ratios.
  """
  result = {}
  for level in levels:
    target, plain_end = ended(plain, level)
    fitness, our_end = ended(ours, level)
    needed, found = reached(plain, level, target), reached(ours, level, target)
    assert needed is not None
    entry: dict[str, Any] = {
      "evolution": {"fitness": target, "end": plain_end, "needed": needed},
      "gram": {"fitness": fitness, "end": our_end, "reached": found},
    }
    if found:
      entry["seconds_ratio"] = needed.seconds / found.seconds
      entry["forwards_ratio"] = needed.forwards / found.forwards
    result[level] = entry
  return result


def spread(values: Sequence[float]) -> dict[str, float] | None:
  """Median, least and largest; None without values."""
  if not values:
    return None
  return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def summary(seeds: Sequence[Mapping[float, Mapping[str, Any]]]) -> dict[float, dict[str, Any]]:
  """Spread over the seeds' results of `compare`, level by level."""
  result = {}
  for level in seeds[0]:
    entries = [seed[level] for seed in seeds]
    result[level] = {
      "evolution_fitness": spread([e["evolution"]["fitness"] for e in entries]),
      "gram_fitness": spread([e["gram"]["fitness"] for e in entries]),
      "reached": sum("seconds_ratio" in e for e in entries),
      "seconds_ratio": spread([e["seconds_ratio"] for e in entries if "seconds_ratio" in e]),
      "forwards_ratio": spread([e["forwards_ratio"] for e in entries if "forwards_ratio" in e]),
    }
  return result


def measure(
  loaded: loading.Loaded,
  plain: SearchSettings,
  ours: SearchSettings,
  seeds: Sequence[int],
  say: Callable[[str], None],
) -> dict[str, Any]:
  """Runs both searches for every seed.

  Args:
    loaded: the model and the images.
    plain: settings of the evolutionary search.
    ours: settings of the search that is compared with it; of the same levels and images.
    seeds: of the searches.
    say: called with lines of progress.
  """
  runs, compared, greedy = [], [], {}
  for seed in seeds:
    wall, rows = {}, {}
    with tempfile.TemporaryDirectory() as folder:
      for settings in (plain, ours):
        workdir, start = Workdir(pathlib.Path(folder) / settings.method), time.perf_counter()
        search(
          *(loaded.network, loaded.model, loaded.space, loaded.scores, loaded.images, settings),
          seed=seed,
          workdir=workdir,
          show=lambda line, seed=seed: say(f"seed {seed}, {line}"),
        )
        wall[settings.method] = time.perf_counter() - start
        rows[settings.method] = steps(workdir, settings.method)
        start_rows = steps(workdir, "greedy")
        greedy = {level: ended(start_rows, level)[0] for level in ours.levels}
    compared.append(compare(rows[plain.method], rows[ours.method], ours.levels))
    for line in lines(compared[-1], greedy):
      say(f"seed {seed}: {line}")
    runs.append({"seed": seed, "wall": wall, "levels": compared[-1], "rows": rows})
  return {
    "groups": loaded.space.total,
    "images": len(loaded.images[: ours.images or None]),
    "evolution": dataclasses.asdict(plain),
    "gram": dataclasses.asdict(ours),
    "greedy": greedy,
    "seeds": runs,
    "summary": summary(compared),
  }


def lines(compared: Mapping[float, Mapping[str, Any]], greedy: Mapping[float, float]) -> list[str]:
  """A seed's results as text, one line for each level."""
  out = []
  for level, entry in compared.items():
    needed, found = entry["evolution"]["needed"], entry["gram"]["reached"]
    line = (
      f"{level:.0%}: greedy {greedy[level]:.5g}, evolution {entry['evolution']['fitness']:.5g} "
      f"({needed.seconds:.0f} s, {needed.forwards:.0f} forwards), "
      f"gram {entry['gram']['fitness']:.5g}"
    )
    if found:
      line += (
        f", evolution's reached in {found.seconds:.0f} s, {found.forwards:.0f} forwards: ratio "
        f"{entry['seconds_ratio']:.1f} of seconds, {entry['forwards_ratio']:.1f} of forwards"
      )
    else:
      end = entry["gram"]["end"]
      line += f", evolution's not reached in {end.seconds:.0f} s, {end.forwards:.0f} forwards"
    out.append(line)
  return out


def summary_lines(document: Mapping[str, Any]) -> list[str]:
  """The spread over seeds as text."""

  def text(values: Mapping[str, float] | None, digits: int) -> str:
    if values is None:
      return "-"
    median, least, most = (f"{values[k]:.{digits}g}" for k in ("median", "min", "max"))
    return f"{median} ({least} to {most})"

  out = [
    f"{'level':>5} {'greedy':>8} {'evolution':>26} {'gram':>26} {'reached':>8} "
    f"{'seconds ratio':>20} {'forwards ratio':>20}"
  ]
  for level, row in document["summary"].items():
    out.append(
      f"{level:5.0%} {document['greedy'][level]:8.4g} {text(row['evolution_fitness'], 4):>26} "
      f"{text(row['gram_fitness'], 4):>26} {row['reached']:>4} of {len(document['seeds'])} "
      f"{text(row['seconds_ratio'], 3):>20} {text(row['forwards_ratio'], 3):>20}"
    )
  return out


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
  """The command line."""
  parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
  parser.add_argument("--json", type=pathlib.Path, help="file for the results")
  parser.add_argument("--model", choices=tuple(loading.CONFIGS), default="resnet20")
  parser.add_argument("--seeds", default="0,1,2", help="comma-separated")
  parser.add_argument("--images", type=int, default=256, help="search images of both")
  parser.add_argument("--generations", type=int, default=30, help="of evolution, at each level")
  parser.add_argument("--population", type=int, default=32, help="of evolution")
  args = parser.parse_args(arguments)
  try:
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
  except ValueError:
    parser.error(f"--seeds: {args.seeds!r}; whole numbers with commas between are accepted")
  if args.images < 1:
    parser.error(f"--images: {args.images}; at least 1 is accepted")
  return args


def main(arguments: Sequence[str] | None = None) -> None:
  """Runs both searches, prints how they compare and writes JSON."""
  args = parse(arguments)
  if not loading.has_data():
    print("skipped: it searches pretrained models, whose folder FLEXIQ_DATA does not name")
    return
  plain = SearchSettings(
    method="evolution",
    population=args.population,
    generations=args.generations,
    images=args.images,
  )
  ours = SearchSettings(images=args.images)
  start = time.perf_counter()

  def say(line: str) -> None:
    print(f"{time.perf_counter() - start:7.0f} s  {line}", flush=True)

  say(f"{args.model}: calibrating")
  loaded = loading.pretrained(args.model)
  document = measure(loaded, plain, ours, args.seeds, say)
  print("\n".join(["", f"{args.model}, seeds {args.seeds}, median (range):"]))
  print("\n".join(summary_lines(document)))
  if args.json:
    args.json.parent.mkdir(parents=True, exist_ok=True)
    document = {"machine": process.describe(), "model": args.model, **document}
    args.json.write_text(json.dumps(document, indent=2, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
  main()
