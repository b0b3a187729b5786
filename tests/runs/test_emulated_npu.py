"""The script on the emulated Ascend: the real torch_npu, end to end, on devices that work and that do not."""

import re
import subprocess

import pytest
from ascend_emulator import environment
from conftest import ROOT, SCRIPT, Run, table

WITH_TEST_MODELS = ROOT / "tests" / "with_test_models.py"
NPU = ("--weights", "random", "--warmup", "1", "--iters", "5")
SMALL = (*NPU, "--model", "test_vit", "--batch-sizes", "1", "4")


@pytest.fixture(scope="session")
def healthy(tmp_path_factory):
    """The default run but for the weights: DINOv3 ViT-S/16, every batch size, on npu:0."""
    return Run(NPU, tmp_path_factory.mktemp("healthy"), environment())


# --- a device that works ----------------------------------------------------------------------------------------------


def test_the_default_run_passes_on_npu_0(healthy):
    assert healthy.status == 0, healthy.stdout + healthy.stderr
    assert healthy.log.startswith("validate_npu: vit_small_patch16_dinov3.lvd1689m on npu:0\n")
    assert re.findall(r"^\[./5\] (\w+)", healthy.log, re.M) == ["device", "model", "outputs", "precision", "throughput"]
    assert re.match(r"RESULT: PASS  (\d+) checks: \1 passed, 0 warned, 0 failed, 0 skipped$", healthy.result)


def test_no_log_of_the_emulated_device_can_pass_for_an_npus(healthy):
    assert "Ascend910B4 (emulated)" in healthy.log


def test_versions_come_from_torch_npu_and_cann(healthy):
    assert re.search(r"torch_npu +2\.\d+", healthy.log)
    assert re.search(r"CANN +8\.5\.0-emulated", healthy.log)


def test_hf32_switches_are_read_and_reported(healthy):
    assert "fp32 is computed in   convolution HF32, matmul float32" in healthy.log
    assert "explained: HF32       embedding off by" in healthy.log


def worst_row_error(log, output, mode):
    """Relative L2 error of the worst row, from one line of stage 4."""
    line = re.search(rf"^\w+ +{output} +{mode} +(\d.*)", log[log.index("[4/5]") :], re.M)
    return float(line[1].split()[3])


def test_precision_errors_are_those_of_hf32_and_not_of_the_cpu_compared_with_itself(healthy, run):
    assert 1e-5 < worst_row_error(healthy.log, "embedding", "float32") < 1e-3
    assert 0 < worst_row_error(healthy.log, "embedding", "strict float32") < 1e-6
    assert re.search(r"^PASS  Conv2d .* 1\.\d+e-04 ", healthy.log, re.M)
    # Without HF32 and with the erf form of GELU nothing is left of it: the emulated kernels are the CPU's.
    exact = run(*SMALL, env=environment(HF32=0) | {"TORCH_NPU_USE_COMPATIBLE_IMPL": "1"})
    assert exact.status == 0
    assert "environment           TORCH_NPU_USE_COMPATIBLE_IMPL=1" in exact.log
    assert worst_row_error(exact.log, "embedding", "float32") < 1e-6


def test_two_runs_diff_clean(run, tmp_path):
    logs = []
    for name in ("first.txt", "second.txt"):
        assert run(*SMALL, "--output", name, env=environment()).status == 0
        logs.append(tmp_path / name)
    diff = subprocess.run(["diff", "-I", "^~", *logs], capture_output=True, text=True)
    assert (diff.returncode, diff.stdout) == (0, "")


@pytest.mark.parametrize("model", ["resnet18", "convnext_atto", "test_efficientnet", "test_nfnet"])
def test_other_families_pass(run, model):
    done = run(*NPU, "--model", model, "--batch-sizes", "1", "2", env=environment())
    assert done.status == 0 and " 0 warned, 0 failed" in done.result, done.stdout


def test_another_device_of_the_host_can_be_named(run):
    done = run(*SMALL, "--device", "npu:1", env=environment(DEVICES=2))
    assert done.status == 0, done.stdout
    assert "npu:1 Ascend910B4 (emulated), 2 visible" in done.log


