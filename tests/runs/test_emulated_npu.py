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
    assert CHIP in healthy.log.facts["device"]
    assert healthy.log.facts["CANN"] == healthy.log.facts["CANN kernels"] == "8.5.0-emulated"
    assert healthy.log.facts["driver"] == "25.5.0-emulated"


def test_what_the_device_computes_in_is_measured_and_printed(healthy):
    precision = "matmul 23 bits, convolution 11 bits (HF32, half away), GELU tanh"
    assert healthy.log.facts["fp32 is computed in"] == precision


def test_the_chips_peak_is_printed_and_float32_has_no_share_of_it(healthy):
    assert healthy.log.facts["fp16 peak"] == "245.8 TFLOP/s"
    assert healthy.rows("throughput")["float32", "fastest"]["of_peak"] == "-"


def test_the_cost_is_attributed_to_gelu_and_to_hf32_with_what_avoids_each(healthy):
    assert re.fullmatch(
        r"embedding, worst row: GELU moves it by \d\.\de-0\d, which TORCH_NPU_USE_COMPATIBLE_IMPL=1 before the start "
        r"avoids .*; then HF32 moves it by \d\.\de-05, which torch.npu.conv.allow_hf32 = False avoids",
        healthy.log.facts["cost"],
    )


def test_a_healthy_device_is_strictly_as_far_off_as_the_cpu_and_costs_as_run_what_is_expected(healthy):
    for name in ("embedding", "tokens", "feature map 3"):
        strict, as_run = (
            {column: float(healthy.rows("precision")[name, what][column]) for column in ("cost", "cpu", "row", "warn")}
            for what in ("float32_strict", "float32")
        )
        assert strict["cost"] == 0 and strict["cpu"] / 2 < strict["row"] < 2 * strict["cpu"]
        assert strict["warn"] == pytest.approx(64 * strict["cpu"], rel=0.1)
        assert as_run["cost"] / 2 < as_run["row"] < 1.25 * as_run["cost"] < as_run["warn"]
        assert as_run["warn"] == pytest.approx(2 * as_run["cost"] + 64 * as_run["cpu"], rel=0.1)


def test_a_convolution_is_compared_strictly_and_again_as_users_run_it(healthy):
    rows = healthy.rows("precision")
    assert float(rows["Conv2d", "worst_of_1"]["row"]) < 1e-6 < 1e-5 < float(rows["Conv2d", "float32_of_1"]["row"]) < 4e-4
    assert [name for name, what in rows if what.startswith("float32_of_")] == ["Conv2d"]


@pytest.mark.skipif(NPU_VERSION == "2.9.0", reason="has no TORCH_NPU_USE_COMPATIBLE_IMPL")
def test_without_hf32_and_another_gelu_nothing_is_left_of_the_cost(run):
    exact = run(*SMALL, env={"TORCH_NPU_USE_COMPATIBLE_IMPL": "1", "TEST_ALLOW_HF32": ""})
    assert exact.clean, exact.stdout
    assert "TORCH_NPU_USE_COMPATIBLE_IMPL=1" in exact.log.facts["environment"] and "cost" not in exact.log.facts
    assert float(exact.rows("precision")["embedding", "float32"]["fp64"]) < 1e-6
    assert ("embedding", "float32_strict") not in exact.rows("precision"), "float32 is strict as it is"


def test_convolutions_in_full_float32_with_hf32_allowed_are_named(run):
    full = run(*SMALL, HF32=0)
    assert full.clean and full.log.facts["switches"] == "outputs are equal bit for bit with each setting: float32 in full"


def test_the_published_checks_are_facts(healthy):
    for name in ("card's check", "error below 1 %"):
        assert " met; the device's arithmetic alone gives " in healthy.log.facts[name] and not healthy.marks(name)


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
    assert done.clean and done.log.facts["device"].startswith(f"npu:1 {CHIP}, 2 visible")


