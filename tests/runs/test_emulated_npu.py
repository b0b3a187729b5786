"""The script on the emulated Ascend: the real torch_npu, end to end, on devices that work and that do not."""

import importlib.metadata
import re
import subprocess

import pytest
from ascend_emulator import environment
from conftest import OLD_LOG, QUICK, SCRIPT, SMALL, WITH_TEST_MODELS, start

import validate_npu

CHIP = "Ascend910B4"
NPU_VERSION = importlib.metadata.version("torch-npu")
FALLBACK_CAN_BE_REFUSED = {"2.9.0.post9", "2.10.0.post7", "2.11.0.post3", "2.12.0.post3", "2.13.0"}


# --- a device that works ----------------------------------------------------------------------------------------------


def test_the_default_run_passes_on_npu_0(healthy):
    assert healthy.clean, healthy.stdout + healthy.stderr
    assert healthy.text.startswith(f"validate_npu {validate_npu.VERSION}: vit_small_patch16_dinov3.lvd1689m on npu:0\n")
    assert re.findall(r"^\[./5\] (\w+)", healthy.text, re.MULTILINE) == [
        "device",
        "model",
        "outputs",
        "precision",
        "throughput",
    ]
    assert re.match(r"RESULT: PASS  (\d+) checks: \1 passed, 0 warned, 0 failed, 0 skipped$", healthy.result)


def test_no_log_of_the_emulated_device_can_pass_for_an_npus(healthy):
    assert f"{CHIP} (Atlas A2), " in healthy.texts["device.name"]
    assert "CANN 8.5.0-emulated, " in healthy.texts["device.software"]
    assert "driver 25.5.0-emulated, " in healthy.texts["device.software"]


def test_the_precision_of_the_device_is_measured_and_printed(healthy):
    precision = "matmul float32, convolution HF32 (11 bits, half away), GELU in the tanh form"
    assert healthy.texts["device.fp32_precision"] == precision
    assert healthy.texts["precision.cost.HF32"].endswith("(avoided by torch.npu.conv.allow_hf32 = False)")
    assert "TORCH_NPU_USE_COMPATIBLE_IMPL=1" in healthy.texts["precision.cost.GELU"]


def test_a_healthy_device_has_the_error_of_the_cpu_in_strict_mode_and_the_expected_cost_by_default(healthy):
    for name in ("embedding", "tokens", "feature_map.3"):
        strict, default = ({column: float(healthy.rows[f"precision.{name}.{mode}"][column])
                            for column in ("expected", "cpu_err", "max_row", "limit")} for mode in ("strict", "float32"))  # fmt: skip
        assert strict["expected"] == 0 and strict["cpu_err"] / 2 < strict["max_row"] < 2 * strict["cpu_err"]
        assert strict["limit"] == pytest.approx(64 * strict["cpu_err"], rel=0.1)
        assert default["expected"] / 2 < default["max_row"] < 1.25 * default["expected"] < default["limit"]
        assert default["limit"] == pytest.approx(2 * default["expected"] + 64 * default["cpu_err"], rel=0.1)


def test_a_convolution_is_compared_strictly_and_again_as_users_run_it(healthy):
    assert float(healthy.rows["precision.modules"]["max_row"]) < 1e-5 < 4e-4
    assert 1e-5 < float(healthy.rows["precision.modules.float32"]["max_row"]) < 4e-4
    assert healthy.rows["precision.modules.float32"]["count"] == "1"


@pytest.mark.skipif(NPU_VERSION == "2.9.0", reason="has no TORCH_NPU_USE_COMPATIBLE_IMPL")
def test_without_hf32_and_another_gelu_nothing_is_left_of_the_cost(run):
    exact = run(*SMALL, env={"TORCH_NPU_USE_COMPATIBLE_IMPL": "1", "TEST_ALLOW_HF32": ""})
    assert exact.clean, exact.stdout
    assert "TORCH_NPU_USE_COMPATIBLE_IMPL=1" in exact.texts["device.environment"]
    assert not [id for id in exact.texts if id.startswith("precision.cost.")]
    assert float(exact.rows["precision.embedding.float32"]["err_fp64"]) < 1e-5
    assert "precision.embedding.strict" not in exact.rows, "float32 is strict as it is"


