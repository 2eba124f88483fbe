"""Trains a small network on distorted digits and quantizes it: nothing to download.

The demonstration of the whole method. The digits are scikit-learn's, turned, moved, covered and
noisy: 5,408 training and 4,450 test images of 8 x 8 pixels, ten of each of the 445 test digits. The
network is a MobileNetV2 of four blocks, a kind that is hard to quantize. Not an experiment of the
paper.

    python run.py --config=configs/digits.py --workdir=runs/digits
    python run.py --config=configs/digits.py:easy      # ResNet-8 on the digits as they are

About a minute on two CPU cores. Seed 0: float and INT8 79.5 %, INT4 76.5 %; with 50 and 75 % of the
MACs in 4 bits 78.9 and 78.4 %, where random orders have 78.1 ± 0.4 and 77.2 ± 0.3 %.
"""

from configs import common


def get_config(arg=None):
  """Returns the config; arguments: `easy` (a task where little is lost), `runlocal` (seconds)."""
  options = common.parse_arg(arg, runlocal=False, easy=False)
  if options.easy or options.runlocal:
    return _easy(options.runlocal)
  config = common.defaults("digits", "mobilenet_digits")
  config.weights = "train"
  config.data.name = config.calibration.name = "distorted_digits"
  config.train.update(
    epochs=10, batch_size=128, learning_rate=0.2, warmup=1.0, weight_decay=5e-4, augmentation="none"
  )
  config.train.held_out = 0.0
  config.batch_size = 890
  config.variants = ("naive",)
  return config


def _easy(small: bool):
  """ResNet-8 on the 1,352 training and 445 test digits, float top-1 about 99 %."""
  config = common.defaults("digits_easy", "resnet8")
  config.weights = "train"
  config.data.name = config.calibration.name = "digits"
  config.train.update(
    epochs=20, batch_size=64, learning_rate=0.1, warmup=2.0, weight_decay=5e-4, augmentation="shift"
  )
  config.batch_size = 445
  config.variants = ("naive", "range")
  if small:
    config.name = "digits_runlocal"
    config.train.update(epochs=2, warmup=1.0)
    config.data.limit = 100
    config.batch_size = 100
    config.calibration.images = 64
    config.random_seeds = (0,)
    config.ratios = (0.0, 0.5, 1.0)
    config.variants = ()
  return config
