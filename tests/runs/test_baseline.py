"""--baseline: a run is compared with an earlier log, which it may replace."""

import pytest
from conftest import OLD_LOG, REHEARSAL, SMALL

KNOWN_TIME = (*SMALL, "--batch-sizes", "1", "--iters", "5", "--baseline", "validation_output.txt")


@pytest.mark.timing
def test_a_run_is_compared_with_its_baseline(run):
    """On a device with a known time: the same again passes, one that takes half as long again fails."""
    first = run(*KNOWN_TIME[:-2], KERNEL_TIME="Convolution=120")
    assert first.clean, first.stdout
    same = run(*KNOWN_TIME, KERNEL_TIME="Convolution=120")
    assert same.clean, same.stdout
    assert "\n[comparison] with validation_output.txt\n" in same.text
    slow = run(*KNOWN_TIME, KERNEL_TIME="Convolution=180")
    assert slow.status == 1 and slow.result.startswith("RESULT: FAIL")
    assert len(slow.failures) == 1 and slow.failures[0].startswith("FAIL comparison.speed: throughput.float32.1: ")
    assert slow.path.read_text("utf-8") == slow.stdout, "the baseline was read before it was replaced"


def test_an_error_that_a_baseline_did_not_have_fails_the_run(run):
    """The device's norms are off by 1 % from the second run on: that run fails twice, by itself and by comparison."""
    assert run(*SMALL).clean
    done = run(*SMALL, "--baseline", "validation_output.txt", FAULT="LayerNorm:scale=1.01")
    assert done.status == 1
    (outcomes,) = (failure for failure in done.failures if failure.startswith("FAIL comparison.outcomes: "))
    assert "precision.module.LayerNorm: new -> FAIL" in outcomes
    (errors,) = (failure for failure in done.failures if failure.startswith("FAIL comparison.errors: "))
    assert "precision.embedding.float32: err_fp64 " in errors
    assert not any(failure.startswith(("WARN comparison.experiment", "FAIL comparison.checks")) for failure in done.failures)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the log old.txt cannot be read"),
        ("a poem\n", "old.txt is not a complete log of validate_npu.py"),
        ("validate_npu 2.0: test_vit on cpu\n\n[1/5] device\n", "old.txt is not a complete log of validate_npu.py"),
        ("validate_npu 2.3: test_vit on cpu\n\nRESULT: PASS  1 checks\n", "old.txt is a log of version 2.3, this script is version"),
        (b"\xff\xfe\x00", "old.txt is not a complete log of validate_npu.py"),
    ],
)
@pytest.mark.parametrize("arguments", [("--baseline", "old.txt"), ("--compare", "old.txt", "old.txt")])
def test_a_file_that_is_no_whole_log_is_refused(run, tmp_path, arguments, text, message):
    (tmp_path / "validation_output.txt").write_text(OLD_LOG)
    if text is not None:
        (tmp_path / "old.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run(*REHEARSAL, *arguments)
    assert done.status == 2 and len(done.errors) == 1 and message in done.errors[0], done.stderr
    assert done.stdout.startswith("RESULT: NOT RUN  (exit status 2"), "before anything is run"
    assert "Traceback" not in done.stderr and done.text == OLD_LOG