def test_every_line_that_calls_the_devices_api_ran_here(tmp_path):
    """Lines of the script that name torch.npu, torch.accelerator or the device's module, but for the CUDA ones."""
    import coverage

    data = tmp_path / "coverage"
    launcher = ["-m", "coverage", "run", f"--data-file={data}", f"--include={SCRIPT}"]
    model = ("--model", "test_dinov3", "--batch-sizes", "1", "2", "--amp", "bfloat16", "--graph")
    assert Run([*NPU, *model], tmp_path, environment(), [*launcher, WITH_TEST_MODELS]).status == 0
    measured = coverage.CoverageData(str(data))
    measured.read()
    ran = set(measured.lines(str(SCRIPT)))
    api = re.compile(r"torch\.(npu|accelerator|get_device_module)\b|\bmodule\.\w+\(")
    lines = {number: line for number, line in enumerate(SCRIPT.read_text("utf-8").splitlines(), 1) if api.search(line)}
    code = {
        number: line for number, line in lines.items() if not re.match(r'\s*(#|"""|[A-Z])', line) and "``" not in line
    }
    assert len(code) >= 8
    missed = {number: line for number, line in code.items() if number not in ran and "empty_cache" not in line}
    assert not missed


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
def test_a_device_that_cannot_be_used_ends_the_run(tmp_path, arguments, knobs, message):
    (tmp_path / "validation_output.txt").write_text("an earlier log\n")
    done = Run([*SMALL, *arguments], tmp_path, environment(**knobs))
    assert done.status == 2, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if "error: " in line]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert "Traceback" not in done.stderr
    assert done.log == "an earlier log\n"


@pytest.mark.parametrize(
    ("knobs", "failures"),
    [
        ({"FAULT": "Addmm:error=507015,from=20"}, [r"model: aclnnAddmm failed on the device, see ~/ascend/log"]),
        (
            {"SYNCHRONIZE_ERROR": "507015,from=30"},
            [r"(model|outputs): error code 507015, an AI Core failed: see ~/ascend/log"],
        ),
        ({"SYNCHRONIZE_ERROR": "507014,from=30"}, [r"(model|outputs): error code 507014, an AI Core timed out"]),
        (
            {"FAULT": "LayerNorm:nan"},
            [r"embedding: batch 1: .*NaN or infinite", r"embedding: float32: .* of .* elements are off"],
        ),
        ({"FAULT": "Convolution:inf"}, [r"tokens: batch 4: .*NaN or infinite"]),
        ({"FAULT": "Matmul:scale=1.01"}, [r"computes: a plain matrix product is wrong"]),
        (
            {"FAULT": "Addmm:scale=1.2"},
            [
                r"embedding: float32: .* of .* elements are off by more than .*; worst row .* at image \d",
                r"Linear: .*first out of limits: ",
            ],
        ),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_a_device_that_misbehaves_fails_with_a_message(run, knobs, failures):
    done = run(*SMALL, env=environment(**knobs))
    assert done.status == 1, done.stdout + done.stderr
    assert done.result.startswith("RESULT: FAIL")
    listed = [line for line in done.log.splitlines() if re.match(r"FAIL  [^ ]+( [^ ]+)*: ", line)]
    for pattern in failures:
        assert any(re.search(pattern, line) for line in listed), "\n".join(listed)


def test_a_chip_without_fp32_and_bfloat16_in_its_matrix_unit_passes(run):
    """The 310P computes fp32 matrix products in float16; its convolutions are not emulated."""
    model = ("--model", "test_vit_without_convolution", "--batch-sizes", "1", "2", "--amp", "bfloat16", "float16")
    done = run(*NPU, *model, env=environment(SOC="Ascend310P3"), launcher=[WITH_TEST_MODELS])
    assert done.status == 0, done.stdout
    assert "fp32 is computed in   convolution float16, matmul float16" in done.log
    assert re.search(r"^SKIP  bfloat16 +npu:0 does not compute in it", done.log, re.M)
    assert 1e-5 < worst_row_error(done.log, "embedding", "float32") < 2**-8
    assert re.search(r"^PASS  Linear ", done.log, re.M)


def test_out_of_memory_at_one_batch_size_is_a_row_and_the_others_are_reported(run):
    sizes = ("--batch-sizes", "1", "4", "64")
    done = run(*SMALL, *sizes, env=environment(MEMORY="40M"))
    assert done.status == 0, done.stdout
    assert set(table(done.log)) == {("float32", 1), ("float32", 4)}
    assert done.outcomes("batch 64") == done.outcomes("float32") == ["WARN"]  # in stage 3, and in stage 5
    assert "2 warned" in done.result


def test_an_operator_that_would_run_on_the_cpu_is_named(run):
    model = ("--model", "test_vit_with_bessel", "--batch-sizes", "1")
    done = run(*NPU, *model, env=environment(), launcher=[WITH_TEST_MODELS])
    assert done.status == 1, done.stdout + done.stderr
    assert re.search(r"FAIL  model: aten::special_bessel_j0\S* has no NPU kernel and would run on the CPU", done.log)
    allowed = run(
        *NPU, *model, env=environment() | {"TORCH_NPU_FALLBACK_CPU_DISABLE": "0"}, launcher=[WITH_TEST_MODELS]
    )
    assert allowed.outcomes("operators") == ["WARN"], allowed.stdout
