"""What the live page shows: the present state, and what it was in the last minutes.

The engine's own figures are of its last window. Effective accuracy is the mean, over the examples
that were computed in the last seconds, of the model's accuracy at the ratio that they got. The
history's ratio is the mean over those of the last second.
"""

import collections
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

from flexiq_jax.serving.server.model import Model

PERIOD = 0.5  # seconds between two points of the history
POINTS = 600
_WINDOW = 10.0  # seconds of examples that the effective accuracy is a mean of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shown:
  """What the page is told beside the state.

  Attributes:
    controller: what chooses the ratio, in words.
    target: latency that it aims at in seconds, None for none.
    hold: whether the ratio may be held by hand.
  """

  controller: str = ""
  target: float | None = None
  hold: bool = False


class Window:
  """Ratios of the examples of the last seconds; any thread may add."""

  def __init__(self, seconds: float = _WINDOW, clock: Callable[[], float] = time.monotonic) -> None:
    """Starts empty."""
    self._seconds, self._clock, self._lock = seconds, clock, threading.Lock()
    self._batches: collections.deque[tuple[float, float, int]] = collections.deque()

  def add(self, ratio: float, count: int) -> None:
    """Adds a batch that was computed now."""
    with self._lock:
      self._batches.append((self._clock(), ratio, count))
      self._forget()

  def mean(self, value: Callable[[float], float | None]) -> float | None:
    """Mean over examples of a function of their ratio; None where there are none."""
    with self._lock:
      self._forget()
      counts = collections.Counter[float]()
      for _, ratio, count in self._batches:
        counts[ratio] += count
    values = {ratio: value(ratio) for ratio in counts}
    if not counts or any(v is None for v in values.values()):
      return None
    return sum(counts[r] * v for r, v in values.items() if v is not None) / counts.total()

  def _forget(self) -> None:
    while self._batches and self._batches[0][0] < self._clock() - self._seconds:
      self._batches.popleft()


class Live:
  """State and history of one server."""

  def __init__(self, engine: Any, model: Model, shown: Shown) -> None:
    """Starts with an empty history.

    Args:
      engine: whose state is shown.
      model: with accuracies, where they are known.
      shown: further facts.
    """
    self._engine, self._model, self.shown = engine, model, shown
    self._window, self._recent = Window(), Window(2 * PERIOD)
    self._points: collections.deque[dict] = collections.deque(maxlen=POINTS)
    self._number = 0

  def add(self, ratio: float, count: int) -> None:
    """Adds a batch that was computed now."""
    self._window.add(ratio, count)
    self._recent.add(ratio, count)

  def accuracy(self) -> float | None:
    """Effective top-1 in % of the last seconds; at rest that of the present ratio."""
    found = self._window.mean(self._model.accuracy)
    return found if found is not None else self._model.accuracy(self._engine.state().ratio)

  def hold(self, ratio: float | None) -> None:
    """Holds the ratio, or gives it back to the controller."""
    self._engine.hold(ratio)

  def sample(self) -> None:
    """Adds a point to the history."""
    state, mean = self._engine.state(), self._recent.mean(float)
    self._number += 1
    self._points.append(
      {
        "n": self._number,
        "time": round(time.time(), 2),
        "arrivals": round(state.arrivals, 2),
        "ratio": state.ratio if mean is None else round(mean, 4),
        "queued": state.queued,
        "accuracy": self.accuracy(),
        **{name: getattr(state, name) for name in ("p50", "p90", "p99")},
      }
    )

  def facts(self, after: int = 0) -> dict[str, Any]:
    """All that the page shows.

    Args:
      after: number of the last point that the page has.
    """
    state, model = self._engine.state(), self._model
    return {
      "model": model.name,
      "ready": bool(self._engine.ready),
      "stopping": bool(self._engine.stopping),
      "levels": model.levels,
      "held": state.held,
      "may_hold": self.shown.hold,
      "controller": self.shown.controller,
      "target": self.shown.target,
      "accuracies": [model.accuracy(level) for level in model.levels] if model.accuracies else None,
      "accuracy": self.accuracy(),
      "now": {
        name: getattr(state, name)
        for name in (
          *("ratio", "queued", "arrivals", "p50", "p90", "p99"),
          *("answered", "refused", "failed", "late"),
        )
      },
      "period": PERIOD,
      "newest": self._number,
      "points": [point for point in self._points if point["n"] > after],
    }
