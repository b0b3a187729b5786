"""Faults in every operator of the model, on the emulated Ascend: each is flagged, and the log says where it arises.

The matrix runs on test_dinov3, the default model's family made small; a sample runs on the default model itself.
"""

import itertools
import multiprocessing.forkserver
import os
import re
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from ascend_emulator import environment
from conftest import ROOT, SCRIPT, Run

SMALL = ("--model", "test_dinov3", "--weights", "random", "--batch-sizes", "2", "--warmup", "0", "--iters", "2")

# What a forward pass launches (ASCEND_EMULATOR_TRACE lists it), and the module that the layer check should name.
OPERATORS = {
    "Convolution": "Conv2d",
    "Cos": "RotaryEmbeddingDinoV3",
    "Sin": "RotaryEmbeddingDinoV3",
    "Div": "RotaryEmbeddingDinoV3",
    "Muls": "RotaryEmbeddingDinoV3",
    "LayerNorm": "LayerNorm",
    "Matmul": "Linear",  # without bias: qkv
    "Addmm": "Linear",
    "Gelu": "GELU",
    "FlashAttentionScore": "EvaAttention",
    "Neg": "EvaAttention",
    "Cat": "EvaAttention",
    "Mul": "EvaAttention",
    "Add": "EvaAttention",
    "Mean": None,  # the pooling, which is in no module: the embedding is flagged, the tokens are not
}
# Persistent, and one-time: from=2 is in the first pass, or for what a pass launches once in the second.
KINDS = ["nan", "scale=1.01", "offset=0.05", "element=1", "error=507015", "nan,from=2,once", "scale=1.01,from=2,once",
         "offset=0.05,from=2,once", "element=1,from=2,once", "error=507015,from=2,once"]  # fmt: skip


class ForkedRun(Run):
    """A run in a process forked from one that has imported torch and timm, which takes longer than the run itself."""

    def __init__(self, context, arguments, folder, env):
        process = context.Process(target=in_fork, args=(list(map(str, arguments)), folder, env))
        process.start()
        process.join(300)
        process.kill()
        process.join()
        self.finished(folder, process.exitcode, *((folder / name).read_text("utf-8") for name in ("stdout", "stderr")))


