"""Sensitivities against plain forward passes of the simulated model, and their resume."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax.methods import layerwise
from flexiq_jax.methods.clado import matrix, suffixes
from flexiq_jax.methods.clado.losses import LayerLosses
from flexiq_jax.methods.examples import Examples
from flexiq_jax.methods.layerwise import FLOAT
from flexiq_jax.methods.program import Choices
from flexiq_jax.network import Network
from flexiq_jax.quant import calibration
from flexiq_jax.runs.checkpoint import Checkpoints
from tests.methods import models_for_test as models
from tests.methods.clado.losses_for_test import average

BITS = (2, 8)
NAMES = ("depth", "conv", "down", "head")  # layers between and before them stay float


@functools.cache
def sensitivity(names=NAMES, loss="cross_entropy", block=16, bits=BITS):
  made, stacks = models.made(), models.layerwise_model(bits).stacks
  return LayerLosses(made.network, stacks, names, loss=loss, block=block)


@functools.cache
def measured(**options):
  return sensitivity(**options).measure(models.made().examples)


def loss_of(bits, loss):
  """Mean loss of one plan, from one forward pass, in NumPy."""
  made, model = models.made(), models.layerwise_model(BITS)
  z, reference = (
    np.asarray(model.simulated({**dict.fromkeys(models.NAMES, FLOAT), **b}, made.images), float)
    for b in (bits, {})
  )
  log_p, log_p0 = (a - np.log(np.exp(a).sum(axis=1, keepdims=True)) for a in (z, reference))
  if loss == "kl":
    return (np.exp(log_p0) * (log_p0 - log_p)).sum(axis=1).mean()
  return -log_p[np.arange(len(z)), made.labels].mean()


@pytest.mark.parametrize(
  ("names", "loss"), [(NAMES, "cross_entropy"), (models.NAMES, "cross_entropy"), (NAMES, "kl")]
)
def test_losses_are_those_of_plain_forward_passes(names, loss):
  found = measured(names=names, loss=loss)
  options = [*itertools.product(names, BITS)]
  singles = [loss_of(dict([k]), loss) for k in options]
  close = functools.partial(np.testing.assert_allclose, rtol=2e-4, atol=1e-6)
  close(found.base, loss_of({}, loss))
  close(found.singles, singles)
  for (i, k), (j, m) in itertools.combinations(enumerate(options), 2):
    if k[0] == m[0]:
      assert np.isnan(found.pairs[i, j])
    else:
      close(found.pairs[i, j], loss_of(dict([k, m]), loss), err_msg=f"{k} {m}")
  assert np.ptp(singles) > 100 * 2e-4 * np.abs(singles).max()  # that the tolerance tells apart


def test_matrix_predicts_the_measured_pairs():
  found = measured()
  choices = Choices.create(NAMES, BITS, {})
  g = matrix.matrix(choices, found)
  x = np.zeros(choices.total)
  x[[0, 7]] = 1  # depth at 2 bits, head at 8
  assert x @ g @ x / 2 == pytest.approx(found.pairs[0, 7] - found.base)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_blocks_of_images_average_to_all_of_them(loss):
  whole, parts = measured(loss=loss), measured(loss=loss, block=5)  # 5, 5, 5, and 1 of 5
  for field in ("base", "singles", "pairs"):
    a, b = getattr(whole, field), getattr(parts, field)
    np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6)
  made, five = models.made(), sensitivity(loss=loss, block=5)
  pieces = [
    five.measure(Examples(made.images[rows], made.labels[rows]))
    for rows in (slice(5), slice(5, None))
  ]
  mean = average(pieces, [5, 11])
  np.testing.assert_allclose(mean.singles, parts.singles, rtol=1e-12)
  np.testing.assert_allclose(mean.pairs, parts.pairs, rtol=1e-12)


def test_pieces_compile_once():
  measured()
  own = sensitivity()._suffixes
  before = own.traces
  made = models.made()
  sensitivity().measure(Examples(made.images[::-1], made.labels))
  assert own.traces == before == 2 * len(NAMES) - 1  # no pair has the first layer as its second


def test_cost_counts_what_follows_the_second_layer():
  layers = models.made().network.layers
  macs = [layer.macs for layer in layers]
  tail = {layer.name: sum(macs[i:]) / sum(macs) for i, layer in enumerate(layers)}
  b = len(BITS)
  expected = 2.0 + b * sum(tail[name] for name in NAMES)
  expected += b * b * sum(tail[second] for _, second in itertools.combinations(NAMES, 2))
  assert sensitivity().forwards == pytest.approx(expected)
  assert sensitivity().plain_forwards == 1 + 8 + 4 * 6
  assert sensitivity().describe(100).startswith("33 losses of 4 layers, alone and in pairs, on 100")


def without_pairs(**options):
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  return LayerLosses(made.network, stacks, NAMES, block=5, pairs=False, **options)


@pytest.mark.parametrize("loss", ["cross_entropy", "kl"])
def test_layers_alone(loss):
  made, alone = models.made(), without_pairs(loss=loss)
  whole, found = measured(loss=loss, block=5), alone.measure(made.examples)
  assert found.base == whole.base
  np.testing.assert_array_equal(found.singles, whole.singles)
  assert np.isnan(found.pairs).all()
  # The pieces that compare pairs are not compiled.
  assert alone._suffixes.traces == len(NAMES)
  tails = alone._suffixes.tails
  assert alone.forwards == pytest.approx(2 + len(BITS) * tails.sum())
  assert alone.describe(16).startswith("9 losses of 4 layers, alone, on 16")


# Checkpoints.


class Killed(Exception):
  pass


@pytest.mark.parametrize("rows", [1, 4, 6])
def test_goes_on_where_it_was_killed(rows, tmp_path):
  """Blocks of 4 rows: inside the first, at its end, inside the second."""
  made, eight = models.made(), sensitivity(block=8)
  expected = eight.measure(made.examples)
  shares = []

  def kill(share):
    shares.append(share)
    if len(shares) == rows:
      raise Killed

  with Checkpoints(tmp_path) as kept:
    with pytest.raises(Killed):
      eight.measure(made.examples, checkpoints=kept, every=0, report=kill)
    assert kept.steps()[-1] == rows
  lines = []
  with Checkpoints(tmp_path) as kept:
    found = eight.measure(made.examples, checkpoints=kept, report=shares.append, show=lines.append)
    assert kept.steps()[-1] == 8
  assert len(shares) == 8  # no row twice
  assert shares == sorted(shares) and shares[-1] == pytest.approx(1)
  assert lines[0].endswith(f"{shares[rows - 1]:.0%} is done")
  assert found.base == expected.base
  np.testing.assert_array_equal(found.singles, expected.singles)
  np.testing.assert_array_equal(found.pairs, expected.pairs)
  with Checkpoints(tmp_path) as kept:  # nothing is left to do
    again = eight.measure(made.examples, checkpoints=kept, report=shares.append)
  assert len(shares) == 8
  np.testing.assert_array_equal(again.pairs, expected.pairs)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
  folder, made = tmp_path_factory.mktemp("kept"), models.made()
  with Checkpoints(folder) as kept:
    sensitivity().measure(made.examples, checkpoints=kept)
  return folder


def other(what):
  """A measurement that differs from the checkpoint's in one thing, and its data."""
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  network, images, labels = made.network, made.images, made.labels
  names, options = NAMES, {"loss": "cross_entropy", "block": 16}
  if what == "model":
    params = jax.tree.map(lambda a: a * np.float32(1.0001), network.params)
    network = models.changed(params=params)
  elif what == "quantizer":
    stacks = made.stacks(BITS, activation_bits=8)
  elif what == "data set":
    labels = np.roll(labels, 1)
  elif what == "images":
    images = images[:15]
    labels = labels[:15]
  elif what == "layers":
    names = ("stem", *NAMES[1:])
  elif what == "more layers":
    names = models.NAMES
  elif what == "pairs":
    options["pairs"] = False
  else:
    options.update({"loss": "kl"} if what == "loss" else {"block": 8})
  return LayerLosses(network, stacks, names, **options), Examples(images, labels)


