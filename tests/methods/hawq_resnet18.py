"""HAWQ-v3's program for ResNet-18, and the bits that it published.

Inputs: repository Zhen-Dong/HAWQ, file ILP.ipynb, section "ResNet18": Hessian traces and weight
errors, parameters, MACs, latencies measured on a T4. Answers: bit_config.py of that repository,
entries bit_config_resnet18_{modelsize,bops,latency}_{0.25,0.5,0.75}.

First convolution and classifier stay in 8 bits and are left out. Layers 0 to 3 are the first stage;
then each stage has conv1, conv2 and the shortcut of its first unit, conv1 and conv2 of its second.
"""

import numpy as np

NAMES = tuple(f"stage1.unit{u}.conv{c}" for u in (1, 2) for c in (1, 2)) + tuple(
  f"stage{s}.{layer}"
  for s in (2, 3, 4)
  for layer in ("unit1.conv1", "unit1.conv2", "unit1.identity", "unit2.conv1", "unit2.conv2")
)
TIED = tuple((f"stage{s}.unit1.conv1", f"stage{s}.unit1.identity") for s in (2, 3, 4))
BITS = (4, 8)

# fmt: off
MEAN_TRACE = np.array([
  .06857826, .03162379, .03298575, .01205663, .02222431, .00596336, .06931772, .00807129, .00372905,
  .00530698, .00209011, .00737569, .00210454, .00151197, .00158041, .00078146, .00451841, .00098745,
  .00072944,
])
SQUARED_ERROR = np.array([  # rows: 4 and 8 bits
  [6.7430, 3.9691, 3.3281, 2.6796, 4.7277, 10.5966, .6827, 9.0942, 4.8857, 10.7599, 21.7546, .8603,
   14.5324, 10.9651, 18.7706, 36.4044, 3.1572, 29.6994, 17.4016],
  [.0235, .0125, .0102, .0082, .0145, .0344, .0023, .0287, .0148, .0333, .0682, .0027, .0448, .0336,
   .0576, .1130, .0102, .0947, .0532],
]).T
PARAMETERS = np.array([
  *[36864] * 4, 73728, 147456, 8192, 147456, 147456, 294912, 589824, 32768, 589824, 589824, 1179648,
  2359296, 131072, 2359296, 2359296,
])
MACS = np.array([115605504] * 4 + [57802752, 115605504, 6422528, 115605504, 115605504] * 3)
LATENCY = np.array([  # rows: 4 and 8 bits
  [.21094404, .21092674, .21104113, .21086851, .13642465, .19167506, .02532183, .19148203,
   .19142914, .11395316, .20556011, .01917474, .20566918, .20566509, .13185102, .22287786,
   .01790088, .22304611, .22286099],
  [.36189111, .36211718, .31141909, .30454471, .19184896, .38948934, .0334169, .38904905, .3892859,
   .19134735, .34307431, .02802354, .34313329, .34310756, .21117103, .37376585, .02896843,
   .37398187, .37405185],
]).T
# fmt: on

_LOW = {0, 1, 2, 4, 6}
_HIGH = {*range(8), *range(9, 13), 14, 16, 17}

# (limited cost, share of the way from 4 to 8 bits) -> (layers in 8 bits, objective less that of all
# layers in 4 bits).
PUBLISHED = {
  ("size", 0.25): ({*range(14)}, -1.1894),
  ("size", 0.5): ({*range(15), 16}, -1.2332),
  ("size", 0.75): ({*range(13), *range(14, 18)}, -1.2743),
  ("bops", 0.25): (_LOW, -0.8473),
  ("bops", 0.5): ({0, 1, 2, 4, 5, 6, 7, 9, 10, 11}, -1.0920),
  ("bops", 0.75): (_HIGH, -1.2277),
  ("latency", 0.25): (_LOW, -0.8473),
  ("latency", 0.5): ({*range(5), 6, 7, 9, 10, 11, 14, 16}, -1.1050),
  ("latency", 0.75): (_HIGH, -1.2277),
}
