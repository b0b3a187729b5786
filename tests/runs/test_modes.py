"""Faster modes beside each other: each is validated and timed, and the log says which is fastest within the error."""

import re

import pytest
from ascend_emulator import environment
from conftest import QUICK, REHEARSAL, TESTS, start

ALL = ("hf32", "amp-float16", "amp-bfloat16", "half-float16", "half-bfloat16")
TINY = (*QUICK, "--model", "test_tiny_vit", "--batch-sizes", "1", "--iters", "5")


def fastest(done):
    """The mode that the log calls the fastest within --max-error, and the whole sentence; None where none is."""
    text = " ".join(done.text.replace("\n~", " ").split())
    sentence = re.search(r"fastest (\S+) with batch \d+ within --max-error \S+ [^:]*: [\d.]+ times \S+", text)
    return sentence and sentence[1]


def test_every_mode_is_validated_and_timed(run):
    done = run(*TINY, "--modes", *ALL, "float32+graph", "half-float16+graph")
    assert done.clean, done.stdout
    precision, timed = done.rows("precision"), done.rows("throughput")
    for mode in ("float32", *ALL):
        row = precision["logits", mode]
        unit = float(row["cost"]) + float(row["cpu"])  # a mode in half precision has no cost, but the CPU's error in it
        assert 0.5 * unit < float(row["row"]) < 1.5 * unit
        assert (mode, "1") in timed
    for mode in ("float32+graph", "half-float16+graph"):
        assert (mode, "against_eager") in timed
    assert float(precision["logits", "hf32"]["cost"]) > 1.2 * float(precision["logits", "float32"]["cost"])


def test_a_mode_that_is_wrong_fails_while_the_others_pass(run):
    """By 1 %, in float16 weights only; it is not called the fastest either."""
    done = run(*TINY, "--model", "test_vit_wrong_in_half", "--modes", "half-float16", "half-bfloat16")
    marks = {key[1:]: mark for key, mark in done.log.marks.items() if key[2]}
    assert done.status == 1
    assert marks["logits", "half-float16"] == "FAIL"
    assert marks["logits", "float32"] == marks["logits", "half-bfloat16"] == "PASS"
    assert done.rows("throughput")["half-float16", "fastest"]["rel_L2_fp64"] == "-" and fastest(done) != "half-float16"


def test_a_mode_that_cannot_run_is_skipped_with_the_reason_and_does_not_end_the_others(run):
    done = run(*TINY, "--model", "test_vit_that_waits", "--modes", "float32+graph", "half-float16")
    assert done.clean and done.marks("float32+graph") == ["SKIP"] and ("half-float16", "1") in done.rows("throughput")
    on_cpu = run(*REHEARSAL, "--modes", "hf32", "float32+graph", "half-bfloat16")
    assert on_cpu.clean and on_cpu.marks("hf32") == on_cpu.marks("float32+graph") == ["SKIP"]
    assert on_cpu.marks("logits", "precision") == ["PASS"] * 3, "float32 of one image and of all, and half"


@pytest.mark.timing
@pytest.mark.parametrize(
    ("model", "knobs", "mode"),
    [
        ("test_vit_with_a_slow_host", {}, "float32+graph"),
        ("test_tiny_vit", {"KERNEL_TIME": "Convolution=60;half:Convolution=10"}, "half-float16"),
    ],
    ids=["host-bound", "device-bound"],
)
def test_what_limits_a_model_decides_which_mode_is_the_fastest(run, model, knobs, mode):
    """Where the host is the limit a graph helps and half precision does not; where the device is, the other way round."""
    done = run(*TINY, "--model", model, "--modes", "half-float16", "float32+graph", **knobs)
    assert done.clean and fastest(done) == mode, done.stdout


def test_none_is_the_fastest_where_none_is_within_the_error(run):
    done = run(*TINY, "--modes", "half-bfloat16", "--max-error", "1e-9")
    assert done.status == 0 and fastest(done) is None
    assert "no mode is within --max-error 1e-09" in done.text
    assert fastest(run(*TINY, "--modes", "half-bfloat16", "--max-error", "1e-3")) == "float32"


@pytest.mark.timing
@pytest.mark.parametrize(("model", "mark"), [("test_tiny_vit", "PASS"), ("test_vit_that_gets_slower", "WARN")])
def test_a_sustained_load_that_slows_down_is_a_warning(run, model, mark):
    done = run(*TINY, "--model", model, "--duration", "4", KERNEL_TIME="Convolution=40")
    assert done.status == 0 and done.marks("sustained load") == [mark], done.stdout
    assert len(re.findall(r"^~ +sustained +float32, batch 1: (?:first|last) tenth of 4 s: ", done.text, re.MULTILINE)) == 2
    assert done.log.marks["[5/5] throughput", "float32", "sustained"] == "PASS"
    assert ", duration 4 s, " in done.log.facts["options"], "another experiment than without it"


def test_a_long_run_is_no_hanging_device(run):
    """Each row may take --timeout, and a sustained load its own time beside it."""
    done = run(*REHEARSAL, "--batch-sizes", "1", "2", "3", "4", "--iters", "9999", "--timeout", "4", "--duration", "5")
    assert done.clean and done.marks("sustained load"), done.stdout + done.stderr


@pytest.mark.parametrize("model", ["levit_128s", "test_vit_that_keeps_a_bias"])
def test_a_model_that_keeps_its_attention_biases_runs_in_half_precision_too(run, model):
    done = run(*REHEARSAL, "--model", model, "--batch-sizes", "1", "--modes", "half-bfloat16")
    assert done.clean, done.stdout


def test_what_is_wrong_only_in_a_long_run_fails(run):
    done = run(*TINY, "--duration", "2", FAULT="Gelu:scale=1.5,from=150,once")
    assert done.log.marks["[5/5] throughput", "float32", "sustained"] == "FAIL", done.stdout


@pytest.mark.full
def test_a_large_model_fits_into_what_is_promised(tmp_path):
    """ViT-L: 1.2 GB of weights in fp32, of which the device has one copy, and the host no fp64 copy beside it."""
    arguments = ("--weights", "random", "--model", "vit_large_patch16_224", "--batch-sizes", "1", "--warmup", "0")
    launcher = [TESTS / "peak_memory.py"]
    rehearsal = start((*arguments, "--iters", "1", "--device", "cpu"), tmp_path, launcher=launcher)
    peak = float(re.search(r"peak_memory: ([\d.]+) GiB", rehearsal.stderr)[1])
    assert rehearsal.clean and peak <= 6, peak
    modes = ("--modes", "half-bfloat16", "--iters", "1")
    assert start((*arguments, *modes), tmp_path, environment(MEMORY="1500M")).clean
