"""How a method looks and is called in every picture: its name in prose, its colour, its marker.

Colours are the set of Okabe and Ito (https://jfly.uni-koeln.de/color/) without its yellow, and
four of Paul Tol's muted scheme (https://sronpersonalpages.nl/~pault/), which colour-blind readers
can tell apart. Methods that are drawn in one picture have different colours and different markers.
"""

import dataclasses
from collections.abc import Iterable

BLUE, RED, GREEN, PINK = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK = "#E69F00", "#56B4E9", "#000000"
WINE, INDIGO, OLIVE, PURPLE = "#882255", "#332288", "#999933", "#AA4499"
COLOURS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK, WINE, INDIGO, OLIVE, PURPLE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "h", "<", "*")


@dataclasses.dataclass(frozen=True)
class Look:
  """Name, colour and marker of a method."""

  name: str
  colour: str
  marker: str


_LOOKS = {
  "gram": Look("FlexiQ, Gram search", BLUE, "o"),
  "greedy": Look("FlexiQ, greedy order", RED, "s"),
  "evolution": Look("FlexiQ, evolutionary search", GREEN, "^"),
  "random": Look("random", BLACK, "X"),  # orders, or plans of bits
  # Of a curve.
  "flexiq_random": Look("random order", BLACK, "X"),
  "greedy_naive": Look("greedy, top four bits", PINK, "D"),
  "greedy_range": Look("greedy, shifts by range", ORANGE, "v"),
  "greedy_per_output": Look("greedy, shifts per output channel", SKY, "P"),
  "greedy_uncorrected": Look("greedy, no bias correction", WINE, "p"),
  "gram_dynamic": Look("Gram search, dynamic shifts", INDIGO, "h"),
  "greedy_dynamic": Look("greedy, dynamic shifts", INDIGO, "h"),
  "evolution_dynamic": Look("evolutionary, dynamic shifts", INDIGO, "h"),
  "distilled": Look("FlexiQ, distilled", OLIVE, "<"),
  "finetuned": Look("FlexiQ, finetuned", PURPLE, "*"),
  # Of an ablation.
  "random_naive": Look("random order, top four bits", PINK, "D"),
  "random_range": Look("random order, shifts by range", ORANGE, "v"),
  "random_mse": Look("random order, shifts by squared error", SKY, "P"),
  # Of a comparison.
  "flexiq": Look("FlexiQ", BLUE, "o"),
  "clado": Look("CLADO", GREEN, "^"),
  "clado_block": Look("CLADO, blocks", SKY, "P"),
  "clado_diagonal": Look("CLADO, diagonal", WINE, "p"),
  "mpqco": Look("MPQCO", ORANGE, "v"),
  "hawq": Look("HAWQ-v3", INDIGO, "h"),
  "quantune": Look("QuantuneV2", PINK, "D"),
  "uniform": Look("uniform", OLIVE, "<"),
  # Of serving.
  "load": Look("FlexiQ, by load", BLUE, "o"),
  "predictive": Look("FlexiQ, by forecast", SKY, "P"),
  "int8": Look("INT8", BLACK, "X"),
  "int4": Look("INT4", RED, "s"),
  "swapping": Look("models swapped", ORANGE, "v"),
  "layerwise": Look("layer-wise plans", PINK, "D"),
  "oracle": Look("FlexiQ, oracle", GREEN, "^"),
}


def looks(methods: Iterable[str]) -> dict[str, Look]:
  """The looks of the methods of a picture.

  Args:
    methods: names as in `results.csv`; `flexiq_` in front of an order's name changes nothing. One
      that is not known here keeps its name and takes what none of the others has.
  """
  names = list(dict.fromkeys(methods))
  known = {name: _LOOKS.get(name) or _LOOKS.get(name.removeprefix("flexiq_")) for name in names}
  taken = {look.colour for look in known.values() if look}
  free = [i for i, colour in enumerate(COLOURS) if colour not in taken] or [*range(len(COLOURS))]
  found, others = {}, 0
  for name, look in known.items():
    if look is None:
      # With more methods than colours, colour and marker repeat, but not together.
      i, turn = free[others % len(free)], others // len(free)
      look = Look(name, COLOURS[i], MARKERS[(i + turn) % len(MARKERS)])
      others += 1
    found[name] = look
  return found
