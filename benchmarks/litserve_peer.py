"""LitServe around the runner of `benchmarks/serving.py`; imported only where LitServe is installed.

A module of its own, since LitServe pickles the class for its worker processes.
"""

import importlib
from typing import Any

import numpy as np

from benchmarks import serving

litserve: Any = importlib.import_module("litserve")


class Api(litserve.LitAPI):
  """One image a request, as JSON numbers; batches go to the runner."""

  def __init__(self, folder: str, wait: float) -> None:
    """Keeps the artifact's folder; waits so many seconds for company."""
    super().__init__(max_batch_size=serving.SIZES[-1], batch_timeout=wait)
    self._folder = folder

  def setup(self, device: str) -> None:
    """Loads the runner in the worker process."""
    self._runner = serving.load(self._folder)

  def decode_request(self, request: dict) -> np.ndarray:
    """One image [H, W, C]."""
    return np.asarray(request["data"], np.float32).reshape(serving.SHAPE)

  def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
    """Images [n, H, W, C]."""
    return np.stack(inputs)

  def predict(self, x: np.ndarray) -> np.ndarray:
    """Logits [n, K]; of a single image where batches are not formed."""
    return np.asarray(self._runner(x))

  def unbatch(self, output: np.ndarray) -> list[np.ndarray]:
    """One row an image."""
    return list(output)

  def encode_response(self, output: np.ndarray) -> dict:
    """JSON numbers."""
    return {"data": output.tolist()}


def serve(folder: str, port: int, wait: float) -> None:
  """Serves until it is ended."""
  litserve.LitServer(Api(folder, wait), accelerator="cpu", timeout=60).run(
    host="127.0.0.1", port=port, generate_client_file=False, log_level="error"
  )
