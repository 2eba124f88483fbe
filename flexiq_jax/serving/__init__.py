"""Serving: a ratio that follows the load (docs/serving.md).

| question                                 | where                                               |
| ---------------------------------------- | --------------------------------------------------- |
| how long does a batch take               | `profile`, `profiling`; modelled: `latency`, `npu`  |
| when do requests come                    | `workloads`                                         |
| which batch runs next, at which ratio    | `deciding`, of `batching` and `controllers`         |
| who runs it                              | `engine` (asyncio), `simulator` (virtual clock)     |
| what became of the requests              | `answers`, `records`                                |
"""

from flexiq_jax.serving.answers import (
  Answer,
  BatchRecord,
  Failed,
  Overloaded,
  ServingError,
  State,
  Stopping,
  TooLate,
)
from flexiq_jax.serving.batching import Batching
from flexiq_jax.serving.controllers import CONTROLLERS, Controller, create
from flexiq_jax.serving.engine import Engine
from flexiq_jax.serving.profile import Profile, modelled
from flexiq_jax.serving.profiling import measure, runner_function
from flexiq_jax.serving.records import Record, summary
from flexiq_jax.serving.replay import replay, stand_in
from flexiq_jax.serving.simulator import simulate

__all__ = [
  "CONTROLLERS",
  "Answer",
  "BatchRecord",
  "Batching",
  "Controller",
  "Engine",
  "Failed",
  "Overloaded",
  "Profile",
  "Record",
  "ServingError",
  "State",
  "Stopping",
  "TooLate",
  "create",
  "measure",
  "modelled",
  "replay",
  "runner_function",
  "simulate",
  "stand_in",
  "summary",
]
