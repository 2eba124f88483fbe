"""How searches went, in the log of a workdir: one event `search` a step.

A step is a generation of an evolutionary search, a round of a search on a surrogate.

| value      | what it is                                                                         |
| ---------- | ---------------------------------------------------------------------------------- |
| `method`   | name of the search method                                                          |
| `ratio`    | level that is searched, 0..1; None where all levels are scored at once             |
| `seed`     | seed of the search                                                                 |
| `step`     | number of the step at this level; 0 is the seeds                                   |
| `forwards` | cost since the search of this method and seed began, in passes over all examples   |
| `seconds`  | time spent searching since then, earlier starts of a resumed run included          |
| `best`     | fitness of the best so far at this level: distance, mean per example               |
| `mean`     | mean of the finite fitnesses of this step's candidates; None where none is finite  |
| `differ`   | share 0..1 of candidates that differ from their parents; None without parents      |
| `stage`    | what the step did, as `seeds`, `evolution`, `gram`                                 |

A log only grows. Where it has more steps of a search than the checkpoint that the search goes on
from, an event `search_resumed` (`method`, `seed`) says how many `steps` of it stay: the later ones
are done again. Several processes may write to one log, each its own (method, seed).
"""

from typing import Any

from flexiq_jax.runs.workdir import Workdir

COLUMNS = (
  "method",
  "ratio",
  "seed",
  "step",
  "forwards",
  "seconds",
  "best",
  "mean",
  "differ",
  "stage",
)


def add(
  workdir: Workdir,
  *,
  method: str,
  ratio: float | None,
  seed: int,
  step: int,
  forwards: float,
  seconds: float,
  best: float,
  mean: float | None,
  stage: str,
  differ: float | None = None,
) -> None:
  """Records a step, which is on disk when this returns; the values are those of the table above."""
  workdir.event(
    "search",
    method=method,
    ratio=None if ratio is None else round(ratio, 6),  # 0.1 + 0.2 and 0.3 are one level
    seed=seed,
    step=step,
    forwards=forwards,
    seconds=seconds,
    best=best,
    mean=mean,
    differ=differ,
    stage=stage,
  )


def steps(workdir: Workdir, method: str | None = None, seed: int | None = None) -> list[dict]:
  """Reads the steps that count, oldest first.

  Args:
    workdir: of the run.
    method: only the steps of this method.
    seed: only the steps of this seed.

  Returns:
    A dict for each step with the values of the table above.

  Raises:
    ValueError: a line of the log is damaged.
  """
  found: list[dict[str, Any]] = []
  for event in workdir.events():
    if event.get("event") == "search":
      found.append({name: event[name] for name in COLUMNS})
    elif event.get("event") == "search_resumed":
      of = (event["method"], event["seed"])
      own = [i for i, row in enumerate(found) if (row["method"], row["seed"]) == of]
      redone = set(own[event["steps"] :])
      found = [row for i, row in enumerate(found) if i not in redone]
  return [r for r in found if method in (None, r["method"]) and seed in (None, r["seed"])]


def keep(workdir: Workdir, method: str, seed: int, count: int) -> None:
  """Says that a search goes on after its first `count` steps; later ones no longer count.

  Raises:
    ValueError: the log has fewer steps of that search.
  """
  have = len(steps(workdir, method, seed))
  if have < count:
    raise ValueError(
      f"{workdir.path / 'metrics.jsonl'}: {have} steps of {method!r} with seed {seed}, and the "
      f"checkpoint was saved after {count}. Restore the file, or search again without the "
      "checkpoint"
    )
  if have > count:
    workdir.event("search_resumed", method=method, seed=seed, steps=count)
