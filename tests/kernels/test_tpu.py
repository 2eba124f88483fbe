"""The TPU kernel: values in interpret mode, legality by compiling ahead of time for each TPU."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import kernels
from flexiq_jax.kernels import Activations, Epilogue, Requantize, Weights, reference, tpu
from tests.kernels.operands_for_test import operands, oracle, raw

SMALL = tpu.Tiles(m=64, n=128, k=128)
WIDE = "TPU v6 lite"  # of a matrix unit of 256 x 256, and erf in hardware


@pytest.mark.parametrize("boundary", [0, 1, 128, 200, 383, 384])
def test_sums_are_exact_at_every_boundary(boundary):
  x, w = operands(boundary, 64, 128, 3, 128, boundary)
  got = kernels.mixed_matmul(x, w, raw(128), implementation="tpu", interpret=True)
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(raw(128).correction))


@pytest.mark.parametrize(
  ("m", "n", "blocks", "block", "tiles"),
  [
    (1, 1, 1, 128, SMALL),
    (200, 300, 2, 128, SMALL),  # short tiles of rows, outputs that are padded
    (130, 256, 2, 256, SMALL),  # blocks of K finer than shift blocks
    (130, 256, 4, 128, tpu.Tiles(m=128, n=256, k=256)),  # and coarser
    (192, 256, 2, 128, tpu.Tiles(m=128, n=128, k=128)),
  ],
)
def test_odd_shapes_and_tiles(m, n, blocks, block, tiles):
  x, w = operands(m, m, n, blocks, block, 100)
  got = tpu.mixed_matmul(x, w, raw(n), tiles=tiles, interpret=True)
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(raw(n).correction))


@pytest.mark.parametrize("signed", [True, False])
def test_shifts_chosen_at_run_time(signed):
  x, w = operands(7, 70, 128, 2, 256, 300, signed=signed, dynamic=True)
  got = tpu.mixed_matmul(x, w, raw(128), interpret=True)
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(raw(128).correction))


@pytest.mark.parametrize("boundary", [0, 100, 128, 256, 300, 511, 512])
@pytest.mark.parametrize("k", [256, 512])
def test_sums_are_exact_in_several_runs_of_a_block(boundary, k):
  """Blocks of several shift blocks; on wide units sums wait in memory between them."""
  x, w = operands(boundary, 330, 256, 4, 128, boundary)
  tiles = tpu.Tiles(m=320, n=256, k=k)
  got = tpu.mixed_matmul(x, w, raw(256), tiles=tiles, kind=WIDE, interpret=True)
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(raw(256).correction))


@pytest.mark.parametrize("signed", [True, False])
def test_shifts_chosen_at_run_time_on_wide_units(signed):
  x, w = operands(7, 70, 128, 4, 128, 300, signed=signed, dynamic=True)
  got = tpu.mixed_matmul(x, w, raw(128), kind=WIDE, interpret=True)
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(raw(128).correction))


@pytest.mark.parametrize("boundary", [-5, 1000])
def test_boundaries_out_of_range_read_nothing_else(boundary):
  x, w = operands(0, 64, 128, 2, 128, 0 if boundary < 0 else 256)
  wrong = dataclasses.replace(x, boundary=jnp.int32(boundary))
  got = tpu.mixed_matmul(wrong, w, raw(128), interpret=True)
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(raw(128).correction))


def test_unused_precision_is_never_read():
  """Whole blocks of the precision that is not in use may hold anything."""
  x, w = operands(0, 64, 128, 3, 128, 128)
  run = lambda x: tpu.mixed_matmul(x, w, raw(128), tiles=SMALL, interpret=True)
  spoiled = dataclasses.replace(
    x, x8=x.x8.at[:, :128].set(77), x4=x.x4.at[:, 128:].set(jnp.int4(5))
  )
  np.testing.assert_array_equal(run(spoiled), run(x))


def test_one_program_for_all_boundaries():
  traces = []

  @jax.jit
  def run(x, w):
    traces.append(1)
    return tpu.mixed_matmul(x, w, raw(128), interpret=True)

  for boundary in (0, 100, 384):
    x, w = operands(1, 64, 128, 3, 128, boundary)
    np.testing.assert_array_equal(run(x, w), oracle(x, w) + np.asarray(raw(128).correction))
  assert len(traces) == 1


def test_vmap_over_activations():
  x, w = operands(2, 128, 128, 2, 128, 128)
  halves = Activations(
    x8=x.x8.reshape(2, 64, 256), x4=x.x4.reshape(2, 64, 256), boundary=x.boundary
  )
  run = lambda x8, x4: tpu.mixed_matmul(
    dataclasses.replace(halves, x8=x8, x4=x4), w, raw(128), interpret=True
  )
  got = jax.vmap(run)(halves.x8, halves.x4).reshape(128, 128)
  np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(raw(128).correction))


def epilogue(n: int, activation: str = "none", **changes) -> Epilogue:
  rng = np.random.default_rng(n)
  return Epilogue(
    scale=jnp.asarray(rng.uniform(2e-6, 1e-5, n), jnp.float32),
    correction=jnp.asarray(rng.integers(-1000, 1000, n), jnp.int32),
    bias=jnp.asarray(rng.normal(size=n), jnp.float32),
    activation=activation,
    **changes,
  )


@pytest.mark.parametrize("kind", ["TPU v5 lite", WIDE])
@pytest.mark.parametrize("out", ["float32", "bfloat16"])
@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "gelu", "gelu_tanh"])
def test_real_outputs(activation, out, kind):
  x, w = operands(3, 64, 128, 2, 128, 128)
  e = epilogue(128, activation, out=out)
  got = tpu.mixed_matmul(x, w, e, kind=kind, interpret=True)
  expected = reference.mixed_matmul(x, w, e)
  assert got.dtype == expected.dtype == jnp.dtype(out)
  as_float = lambda a: np.asarray(a.astype(jnp.float32))
  tolerance = 1e-5 if out == "float32" else 1e-2
  np.testing.assert_allclose(as_float(got), as_float(expected), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("erf", [False, True])
def test_gelu_is_exact(erf):
  y = np.linspace(-12, 12, 5001, dtype=np.float32)
  c, d = (math.sqrt(0.5), math.sqrt(2)) if erf else (math.sqrt(0.5 / math.log(2)),) * 2
  kernel = lambda ref, out: out.__setitem__(..., tpu.epilogues.gelu(ref[...] * c, erf) / d)
  shape = jax.ShapeDtypeStruct(y.shape, jnp.float32)
  got = jax.experimental.pallas.pallas_call(kernel, out_shape=shape, interpret=True)(y)
  exact = [0.5 * v * math.erfc(-v / math.sqrt(2)) for v in y.astype(np.float64)]
  # Interpret mode estimates reciprocals to eight bits; a TPU's twelve leave 1e-6.
  np.testing.assert_allclose(got, exact, atol=1e-5)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize(
  ("boundary", "granule"), [(0, 0), (130, 0), (0, 128), (256, 128), (384, 128), (130, 256)]
)
def test_requantized_outputs(signed, boundary, granule):
  check_requantized(signed, boundary, granule, 200, tiles=SMALL)


@pytest.mark.parametrize("k", [128, 384])  # blocks of one run and of three
@pytest.mark.parametrize("low", [0, 300, 384])
@pytest.mark.parametrize(
  ("signed", "boundary", "granule"), [(True, 130, 0), (False, 130, 384), (True, 384, 384)]
)
def test_requantizing_beside_the_last_block(k, low, signed, boundary, granule):
  """The last block's product in 4 bits, in 8, or in both."""
  tiles = tpu.Tiles(m=128, n=384, k=k)
  check_requantized(signed, boundary, granule, low, tiles=tiles, kind=WIDE)


