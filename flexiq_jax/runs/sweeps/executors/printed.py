"""Prints the commands of the cells that are left, for any other scheduler or for a shell."""

import dataclasses
import shlex
from collections.abc import Sequence

from flexiq_jax.runs.sweeps.board import Board
from flexiq_jax.runs.sweeps.cells import Cell


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """Nothing is to be set."""


def require(settings: Settings) -> None:
  """Always there."""


def lacks(cell: Cell, settings: Settings) -> str:
  """Nothing: the commands may go anywhere."""
  return ""


def run(cells: Sequence[Cell], settings: Settings, board: Board) -> None:
  """Prints one command a line."""
  for cell in cells:
    board.say(shlex.join(cell.command))
