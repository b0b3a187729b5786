"""--baseline and --compare: what became worse between two logs is found, and what only differs is shown."""

import re
import time

import pytest
import validate_npu as v
from ascend_emulator import environment
from conftest import SMALL

NPU = ("--weights", "random", "--model", "test_vit", "--batch-sizes", "1", "--warmup", "0", "--iters", "5")


def slower(factor, rows=r"\d+"):
    """A change of a log: every batch takes so many times as long."""

    def change(log):
        def row(found):
            rate, p50, p90 = (float(found[i]) for i in (2, 3, 4))
            return f"{found[1]} {rate / factor:.2f} {p50 * factor:.2f} {p90 * factor:.2f}"

        return re.sub(rf"^(~ +float32 +{rows}) +([\d.]+) +([\d.]+) +([\d.]+)", row, log, flags=re.M)

    return change


def one_slow_batch(log):
    """Throughput falls to a third, by a single batch of hundreds: the other figures stay."""
    return re.sub(r"^(~ +float32 +\d+) +([\d.]+)", lambda row: f"{row[1]} {float(row[2]) / 3:.2f}", log, flags=re.M)


def steady(log):
    """The same log as if no batch had been slower than another: on a busy machine the spread would excuse anything."""
    return re.sub(r"[\d.]+%", "0.0%", log)


@pytest.mark.parametrize(
    ("change", "status", "shown"),
    [
        (lambda log: log, 0, r"changed lines +none"),
        (slower(1.05), 0, r"PASS  speed"),
        (slower(0.5), 0, r"~ +float32 +1 .* (1\.9|2\.0)\d "),
        (slower(1.2), 1, r"FAIL  speed .*: float32, batch 1: "),
        (slower(1.2, "3"), 1, r"FAIL  speed .*: float32, batch 3: "),
        (one_slow_batch, 0, r"PASS  speed"),
        (lambda log: log.replace("PASS  repeat", "WARN  repeat", 1), 1, r"FAIL  outcomes .*: repeat: PASS -> WARN"),
        (lambda log: log.replace("PASS  control", "FAIL  control", 1), 1, r"FAIL  outcomes .*: control: PASS -> FAIL"),
        (
            lambda log: re.sub(r"(PASS  embedding +float32 +)\S+", r"\g<1>3.00e-03", log),
            1,
            r"FAIL  errors .*: embedding float32",
        ),
        (lambda log: log.replace("PASS  control", "FAIL  new\nPASS  control"), 1, r"FAIL  outcomes .*: new: new, FAIL"),
        (lambda log: re.sub(r"PASS  control.*\n", "", log), 1, r"FAIL  checks .*: control of \[4/5\] precision"),
        (
            lambda log: re.sub(r"~ +float32 +3 .*\n", "", log, count=1),
            1,
            r"FAIL  checks .*: the time of float32, batch 3",
        ),
        (lambda log: log.replace("numpy    ", "numpy   9"), 0, r" +\+  +numpy +9"),
        (lambda log: log.replace("test_vit", "test_vit2"), 0, r"WARN  experiment .*: validate_npu: test_vit2 on cpu"),
        (lambda log: re.sub(r"(weights SHA-256 +)....", r"\g<1>0000", log), 0, r"WARN  experiment .*: weights SHA-256"),
        (lambda log: log.replace("seed 0,", "seed 1,"), 0, r"WARN  experiment .*: options: "),
    ],
)
def test_what_became_worse_fails_and_what_differs_is_shown(rehearsal, run, tmp_path, change, status, shown):
    (tmp_path / "old.txt").write_text(steady(rehearsal.log))
    (tmp_path / "new.txt").write_text(change(steady(rehearsal.log)))
    done = run("--compare", "old.txt", "new.txt")
    assert done.status == status, done.stdout
    assert re.search(rf"^ *{shown}", done.stdout, re.M), done.stdout
    assert done.log is None, "nothing was run, so there is no log"


def test_errors_that_are_rounding_may_grow():
    old, new = (
        v.parse_log("", f"head\n\n[3/5] outputs\nPASS  tokens   4  2x3  float32  0.1  {error}".splitlines())
        for error in ("0.0e+00", "3.1e-06")
    )
    assert all(entry.outcome != v.FAIL for entry in v.compare_logs(old, new, 10))


def test_the_spread_of_both_runs_is_allowed_for():
    def log(ms, spread):
        row = f"~     float32    4   {4000 / ms:.2f}   {ms}   {ms}   1.00   1.00   {spread}%   1.00"
        return v.parse_log("", ["head", "", "[5/5] throughput", row])

    outcomes = [v.compare_logs(log(10.0, 20.0), log(ms, 10.0), 10)[6].outcome for ms in (13.2, 13.5)]
    assert outcomes == [v.PASS, v.FAIL]


def test_a_card_that_became_worse_is_found():
    logs = (f"head\n\n[all cards]\n{word}  {'card 1':<21} node 0 npu:1" for word in ("PASS", "FAIL"))
    old, new = (v.parse_log("", log.splitlines()) for log in logs)
    outcomes = next(entry for entry in v.compare_logs(old, new, 10) if entry.name == "outcomes")
    assert outcomes.problem == "card 1: PASS -> FAIL"


def test_two_logs_are_compared_without_torch(rehearsal, run, tmp_path):
    (tmp_path / "log.txt").write_text(rehearsal.log)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        assert run("--compare", "log.txt", "log.txt").status == 0
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.5


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the log old.txt cannot be read"),
        ("a poem\n", "old.txt is not a whole log of validate_npu.py"),
        ("", "old.txt is not a whole log of validate_npu.py"),
        ("validate_npu: test_vit on npu:0\n[1/5] device\n", "old.txt is not a whole log of validate_npu.py"),
        (b"\xff\xfe\x00", "the log old.txt cannot be read"),
    ],
)
@pytest.mark.parametrize("arguments", [("--baseline", "old.txt"), ("--compare", "old.txt", "old.txt")])
def test_a_file_that_is_no_whole_log_is_refused(run, tmp_path, arguments, text, message):
    if text is not None:
        (tmp_path / "old.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    done = run(*SMALL, *arguments)
    assert done.status == 2 and message in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_is_compared_with_its_baseline(run, tmp_path):
    """On a device with a known time: the same again passes, one that takes half as long again fails."""

    def validate(ms):
        return run(*NPU, "--baseline", "validation_output.txt", env=environment(KERNEL_TIME=f"Convolution={ms}"))

    first = run(*NPU, env=environment(KERNEL_TIME="Convolution=200"))
    assert first.status == 0
    same = validate(200)
    assert same.status == 0, same.stdout
    assert "[comparison] with validation_output.txt" in same.log and "changed lines         none" in same.log
    slow = validate(300)
    assert slow.status == 1 and re.search(r"^FAIL  speed: float32, batch 1: ", slow.log, re.M), slow.stdout
    assert (tmp_path / "validation_output.txt").read_text() == slow.log
    assert slow.result.startswith("RESULT: FAIL")
