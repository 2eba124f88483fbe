r"""Serves a deployed model over HTTP, at a ratio that follows the load.

Without `artifact` the model of `of` is deployed first, below runs/: by default the demonstration's
digits, trained on the way. With one, the artifact says which model it is.

    python run.py --config=configs/serve.py
    python run.py --config=configs/serve.py --config.artifact=runs/.../artifact
    python run.py --config=configs/serve.py:of=efficientnet_lite0,block=16

    curl localhost:8000/v2/models/mobilenet_digits
    curl --data-binary @photo.jpg localhost:8000/classify

Clients speak the Open Inference Protocol, or send pictures. The page at http://localhost:8000/
shows the load and the ratio, 0 to 100 % of the MACs in 4 bits. On a CPU 4 bits gain no time; the
profile, which is measured at the start, says so. SIGTERM or Ctrl-C answers what waits and ends with
status 0. See docs/serving.md.
"""

from ml_collections import config_dict

from configs import common, deploy
from flexiq_jax.serving import server


def get_config(arg=None):
  """Returns the config; arguments: `of=CONFIG`, `block=CHANNELS`, and `runlocal` (no data)."""
  options = common.parse_arg(arg, of="digits", block=16, runlocal=False)
  small = ",runlocal" if options.runlocal else ""
  config = deploy.get_config(f"of={options.of},block={options.block}{small}")
  config.experiment = "serve"
  config.name = config.name.replace("deploy_", "serve_", 1)
  # Folder of an artifact; "" deploys the model of `of`, where that is not done yet.
  config.artifact = ""
  config.serve = config_dict.create(
    host="127.0.0.1",
    port=8000,
    # In URLs; "" takes the model's.
    name="",
    # What chooses the ratio: load, predictive, or fixed (at `ratio`).
    controller="load",
    ratio=0.0,
    # Seconds in which a request is to be answered: what controllers aim at.
    target=0.1,
    # Levels that run less than this share more examples a second than the one below cost accuracy
    # for nothing: controllers leave them out.
    gain=0.05,
    # Batch sizes that are compiled; the largest is the most that one request may hold.
    sizes=(1, 8, 32),
    # Seconds that the oldest request may wait for company.
    delay=0.0,
    # Examples that may wait; further ones are refused.
    queue=1024,
    # Seconds to the deadline: of requests of priority 1, 2, ..., and of all others (0: none).
    priorities=(),
    deadline=0.0,
    # Whether the page may hold the ratio by hand.
    hold=False,
    # Files: a latency profile ("": measured at the start), a results.csv with accuracies ("": the
    # artifact's own run) and the method of its rows, and names of the classes, one a line.
    profile="",
    accuracies="",
    method="deployed",
    classes="",
    # Seconds that what waits may take at the end.
    drain=30.0,
  )
  # See flexiq_jax/serving/server/limits.py; `batch` is the largest size.
  config.limits = common.settings(server.Limits())
  del config.limits.batch
  return config
