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
    assert healthy.text.startswith(f"validate_npu {validate_npu.VERSION}: vit_small_patch16_dinov3.lvd1689m on npu:0 (emulated, not an NPU)\n")
    assert re.findall(r"^\[./5\] (\w+)", healthy.text, re.MULTILINE) == [
        "device",
        "model",
        "outputs",
        "precision",
        "throughput",
    ]
    assert re.match(r"RESULT: PASS  (\d+) checks: \1 passed, 0 warned, 0 failed, 0 skipped \(emulated, not an NPU\)$", healthy.result)


def test_no_log_of_the_emulated_device_can_pass_for_an_npus(healthy):
    assert healthy.texts["device.name"].startswith(f"npu:0, {CHIP} (Atlas A2), ")
    for version in ("CANN 8.5.0-emulated", "driver 25.5.0-emulated", f"torch_npu {NPU_VERSION}"):
        assert version in healthy.texts["device.software"]


def test_the_precision_of_float32_is_measured_and_printed(healthy):
    precision = "matmul float32, convolution HF32 (11 bits, half away), GELU in the tanh form"
    assert healthy.texts["device.fp32"] == precision


def test_half_precision_has_a_share_of_the_chips_float16_peak_and_float32_has_none(run):
    done = run(*SMALL, "--modes", "amp-float16")
    shares = {id: row["share"] for id, row in done.rows.items() if "share" in row}
    assert done.clean and [share == "-" for share in shares.values()] == [True, False], done.stdout


def test_the_cost_of_gelu_and_of_hf32_is_printed_with_the_setting_that_avoids_it(healthy):
    for name, pattern in {
        "GELU": r"GELU costs embedding \d\.\de-04 \(avoided by TORCH_NPU_USE_COMPATIBLE_IMPL=1, not in 2\.9\.0\)",
        "HF32": r"HF32 costs embedding \d\.\de-05 \(avoided by torch\.npu\.conv\.allow_hf32 = False\)",
    }.items():
        assert re.fullmatch(pattern, healthy.texts[f"precision.cost.{name}"])


def test_each_output_has_the_error_of_the_cpu_in_strict_mode_and_the_expected_error_in_float32(healthy):
    outputs = [id.removeprefix("outputs.") for id in healthy.rows if id.startswith("outputs.")]
    assert outputs == ["embedding", "tokens", "feature_map.1", "feature_map.2", "feature_map.3"]
    for output in outputs:
        strict, float32 = (
            {column: float(healthy.rows[f"precision.{output}.{mode}"][column])
             for column in ("expected", "cpu_err", "max_row", "limit")}
            for mode in ("strict", "float32")
        )  # fmt: skip
        assert strict["expected"] == 0 and strict["cpu_err"] / 2 < strict["max_row"] < 2 * strict["cpu_err"]
        assert strict["limit"] == pytest.approx(64 * strict["cpu_err"], rel=0.1)
        assert 0.5 < float32["max_row"] / float32["expected"] < 1.3
        assert float32["limit"] == pytest.approx(2 * float32["expected"] + 64 * float32["cpu_err"], rel=0.1)


def test_only_convolutions_are_compared_again_in_float32(healthy):
    strict, float32 = (healthy.rows[id] for id in ("precision.modules", "precision.modules.float32"))
    assert float(strict["max_row"]) < 1e-6 < 1e-5 < float(float32["max_row"]) < 4e-4
    assert int(strict["count"]) > 100 and (float32["count"], float32["worst"]) == ("1", "patch_embed.proj")


@pytest.mark.skipif(NPU_VERSION == "2.9.0", reason="has no TORCH_NPU_USE_COMPATIBLE_IMPL")
def test_without_hf32_and_with_the_requested_gelu_the_cost_is_zero(run):
    exact = run(*SMALL, env={"TORCH_NPU_USE_COMPATIBLE_IMPL": "1", "TEST_ALLOW_HF32": ""})
    assert exact.clean, exact.stdout
    assert "TORCH_NPU_USE_COMPATIBLE_IMPL=1" in exact.texts["device.environment"]
    assert float(exact.rows["precision.embedding.float32"]["err_fp64"]) < 1e-6
    unused = ("precision.cost.", "precision.embedding.strict")  # float32 already is strict
    assert not [id for id in exact.texts | exact.rows if id.startswith(unused)]


