"""Fits shifts and mean codes anew to changed weights and scales; order and groups stay."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from flexiq_jax.adaptive import AdaptiveModel
from flexiq_jax.quant import calibration, grouping, straight

Array = Any


def refit(
  model: AdaptiveModel,
  params: Any,
  scales: Mapping[str, straight.Scales],
  batches: Iterable[Array],
  run: Any = None,
) -> AdaptiveModel:
  """A model with other weights and scales, its shifts and mean codes fitted to them.

  Args:
    model: gives order, groups, shift blocks and settings.
    params: the (folded) parameters, as `model.network.params`.
    scales: layer name -> scales, for all layers.
    batches: calibration inputs `[B, ...]`; a pass of the new 8-bit model is made over them.
    run: see `calibration.observe_codes`.
  """
  network = model.network.with_params(params)
  base = {
    layer.name: straight.quantize_layer(
      *(layer, network.weights[layer.name], scales[layer.name]), model.model[layer.name].signed
    )
    for layer in network.layers
  }
  codes = calibration.observe_codes(
    *(network.apply, network.params, base, batches), platform=network.platform, run=run
  )
  cuts = {
    name: grouping.reshift(
      *(network.layer(name), base[name], codes[name], cut.channels, cut.block, model.settings)
    )
    for name, cut in model.cuts.items()
  }
  return dataclasses.replace(
    model,
    network=network,
    model=grouping.lower_layers(network.layers, base, cuts, model.settings),
    cuts=cuts,
    drops={},  # not measured
    w_scales={name: s.w for name, s in scales.items()},
  )
