"""What each layer became in the compiled programs: integer products, and no silent rounding."""

import jax
import pytest

from tests import targets_for_test as targets
from tests.accelerators import jobs_for_test as jobs
from tests.accelerators.hlo_for_test import products
from tests.accelerators.recorder_for_test import recording

pytestmark = pytest.mark.aot

# v7x has no int8 products: its compiler makes others of them.
NAMES = [name for name in targets.NAMES if name != "v7x"]


def cases(models):
  """All on four accelerators; the rest is marked slow."""
  for name in NAMES:
    for model in models:
      marks = [] if name in ("h100", "a100", "v5e", "v6e") else [pytest.mark.slow]
      yield pytest.param(model, name, marks=marks, id=f"{model}-{name}")


CUDNN = "__cudnn$convForward", ("s8", "s8"), "f32"
CUBLAS = "__cublas$lt$matmul", ("s8", "s8"), "s32"
XLA_TPU = "convolution", ("s8", "s8"), "s32"


def expected(layer, platform):
  """How an 8-bit or mixed layer is computed: (function, operands, result); None: no product."""
  if platform == "tpu":
    return XLA_TPU
  if layer.kind == "depthwise":
    return None  # multiply-adds
  plain = layer.groups == 1 and len(layer.window) == 2 and {*layer.window} != {1}
  return CUDNN if plain and "dilated" not in layer.name else CUBLAS


def compiled(model, target, rules):
  """Text of the first program of an evaluation by a rule, as a run sets precision."""
  m = jobs.made(model)
  with jax.default_matmul_precision("highest"), recording() as calls:
    jobs.inference(m, target.platform)
    named = [call for call in calls if call.name.endswith(rules)]
    return m, named[0].lower(target).compile(target.options).as_text()


@pytest.mark.parametrize(("model", "name"), [*cases(jobs.MODELS)])
def test_quantized_layers_are_integer_products(model, name):
  target = targets.get(name)
  m, text = compiled(model, target, "mixed")
  left = products(text)
  for layer in m.calibrated.network.layers:
    of_it = lambda p, name=layer.name: p.where.partition("/")[2].startswith(f"{name}/")
    own = {(p.kind, p.operands, p.result) for p in left if of_it(p)}
    want = expected(layer, target.platform)
    assert own <= {want}, layer.name
    if layer.kind != "depthwise":
      assert own == {want}, layer.name
    left = [p for p in left if not of_it(p)]
    # What is left is the model's own, attention above all, and keeps its bits.
  assert all(p.precise for p in left), left
  assert model in ("vit_s", "swin_t") or not left


@pytest.mark.parametrize(("model", "name"), [*cases(("resnet20", "vit_s"))])
def test_float_models_are_not_rounded(model, name):
  target = targets.get(name)
  _, text = compiled(model, target, "float")
  found = products(text)
  assert found and all(p.precise for p in found)
  assert all({*p.operands} == {"f32"} for p in found)


def test_a_products_line_is_read():
  text = """
  %a.1 = s8[4,8]{1,0} parameter(0)
  %w = bf16[8,3]{1,0} copy(%b)
  ROOT %dot.2 = f32[4,3]{1,0} dot(%a.1, %w), lhs_contracting_dims={1}, metadata={op_name="jit(f)/fc1/dot_general"}
  %conv = (f32[1,2]{1,0}, u8[0]{0}) custom-call(%a.1, %a.1), custom_call_target="__cudnn$convForward", operand_precision={highest,highest}, metadata={op_name="jit(f)/conv/x"}
  %other = f32[1]{0} custom-call(%w), custom_call_target="topk"
  """  # noqa: E501
  one, two = products(text)
  assert (one.where, one.kind, one.operands, one.result) == (
    *("jit(f)/fc1/dot_general", "dot"),
    *(("s8", "bf16"), "f32"),
  )
  assert (two.kind, two.operands, two.result) == ("__cudnn$convForward", ("s8", "s8"), "f32")
  assert two.precise and not one.precise