def test_convolutions_in_full_float32_although_hf32_is_allowed_are_reported(run):
    full = run(*SMALL, HF32=0)
    same = "outputs are bit-identical with and without reduced-precision float32"
    assert full.clean and full.texts["precision.switches"] == same


def test_the_published_error_measures_are_printed_without_a_limit(healthy):
    row = healthy.rows["precision.published.embedding"]
    assert float(row["rel_l2"]) < 1e-3 and float(row["cosine"]) > 0.99999
    assert not healthy.marks("precision.published")


def test_the_first_values_of_both_sides_are_printed(healthy):
    npu, cpu = (healthy.texts[f"precision.first_values.{place}"].split(": ") for place in ("npu", "cpu"))
    assert npu[0] == cpu[0] == "embedding, image 0"
    values = [[float(value) for value in text.split()] for _, text in (npu, cpu)]
    assert values[0] != values[1] and values[0] == pytest.approx(values[1], rel=1e-2)


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
    assert done.clean, done.stdout
    assert re.fullmatch(rf"npu:1, {CHIP} .*, 2 visible", done.texts["device.name"])


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
        ([], {"DEVICES": 0}, "there is no npu:0: 0 npu device(s) visible to torch"),
        (["--device", "npu:3"], {"DEVICES": 2}, "there is no npu:3: 2 npu device(s) visible to torch"),
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
        ({"FAULT": "Addmm:error=507015,from=60"}, [r"outputs\.stage: aclnnAddmm: error code 507015, an AI Core failed; see"]),
        ({"FAULT": "Mul:error=507015,from=30"}, [r"\.stage: aclnnMul: error code 507015, an AI Core failed; see ~/ascend/log"]),
        ({"SYNCHRONIZE_ERROR": "507015,from=60"}, [r"\.stage: error code 507015, an AI Core failed; see ~/ascend/log"]),
        ({"SYNCHRONIZE_ERROR": "507014,from=60"}, [r"\.stage: error code 507014, an AI Core timed out"]),
        ({"FAULT": "LayerNorm:nan"}, [
            r"^FAIL outputs\.embedding: batch 1: \d+ NaN and 0 Inf in \d+ values, 0 on the CPU; .*"
            r"in execution order: blocks\.0\.norm1 \(LayerNorm, .* more checks failed after it: outputs\.tokens, .*"
            r"next: run blocks\.0\.norm1 by itself on the device and on the CPU$"]),
        ({"FAULT": "Convolution:inf"}, [r"device\.convolution: error inf .*NaN and Inf: device 0 and 1, reference 0 and 0"]),
        ({"FAULT": "Matmul:scale=1.01"}, [
            r"device\.matmul: error 1\.0e-02 > limit .*order: blocks\.0\.attn\.qkv \(Linear, .*next: a plain matmul is incorrect"]),
        ({"FAULT": "Addmm:scale=1.2"}, [
            r"precision\.embedding\.strict: .*worst row: image \d.* in execution order: blocks\.0\.attn\.proj \(Linear, 2\.0e-01 "]),
    ],
    ids=lambda value: ",".join(map(str, value.values())) if isinstance(value, dict) else "",
)  # fmt: skip
def test_a_device_that_misbehaves_fails_with_a_message(run, knobs, failures):
    """One cause makes one block in the list of failures, which names the first module and counts the later checks."""
    done = run(*QUICK, "--model", "test_dinov3", **knobs)
    assert done.status == 1, done.stdout + done.stderr
    assert done.result.startswith("RESULT: FAIL")
    assert len(done.failures) == len(failures), "\n".join(done.failures)
    for pattern, block in zip(failures, done.failures):
        assert re.search(pattern, block)
    assert all(len(line) <= 120 for line in done.text.splitlines())