def test_convolutions_in_full_float32_with_hf32_allowed_are_named(run):
    full = run(*SMALL, HF32=0)
    assert full.clean and full.texts["precision.switches"].startswith("outputs are bit-identical with and without")


def test_an_npu_that_computes_exactly_what_the_cpu_computes_is_a_warning(run):
    """A CNN without GELU on a device that never rounds to HF32: was it the NPU that computed?"""
    done = run(*SMALL, "--model", "test_resnet", HF32=0)
    assert done.status == 0 and done.mark("precision.is_device") == "WARN", done.stdout


def test_published_figures_are_facts(healthy):
    row = healthy.rows["precision.published.embedding"]
    assert {"max_abs", "mean_abs", "rel_l2", "nmae", "cosine", "seeds"} <= set(row) and row["seeds"] == "5" and not healthy.marks("precision.published")


def test_one_cause_makes_one_block_with_the_first_module(run):
    done = run(*SMALL, FAULT="LayerNorm:nan")
    (block,) = done.failures
    assert block.startswith("FAIL outputs.embedding: batch 1: ") and ", 0 on the CPU" in block
    assert re.search(r"modules out of tolerance, in execution order: blocks\.0\.norm1 \(LayerNorm, inf > ", block)
    assert re.search(r"\d+ more checks failed after it: outputs\.", block)
    assert "next: run blocks.0.norm1 by itself on the device and on the CPU" in block


def test_the_error_code_of_a_launch_is_in_the_log(run):
    done = run(*SMALL, "--model", "test_dinov3", FAULT="Mul:error=507015,from=30")
    assert "aclnnMul: error code 507015, an AI Core failed" in " ".join(done.text.split()), done.text


def test_two_runs_diff_clean(run, tmp_path):
    for name in ("first.txt", "second.txt"):
        run(*SMALL, "--output", name)
    logs = [tmp_path / name for name in ("first.txt", "second.txt")]
    diff = subprocess.run(["diff", "-I", "^~", *logs], capture_output=True, text=True)
    assert (diff.returncode, diff.stdout) == (0, "")


@pytest.mark.parametrize("model", ["test_resnet", "test_convnext", "test_efficientnet", "test_nfnet"])
def test_other_families_pass(run, model):
    done = run(*QUICK, "--model", model)
    assert done.clean, done.stdout


def test_another_device_of_the_host_can_be_named(run):
    done = run(*SMALL, "--device", "npu:1", DEVICES=2)
    assert done.clean and re.match(rf"npu:1, {CHIP} .*, 2 visible", done.texts["device.name"])


@pytest.mark.full
def test_every_line_that_calls_the_devices_api_ran_here(tmp_path):
    """Lines of the script that name torch.npu, torch.accelerator or the device's module, but for the CUDA ones."""
    import coverage

    data = tmp_path / "coverage"
    launcher = ["-m", "coverage", "run", "--append", f"--data-file={data}", f"--include={SCRIPT}", WITH_TEST_MODELS]
    modes = ("hf32", "bfloat16", "float32+graph")
    arguments = (*QUICK, "--model", "test_dinov3", "--batch-sizes", "1", "--warmup", "1", "--modes", *modes)
    assert start(arguments, tmp_path, environment(), launcher).clean
    lacking = (*QUICK, "--model", "test_vit_that_waits", "--batch-sizes", "1", "2048", "--modes", "float32+graph")
    assert start(lacking, tmp_path, environment(MEMORY="24M"), launcher).status == 0
    measured = coverage.CoverageData(str(data))
    measured.read()
    ran = set(measured.lines(str(SCRIPT)))
    api = re.compile(r"torch\.(npu|accelerator|get_device_module)\b|\bmodule\.(?!register)\w+\(")
    lines = {number: line for number, line in enumerate(SCRIPT.read_text("utf-8").splitlines(), 1) if api.search(line)}
    code = {
        number: line for number, line in lines.items() if not re.match(r'\s*(#|"|[A-Z])', line) and "``" not in line
    }
    assert len(code) >= 8
    assert not {number: line for number, line in code.items() if number not in ran}