@pytest.mark.parametrize(
  ("what", "message"),
  [
    ("model", "sensitivities of another model;"),
    ("quantizer", "sensitivities of another quantizer;"),
    ("data set", "sensitivities of another data set;"),
    ("images", "sensitivities of another data set and block;"),
    ("layers", "sensitivities of another layers;"),
    ("loss", "sensitivities of another loss;"),
    ("block", "sensitivities of another block;"),
    ("pairs", "sensitivities of another pairs;"),
    ("more layers", "If it is of other layers or bit widths: remove"),
  ],
)
def test_checkpoints_of_something_else_are_refused(what, message, checkpoint):
  measurement, examples = other(what)
  with Checkpoints(checkpoint) as kept, pytest.raises(ValueError, match=message) as error:
    measurement.measure(examples, checkpoints=kept)
  assert str(checkpoint) in str(error.value)


def test_checkpoints_without_pairs_are_none_of_pairs(tmp_path):
  made = models.made()
  with Checkpoints(tmp_path) as kept:
    without_pairs().measure(made.examples, checkpoints=kept)
  with Checkpoints(tmp_path) as kept, pytest.raises(ValueError, match="of another pairs;"):
    sensitivity(block=5).measure(made.examples, checkpoints=kept)


# Refusals.


def test_losses_that_are_not_finite_are_refused():
  made = models.made()
  images = made.images.copy()
  images[3, 0, 0, 0] = np.nan
  with pytest.raises(ValueError, match="losses: not finite with layer depth quantized"):
    sensitivity().measure(Examples(images, made.labels))


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"names": ("haed",)}, "names: no layer 'haed'; closest names: head"),
    ({"names": ()}, "names: .*once, in execution order"),
    ({"names": ("head", "conv")}, "names: .*once, in execution order"),
    ({"names": ("conv", "conv")}, "names: .*once, in execution order"),
    ({"loss": "l2"}, "loss: 'l2' is not one of cross_entropy, kl"),
    ({"block": 0}, "block: 0"),
  ],
)
def test_wrong_arguments_are_refused(options, message):
  with pytest.raises(ValueError, match=message):
    sensitivity(**options)