def test_a_chip_without_fp32_and_bfloat16_in_its_matrix_unit_passes(run):
    """The 310P computes fp32 matrix products in float16; its convolutions are not emulated."""
    model = ("--model", "test_vit_without_convolution", "--modes", "amp-float16")
    done = run(*QUICK, *model, SOC="Ascend310P3", env={"INF_NAN_MODE_ENABLE": "0"})
    assert done.clean, done.stdout
    assert "overflow saturates" in done.texts["device.settings"]
    assert done.texts["device.fp32"] == "matmul float16 (10 bits, half even), GELU in the tanh form"
    assert done.mark("precision.strict") == "SKIP"
    assert "npu:0 has no float32 products" in done.texts["precision.strict"]
    row = done.rows["precision.embedding.float32"]
    assert 1e-5 < float(row["max_row"]) < 1.25 * float(row["expected"])


def test_out_of_memory_at_one_batch_size_is_a_row_and_the_others_are_reported(run):
    done = run(*SMALL, "--batch-sizes", "1", "4", "64", MEMORY="40M")
    assert done.status == 0, done.stdout
    timed = ["throughput.float32.1", "throughput.float32.4"]
    assert [id for id in done.rows if id.startswith("throughput.float32.")] == timed
    assert [id for id, mark in done.marks().items() if mark == "WARN"] == ["outputs.batch.64", "throughput.float32.64"]
    assert [re.match("WARN .*: out of device memory next: use smaller --batch-sizes", block) for block in done.failures]


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
    """After one failed launch torch_npu drops all later operators silently: one FAIL, and a SKIP for each later stage."""
    done = run(*QUICK, "--model", "test_dinov3", "--iters", "40", FAULT=knobs)
    failed, missing = ([id for id, mark in done.marks().items() if mark == outcome] for outcome in ("FAIL", "SKIP"))
    assert done.status == 1 and failed == [f"{stage}.stage"], done.stdout
    assert done.mark("precision.control") == ("PASS" if stage == "throughput" else None), "nothing was computed for it"
    assert missing == [f"{stage}.stage" for stage in skipped]
    assert done.text.count(LOST) == len(skipped)
    assert re.search(r"error code 5070\d\d, ", done.texts[f"{stage}.stage"])


def test_a_capture_that_fails_leaves_the_stream_and_the_other_modes_as_they_were(run):
    arguments = ("--model", "test_vit_that_waits", "--modes", "float32+graph", "amp-bfloat16", "amp-bfloat16+graph")
    done = run(*QUICK, *arguments)
    assert done.clean, done.stdout
    graphs = [f"throughput.{mode}.1" for mode in ("float32+graph", "amp-bfloat16+graph")]
    assert [id for id, mark in done.marks().items() if mark == "SKIP"] == graphs


def test_an_operator_that_would_run_on_the_cpu_is_named(run):
    model = (*QUICK, "--model", "test_vit_with_bessel")
    done = run(*model)
    failure, warning = r"has no NPU kernel and would run on the CPU", r"^WARN model\.fallback: on the CPU: aten::special_bessel_j0"
    assert done.status == (NPU_VERSION in FALLBACK_CAN_BE_REFUSED), done.stdout + done.stderr
    assert any(re.search(failure if done.status else warning, block) for block in done.failures), done.failures
    allowed = run(*model, env={"TORCH_NPU_FALLBACK_CPU_DISABLE": "0"})
    assert len(allowed.failures) == 1 and re.search(warning, allowed.failures[0]), allowed.stdout
    assert "will fall back to run on the CPU" in allowed.stderr, "torch_npu's warning is printed as well"


def test_an_operator_whose_kernel_copies_to_the_cpu_is_named(run):
    """torch_npu gives no warning for it, whatever TORCH_NPU_FALLBACK_CPU_DISABLE is."""
    done = run(*QUICK, "--model", "test_vit_with_antialias")
    assert done.mark("model.fallback") == "WARN", done.stdout
    assert "_upsample_bicubic2d_aa (its NPU kernel copies to the CPU and back)" in done.texts["model.fallback"]
