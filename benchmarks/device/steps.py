"""What `make device` runs: the steps, the most valuable first, and the seconds that each may take.

The limits add up to less than eight minutes. What a step leaves of its time goes to those after
it, but never does one take the limit of another (`driver.py`).
"""

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
  """One step.

  Attributes:
    name: in file names and on the command line.
    module: below `benchmarks.device`, with `run(context) -> dict`.
    limit: seconds, start of the process included.
    small_limit: the same in small form, as on a CPU.
    accelerator: why it needs one; empty where it runs on a CPU, too.
    options: for the module.
  """

  name: str
  module: str
  limit: float
  small_limit: float = 120
  accelerator: str = ""
  options: tuple[str, ...] = ()


STEPS = (
  Step(name="ceilings", module="ceilings", limit=30),
  Step(
    name="hardware_tests",
    module="hardware_tests",
    limit=45,
    accelerator="the tests marked gpu need the device",
  ),
  Step(name="main_job", module="main_job", limit=80, small_limit=400),
  Step(name="search", module="search_speed", limit=65, small_limit=240),
  Step(name="products", module="products", limit=70),
  Step(name="models", module="whole_models", limit=65, small_limit=400),
  Step(name="convolutions", module="convolutions", limit=30),
  Step(
    name="tiles",
    module="tiles",
    limit=40,
    accelerator="a CPU runs the reference, which has no tiles",
  ),
  Step(
    name="products_tuned",
    module="products",
    limit=25,
    accelerator="there are no tiles for a CPU",
    options=("tuned",),
  ),
  Step(
    name="models_tuned",
    module="whole_models",
    limit=25,
    accelerator="there are no tiles for a CPU",
    options=("tuned",),
  ),
)


def named(names: list[str]) -> list[Step]:
  """The steps of these names, in their own order; all without names.

  Raises:
    ValueError: an unknown name.
  """
  known = {step.name for step in STEPS}
  if unknown := [name for name in names if name not in known]:
    accepted = ", ".join(step.name for step in STEPS)
    raise ValueError(f"--steps: {', '.join(unknown)}; of {accepted} any are accepted")
  return [step for step in STEPS if not names or step.name in names]
