"""Experiments that simulate serving."""

from ml_collections import config_dict

from configs import common


def simulated(name: str, of: str, small: bool) -> config_dict.ConfigDict:
  """A serving experiment; arguments as of `common.of_other`."""
  config = common.of_other(name, of, small)
  config.serving = config_dict.create(
    # Latencies: a profile's file; `measure` times the artifact's model here, `repeats` batches at
    # each size and ratio; "" models them: INT8 runs `int8` requests a second in its largest
    # batches, `fixed` seconds of each batch are not its examples', 100 % runs `gain` times as fast.
    profile="",
    artifact="",
    repeats=20,
    int8=1250.0,
    gain=1.43,
    fixed=0.004,
    sizes=(1, 2, 4, 8, 16, 32, 64, 128),
    # Accuracy: the workdir of a finished run, and which of its methods.
    accuracy="",
    method="flexiq_distilled",
    # Largest batch, seconds that a batch waits for company, requests that wait at most, seconds
    # within which a request is to be answered.
    size=128,
    delay=0.1,
    queue=4096,
    target=0.3,
  )
  return config
