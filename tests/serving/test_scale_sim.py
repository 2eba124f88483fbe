"""The cycle model against SCALE-Sim 3 itself, which runs in an environment of its own.

    pytest -s -m slow tests/serving/test_scale_sim.py

The first run puts it into build/scalesim (300 MB: it needs another NumPy than this project).
"""

import csv
import pathlib
import subprocess
import sys

import pytest

from flexiq_jax.serving import npu
from flexiq_jax.serving.npu import Array
from tests.serving.test_npu import RESNET18, resnet18

ROOT = pathlib.Path(__file__).parent.parent.parent
HOME = ROOT / "build" / "scalesim"
PACKAGES = ("scalesim==3.0.0", "numpy<2.3")
LAYERS = (15, 20)  # of its ResNet-18: 3 x 3 with stride 2 from 14 x 14 x 256 to 512, and the last
ROWS, COLUMNS = 32, 32

CONFIG = f"""[general]
run_name = two
[run_presets]
InterfaceBandwidth = CALC
UseRamulatorTrace = False
[architecture_presets]
ArrayHeight = {ROWS}
ArrayWidth = {COLUMNS}
IfmapSramSzkB = 64
FilterSramSzkB = 64
OfmapSramSzkB = 64
IfmapOffset = 0
FilterOffset = 10000000
OfmapOffset = 20000000
Dataflow = ws
Bandwidth = 10
ReadRequestBuffer = 32
WriteRequestBuffer = 32
[layout]
IfmapCustomLayout = False
FilterCustomLayout = False
IfmapSRAMBankBandwidth = 10
IfmapSRAMBankNum = 10
IfmapSRAMBankPort = 2
FilterSRAMBankBandwidth = 10
FilterSRAMBankNum = 10
FilterSRAMBankPort = 2
[sparsity]
SparsitySupport = false
"""

# Its command line has no way to leave out gigabytes of traces; its Python API has.
PROGRAM = """
from scalesim.scale_sim import scalesim
files = {"config": "array.cfg", "topology": "layers.csv", "layout": "layout.csv"}
scalesim(save_disk_space=True, verbose=False, **files).run_scale(top_path=".")
"""


@pytest.fixture(scope="module")
def python() -> pathlib.Path:
  """The interpreter of that environment."""
  interpreter = HOME / "bin" / "python"
  works = [interpreter, "-c", "import scalesim.scale_sim"]
  if not interpreter.exists() or subprocess.run(works, capture_output=True).returncode:
    for command in (
      [sys.executable, "-m", "venv", "--clear", HOME],
      [interpreter, "-m", "pip", "install", "--quiet", *PACKAGES],
    ):
      ended = subprocess.run(command, capture_output=True, text=True)
      if ended.returncode:
        errors = [line for line in ended.stderr.splitlines() if "ERROR" in line]
        pytest.skip(f"SCALE-Sim cannot be installed: {' '.join(errors or [ended.stderr])[-200:]}")
  return interpreter


@pytest.mark.slow
def test_cycles_are_those_of_scale_sim(python, tmp_path):
  (tmp_path / "array.cfg").write_text(CONFIG)
  header = "Layer,IFMAP Height,IFMAP Width,Filter Height,Filter Width,Channels,Filters,Strides,\n"
  rows = []
  for i in LAYERS:
    size, window, channels, filters, stride = RESNET18[i]
    rows.append(f"L{i},{size},{size},{window},{window},{channels},{filters},{stride},\n")
  (tmp_path / "layers.csv").write_text(header + "".join(rows))
  # Custom layouts are off, but the file has to be there.
  (tmp_path / "layout.csv").write_text(
    "Layer" + ",-" * 20 + ",\n" + "".join(f"L{i}" + ",1" * 20 + ",\n" for i in LAYERS)
  )
  subprocess.run([python, "-c", PROGRAM], cwd=tmp_path, check=True, capture_output=True)
  with (tmp_path / "two" / "COMPUTE_REPORT.csv").open(newline="") as file:
    found = [{k.strip(): v for k, v in row.items() if k} for row in csv.DictReader(file)]
  theirs = [float(row["Total Cycles"]) for row in found]
  assert [float(row["Stall Cycles"]) for row in found] == [0, 0]
  works = resnet18(False)
  ours = [npu.compute_cycles(Array(rows=ROWS, columns=COLUMNS), works[i], 0) for i in LAYERS]
  print(dict(zip(LAYERS, theirs, strict=True)))
  assert theirs == ours