def test_stacks_of_another_model_are_refused():
  made, stacks = models.made(), models.made().stacks((8,))
  fewer = layerwise.Stacks(stacks.layers[1:], stacks.names[1:], (8,), (8,))
  with pytest.raises(ValueError, match="stacks: of other layers than the model has; stem"):
    LayerLosses(made.network, fewer, models.NAMES)


def test_results_that_are_no_logits_are_refused():
  made, stacks = models.made(), models.layerwise_model(BITS).stacks
  apply = lambda params, x: made.network.apply(params, x)[:, None]
  measurement = LayerLosses(models.changed(apply=apply), stacks, models.NAMES)
  with pytest.raises(ValueError, match=r"result has shape \(16, 1, 5\); expected logits"):
    measurement.measure(made.examples)


def test_divergence_is_never_negative_and_zero_for_equal_logits():
  rng = np.random.default_rng(0)
  z = jnp.asarray(rng.normal(size=(50, 7)) * 5, jnp.float32)
  assert not np.asarray(suffixes.divergence(z, z)).any()
  near = suffixes.divergence(z + jnp.asarray(rng.normal(size=z.shape) * 1e-4, jnp.float32), z)
  assert (np.asarray(near) >= 0).all()


def test_recovers_the_hessian_of_a_loss_that_is_exactly_quadratic(monkeypatch):
  """Three layers side by side: z = sum x_i W_i, loss |z|^2, so G_ij = 2 e_i . e_j off the diagonal.

  e_i is what quantizing layer i changes in z. On the diagonal stands the whole increase, twice, of
  which 2 |e_i|^2 is the curvature's and the rest is the slope's.
  """
  monkeypatch.setitem(suffixes.LOSSES, "squares", lambda z, labels: jnp.square(z).sum(axis=-1))
  rng = np.random.default_rng(0)
  params = {f"w{i}": jnp.asarray(rng.normal(size=(6, 3)), jnp.float32) for i in range(3)}
  x = rng.normal(size=(10, 18)).astype(np.float32)

  def apply(params, x):
    return sum(x[:, 6 * i : 6 * i + 6] @ params[f"w{i}"] for i in range(3))

  network = Network(apply, params, x[:1])
  values = calibration.observe_values(network.apply, network.params, [x])
  ranges = calibration.RangeSettings()
  stacks = layerwise.create(network.layers, network.weights, values, ranges, bits=BITS)
  measurement = LayerLosses(network, stacks, stacks.names, loss="squares", block=4)
  choices = Choices.create(measurement.names, BITS, {})
  g = matrix.matrix(choices, measurement.measure(Examples(x, np.zeros(10, int))))
  model = layerwise.Layerwise(network.apply, network.params, stacks)
  floats = dict.fromkeys(stacks.names, FLOAT)
  base = np.asarray(model.exact(floats, x), np.float64)
  effects = np.stack(
    [
      np.asarray(model.exact({**floats, name: b}, x), np.float64) - base
      for name, b in itertools.product(stacks.names, BITS)
    ]
  )
  expected = 2 * np.einsum("knc,mnc->km", effects, effects) / len(x)
  expected[choices.layer[:, None] == choices.layer] = 0
  slope = 2 * np.einsum("nc,knc->k", base, effects) / len(x)
  expected += np.diag(2 * (np.square(effects).sum(axis=(1, 2)) / len(x) + slope))
  np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())
