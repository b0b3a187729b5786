"""Modes NAME+compile: that the compiled graph ran, that its numbers are judged, and why it cannot run.

What torch.compile does on a real Ascend was never seen. On the emulated one npugraphs captures and replays graphs.
"""

import dataclasses
import os
import re
import signal
import subprocess
import sys

import pytest
from ascend_emulator import environment
from conftest import QUICK, REHEARSAL, ROOT, TESTS
from with_test_models import register_backends, scaled

import validate_npu as v

sys.path.append(str(TESTS / "unit"))
from small_run import after_model_stage, drain, marks, with_references

TINY = ("--model", "test_tiny_vit", "--batch-sizes", "5", "--warmup", "0", "--iters", "3")
COMPILED = v.MODES["float32+compile"]


@pytest.fixture
def small_run(monkeypatch):
    """small_run(backend, *modes): a dry run after its model stage. Its folder for caches is not the test process's."""
    register_backends()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    yield lambda backend, *modes: after_model_stage(*TINY, "--compile-backend", backend, "--modes", *modes)
    v.torch.compiler.reset()


def stages_4_and_5(context, loaded):
    """The outcomes of both, and what stage 4 returned."""
    precision, checked = drain(v.precision_stage(context, loaded))
    timed, _ = drain(v.throughput_stage(context, v.Outputs(loaded, loaded.references.float32["logits"][:1]), checked))
    return marks(precision) | marks(timed), checked


# --- On the CPU -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("modes", [["float32"], pytest.param(["float32", "bfloat16"], marks=pytest.mark.full)])
def test_a_compiled_mode_is_validated_and_timed_and_leaves_no_file(run, tmp_path, modes):
    (tmp_path / "tmp").mkdir()
    both = (name for mode in modes for name in (mode, f"{mode}+compile"))
    done = run(*REHEARSAL, *TINY, "--modes", *both, env={"TMPDIR": str(tmp_path / "tmp")})
    assert done.clean, done.stdout + done.stderr
    assert done.texts["device.compiler"] == "torch.compile with inductor"
    for mode in modes:
        found, plain = (done.rows[f"precision.logits.{name}"] for name in (f"{mode}+compile", mode))
        assert found["cpu_err"] == plain["cpu_err"] and found["limit"] == plain["limit"]
        assert done.mark(f"throughput.outputs.{mode}+compile") == "PASS"
        assert re.match(r"with the first calls: batch size 5 \d+\.\d s \(", done.texts[f"throughput.compile.{mode}+compile"])
        assert f"throughput.{mode}+compile.5" in done.rows
    assert sorted(os.listdir(tmp_path)) == ["stderr", "stdout", "tmp", "validation_output.txt"]
    assert not os.listdir(tmp_path / "tmp"), "caches"


@pytest.mark.parametrize(
    ("arguments", "env", "reason"),
    [
        (("--model", "test_vit_that_branches"), {}, "torch.compile with inductor failed: Unsupported: Data-dependent branching"),
        ((), {"PATH": ""}, r"inductor: no C\+\+ compiler: apt install g\+\+, or set CXX"),
        (("--compile-backend", "nonesuch"), {}, "torch.compile with nonesuch failed: InvalidBackend"),
        ((), {"TORCHDYNAMO_DISABLE": "1"}, "torch.compile with inductor ran no graph: is TORCHDYNAMO_DISABLE set"),
    ],
    ids=["a graph break", "no compiler", "an unknown backend", "no graph at all"],
)
def test_what_cannot_be_compiled_is_skipped_with_the_reason(run, arguments, env, reason):
    done = run(*REHEARSAL, *TINY, "--modes", "float32+compile", *arguments, env=env)
    assert done.status == 0 and done.mark("precision.float32+compile") == "SKIP", done.stdout
    assert re.search(reason, done.texts["precision.float32+compile"]), done.texts["precision.float32+compile"]
    assert done.mark("throughput.outputs.float32+compile") is None


@pytest.mark.parametrize(
    ("mode", "factor", "stage_4", "stage_5"),
    [
        ("float32+compile", 1, "PASS", "PASS"),
        ("float32+compile", 1.009, "WARN", "FAIL"),  # against the CPU nothing below 1e-2 fails
        ("float32+compile", 1.01, "FAIL", "FAIL"),
        ("bfloat16+compile", 1, "PASS", "PASS"),
        ("bfloat16+compile", 1.08, "FAIL", "FAIL"),
    ],
)
def test_outputs_of_the_compiled_graph_that_are_wrong_fail(small_run, monkeypatch, mode, factor, stage_4, stage_5):
    backends = v.torch._dynamo.backends.registry._COMPILER_FNS
    context, loaded = small_run("scaled", mode)
    monkeypatch.setitem(backends, "scaled", scaled(factor))
    found, _ = stages_4_and_5(context, loaded)
    assert (found[f"precision.logits.{mode}"], found[f"throughput.outputs.{mode}"]) == (stage_4, stage_5)
    assert found["precision.logits.float32"] == found["throughput.outputs.float32"] == "PASS"