def in_fork(arguments, folder, env):
    os.chdir(folder)
    os.environ.update(env)
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [str(SCRIPT), *arguments]
    import with_test_models

    with_test_models.allow_hf32()
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture(scope="session")
def run_all(tmp_path_factory):
    """run_all([(arguments, env), ...]): a run of each, two side by side."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["with_test_models"])  # torch_npu is left to each run: it reads the faults then
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    with pytest.MonkeyPatch.context() as patch:  # the server's environment, which each run inherits
        for name, value in {**environment(), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}.items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()

    def run(arguments, env, folder):
        return ForkedRun(context, arguments, folder, env)

    def run_all(cases):
        folders = [tmp_path_factory.mktemp("run") for _ in cases]  # here, because it is not made for threads
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(run, *zip(*cases), folders))

    return run_all


@pytest.fixture(scope="session")
def runs(run_all):
    """One run of the script for each operator and kind of fault."""
    faults = [f"{operator}:{kind}" for operator in OPERATORS for kind in KINDS]
    return dict(zip(faults, run_all([(SMALL, environment(FAULT=fault)) for fault in faults])))


def simple_check(run):
    """Whether max abs error < 1e-2 on the embedding, as published adaptations test it, would have noticed."""
    line = re.search(r"^(PASS|FAIL)  card's check", run.log or "", re.M)
    return line is None or line[1] == "FAIL"


def noticed(run):
    """FAIL, WARN or PASS, from the result line; a device that cannot be used (exit status 2) is no PASS either."""
    if run.status == 2:
        return "FAIL"
    assert (run.status == 1) == run.result.startswith("RESULT: FAIL")
    return "FAIL" if run.status else "PASS" if " 0 warned" in run.result else "WARN"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_fault_in_any_operator_is_flagged(runs, operator, kind):
    run = runs[f"{operator}:{kind}"]
    assert noticed(run) in ("FAIL", "WARN"), run.stdout


@pytest.mark.parametrize("kind", ["nan", "scale=1.01", "offset=0.05", "element=1"])
@pytest.mark.parametrize(("operator", "module"), OPERATORS.items())
def test_the_log_names_the_kind_of_module_where_it_arises(runs, operator, kind, module):
    run = runs[f"{operator}:{kind}"]
    table = run.log[run.log.index("[4/5]") :]
    if module is None:
        assert re.search(r"^(FAIL|WARN)  embedding", table, re.M) and not re.search(
            r"^(FAIL|WARN)  tokens", table, re.M
        )
    else:
        assert re.search(rf"^(FAIL|WARN)  {module} ", table, re.M), table


@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_that_fails_is_named(runs, operator):
    run = runs[f"{operator}:error=507015"]
    assert run.status == 1 and f"aclnn{operator} failed on the device" in run.stdout + run.stderr, (
        run.stdout + run.stderr
    )


def test_the_readme_shows_what_is_caught(runs):
    rows = []
    for kind in KINDS:
        verdicts = [noticed(runs[f"{operator}:{kind}"]) for operator in OPERATORS]
        # Whether one pass sees a fault that strikes once depends on the pass.
        simple = "-" if "once" in kind else sum(simple_check(runs[f"{operator}:{kind}"]) for operator in OPERATORS)
        name = kind.replace(",from=2,once", ", once")
        rows.append(f"| {name} | {len(OPERATORS)} | {verdicts.count('FAIL')} | {verdicts.count('WARN')} | {simple} |")
    table = "\n".join(rows)
    assert table in (ROOT / "README.md").read_text("utf-8"), f"the table is now:\n{table}"


# --- no false alarm ---------------------------------------------------------------------------------------------------


HEALTHY = list(itertools.product([0, 1, 2], ["conv", "", "conv matmul"], ["tanh", "erf"]))


@pytest.fixture(scope="session")
def healthy(run_all):
    """One run for each seed, setting of HF32 and form of GELU."""

    def case(seed, hf32, gelu):
        form = {"TORCH_NPU_USE_COMPATIBLE_IMPL": "1"} if gelu == "erf" else {}
        return (*SMALL, "--seed", seed, "--amp", "float16", "bfloat16", "--strict"), form | {"TEST_ALLOW_HF32": hf32}

    return dict(zip(HEALTHY, run_all([case(*settings) for settings in HEALTHY])))


@pytest.mark.parametrize(("seed", "hf32", "gelu"), HEALTHY)
def test_a_healthy_device_passes_without_a_warning(healthy, seed, hf32, gelu):
    done = healthy[seed, hf32, gelu]
    assert done.status == 0 and " 0 warned, 0 failed" in done.result, done.stdout
    assert ("explained: GELU" in done.log) == (gelu == "tanh")
    arithmetic = ("HF32" if name in hf32 else "float32" for name in ("conv", "matmul"))
    assert "convolution {}, matmul {}".format(*arithmetic) in done.log


def test_strict_makes_a_warning_fail(run_all):
    env = environment(FAULT="Neg:scale=1.002")
    assert [done.status for done in run_all([(SMALL, env), ((*SMALL, "--strict"), env)])] == [0, 1]


# --- the default model, a sample --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "module"),
    [
        ("Neg:scale=1.01", "EvaAttention"),
        ("Gelu:scale=1.01", "GELU"),
        ("Add:element=1", "EvaAttention"),
        ("Sin:scale=1.01", "RotaryEmbeddingDinoV3"),
    ],
)
def test_faults_are_flagged_on_the_default_model_too(run, fault, module):
    done = run(
        "--weights", "random", "--batch-sizes", "1", "--warmup", "0", "--iters", "1", env=environment(FAULT=fault)
    )
    assert noticed(done) in ("FAIL", "WARN")
    assert re.search(rf"^(FAIL|WARN)  {module} ", done.log, re.M), done.log
