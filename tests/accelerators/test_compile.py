"""Everything that a run executes compiles for every accelerator, without one."""

import functools

import jax
import numpy as np
import pytest

from flexiq_jax.quant import exact
from flexiq_jax.search import fitness
from flexiq_jax.search.gram import influence
from tests import targets_for_test as targets
from tests.accelerators import jobs_for_test as jobs
from tests.accelerators.hlo_for_test import products
from tests.accelerators.recorder_for_test import recording
from tests.layers_for_test import conv

pytestmark = pytest.mark.aot(legality_alone=True)

JOBS = {
  "inference": jobs.inference,
  "calibrate": jobs.calibrate,
  "search": jobs.search,
  "layer_bits": jobs.layer_bits,
  "finetune": jobs.finetune,
  "serve": jobs.serve,
  "train_methods": jobs.train_methods,
}


# What runs in every test: each job on each of four accelerators, of the models named here; the rest
# is marked slow. What mixed programs become test_programs.py looks at, of all models. Compiling
# convolutions for a TPU takes several times as long as for a GPU.
_VIT, _ODD, _RESNET = ("vit_s",), ("odd",), ("resnet20",)
QUICK = {
  "inference": {"h100": _ODD, "a100": _VIT, "v5e": _ODD, "v6e": _VIT},
  "calibrate": {"h100": ("resnet20", "odd"), "a100": _VIT, "v5e": _ODD, "v6e": _VIT},
  "search": {"h100": ("vit_s", "odd", "mobilenet_v2"), "a100": _RESNET, "v5e": _ODD, "v6e": _VIT},
  "layer_bits": {"h100": _ODD, "a100": _ODD, "v5e": _ODD, "v6e": _ODD},
  "finetune": {"h100": _RESNET, "a100": _RESNET, "v5e": _VIT, "v6e": _VIT},
  "train_methods": {"h100": _RESNET, "a100": _RESNET, "v5e": _VIT, "v6e": _VIT},
  "serve": {"h100": _RESNET, "a100": _VIT, "v5e": _VIT, "v6e": _VIT},
}


_FOUR = ("h100", "a100", "v5e", "v6e")


def pairs(quick):
  """Every model on every target; slow are those that `quick`, model -> targets, does not name."""
  for model, names in quick.items():
    for name in targets.NAMES:
      marks = [] if name in names else [pytest.mark.slow]
      yield pytest.param(model, name, marks=marks, id=f"{model}-{name}")


def cases():
  """Every job of every model on every target."""
  for name in targets.NAMES:
    for model in jobs.MODELS:
      for job in JOBS:
        marks = [] if model in QUICK[job].get(name, ()) else [pytest.mark.slow]
        yield pytest.param(job, model, name, marks=marks, id=f"{model}-{job}-{name}")


@pytest.fixture(autouse=True, scope="module")
def recorded():
  """Recorded calls keep what was compiled of them."""
  yield
  compiled.clear()
  calls_of.cache_clear()
  training_calls.cache_clear()


@functools.cache
def calls_of(job, model, platform, dtype="float32", **options):
  m = jobs.made(model, dtype)
  with recording() as calls:
    JOBS[job](m, platform, **options)
  return calls


compiled: set[tuple] = set()


def compile_all(calls, target, options=None):
  """Compiles all calls; an assertion names those that fail.

  Jobs share functions: of equal programs for one target the first is compiled.
  """
  failed = []
  for call in calls:
    try:
      lowered = call.lower(target)
      program = hash(lowered.as_text()), target.name, str(options)
      if program not in compiled:
        lowered.compile(target.legality if options is None else options)
        compiled.add(program)
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError) as error:
      failed.append(f"{call.name}: {str(error).strip()[:400]}")
  assert not failed, "\n".join(failed)


@pytest.mark.parametrize(("job", "model", "name"), [*cases()])
def test_a_job_compiles(job, model, name):
  target = targets.get(name)
  options = {}
  if job == "serve" and target.platform == "tpu":
    options = {"kind": target.kind}
  elif job == "serve" and name != "h100":  # the kernel for GPUs is one for Hopper
    options = {"implementation": "reference"}
  calls = calls_of(job, model, target.platform, **options)
  assert calls
  compile_all(calls, target)


def test_jobs_run_what_they_say():
  """Names of the functions that the jobs compile; a new one belongs here."""
  found = {job: {call.name for call in calls_of(job, "resnet20", "gpu")} - _SHARED for job in JOBS}
  assert found == {
    "inference": {f"Network.compiled.run_{rule}" for rule in ("float", "uniform", "mixed")},
    "calibrate": {"compiled.<lambda>"},
    "search": {
      "Network.compiled.run_mixed",
      "Fitness._attempt.run",
      "influence_pass.run",
      "Flips.__init__.piece.run",
    },
    "layer_bits": {
      *("Layerwise.__init__.run_exact", "Layerwise.__init__.run_simulated"),
      *("fold_batch_norm.folded_apply", "Segments._run.run", "Suffixes._piece.run"),
      *("cross_entropy", "mean_traces.sample", "relative_logits.changes", "measure.both"),
    },
    "finetune": {
      *("make_step.gradient_fn", "make_step.update", "targets.run", "compiled.<lambda>"),
      *("moment_pass.run", "round_weights"),
    },
    "serve": {"Runner.__init__.run", "prepare"},
    "train_methods": {
      *("make_step.whole", "observe.run", "AnyPrecision.at.<lambda>", "Segments._run.run"),
      *("Reconstruction._next.run", "Network.compiled.run_uniform", "compiled.<lambda>"),
    },
  }
  # Two widths, static and dynamic; the fold.
  assert len(calls_of("inference", "resnet20", "gpu")) == 5 + 2
  sizes = [c.arguments[1].shape[0] for c in calls_of("serve", "resnet20", "gpu") if "run" in c.name]
  assert sizes == [1, 8, 32, 128]


