"""Static schedules of TPU kernels, read from the compiler's dump of its final VLIW bundles.

A bundle is what the core issues in about one cycle, memory waits aside: a relative measure that
needs no TPU, only libtpu. Set `ENVIRONMENT` before JAX starts libtpu, compile, then `newest`.
"""

import dataclasses
import pathlib
import re
import shutil

_LINE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:[A-Z]{2})?\s*:\s*(?:> ?)*\{(.*)")
_JUMP = re.compile(r"sbr\.rel \(!?%\S+\) target bundleno = (\d+)")


def environment(folder: pathlib.Path) -> dict[str, str]:
  """Variables that make libtpu dump into a folder."""
  return {
    "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3",
  }


@dataclasses.dataclass(frozen=True)
class Program:
  """A kernel's bundles.

  Attributes:
    bundles: their number.
    loops: (first, last) bundle of each loop.
    skips: (first, behind) of what a forward branch may jump over.
    products: bundles that use the matrix unit.
  """

  bundles: int
  loops: tuple[tuple[int, int], ...]
  skips: tuple[tuple[int, int], ...]
  products: tuple[int, ...]

  def multiplies(self, span: tuple[int, int]) -> bool:
    return any(span[0] <= at <= span[1] for at in self.products)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
  """Bundles of the mixed matmul's parts.

  Attributes:
    low, high: one block of K in 4 and in 8 bits.
    low_last, high_last: the last block with the epilogue beside it, or what precedes `finish`; 0
      where the epilogue stands alone.
    finish: an epilogue that requantizes, one turn of its loop: 8-bit, 4-bit, both; where the last
      block's product is part of it, first with a product in 4 bits, then with one in 8.
    step: all else in a step of the grid.
  """

  low: int
  high: int
  low_last: int
  high_last: int
  finish: tuple[int, ...]
  step: int

  def tile(self, low: int, high: int, finishing: int = 0) -> int:
    """Bundles of one step of the grid.

    Args:
      low: blocks of K in 4 bits.
      high: blocks of K in 8 bits; one may be in both.
      finishing: bundles of an epilogue that requantizes.
    """
    last = 0
    if self.low_last:
      last = self.low_last - self.low if high == 0 else self.high_last - self.high
    return self.step + low * self.low + high * self.high + last + finishing


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preparation:
  """Bundles of the kernel that quantizes, permutes and splits.

  Attributes:
    quantize: one turn of the loop over rows; 0 where there is one turn, which counts as a step.
    finish: permuting and writing one turn of a strip: 8-bit, 4-bit, both.
    step: all else in a step of the grid.
  """

  quantize: int
  finish: tuple[int, ...]
  step: int


def newest(folder: pathlib.Path, name: str, keep: bool = False) -> Program:
  """The program of the kernel `name` that was compiled last; dumps are removed unless kept.

  Raises:
    FileNotFoundError: the compiler left no such dump.
  """
  files = [
    path
    for path in folder.glob(f"*-{name}*-packed-bundles-post-ra.txt")
    if "schedule-analysis" not in path.name
  ]
  if not files:
    raise FileNotFoundError(f"{folder}: no dump of {name}; was libtpu started before?")
  program = parse(max(files, key=lambda path: path.stat().st_mtime_ns).read_text())
  if not keep:
    clear(folder)
  return program


def clear(folder: pathlib.Path) -> None:
  """Removes all dumps."""
  shutil.rmtree(folder)
  folder.mkdir()


def parse(text: str) -> Program:
  """Reads a dump."""
  found: list[tuple[int, str]] = []
  for line in text.splitlines():
    if match := _LINE.match(line):
      found.append((int(match[1], 16), match[2]))
    elif found:  # comments run over several lines
      found[-1] = (found[-1][0], found[-1][1] + line)
  jumps = [(at, int(to)) for at, body in found for to in _JUMP.findall(body)]
  return Program(
    bundles=len(found),
    loops=tuple((to, at) for at, to in jumps if to <= at),
    skips=tuple((at, to) for at, to in jumps if to > at),
    products=tuple(at for at, body in found if "vmatmul" in body),
  )


def schedule(program: Program, turns: int = 1, stages: int = 1) -> Schedule:
  """The parts of a mixed matmul.

  Args:
    program: its bundles.
    turns: how often the loop over rows of a block's product runs; with one there is no such loop.
    stages: the same of the loop that brings rows of a convolution into words.

  Raises:
    ValueError: a program of another shape.
  """
  size = lambda span: span[1] - span[0]
  holds = lambda outer, span: outer[0] <= span[0] and span[1] <= outer[1]
  outermost = lambda spans: sorted(
    s for s in spans if not any(holds(o, s) for o in spans if o != s)
  )
  multiplying = lambda spans: [s for s in spans if program.multiplies(s)]
  loops = multiplying(program.loops)
  steps = max(loops, key=size)
  if not all(holds(steps, loop) for loop in loops):  # a grid of one step has no loop
    steps = (0, program.bundles)
  parts = [s for s in program.skips if holds(steps, s) and size(s) < 0.95 * size(steps)]
  # Of each precision what surrounds its loop over blocks, and the last block where that is apart.
  products = multiplying(outermost(parts))
  if len(products) not in (2, 4):
    raise ValueError(f"program: {len(products)} parts with products, expected 2 or 4")
  around, lasts = products[:: len(products) // 2], products[1::2] if len(products) == 4 else []
  loop_in = lambda s: max((a for a in program.loops if holds(s, a)), key=size, default=s)
  low, high = map(loop_in, around)
  last, finishes, tails, rest = [0, 0], [], [], []
  for i, span in enumerate(lasts):
    within = outermost([s for s in parts if holds(span, s) and s != span])
    codes = multiplying(within)
    finishes += codes
    last[i] = size(span) - sum(map(size, within if codes else []))
  if not lasts:
    behind = outermost([s for s in parts if s[0] > around[1][1]])
    tails, rest = behind[:3], behind[3:]
    finishes = tails
  if len(finishes) not in ((0, 6) if lasts else (3,)):
    raise ValueError(f"program: {len(finishes)} epilogues, expected 3, twice beside products")
  # Clearing a precision that is not used is left out: one tile in a row has it at most.
  outside = [*products, *tails, *rest]
  return Schedule(
    low=_cost(program, low, turns, stages),
    high=_cost(program, high, turns, stages),
    low_last=last[0],
    high_last=last[1],
    finish=tuple(size(loop_in(s)) + 1 for s in finishes),
    step=size(steps) + 1 - sum(map(size, outside)),
  )


def _cost(program: Program, span: tuple[int, int], turns: int, stages: int) -> int:
  """Bundles of one turn of a loop, with the loops inside that multiply and that do not."""
  total = span[1] - span[0] + 1
  for first, last in program.loops:
    if span[0] <= first and last <= span[1] and (first, last) != span:
      trips = turns if program.multiplies((first, last)) else stages
      total += (trips - 1) * (last - first + 1)
  return total


def preparation(program: Program) -> Preparation:
  """The parts of the kernel that makes a product's operands.

  Raises:
    ValueError: a program of another shape.
  """
  size = lambda span: span[1] - span[0]
  holds = lambda outer, span: outer[0] <= span[0] and span[1] <= outer[1]
  steps = max(program.loops, key=size)
  within = [s for s in program.skips if holds(steps, s)]
  # What holds all others is the step itself, which the grid's borders may skip.
  parts = [s for s in within if sum(holds(s, other) for other in within) <= 5]
  outermost = sorted(s for s in parts if not any(holds(o, s) for o in parts if o != s))
  # The last two wait for the outputs of the turn before.
  before, finishes = outermost[:-5], outermost[-5:-2]
  multiply = [program.multiplies(s) for s in finishes]
  if len(finishes) != 3 or len({*multiply}) > 1 or any(map(program.multiplies, before)):
    raise ValueError(f"program: {len(outermost)} parts of another shape")
  # Where all rows are one turn, quantizing is no loop and counts as part of the step.
  turns = [a for a in program.loops if holds(steps, a) and a[1] < finishes[0][0]]
  quantize = max(turns, key=size, default=None)
  inside = any(quantize and holds(s, quantize) for s in before)
  loop_in = lambda s: max((a for a in program.loops if holds(s, a)), key=size, default=s)
  own = size(quantize) + 1 if quantize else 0
  return Preparation(
    quantize=own,
    finish=tuple(size(loop_in(s)) + 1 for s in finishes),
    step=size(steps) + 1 - sum(map(size, outermost)) - (0 if inside else own),
  )
