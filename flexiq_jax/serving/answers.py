"""What an engine says: answers, refusals, its state, and what each batch was."""

import dataclasses

import numpy as np


class ServingError(Exception):
  """A request that gets no result; its class says why."""


class Overloaded(ServingError):
  """The queue is full; the same request may be accepted later."""


class TooLate(ServingError):
  """The deadline cannot be met any more, so nothing was computed."""


class Stopping(ServingError):
  """The engine is not ready yet, or takes no new requests."""


class Failed(ServingError):
  """The batch of this request raised; `cause` is what."""

  def __init__(self, cause: BaseException) -> None:
    """Args: cause: what was raised."""
    super().__init__(f"the batch failed: {type(cause).__name__}: {cause}")
    self.cause = cause


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
  """The result of one request, all of it at one ratio.

  Attributes:
    y: `[n, ...]`, of the request's n examples.
    ratio: 4-bit ratio of its batch.
    queued_s: seconds from the submission to the start of its batch.
    computed_s: seconds of its batch.
    batch: number of the batch.
  """

  y: np.ndarray
  ratio: float
  queued_s: float
  computed_s: float
  batch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRecord:
  """One batch.

  Attributes:
    number: counted from 0.
    size: examples.
    ratio: 4-bit ratio.
    started: clock seconds.
    queued_s: float64 `[requests]`, seconds that each of its requests waited.
    computed_s: seconds.
    outcome: `answered` or `failed`.
  """

  number: int
  size: int
  ratio: float
  started: float
  queued_s: np.ndarray
  computed_s: float
  outcome: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
  """An engine at one moment.

  Attributes:
    ready, stopping: whether it takes requests; whether it ends.
    queued: examples that wait.
    ratio: of the latest batch; before the first, the lowest level.
    level: number of that ratio among the levels.
    levels: ratios that may be chosen.
    held: the ratio that is held by hand, or None.
    arrivals: examples offered a second, estimated.
    p50, p90, p99: seconds from submission to answer, of the requests answered in the last window;
      nan where there were none.
    answered, refused, late, failed, cancelled: requests so far. Their sum, with those that wait or
      run, is the number of all submissions that were valid.
    batches: size in examples -> number of batches.
    effective_ratio: mean over answered examples; nan before the first.
  """

  ready: bool
  stopping: bool
  queued: int
  ratio: float
  level: int
  levels: tuple[float, ...]
  held: float | None
  arrivals: float
  p50: float
  p90: float
  p99: float
  answered: int
  refused: int
  late: int
  failed: int
  cancelled: int
  batches: dict[int, int]
  effective_ratio: float