def test_a_graph_that_ignores_its_inputs_fails(small_run, monkeypatch):
    """It gives the output of the first call. That call has zeros as input."""

    def frozen(graph, inputs):
        outputs = []

        def call(*args):
            outputs.append(outputs[0] if outputs else graph(*args))
            return outputs[0]

        return call

    context, loaded = small_run("scaled", "float32+compile")
    monkeypatch.setitem(v.torch._dynamo.backends.registry._COMPILER_FNS, "scaled", frozen)
    found, _ = stages_4_and_5(context, loaded)
    assert found["precision.logits.float32+compile"] == found["throughput.outputs.float32+compile"] == "FAIL"


@pytest.mark.full
def test_of_a_compiler_that_fails_the_last_line_is_the_reason(small_run, monkeypatch, tmp_path):
    compiler = tmp_path / "g++"
    compiler.write_text("#!/bin/sh\n[ $1 = --version ] && echo 'g++ (GCC) 12.2.0' || { echo in main.cpp:; echo main.cpp:3: no space left; exit 1; }\n")
    compiler.chmod(0o755)
    context, loaded = small_run("inductor", "float32+compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with v.torch._inductor.config.patch({"cpp.cxx": (None, str(compiler)), "force_disable_caches": True}):
        with pytest.raises(v.CannotCapture, match="^torch.compile with inductor failed: main.cpp:3: no space left$"):
            v.compiled(context, COMPILED, loaded.device, loaded.inputs)


@pytest.mark.full
def test_a_pass_of_inductor_that_scales_an_output_fails(small_run, monkeypatch, tmp_path):
    import torch._inductor.config as inductor

    def scale(graph):
        output = graph.output_node()
        with graph.inserting_before(output):
            scaled = graph.call_function(v.torch.ops.aten.mul.Tensor, (output.args[0][0], 1.01))
        output.args = ((scaled, *output.args[0][1:]),)

    context, loaded = small_run("inductor", "float32+compile")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    for change, mark in ((None, "PASS"), (scale, "FAIL")):
        with inductor.patch(post_grad_custom_post_pass=change, force_disable_caches=True):
            assert stages_4_and_5(context, loaded)[0]["throughput.outputs.float32+compile"] == mark


def test_a_compiler_may_expand_gelu_in_the_form_that_the_model_requests(small_run):
    """The device computes tanh, here only on paper: float32 on the CPU is as far from that as a compiled graph is."""
    context, loaded = small_run("eager", "float32+compile")
    tanh = dataclasses.replace(loaded.probe, gelu={"none": "tanh", "tanh": "tanh"})
    loaded = with_references(context, loaded, probe=tanh)
    found, checked = stages_4_and_5(context, loaded)
    assert found["precision.logits.float32"] != "PASS" and found["precision.logits.float32+compile"] == "PASS"
    more = checked.tolerances["float32+compile"].warn - checked.tolerances["float32"].warn
    assert more == pytest.approx(2 * checked.costs["GELU"])


def test_each_batch_size_is_one_graph_whatever_was_compiled_before(small_run):
    """Dynamo gives up at the ninth shape that one function is compiled for."""
    context, loaded = small_run("eager", "float32+compile")
    for size in range(1, 11):
        with v.forward_pass(context, COMPILED, loaded.device, v.torch.zeros(size, 3, 32, 32)):
            assert v.torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_it_is_no_compiled_graph_if_torch_runs_the_model_itself(small_run):
    context, loaded = small_run("eager", "float32+compile")
    with v.torch._dynamo.config.patch(disable=True), pytest.raises(v.CannotCapture, match="no compiled frames|no graph"):
        v.compiled(context, COMPILED, loaded.device, loaded.inputs)


def test_the_handlers_of_signals_are_put_back(small_run, monkeypatch):
    def replaces_them(graph, inputs):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        return graph

    context, loaded = small_run("scaled", "float32+compile")
    monkeypatch.setitem(v.torch._dynamo.backends.registry._COMPILER_FNS, "scaled", replaces_them)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    v.compiled(context, COMPILED, loaded.device, loaded.inputs)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.full
def test_a_compiler_that_hangs_is_named_and_its_files_are_removed(run, tmp_path):
    (tmp_path / "tmp").mkdir()
    env = {"TEST_BACKENDS": "1", "TMPDIR": str(tmp_path / "tmp")}
    modes = "--modes", "float32+compile", "--compile-backend", "sleeping"
    done = run(*REHEARSAL, *TINY, *modes, "--timeout", "10", env=env)
    assert done.status == 2, done.stdout
    assert "stage precision (compiling float32+compile) takes longer than --timeout 10 s" in done.errors[0]
    assert not os.listdir(tmp_path / "tmp")


# --- On the emulated Ascend -------------------------------------------------------------------------------------------

ON_NPU = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(TESTS)!r}]
import with_test_models, validate_npu as v
device = v.find_device('npu')
"""


def on_npu(tmp_path, lines, **knobs):
    """What a script prints that has a device."""
    (tmp_path / "script.py").write_text(ON_NPU + lines)
    command, env = [sys.executable, tmp_path / "script.py"], os.environ | environment(**knobs)
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    return done.stdout + done.stderr


def test_each_lack_of_a_backend_is_named(tmp_path):
    """Without triton-ascend the order ends at npugraphs; without folders and with a queue of 2 nothing is left."""
    lines = """
