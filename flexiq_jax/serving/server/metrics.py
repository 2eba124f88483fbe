"""Counters of the server for Prometheus, in a registry of their own.

| name | labels | what it is |
|---|---|---|
| `flexiq_requests_total` | `kind`, `outcome` | requests; outcomes are `OUTCOMES` |
| `flexiq_latency_seconds` | `kind` | histogram, from a request's headers to its response |
| `flexiq_batch_examples` | | histogram of examples in a batch |
| `flexiq_queue_seconds` | | histogram of each request's wait |
| `flexiq_compute_seconds` | | histogram of batches |
| `flexiq_examples_total` | `ratio` | examples that were computed at a ratio |
| `flexiq_failed_batches_total` | | batches that raised |
| `flexiq_ratio` | | the present 4-bit ratio |
| `flexiq_effective_accuracy` | | top-1 in %, mean over the examples of the last seconds |
| `flexiq_queued_examples` | | that wait now |
| `flexiq_request_bytes` | | that requests hold in memory |
| `process_*` | | memory, CPU and file descriptors of the process |
"""

from collections.abc import Callable

import prometheus_client as prometheus

_SECONDS = (
  *(0.001, 0.002, 0.004, 0.006, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1),
  *(0.15, 0.25, 0.4, 0.6, 1.0, 2.5, 5.0, 10.0, 30.0),
)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
OUTCOMES = ("answered", "refused", "overloaded", "late", "unavailable", "failed", "gone")
KINDS = ("infer", "classify")
CONTENT_TYPE = prometheus.CONTENT_TYPE_LATEST


class Metrics:
  """All counters; they may be used from any thread."""

  def __init__(self, levels: tuple[float, ...]) -> None:
    """Makes all series, so that those that never happened are there as 0.

    Args:
      levels: ratios that batches can have.
    """
    self.registry = registry = prometheus.CollectorRegistry()
    prometheus.ProcessCollector(registry=registry)
    histogram = lambda name, text, buckets, *labels: prometheus.Histogram(
      f"flexiq_{name}", text, labels, buckets=buckets, registry=registry
    )
    counter = lambda name, text, *labels: prometheus.Counter(
      f"flexiq_{name}", text, labels, registry=registry
    )
    self._requests = counter("requests", "Requests by outcome", "kind", "outcome")
    self._examples = counter("examples", "Examples computed at a 4-bit ratio", "ratio")
    self._failed = counter("failed_batches", "Batches that raised")
    self._latency = histogram("latency_seconds", "Request to response", _SECONDS, "kind")
    self._batch = histogram("batch_examples", "Examples of a batch", _SIZES)
    self._queue = histogram("queue_seconds", "Wait of a request", _SECONDS)
    self._compute = histogram("compute_seconds", "Time of a batch", _SECONDS)
    for kind in KINDS:
      self._latency.labels(kind)
      for outcome in OUTCOMES:
        self._requests.labels(kind, outcome)
    for level in levels:
      self._examples.labels(f"{level:g}")

  def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
    """A gauge that is read when it is asked for."""
    gauge = prometheus.Gauge(f"flexiq_{name}", text, registry=self.registry)
    gauge.set_function(value)

  def request(self, kind: str, outcome: str, seconds: float) -> None:
    """Counts a request that has its response."""
    self._requests.labels(kind, outcome).inc()
    self._latency.labels(kind).observe(seconds)

  def batch(self, record) -> None:
    """Counts a batch (see `serving.BatchRecord`)."""
    if record.outcome != "answered":
      self._failed.inc()
      return
    self._batch.observe(record.size)
    self._compute.observe(record.computed_s)
    self._examples.labels(f"{record.ratio:g}").inc(record.size)
    for seconds in record.queued_s:
      self._queue.observe(float(seconds))

  def text(self) -> bytes:
    """All of them in Prometheus' text format."""
    return prometheus.generate_latest(self.registry)
