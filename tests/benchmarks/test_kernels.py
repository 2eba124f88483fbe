"""The kernel benchmark: reading schedules, adding them up, and that its parts run."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import kernel_schedules, kernel_times, llo
from benchmarks.kernel_products import Product
from flexiq_jax.kernels import tpu
from flexiq_jax.kernels.windows import Window

DUMP = """
     0   :  { %1 = smov 0 }
   0x1 LB: > { %2 = sadd 1
 a comment that runs over a line }
   0x2   : > { %3 = sbr.rel (%p1) target bundleno = 6 (0x6), region = 1 }
   0x3 LB: >> { %4 = vmatmul.s4.gmra.mxu0 }
   0x4   : >> { %5 = vadd.s32 }
   0x5   : >> { %6 = sbr.rel (!%p2) target bundleno = 3 (0x3), region = 2 }
   0x6   : > { %7 = sbr.rel (!%p3) target bundleno = 1 (0x1), region = 3 }
   0x7   :  { %8 = sfence }
"""


def product(**changes) -> Product:
  facts = {
    "name": "layer",
    "m": 64,
    "k": 256,
    "n": 128,
    "block": 128,
    "boundaries": (0, 0, 128, 256, 256),
    "prepares": False,
    "channels": 256,
    "taps": 1,
    "activation": "none",
    "next_boundaries": None,
  }
  return Product(**facts | changes)


WINDOW = Window(height=8, width=8, offsets=tuple((a, b) for a in (-1, 0, 1) for b in (-1, 0, 1)))


def test_dumps_are_read():
  program = llo.parse(DUMP)
  assert program.bundles == 8
  assert program.loops == ((3, 5), (1, 6))
  assert program.skips == ((2, 6),)
  assert program.products == (3,)
  assert program.multiplies((3, 5)) and not program.multiplies((6, 7))


def test_parts_of_a_preparation():
  """Quantizing as a loop of its own, inside a part, or inline; a fill; the two waits at the end."""
  finish = [(30, 40), (41, 50), (51, 70)]
  skips, waits = finish, [(72, 75), (76, 80)]
  program = lambda loops, before, products=(): llo.Program(
    bundles=100,
    loops=((5, 90), *loops),
    skips=((6, 89), *before, *skips, *waits),
    products=products,
  )
  rest = 86 - sum(b - a for a, b in (*finish, *waits))
  found = llo.preparation(program([(10, 20)], []))
  assert found == llo.Preparation(quantize=11, finish=(11, 10, 20), step=rest - 11)
  assert llo.preparation(program([], [])) == llo.Preparation(
    quantize=0, finish=(11, 10, 20), step=rest
  )
  found = llo.preparation(program([(10, 20), (31, 39)], [(8, 22)], products=(32, 45, 60)))
  assert found == llo.Preparation(quantize=11, finish=(9, 10, 20), step=rest - 14)
  with pytest.raises(ValueError, match="program: 5 parts of another shape"):
    llo.preparation(program([], [], products=(32,)))


def test_programs_of_another_shape_are_refused():
  with pytest.raises(ValueError, match="program: 1 parts with products, expected 2 or 4"):
    llo.schedule(llo.parse(DUMP))


def test_tiles_add_up():
  beside = llo.Schedule(low=10, high=20, low_last=15, high_last=22, finish=(), step=5)
  assert beside.tile(3, 0) == 5 + 2 * 10 + 15
  assert beside.tile(0, 3) == 5 + 2 * 20 + 22
  assert beside.tile(2, 2) == 5 + 2 * 10 + 20 + 22  # the block of the boundary runs in both
  behind = llo.Schedule(low=10, high=20, low_last=0, high_last=0, finish=(7, 8, 9), step=5)
  assert behind.tile(1, 2, 36) == 5 + 10 + 40 + 36


def test_bundles_of_a_product():
  tiles = tpu.Tiles(m=64, n=128, k=128)
  schedule = llo.Schedule(low=10, high=20, low_last=15, high_last=22, finish=(), step=5)
  sweep = kernel_schedules.sweep(130, product(n=256), tiles)  # three tiles of rows, two of columns
  assert kernel_schedules.bundles(sweep, schedule, 0) == 6 * (5 + 20 + 22)
  assert kernel_schedules.bundles(sweep, schedule, 100) == 6 * (5 + 10 + 20 + 22)
  assert kernel_schedules.bundles(sweep, schedule, 256) == 6 * (5 + 10 + 15)
  schedule = llo.Schedule(low=10, high=20, low_last=0, high_last=0, finish=(1, 2, 4), step=5)
  sweep = kernel_schedules.sweep(64, product(n=384, next_boundaries=(0,), granule=128), tiles)
  # Its tiles of columns feed channels in 4 bits, in both, and in 8.
  assert kernel_schedules.bundles(sweep, schedule, 256, 200) == 3 * (5 + 20) + 2 + 4 + 1


def test_bundles_of_products_that_requantize_beside_the_last_block():
  tiles = tpu.Tiles(m=64, n=128, k=128)
  finish = (1, 2, 4, 10, 20, 40)  # with a last block in 4 bits, and in 8
  schedule = llo.Schedule(low=100, high=200, low_last=3, high_last=6, finish=finish, step=5)
  one = product(n=384, next_boundaries=(0,), granule=128)
  sweep = kernel_schedules.sweep(64, one, tiles, "TPU v6 lite")
  assert sweep.fused
  assert kernel_schedules.bundles(sweep, schedule, 256, 128) == 3 * (5 + 100 + 3) + 2 + 1 + 1
  assert kernel_schedules.bundles(sweep, schedule, 128, 128) == 3 * (5 + 100 + 6) + 20 + 10 + 10
  assert kernel_schedules.bundles(sweep, schedule, 0, 384) == 3 * (5 + 200 + 6) + 20 + 20 + 20


def test_blocks_of_a_convolution_are_blocks_of_columns():
  tiles = tpu.Tiles(m=64, n=128, k=9 * 128)
  schedule = llo.Schedule(low=10, high=20, low_last=15, high_last=22, finish=(), step=5)
  slides = product(n=256, k=18 * 128, block=9 * 128, channels=256, taps=9, window=WINDOW)
  sweep = kernel_schedules.sweep(128, slides, tiles)  # two tiles of rows, two of columns
  assert kernel_schedules.bundles(sweep, schedule, 0) == 4 * (5 + 20 + 22)
  assert kernel_schedules.bundles(sweep, schedule, 100) == 4 * (5 + 10 + 20 + 22)
  assert kernel_schedules.bundles(sweep, schedule, 256) == 4 * (5 + 10 + 15)


def test_turns_of_inner_loops_count():
  program = llo.Program(
    bundles=99, loops=((10, 59), (12, 21), (30, 49)), skips=(), products=(35, 40)
  )
  assert llo._cost(program, (10, 59), 1, 1) == 50
  assert llo._cost(program, (10, 59), 3, 1) == 50 + 2 * 20
  assert llo._cost(program, (10, 59), 3, 4) == 50 + 2 * 20 + 3 * 10


def test_times_are_measured(capsys):
  found = [product(n=16), product(name="other", n=16)]
  slides = product(name="slides", n=16, k=9 * 256, block=9 * 128, taps=9, window=WINDOW)
  row, other = kernel_times.measure([*found, slides], (2,), 2, implementation="reference")
  assert other["layers"] == ["slides"]
  assert row["layers"] == ["layer", "other"] and row["m"] == 128
  assert {f"mixed {p} %" for p in kernel_times.LEVELS} <= row["seconds"].keys()
  assert {"xla_int8", "xla_bfloat16"} <= row["seconds"].keys()
  assert "(times 2): speed against 0 %" in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.slow
def test_schedules_come_out_of_the_compiler(tmp_path):
  """In a process of its own: libtpu reads where to dump to when it starts."""
  program = """