print('found', v.find_compiler(device, ''))
print('inductor', v.find_compiler(device, 'inductor'))
os.environ['TORCHINDUCTOR_NPU_BACKEND'] = 'dvm'
print('dvm', v.find_compiler(device, 'inductor'))
os.environ['PATH'] = ''
print('path', v.find_compiler(device, 'inductor'))
os.environ['TORCHINDUCTOR_NPU_BACKEND'] = 'default'
v.COMPILER_FOLDERS['npugraph_ex'] = 'dynamo/nonesuch'
print('folder', v.find_compiler(device, 'npugraph_ex'))
print('next', v.find_compiler(device, ''))
os.environ['TASK_QUEUE_ENABLE'] = '2'
print('queue', v.find_compiler(device, 'npugraphs'))
print('none', v.find_compiler(device, ''))
"""
    shown = on_npu(tmp_path, lines)
    found = dict(line.split(" ", 1) for line in shown.splitlines() if line.endswith("')"))
    assert found["found"] == "('npugraph_ex', '')" and found["next"] == "('npugraphs', '')", shown
    assert "pip install triton-ascend, after torch" in found["inductor"]
    assert found["dvm"] == "('inductor', '')" and "no C++ compiler: apt install g++" in found["path"]
    assert "this torch_npu has no npugraph_ex: " in found["folder"] and "pip install" in found["folder"]
    assert "export TASK_QUEUE_ENABLE=1" in found["queue"]
    assert re.search("npugraph_ex: this .*; inductor: no C.. compiler.*; npugraphs: it captures", found["none"]), shown


@pytest.mark.full
def test_chips_that_nothing_compiles_for_are_named(tmp_path):
    shown = on_npu(tmp_path, "print(v.find_compiler(device, ''))", SOC="Ascend310P3")
    assert "npugraphs: torch_npu compiles for Atlas A2, A3 and 350, not for Ascend310P3" in shown


def test_the_default_models_family_is_captured_and_replayed_by_npugraphs(run, tmp_path):
    arguments = ("--batch-sizes", "1", "--modes", "float32+compile", "--compile-backend", "npugraphs")
    done = run(*QUICK, "--model", "test_dinov3", *arguments)
    assert done.clean, done.stdout + done.stderr
    assert done.mark("precision.embedding.float32+compile") == done.mark("throughput.outputs.float32+compile") == "PASS"
    assert sorted(os.listdir(tmp_path)) == ["stderr", "stdout", "validation_output.txt"]


@pytest.mark.full
def test_npugraphs_that_runs_single_operators_is_skipped(run):
    model = "--model", "test_vit_with_a_table_on_the_cpu"
    done = run(*QUICK, *model, "--batch-sizes", "1", "--modes", "float32+compile", "--compile-backend", "npugraphs")
    assert done.status == 0 and done.mark("precision.float32+compile") == "SKIP", done.stdout
    assert "torch.compile with npugraphs ran no graph: is an operator on the CPU?" in done.text.replace("\n          ", " ")


@pytest.mark.full
def test_npugraph_ex_which_the_emulator_lacks_a_function_for_is_skipped_and_its_signal_handlers_are_gone(tmp_path):
    lines = """
options = v.parse_arguments('--modes float32+compile'.split())
report = v.Report(quiet=True)
report.timeout = 600
context = v.make_context(options, device, v.Ranks(), report)
model = v.timm.create_model('test_tiny_vit').eval().to(device)
try:
    v.compiled(context, v.MODES['float32+compile'], model, v.torch.zeros(1, 3, 32, 32, device=device))
except v.CannotCapture as problem:
    print('problem', problem)
print('imported', 'npugraph_ex.core' in sys.modules, signal.getsignal(signal.SIGINT) == signal.default_int_handler)
"""
    shown = on_npu(tmp_path, lines)
    assert "problem torch.compile with npugraph_ex failed: RuntimeError: Failed to find function" in shown, shown
    assert "imported True True" in shown, shown
