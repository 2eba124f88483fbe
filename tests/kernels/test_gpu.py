"""The Hopper kernel: values in the interpreter, legality by lowering for CUDA; no GPU needed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexiq_jax import kernels
from flexiq_jax.kernels import Activations, Epilogue, Requantize, Weights, gpu, reference
from flexiq_jax.kernels.gpu.tiling import SHARED, Tiles, choose_tiles
from tests import targets_for_test as targets
from tests.kernels.gpu_for_test import interpreter, require_hopper
from tests.kernels.operands_for_test import operands, oracle, raw
from tests.marks_for_test import slow

SMALL = Tiles(m=64, n=64, groups=1)
# (K, N) of layers, at the rows of a batch of 8: DeiT-S, ViT-B, and ResNet-50's convolutions as
# matmuls (1x1 at 14 x 14, 3x3 at 7 x 7, and the narrowest).
DEIT_S = [(384, 1152), (384, 384), (384, 1536), (1536, 384)]
VIT_B = [(768, 2304), (768, 3072), (3072, 768)]
RESNET_50 = [(1024, 256), (4608, 512), (64, 64), (256, 1024)]
SHAPES = [(8 * 197, *s) for s in DEIT_S + VIT_B] + [(8 * 196, *s) for s in RESNET_50]


@functools.cache
def compiled(tiles):
  mixed = functools.partial(gpu.mixed_matmul, tiles=tiles, interpret=interpreter(tiles.groups))
  return jax.jit(mixed)


def run(x, w, epilogue, tiles=SMALL):
  return compiled(tiles)(x, w, epilogue)


def check_sum(x, w, tiles=SMALL):
  epilogue = raw(w.w8.shape[1], 1)
  expected = oracle(x, w) + np.asarray(epilogue.correction)
  np.testing.assert_array_equal(run(x, w, epilogue, tiles), expected)


def test_every_kind_of_boundary_in_one_executable():
  traces = []

  @jax.jit
  def call(x, w, epilogue):
    traces.append(1)
    return gpu.mixed_matmul(x, w, epilogue, tiles=SMALL, interpret=interpreter())

  for boundary in (0, 1, 128, 256):
    x, w = operands(boundary, 64, 64, 4, 64, boundary)
    expected = oracle(x, w) + np.asarray(raw(64).correction)
    np.testing.assert_array_equal(call(x, w, raw(64)), expected)
  assert len(traces) == 1


@pytest.mark.parametrize(
  ("m", "n", "blocks", "block", "tiles"),
  [
    slow(5, 7, 1, 64, SMALL, id="less than one tile of anything"),
    pytest.param(65, 130, 3, 64, Tiles(m=64, n=192, groups=1), id="one row and columns over"),
    pytest.param(64, 128, 5, 128, Tiles(m=64, n=128), id="two groups, more tiles than buffers"),
    slow(100, 256, 2, 192, Tiles(m=128, n=256, buffers=3), id="large tiles"),
    slow(64, 64, 1, 512, SMALL, id="one shift block"),
  ],
)
def test_sums_at_odd_shapes(m, n, blocks, block, tiles):
  check_sum(*operands(m, m, n, blocks, block, blocks * block // 2 + 3), tiles)


def test_tiles_of_the_other_precision_are_not_read():
  """Nonsense where the operand of a tile is not in use would show in the sums if it were read."""
  rng = np.random.default_rng(0)
  x, w = operands(0, 64, 64, 3, 128, 200)
  prepared = gpu.prepare(w)
  low, high = (rng.integers(-128, 128, (64, 384)).astype(np.int8) for _ in range(2))
  low[:, 200:256], high[:, 128:200] = 0, 0

  @jax.jit
  def sums(low, high):
    return gpu.hopper.mixed(
      x.boundary[None],
      low,
      high,
      prepared.w4,
      prepared.w8,
      prepared.shift,
      (jnp.zeros(64, jnp.int32),),
      finish=lambda acc, zero: (acc + zero,),
      dtypes=("int32",),
      tiles=SMALL,
      interpret=interpreter(),
    )[0]

  got = sums(low, high)
  low[:, 256:], high[:, :128] = 0, 0
  np.testing.assert_array_equal(got, sums(low, high))
  w4 = np.asarray(kernels.unpack(w.w4)).astype(np.int64) << np.repeat(w.w_shift, 128, axis=0)
  expected = low.astype(np.int64) @ w4 + high.astype(np.int64) @ np.asarray(w.w8)
  np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("signed", [True, slow(False)])
def test_sums_with_shifts_chosen_at_run_time(signed):
  for boundary in (100, 256):
    check_sum(*operands(boundary, 64, 64, 2, 128, boundary, signed=signed, dynamic=True))


def test_extreme_codes_do_not_overflow():
  """The largest magnitudes everywhere: every byte of a widened word at its limits."""
  x, w = operands(0, 64, 64, 2, 128, 200)
  low = np.arange(256) < 200
  x = dataclasses.replace(
    x,
    x8=jnp.asarray(np.where(low, 0, np.full((64, 256), -128)), jnp.int8),
    x4=jnp.asarray(np.where(low, np.full((64, 256), -8), 0), jnp.int8).astype(jnp.int4),
  )
  for code in (-8, 7):
    codes = jnp.full((256, 64), code).at[::3].set(-8)
    full = dataclasses.replace(
      w,
      w8=jnp.full_like(w.w8, -128),
      w4=kernels.pack(codes),
      w_shift=jnp.full_like(w.w_shift, 4),
      x_shift=jnp.full_like(w.x_shift, 4),
    )
    check_sum(x, full)


def test_prepared_weights_give_the_same():
  x, w = operands(2, 64, 50, 3, 64, 100)
  prepared = gpu.prepare(w)
  assert prepared.w8.shape == (64, 256) and prepared.w4.shape == (64, 32)
  assert prepared.w4.nbytes * 2 == prepared.w8.nbytes
  epilogue = raw(50)
  np.testing.assert_array_equal(run(x, prepared, epilogue), run(x, w, epilogue))


@pytest.mark.parametrize("activation", ["none", slow("relu"), slow("relu6"), "gelu", "gelu_tanh"])
def test_epilogue(activation):
  x, w = operands(3, 64, 64, 4, 64, 130)
  rng = np.random.default_rng(0)
  epilogue = Epilogue(
    scale=jnp.asarray(rng.uniform(1e-6, 2e-5, 64), jnp.float32),
    correction=jnp.asarray(rng.integers(-9999, 9999, 64), jnp.int32),
    bias=jnp.asarray(rng.normal(size=64), jnp.float32),
    activation=activation,
  )
  expected = np.asarray(reference.mixed_matmul(x, w, epilogue))
  assert np.abs(expected).max() > 1
  np.testing.assert_allclose(run(x, w, epilogue), expected, rtol=1e-5, atol=1e-5)


def test_epilogue_in_bfloat16_without_a_bias():
  x, w = operands(3, 64, 128, 4, 64, 130)
  epilogue = Epilogue(
    scale=jnp.full(128, 1e-5, jnp.float32), correction=jnp.zeros(128, jnp.int32), out="bfloat16"
  )
  got = run(x, w, epilogue, Tiles(m=64, n=128, groups=1))
  assert got.dtype == jnp.bfloat16
  np.testing.assert_array_equal(got, reference.mixed_matmul(x, w, epilogue))


@pytest.mark.parametrize("signed", [True, False])
def test_requantized_results(signed):
  n = 128 if signed else 150
  x, w = operands(4, 64, n, 4, 64, 130)
  shift = jnp.asarray(np.random.default_rng(0).integers(0, 5, n), jnp.int32)
  epilogue = Epilogue(
    scale=jnp.full(n, 1e-5, jnp.float32),
    correction=jnp.zeros(n, jnp.int32),
    activation="none" if signed else "relu",
    requantize=Requantize(
      scale=jnp.float32(0.02), boundary=jnp.int32(70), shift=shift, signed=signed
    ),
  )
  tiles = Tiles(m=64, n=128 if signed else 192, groups=1)
  got, expected = run(x, w, epilogue, tiles), reference.mixed_matmul(x, w, epilogue)
  assert isinstance(got, Activations) and isinstance(expected, Activations)
  assert got.boundary == 70
  np.testing.assert_array_equal(got.x8, expected.x8)
  np.testing.assert_array_equal(got.x4.astype(jnp.int8), expected.x4.astype(jnp.int8))
  assert got.x8.any() and got.x4.astype(jnp.int8).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [(50, 384, 384), (1576, 768, 3072), (300, 64, 100)])
def test_sums_on_hardware(m, k, n, dynamic):
  require_hopper()
  for boundary in (0, k // 2 + 3, k):
    x, w = operands(boundary, m, n, k // 64, 64, boundary, signed=not dynamic, dynamic=dynamic)
    epilogue = raw(n)
    got = jax.jit(gpu.mixed_matmul)(x, gpu.prepare(w), epilogue)
    np.testing.assert_array_equal(got, oracle(x, w) + np.asarray(epilogue.correction))


def avals(m, k, n, dynamic=False, requantize=False, **epilogue):
  """Shapes of operands, nothing allocated; weights as `prepare` leaves them."""
  array = jax.ShapeDtypeStruct
  k = -(-k // 128) * 128
  x = Activations(
    x8=array((m, k), jnp.int8),
    x4=array((m, k), jnp.int4),
    boundary=array((), jnp.int32),
    row_shift=array((m, k // 128), jnp.int32) if dynamic else None,
  )
  w = Weights(
    w8=array((k, n), jnp.int8),
    w4=array((k // 2, n), jnp.int8),
    x_shift=array((k // 128,), jnp.int32),
    w_shift=array((k // 128, n), jnp.int32),
    block=128,
    offset=8 if dynamic else 0,
  )
  following = Requantize(
    scale=array((), jnp.float32), boundary=array((), jnp.int32), shift=array((n,), jnp.int32)
  )
  return (
    x,
    jax.eval_shape(gpu.prepare, w),
    Epilogue(
      scale=array((n,), jnp.float32),
      correction=array((n,), jnp.int32),
      bias=array((n,), jnp.float32),
      requantize=following if requantize else None,
      **epilogue,
    ),
  )


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
def test_lowers_for_cuda(m, k, n):
  lowered = jax.jit(gpu.mixed_matmul).trace(*avals(m, k, n, out="bfloat16"))
  text = lowered.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") == 1


@pytest.mark.parametrize("activation", ["none", "relu", "relu6", "gelu", "gelu_tanh"])
def test_epilogues_lower_for_cuda(activation):
  arguments = avals(1576, 384, 1536, requantize=True, activation=activation)
  jax.jit(gpu.mixed_matmul).trace(*arguments).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("out", ["float32", "int32"])
def test_dynamic_shifts_lower_for_cuda(out):
  arguments = avals(1576, 384, 1536, dynamic=True, out=out)
  jax.jit(gpu.mixed_matmul).trace(*arguments).lower(lowering_platforms=("cuda",))


def test_exports_for_cuda():
  exported = jax.export.export(
    jax.jit(gpu.mixed_matmul),
    platforms=["cuda"],
    disabled_checks=[jax.export.DisabledSafetyCheck.custom_call("mosaic_gpu_v2")],
  )
  whole = exported(*avals(1576, 384, 384, out="bfloat16"))
  assert whole.platforms == ("cuda",)
  assert [a.shape for a in whole.out_avals] == [(1576, 384)]


@pytest.mark.aot
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("m", "k", "n"), [SHAPES[0], SHAPES[5], (50, 384, 384)])
def test_compiles_for_an_h100(m, k, n, dynamic):
  """Down to machine code: registers and shared memory suffice."""
  arguments = targets.get("h100").placed(
    avals(m, k, n, dynamic=dynamic, requantize=dynamic, activation="gelu", out="bfloat16")
  )
  assert "mosaic_gpu" in jax.jit(gpu.mixed_matmul).lower(*arguments).compile().as_text()


@pytest.mark.parametrize(("m", "k", "n"), [*SHAPES, (1, 384, 1000), (128 * 197, 768, 3072)])
def test_chosen_tiles_fit(m, k, n):
  del k
  tiles = choose_tiles(m, -(-n // 64) * 64)
  assert -(-n // 64) * 64 % tiles.n == 0
  assert tiles.shared_bytes <= SHARED
  assert tiles.m < m + 64, "no tile of which most rows are padding"


def test_large_layers_get_large_tiles():
  assert choose_tiles(128 * 197, 3072) == Tiles(m=128, n=256, groups=2, buffers=4)
  assert choose_tiles(50, 384).m == 64


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"m": 96}, "tiles.m: 96"),
    ({"n": 96}, "tiles.n: 96"),
    ({"n": 128, "groups": 3}, "tiles.groups: 3"),
    ({"buffers": 1}, "tiles.buffers: 1"),
    ({"m": 256, "n": 256}, "tiles.m, tiles.n: 256 x 128 sums"),
  ],
)
def test_tiles_that_no_kernel_has_are_refused(fields, match):
  with pytest.raises(ValueError, match=match):
    Tiles(**{"m": 64, "n": 128, **fields})


def test_what_the_kernel_cannot_take_is_refused():
  x, w = operands(0, 64, 64, 8, 32, 0)
  with pytest.raises(NotImplementedError, match="block: 32 rows in a shift block"):
    gpu.mixed_matmul(x, w, raw(64))
  x, w = operands(0, 64, 64, 4, 64, 0)
  with pytest.raises(NotImplementedError, match="interpret: True"):
    kernels.mixed_matmul(x, w, raw(64), implementation="gpu", interpret=True)
  with pytest.raises(ValueError, match="128 does not divide the 64 padded outputs"):
    gpu.mixed_matmul(x, w, raw(64), tiles=Tiles(m=64, n=128))
  x, w = operands(0, 128, 256, 1, 128, 0)
  with pytest.raises(ValueError, match="bytes of shared memory"):
    gpu.mixed_matmul(x, w, raw(256), tiles=Tiles(m=128, n=256, buffers=5))