def check_requantized(signed, boundary, granule, low, **how):
  """Codes of the kernel against the reference's, where the next layer reads them."""
  x, w = operands(4, 70, 384, 3, 128, low)
  rng = np.random.default_rng(0)
  e = epilogue(
    384,
    "relu" if not signed else "gelu",
    requantize=Requantize(
      scale=jnp.float32(0.02),
      boundary=jnp.int32(boundary),
      shift=jnp.asarray(rng.integers(0, 5, 384), jnp.int32),
      signed=signed,
      granule=granule,
    ),
  )
  got, expected = (
    tpu.mixed_matmul(x, w, e, interpret=True, **how),
    reference.mixed_matmul(x, w, e),
  )
  end = -(-boundary // granule) * granule if granule else 384
  start = boundary // granule * granule if granule else 0
  high = np.asarray(got.x8, int) - np.asarray(expected.x8)
  low = np.asarray(got.x4.astype(jnp.int8), int) - np.asarray(expected.x4.astype(jnp.int8))
  differing = np.concatenate([high[:, start:].ravel(), low[:, :end].ravel()])
  # A code may fall on the other side of a tie.
  assert np.abs(differing).max() <= 1 and (differing != 0).mean() <= 1e-4
  assert got.boundary == boundary


@pytest.mark.parametrize("field", ["m", "n", "k"])
def test_tiles_are_checked(field):
  with pytest.raises(ValueError, match=rf"tiles\.{field}: 100; a positive multiple of"):
    dataclasses.replace(SMALL, **{field: 100})


def test_shapes_without_a_kernel_are_refused_and_chosen_around():
  x, w = operands(0, 4, 6, 3, 8, 8)
  with pytest.raises(NotImplementedError, match="block, K: 8 and 24; the TPU kernel takes"):
    tpu.mixed_matmul(x, w, raw(6), interpret=True)
  assert kernels.choose_implementation(w, "tpu") == "reference"
  _, w = operands(0, 4, 6, 3, 128, 8)
  assert kernels.choose_implementation(w, "tpu") == "tpu"
  with pytest.raises(NotImplementedError, match=r"tiles\.k: 256 with K = 384"):
    tpu.mixed_matmul(*operands(0, 4, 128, 3, 128, 8), raw(128), tiles=tpu.Tiles(m=64, n=128, k=256))


def shapes(k, n):
  """Operands that are shapes alone."""
  of = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, dtype)
  x = Activations(of("int8", 4, k), of("int4", 4, k), of("int32"))
  w = (of("int8", k, n), of("int8", k // 2, n), of("int32", 1), of("int32", 1, n))
  return x, Weights(*w, block=k)


def test_kinds_of_tpus():
  """A program for no TPU in particular fits into the least memory, one for a TPU into its own."""
  run = lambda kind: jax.eval_shape(
    lambda x, w: kernels.mixed_matmul(
      *(x, w, raw(8192)), implementation="tpu", interpret=True, kind=kind
    ),
    *shapes(8192, 8192),
  )
  assert run("TPU v5 lite").shape == (4, 8192)
  for kind in (None, "TPU v5p", "TPU7x"):
    with pytest.raises(NotImplementedError, match="K = 8192 and N = 8192 do not fit into the 63 M"):
      run(kind)
  for kind in ("TPU v4", "v6e", "NVIDIA H100"):
    with pytest.raises(ValueError, match=f"kind: '{kind}' has no TPU kernel; one as 'TPU v6 lite'"):
      run(kind)


def test_tiles_that_do_not_fit_are_refused():
  tiles = tpu.Tiles(m=4096, n=1024, k=1024)
  run = lambda x, w: tpu.mixed_matmul(x, w, raw(8192), tiles=tiles, kind="TPU v6 lite")
  with pytest.raises(NotImplementedError, match="tiles: 4096 x 1024 and weights of K = 8192 and N"):
    jax.eval_shape(run, *shapes(8192, 8192))


@pytest.mark.parametrize(
  ("k", "n", "kind", "expected"),
  [
    (4096, 4096, "TPU v5p", "tpu"),  # VGG-16's second dense layer
    (8192, 8192, "TPU v5 lite", "tpu"),
    (8192, 8192, None, "reference"),
    (25088, 4096, "TPU v6 lite", "reference"),  # and its first
    (4096, 4096, "TPU v4", "reference"),  # no int8 products
    (4096, 4096, "TPU v9", "reference"),  # who knows
  ],
)
def test_what_no_kernel_is_known_to_run_is_left_to_the_reference(k, n, kind, expected):
  _, w = shapes(k, n)
  assert kernels.choose_implementation(w, "tpu", kind) == expected


@pytest.mark.parametrize("kind", ["TPU v5 lite", "TPU v5p", WIDE, "TPU7x"])
@pytest.mark.parametrize(("k", "n"), [(768, 3072), (4096, 4096), (12288, 512), (4608, 512)])
def test_chosen_tiles_fit_on_the_chip(kind, k, n):
  tiles = tpu.choose_tiles(25216, k, n, k, kind)
  whole = sweep(
    shape=(25216, k, tpu.up(n, tiles.n)),
    tiles=tiles,
    block=k,
    out="float32",
    dynamic=True,
    vectors=tuple((name, 1) for name in ("scale", "bias", "correction", "offsets", "shift")),
    wide=tpu.wide(kind),
  )
  assert whole.vmem + whole.spilled <= (128 if "lite" in kind else 63) * 2**20


@pytest.mark.parametrize(
  ("m", "k", "n", "granule", "expected"),
  [
    (25216, 768, 3072, 1536, (2048, 768)),  # strips as wide as the tile
    (25216, 768, 2304, 0, (2048, 768)),  # 1,152 columns leave a half of one pass empty
    (25216, 384, 1152, 0, (2048, 1152)),  # but all divisors of these do
    (1576, 768, 768, 0, (1600, 768)),
    (25, 128, 128, 0, (64, 128)),
    (25216, 12288, 512, 0, (896, 512)),  # rows of x that long are few
  ],
)
def test_tiles_of_wide_units(m, k, n, granule, expected):
  tiles = tpu.choose_tiles(m, k, n, 128, WIDE, granule=granule)
  assert (tiles.m, tiles.n) == expected


@pytest.mark.parametrize(
  ("k", "block", "expected"),
  [
    (3072, 3072, 1536),  # nothing but ends of shift blocks is a boundary
    (3072, 768, 768),
    (1536, 768, 768),
    (2048, 512, 512),
    (1536, 384, 768),  # two shift blocks: one alone is short for the unit
    (1024, 128, 512),
    (384, 384, 384),
    (1920, 640, 128),
  ],
)
def test_blocks_of_wide_units_end_where_boundaries_are(k, block, expected):
  assert tpu.choose_tiles(25216, k, 768, block, WIDE).k == expected


@pytest.mark.parametrize("kind", ["TPU v5 lite", WIDE])
@pytest.mark.parametrize(("m", "k", "n"), [(25216, 768, 3072), (1576, 384, 1152), (392, 640, 64)])
def test_chosen_tiles_fit(kind, m, k, n):
  tiles = tpu.choose_tiles(m, k, n, 128, kind)
  assert k % tiles.k == 0 and -(-n // 128) * 128 % tiles.n == 0 and tiles.m <= 2048


def sweep(**changes) -> tpu.Sweep:
  facts = {
    "shape": (256, 512, 1024),
    "tiles": tpu.Tiles(m=64, n=128, k=128),
    "block": 128,
    "activation": "none",
    "out": "bfloat16",
    "signed": None,
    "granule": 0,
    "dynamic": False,
    "vectors": (("scale", 1),),
    "interpret": False,
  }
  return tpu.Sweep(**facts | changes)


def test_bytes_follow_the_boundary():
  high, low = (tpu.traffic(sweep(), boundary) for boundary in (0, 512))
  assert (high.x, high.w) == (256 * 512, 512 * 1024)
  assert (low.x, low.w) == (high.x // 2, high.w // 2)
  assert high.y == low.y == 256 * 1024 * 2
  inside = tpu.traffic(sweep(), 200)  # block 1 is read in both precisions
  assert inside.w == 1024 * (256 // 2 + 384)


@pytest.mark.parametrize(("boundary", "high", "low"), [(0, 8, 1), (512, 4, 4), (1024, 1, 8)])
def test_requantized_bytes_count_the_tiles_that_leave(boundary, high, low):
  """One tile of the precision that nothing uses leaves a row of tiles, too."""
  moved = tpu.traffic(sweep(signed=True, granule=128), 0, boundary)
  assert moved.y == 256 * 128 * high + 256 * 64 * low


def test_weights_beyond_the_chip_are_refused():
  x, w = operands(0, 4, 128, 1, 128, 8)
  wide = lambda a, n: jnp.zeros((*a.shape[:-1], n), a.dtype)
  n = 2**20
  w = dataclasses.replace(
    w, w8=wide(w.w8, n), w4=wide(w.w4, n), w_shift=jnp.zeros((1, n), jnp.int32)
  )
  with pytest.raises(NotImplementedError, match="w: K = 128 and N = 1048576 do not fit into"):
    tpu.mixed_matmul(x, w, raw(n), interpret=True)
