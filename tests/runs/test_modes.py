"""Faster modes beside each other: each is validated and timed, and the log names the fastest within the error."""

import re

import pytest
from ascend_emulator import environment
from conftest import QUICK, REHEARSAL, TESTS, start

ALL = ("hf32", "amp-float16", "amp-bfloat16", "float16", "bfloat16")
TINY = (*QUICK, "--model", "test_tiny_vit", "--batch-sizes", "1", "--iters", "5")


def fastest(done):
    """The mode that the log calls the fastest within --max-error, and the whole sentence; None where none is."""
    text = done.texts.get("throughput.fastest", "")
    return text.partition(" at batch size ")[0] or None


def test_every_mode_is_validated_and_timed(run):
    done = run(*TINY, "--modes", *ALL, "float32+graph", "float16+graph")
    assert done.clean, done.stdout
    for mode in ("float32", *ALL):
        row = done.rows[f"precision.logits.{mode}"]
        unit = float(row["expected"]) + float(row["cpu_err"])  # half precision has no expected cost, but the CPU's error
        assert 0.5 * unit < float(row["max_row"]) < 1.5 * unit
        assert f"throughput.{mode}.1" in done.rows
    for mode in ("float32+graph", "float16+graph"):
        assert "without graph" in done.texts[f"throughput.outputs.{mode}"]
    costs = [float(done.rows[f"precision.logits.{mode}"]["expected"]) for mode in ("hf32", "float32")]
    assert costs[0] > 1.2 * costs[1]


def test_a_mode_that_is_wrong_fails_while_the_others_pass(run):
    """By 1 %, in float16 weights only; it is not called the fastest either."""
    done = run(*TINY, "--model", "test_vit_wrong_in_half", "--modes", "float16", "bfloat16")
    assert done.status == 1
    assert done.mark("precision.logits.float16") == "FAIL"
    assert done.mark("precision.logits.float32") == done.mark("precision.logits.bfloat16") == "PASS"
    assert done.rows["throughput.best.float16"]["err_fp64"] == "-" and fastest(done) != "float16"


def test_a_mode_that_cannot_run_is_skipped_with_the_reason_and_does_not_end_the_others(run):
    done = run(*TINY, "--model", "test_vit_that_waits", "--modes", "float32+graph", "float16")
    assert done.clean and done.mark("throughput.float32+graph.1") == "SKIP" and "throughput.float16.1" in done.rows


@pytest.mark.timing
@pytest.mark.parametrize(
    ("model", "knobs", "mode"),
    [
        ("test_vit_with_a_slow_host", {}, "float32+graph"),
        ("test_tiny_vit", {"KERNEL_TIME": "Convolution=60;half:Convolution=10"}, "float16"),
    ],
    ids=["host-bound", "device-bound"],
)
def test_what_limits_a_model_decides_which_mode_is_the_fastest(run, model, knobs, mode):
    """Where the host is the limit a graph helps and half precision does not; where the device is, the other way round."""
    done = run(*TINY, "--model", model, "--modes", "float16", "float32+graph", **knobs)
    assert done.clean and fastest(done) == mode, done.stdout


def test_none_is_the_fastest_where_none_is_within_the_error(run):
    done = run(*TINY, "--modes", "bfloat16", "--max-error", "1e-9")
    assert done.status == 0 and fastest(done) is None
    assert fastest(run(*TINY, "--modes", "bfloat16", "--max-error", "1e-3")) == "float32"


@pytest.mark.timing
@pytest.mark.parametrize(("model", "mark"), [("test_tiny_vit", "PASS"), ("test_vit_that_gets_slower", "WARN")])
def test_a_sustained_load_that_slows_down_is_a_warning(run, model, mark):
    done = run(*TINY, "--model", model, "--duration", "4", KERNEL_TIME="Convolution=40")
    assert done.status == 0 and done.mark("throughput.sustained") == mark, done.stdout
    assert done.texts["throughput.sustained.tenths"].startswith("float32.1: first tenth of 4 s ")
    assert done.mark("throughput.outputs.sustained.float32") == "PASS"
    assert "--duration 4" in done.texts["run.command"], "another experiment than without it"


@pytest.mark.timing
def test_a_long_run_is_no_hanging_device(run):
    """Each row may take --timeout, and a sustained load its own time beside it."""
    done = run(*REHEARSAL, "--batch-sizes", "1", "2", "3", "4", "--iters", "9999", "--timeout", "4", "--duration", "5")
    assert done.status == 0 and done.mark("throughput.sustained"), done.stdout + done.stderr


@pytest.mark.parametrize("model", ["levit_128s", "test_vit_that_keeps_a_bias"])
def test_a_model_that_keeps_its_attention_biases_runs_in_half_precision_too(run, model):
    done = run(*REHEARSAL, "--model", model, "--batch-sizes", "1", "--modes", "bfloat16")
    assert done.clean and " 0 skipped" in done.result, done.stdout


def test_what_is_wrong_only_in_a_long_run_fails(run):
    done = run(*TINY, "--duration", "2", FAULT="Gelu:scale=1.5,from=150,once")
    assert done.mark("throughput.outputs.sustained.float32") == "FAIL", done.stdout


@pytest.mark.full
def test_a_large_model_fits_into_what_is_promised(tmp_path):
    """ViT-L: 1.2 GB of weights in fp32, of which the device has one copy, and the host no fp64 copy beside it."""
    arguments = ("--weights", "random", "--model", "vit_large_patch16_224", "--batch-sizes", "1", "--warmup", "0")
    launcher = [TESTS / "peak_memory.py"]
    rehearsal = start((*arguments, "--iters", "1", "--device", "cpu"), tmp_path, launcher=launcher)
    peak = float(re.search(r"peak_memory: ([\d.]+) GiB", rehearsal.stderr)[1])
    assert rehearsal.clean and peak <= 6, peak
    modes = ("--modes", "bfloat16", "--iters", "1")
    assert start((*arguments, *modes), tmp_path, environment(MEMORY="1500M")).clean