@pytest.mark.full
def test_every_line_that_calls_the_devices_api_ran_here(tmp_path):
    """Lines of the script that name torch.npu, torch.accelerator or the device's module, but for the CUDA ones."""
    import coverage

    data = tmp_path / "coverage"
    launcher = ["-m", "coverage", "run", "--append", f"--data-file={data}", f"--include={SCRIPT}", WITH_TEST_MODELS]
    modes = ("hf32", "half-bfloat16", "float32+graph")
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
        ({"FAULT": "Addmm:error=507015,from=60"}, [r"(device|model|outputs): aclnnAddmm failed on the device, see"]),
        ({"SYNCHRONIZE_ERROR": "507015,from=60"}, [r"\w+: error code 507015, an AI Core failed: see ~/ascend/log"]),
        ({"SYNCHRONIZE_ERROR": "507014,from=60"}, [r"\w+: error code 507014, an AI Core timed out"]),
        ({"FAULT": "LayerNorm:nan"}, [r"embedding: batch 1: .*NaN or infinite", r"embedding: float32: off by inf"]),
        ({"FAULT": "Convolution:inf"}, [r"tokens: batch 3: .*NaN or infinite"]),
        ({"FAULT": "Matmul:scale=1.01"}, [r"computes: matmul.*: off by 1\.0e-02 .* a plain matmul is"]),
        ({"FAULT": "Addmm:scale=1.2"}, [r"embedding: float32: off by .* at image \d.* it begins in \w", r"Linear: .*Linear is wrong"]),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_device_that_misbehaves_fails_with_a_message(run, knobs, failures):
    done = run(*SMALL, **knobs)
    assert done.status == 1, done.stdout + done.stderr
    assert done.result.startswith("RESULT: FAIL")
    for pattern in failures:
        assert any(re.search(pattern, line) for line in done.failures), "\n".join(done.failures)
    assert all(len(line) <= 120 for line in done.text.splitlines())


def test_a_chip_without_fp32_and_bfloat16_in_its_matrix_unit_passes(run):
    """The 310P computes fp32 matrix products in float16; its convolutions are not emulated."""
    model = ("--model", "test_vit_without_convolution", "--modes", "amp-bfloat16", "amp-float16")
    done = run(*QUICK, *model, SOC="Ascend310P3", env={"INF_NAN_MODE_ENABLE": "0"})
    assert done.clean, done.stdout
    assert done.log.facts["overflow"].startswith("ends at the largest number")
    assert done.log.facts["fp32 is computed in"] == "matmul 10 bits (float16, half even), GELU tanh"
    assert done.marks("float32 strict") == ["SKIP"] and "npu:0 has no float32 products" in done.text
    assert done.marks("amp-bfloat16") == ["SKIP"]
    row = done.rows("precision")["embedding", "float32"]
    assert 1e-5 < float(row["row"]) < 1.25 * float(row["cost"])


def test_out_of_memory_at_one_batch_size_is_a_row_and_the_others_are_reported(run):
    done = run(*SMALL, "--batch-sizes", "1", "4", "64", MEMORY="40M")
    assert done.status == 0, done.stdout
    assert [key[1] for key in done.rows("throughput") if key[0] == "float32"][:2] == ["1", "4"]
    assert done.marks("batch 64", "outputs") == ["WARN"] and "2 warned" in done.result
    assert any("float32: batch 64: out of device memory" in line for line in done.failures)


LOST = "the device cannot be used any more after the error above"


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
    failed = [key[1] for key, mark in done.log.marks.items() if mark == "FAIL"]
    assert done.status == 1 and failed == [stage], done.stdout
    assert "control" not in done.log.facts, "nothing was computed for it"
    assert [key[1] for key, mark in done.log.marks.items() if mark == "SKIP"] == skipped
    assert done.text.count(LOST) == (len(skipped) if stage != "device" else 1)


def test_a_capture_that_fails_leaves_the_stream_and_the_other_modes_as_they_were(run):
    arguments = ("--model", "test_vit_that_waits", "--modes", "float32+graph", "amp-bfloat16", "amp-bfloat16+graph")
    done = run(*QUICK, *arguments)
    assert done.clean, done.stdout
    assert done.marks("float32+graph") == done.marks("amp-bfloat16+graph") == ["SKIP"]


def test_an_operator_that_would_run_on_the_cpu_is_named(run):
    model = (*QUICK, "--model", "test_vit_with_bessel")
    done = run(*model)
    named = {1: r"model: aten::special_bessel_j0\S* has no NPU kernel and would run on the CPU",
             0: r"operators: on the CPU: aten::special_bessel_j0\.out"}  # fmt: skip
    assert done.status == (NPU_VERSION in FALLBACK_CAN_BE_REFUSED), done.stdout + done.stderr
    assert any(re.search(named[done.status], line) for line in done.failures)
    allowed = run(*model, env={"TORCH_NPU_FALLBACK_CPU_DISABLE": "0"})
    assert allowed.marks("operators") == ["WARN"], allowed.stdout
    assert any("operators: on the CPU: aten::special_bessel_j0.out" in line for line in allowed.failures)
    assert "will fall back to run on the CPU" in allowed.stderr, "what is read is passed on"


def test_an_operator_whose_kernel_copies_to_the_cpu_is_named(run):
    """Without a word, and whatever TORCH_NPU_FALLBACK_CPU_DISABLE says."""
    done = run(*QUICK, "--model", "test_vit_with_antialias")
    assert done.marks("operators") == ["WARN"], done.stdout
    assert any("_upsample_bicubic2d_aa (its NPU kernel copies to the CPU and back)" in line for line in done.failures)