# --- devices that do not work -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "knobs", "message"),
    [
        ([], {"DEVICES": 0}, "no npu device is visible to torch"),
        (["--device", "npu:3"], {"DEVICES": 2}, "there is no npu:3: 2 npu device(s) visible, npu:0 to npu:1"),
        ([], {"SET_DEVICE_ERROR": 507033}, "npu:0 is visible, but does not work: error code 507033, the device does not start"),
        ([], {"INIT_ERROR": 507008}, "npu:0 is visible, but does not work: error code 507008, the SoC could not be read"),
        ([], {"WITHOUT": "driver"}, "the Ascend driver is missing (libascend_hal.so): install it, or mount"),
        ([], {"WITHOUT": "cann"}, "CANN is not installed, or its environment is not set"),
    ],
    ids=lambda value: ",".join(map(str, value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_device_that_cannot_be_used_ends_the_run(tmp_path, run, arguments, knobs, message):
    (tmp_path / "validation_output.txt").write_text(OLD_LOG)
    fresh = "WITHOUT" in knobs  # libraries are found when a process starts
    done = start([*SMALL, *arguments], tmp_path, environment(**knobs)) if fresh else run(*SMALL, *arguments, **knobs)
    assert done.status == 2, done.stdout + done.stderr
    assert len(done.errors) == 1 and message in done.errors[0], done.stderr
    assert "Traceback" not in done.stderr and done.text == OLD_LOG


@pytest.mark.parametrize(
    ("knobs", "failures"),
    [
        ({"FAULT": "Addmm:error=507015,from=60"}, [r"(device|model|outputs)\.stage: aclnnAddmm: error code 507015"]),
        ({"SYNCHRONIZE_ERROR": "507015,from=60"}, [r"\.stage: error code 507015, an AI Core failed: see ~/ascend/log"]),
        ({"SYNCHRONIZE_ERROR": "507014,from=60"}, [r"\.stage: error code 507014, an AI Core timed out"]),
        ({"FAULT": "LayerNorm:nan"}, [r"outputs\.embedding: batch 1: \d+ NaN and 0 Inf"]),
        ({"FAULT": "Convolution:inf"}, [r"device\.convolution: error inf > "]),
        ({"FAULT": "Matmul:scale=1.01"}, [r"device\.matmul: error 1\.0e-02 > limit "]),
        ({"FAULT": "Addmm:scale=1.2"}, [r"precision\.embedding\.strict: .* worst row: image \d.* modules out of tolerance, .*Linear"]),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_device_that_misbehaves_fails_with_a_message(run, knobs, failures):
    done = run(*SMALL, **knobs)
    assert done.status == 1, done.stdout + done.stderr
    assert done.result.startswith("RESULT: FAIL")
    for pattern in failures:
        assert any(re.search(pattern, line) for line in done.failures), "\n".join(done.failures)
    assert all(len(line) <= 99 for line in done.text.splitlines())


def test_a_chip_without_fp32_and_bfloat16_in_its_matrix_unit_passes(run):
    """The 310P computes fp32 matrix products in float16; its convolutions are not emulated."""
    model = ("--model", "test_vit_without_convolution", "--modes", "amp-bfloat16", "amp-float16")
    done = run(*QUICK, *model, SOC="Ascend310P3", env={"INF_NAN_MODE_ENABLE": "0"})
    assert done.clean, done.stdout
    assert "overflow saturates" in done.texts["device.settings"]
    assert done.texts["device.fp32_precision"] == "matmul float16 (10 bits, half even), GELU in the tanh form"
    assert done.mark("precision.strict") == "SKIP" and "npu:0 has no float32 products" in done.text
    assert done.mark("precision.amp-bfloat16") == "SKIP"
    row = done.rows["precision.embedding.float32"]
    assert 1e-5 < float(row["max_row"]) < 1.25 * float(row["expected"])


def test_out_of_memory_at_one_batch_size_is_a_row_and_the_others_are_reported(run):
    done = run(*SMALL, "--batch-sizes", "1", "4", "64", MEMORY="40M")
    assert done.status == 0, done.stdout
    assert [id for id in done.rows if id.startswith("throughput.float32.")] == ["throughput.float32.1", "throughput.float32.4"]
    assert done.mark("outputs.batch.64") == done.mark("throughput.float32.64") == "WARN" and "2 warned" in done.result
    assert any("throughput.float32.64: out of device memory" in line for line in done.failures)


LOST = "the device no longer works after the error above"


@pytest.mark.parametrize(
    ("knobs", "stage", "skipped"),
    [
        ("Addmm:error=507015,from=60,once", "outputs", ["precision", "throughput"]),
        ("LayerNorm:error=507015,from=60,once", "precision", ["throughput"]),
        ("Convolution:error=507015,from=55,once", "throughput", []),
        ("Addmm:async_error=507054,from=60", "outputs", ["precision", "throughput"]),
        ("Convolution:error=507015,from=1,once", "device", ["model", "outputs", "precision", "throughput"]),
    ],
)
def test_nothing_is_judged_on_a_device_that_is_lost(run, knobs, stage, skipped):
    """After one failed launch torch_npu drops every later operator without a word: one FAIL, and a SKIP for the rest."""
    done = run(*QUICK, "--model", "test_dinov3", "--iters", "40", FAULT=knobs)
    marks = done.marks()
    assert done.status == 1 and [id for id, mark in marks.items() if mark == "FAIL"] == [f"{stage}.stage"], done.stdout
    assert stage == "throughput" or not done.mark("precision.control"), "nothing was computed for it"
    assert [id for id, mark in marks.items() if mark == "SKIP"] == [f"{name}.stage" for name in skipped]
    assert done.text.count(LOST) == len(skipped)


def test_a_capture_that_fails_leaves_the_stream_and_the_other_modes_as_they_were(run):
    arguments = ("--model", "test_vit_that_waits", "--modes", "float32+graph", "amp-bfloat16", "amp-bfloat16+graph")
    done = run(*QUICK, *arguments)
    assert done.clean, done.stdout
    assert done.mark("throughput.float32+graph.1") == done.mark("throughput.amp-bfloat16+graph.1") == "SKIP"


def test_an_operator_that_would_run_on_the_cpu_is_named(run):
    model = (*QUICK, "--model", "test_vit_with_bessel")
    done = run(*model)
    named = {1: r"model\.stage: aten::special_bessel_j0\S* has no NPU kernel and would run on the CPU",
             0: r"model\.fallback: on the CPU: aten::special_bessel_j0\.out"}  # fmt: skip
    assert done.status == (NPU_VERSION in FALLBACK_CAN_BE_REFUSED), done.stdout + done.stderr
    assert any(re.search(named[done.status], line) for line in done.failures)
    allowed = run(*model, env={"TORCH_NPU_FALLBACK_CPU_DISABLE": "0"})
    assert allowed.mark("model.fallback") == "WARN", allowed.stdout
    assert any("model.fallback: on the CPU: aten::special_bessel_j0.out" in line for line in allowed.failures)
    assert "will fall back to run on the CPU" in allowed.stderr, "what is read is passed on"


def test_an_operator_whose_kernel_copies_to_the_cpu_is_named(run):
    """Without a word, and whatever TORCH_NPU_FALLBACK_CPU_DISABLE says."""
    done = run(*QUICK, "--model", "test_vit_with_antialias")
    assert done.mark("model.fallback") == "WARN", done.stdout
    assert any("_upsample_bicubic2d_aa (its NPU kernel copies to the CPU and back)" in line for line in done.failures)
