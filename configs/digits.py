"""Trains a small ResNet on scikit-learn's digits and quantizes it: nothing to download.

The demonstration of the whole pipeline, on 1,352 training and 445 test images of 8 x 8 pixels. Not
an experiment of the paper: the task is easy, so little accuracy is lost anywhere.

    python run.py --config=configs/digits.py --workdir=runs/digits

About a minute on two CPU cores. Float top-1 about 99 %.
"""

from configs import common


def get_config(arg=None):
  """Returns the config; the argument `runlocal` makes it a few seconds long."""
  options = common.parse_arg(arg, runlocal=False)
  config = common.defaults("digits", "resnet8")
  config.weights = "train"
  config.data.name = config.calibration.name = "digits"
  config.train.update(
    epochs=20, batch_size=64, learning_rate=0.1, warmup=2.0, weight_decay=5e-4, augmentation="shift"
  )
  config.batch_size = 445
  config.variants = ("naive", "range")
  if options.runlocal:
    config.name += "_runlocal"
    config.train.update(epochs=2, warmup=1.0)
    config.data.limit = 100
    config.batch_size = 100
    config.calibration.images = 64
    config.random_seeds = (0,)
    config.ratios = (0.0, 0.5, 1.0)
    config.variants = ()
  return config