import dataclasses, json, pathlib, sys
from benchmarks import kernel_schedules, kernel_times
from tests.benchmarks.test_kernels import WINDOW, product
compiler = kernel_schedules.Compiler(pathlib.Path(sys.argv[1]))
try:
  compiler.device("v5e")
except RuntimeError:
  sys.exit(3)
found = []
for after in (None, (0, 0, 0, 0, 0)):
  one = product(
    m=128, k=512, block=256, next_boundaries=after, activation="relu", granule=128 if after else 0
  )
  found.append(dataclasses.asdict(compiler.mixed("v5e", 128, one)[1]))
slides = product(
  m=64, k=18 * 128, n=128, block=9 * 128, channels=256, taps=9, window=WINDOW, activation="relu"
)
slides = dataclasses.replace(slides, next_boundaries=(0,) * 5, granule=128)
found.append([dataclasses.asdict(compiler.mixed("v5e", m, slides)[1]) for m in (64, 16 * 640)])
one = product(m=512, k=512, n=256, block=256, next_boundaries=(0,) * 5, granule=256)
found.append(dataclasses.asdict(compiler.mixed("v6e", 512, one)[1]))
both = [product(channels=768, k=768, gathers=gathers) for gathers in (False, True)]
found.append([dataclasses.asdict(compiler.prepare("v5e", one)) for one in both])
peers = kernel_times.peers(256, 512, 128)
print(json.dumps(found + [{name: compiler.peer("v5e", *how) for name, how in peers.items()}]))
"""
  folder = tmp_path / "llo"
  folder.mkdir()
  done = subprocess.run(
    [sys.executable, "-c", program, str(folder)],
    env=os.environ | llo.environment(folder) | {"PYTHONPATH": "."},
    capture_output=True,
    text=True,
    check=False,
  )
  if done.returncode == 3:
    pytest.skip("no TPU compiler here")
  assert done.returncode == 0, done.stderr
  real, codes, windows, beside, preparing, peers = json.loads(done.stdout.splitlines()[-1])
  assert 0 < real["low"] < real["high"] and real["low_last"] > 0 and real["step"] > 0
  assert not real["finish"] and len(codes["finish"]) == 3 and codes["low_last"] == 0
  assert codes["finish"][0] < codes["finish"][1]  # 4 bits take a shift more
  for one in windows:
    assert one["low"] < one["high"] and len(one["finish"]) == 3
  assert len(beside["finish"]) == 6 and beside["low_last"] > 0
  assert beside["finish"][1] < beside["finish"][2] and beside["finish"][4] < beside["finish"][5]
  # A tile of 2,048 rows; making patches hides beside the matrix unit.
  assert 9 * 2048 // 8 < windows[1]["high"] < 1.25 * 9 * 2048 // 8
  plain, gathering = preparing
  assert 0 < plain["quantize"] == gathering["quantize"] < min(gathering["finish"])
  assert all(a < b for a, b in zip(plain["finish"], gathering["finish"], strict=True))
  assert 0 < peers["xla_int8"] < peers["xla_bfloat16"]