_SHARED = {"fold_batch_norm.fold", "weights.compute"}


_BFLOAT16 = {"odd": _FOUR, "vit_s": ("h100", "v5e"), "resnet20": (), "efficientnet_lite0": ()}


@pytest.mark.parametrize(("model", "name"), [*pairs(_BFLOAT16)])
def test_models_in_bfloat16_compile(model, name):
  target = targets.get(name)
  calls = calls_of("inference", model, target.platform, "bfloat16")
  compile_all([call for call in calls if "run" in call.name], target)


@pytest.mark.parametrize(
  "model", ["vit_s", *(pytest.param(m, marks=pytest.mark.slow) for m in ("resnet20", "odd"))]
)
def test_quantized_layers_compile_with_the_compilers_own_tiles(model):
  """Without the vendor's library; float products of some shapes do not (see `Target.options`)."""
  target = targets.get("h100")
  calls = calls_of("inference", model, "gpu")
  compile_all([c for c in calls if c.name.endswith(("uniform", "mixed"))], target, options={})


@pytest.mark.parametrize(("model", "name"), [*pairs({"resnet20": _FOUR, "vit_s": ()})])
@pytest.mark.parametrize("form", fitness.FORMS)
def test_every_form_of_a_population_compiles_on_several_devices(form, model, name):
  target, m = targets.get(name), jobs.made(model)
  network = jobs.network_for(m, target.platform)
  one = fitness.distance_of(
    network.apply, m.space, "l2", split=form == "split", platform=target.platform
  )
  mesh, width = target.mesh(fitness.AXIS), 1 if form == "loop" else 2
  run = fitness.population_of(one, width=width, mesh=mesh)
  spec = jax.sharding.PartitionSpec
  same, shared = (jax.sharding.NamedSharding(mesh, s) for s in (spec(), spec(fitness.AXIS)))
  blocks = m.images[None]
  logits = jax.eval_shape(network.float, m.images)
  arguments = (
    target.placed((np.zeros((8, m.space.total), bool), np.zeros(4, np.int32)), shared),
    target.placed((np.zeros(2, np.int32), blocks), same),
    target.placed((jax.ShapeDtypeStruct((1, *logits.shape), logits.dtype),), same),
    target.placed((m.model, network.params), same),
  )
  jax.jit(run).lower(*sum(arguments, ())).compile(target.legality)


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("name", ["h100", "a100", "a6000"])
@pytest.mark.parametrize("stride", [1, 2])
def test_convolutions_in_parts_compile(stride, name, parts):
  """Layers whose sums float32 does not count at once, as ResNet-50 has them."""
  case = conv((8, 14, 14, 256), (3, 3, 256, 256), stride=stride, padding=((1, 1), (1, 1)))
  target, (layer, contract) = targets.get(name), case.given_to_a_rule

  @jax.jit
  def run(codes, w):
    options = {"signed": False, "parts": parts, "platform": "gpu", "way": "float_result"}
    return exact.product(layer, codes, w, contract, **options)

  arguments = jax.ShapeDtypeStruct(case.x, np.int32), jax.ShapeDtypeStruct(case.w, np.int8)
  text = run.lower(*target.placed(arguments)).compile(target.options).as_text()
  found = [(p.kind, p.operands, p.result) for p in products(text)]
  # Each part twice: codes less 128, and what corrects that.
  assert found == [("__cudnn$convForward", ("s8", "s8"), "f32")] * (2 * parts)


@pytest.mark.parametrize(("model", "name"), [*pairs({"resnet20": ("h100", "v5e")})])
@pytest.mark.parametrize("exact_logits", [False, True])
def test_influence_on_the_divergence_compiles(exact_logits, model, name):
  target, m = targets.get(name), jobs.made(model)
  network = jobs.network_for(m, target.platform)
  run = influence.influence_pass(
    network.apply, m.space, "kl", exact_logits=exact_logits, platform=target.platform
  )
  z = jax.eval_shape(network.float, m.images)
  arguments = (m.model, network.params, np.zeros(m.space.total, bool), m.images, z)
  key, number = jax.random.key(0), np.int32(0)
  jax.jit(run).lower(*target.placed((*arguments, key, number))).compile(target.legality)


_TRAINED = {
  "resnet20": ("h100", "a100"),
  "mobilenet_v2": ("h100", "v5e"),
  "vit_cifar10": ("h100", "v5e", "v6e"),
}


@pytest.mark.parametrize(("model", "name"), [*pairs(_TRAINED)])
def test_training_compiles(model, name):
  target = targets.get(name)
  compile_all(training_calls(model), target)


@functools.cache
def training_calls(model):
  with recording() as calls:
    jobs.training(model)
  assert [call.name for call in calls] == ["make_step.whole"]
  return calls
