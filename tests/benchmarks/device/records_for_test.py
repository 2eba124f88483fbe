"""Records of steps and of whole runs."""

from benchmarks.device import records
from benchmarks.device.records import Record

CPU = {"platform": "cpu", "device_kind": "cpu"}
GPU = {"platform": "gpu", "device_kind": "NVIDIA H100 80GB HBM3", "commit": "0123"}


def record(**changes) -> Record:
  facts = {"step": "a", "status": "done", "why": "", "seconds": 1.0, "limit": 2.0}
  return Record(**facts | {"complete": True, "result": {"claims": []}, "tail": ""} | changes)


def summary(machine=GPU, small=False, **changes) -> records.Summary:
  facts = {"version": 1, "made": "measured", "date": "2026-01-02", "command": "c", "seconds": 1.0}
  return records.Summary(**facts | {"small": small, "machine": machine, "steps": [], **changes})
