"""What a run promises, seen on a rehearsal: the script is run as a user does, and its log is read."""

import os
import pty
import re
import subprocess
import sys
import time

import pytest
import trained
from conftest import REHEARSAL, ROOT, SCRIPT, SMALL, start

import validate_npu
from validate_npu import PASS, Log

STAGES = ["[1/5] device", "[2/5] model", "[3/5] outputs", "[4/5] precision", "[5/5] throughput"]


def test_the_stages_run_in_sequence_and_the_verdict_comes_last(rehearsal):
    assert rehearsal.status == 0, rehearsal.stdout + rehearsal.stderr
    assert re.findall(r"^\[.*", rehearsal.text, re.MULTILINE) == [*STAGES, "[summary]"]
    marks = rehearsal.marks()
    assert set(marks.values()) == {PASS} and not rehearsal.failures
    counts = f"{len(marks)} checks: {len(marks)} passed, 0 warned, 0 failed, 0 skipped"
    assert rehearsal.result.startswith(f"RESULT: PASS  {counts}"), "each check has an id of its own"


def test_stdout_shows_the_lines_of_the_log(rehearsal):
    assert rehearsal.stdout == rehearsal.text


def test_a_rehearsal_says_that_no_npu_was_validated_at_the_top_and_in_the_result(rehearsal):
    assert "(dry run, not an NPU)" in rehearsal.text.splitlines()[0]
    assert "(dry run, not an NPU)" in rehearsal.result


def test_no_line_shows_a_path_or_an_address_of_this_machine(rehearsal):
    assert not re.search(r"0x[0-9a-f]{6}|/(home|root|tmp|work|usr)/", rehearsal.text)


def test_no_line_is_too_long_for_a_terminal_whether_all_passes_or_everything_fails(rehearsal, run):
    failing = run(*SMALL, "--model", "test_dinov3", "--modes", "amp-float16", "amp-bfloat16", FAULT="Addmm:nan")
    assert failing.status == 1 and list(failing.marks().values()).count("FAIL") > 20
    for done in (rehearsal, failing):
        assert not [line for line in done.text.splitlines() if len(line) > 99]


def test_two_runs_differ_only_in_lines_that_begin_with_a_tilde(rehearsal, run):
    again = run(*REHEARSAL)
    assert again.clean
    assert again.text != rehearsal.text  # the date at least: diff has something to ignore
    diff = subprocess.run(["diff", "-I", "^~", rehearsal.path, again.path], capture_output=True, text=True)
    assert (diff.returncode, diff.stdout) == (0, "")


def test_another_seed_is_another_experiment(rehearsal, run):
    other = run(*REHEARSAL, "--seed", "1")
    assert other.clean
    for id in ("model.weights_sha256", "model.inputs_sha256"):
        assert len(other.texts[id]) == 64 and other.texts[id] != rehearsal.texts[id]


def test_a_photograph_goes_through_the_models_own_transforms(run):
    photographs = trained.photographs()
    done = run(*REHEARSAL, "--image", photographs["chelsea"], photographs["rocket"])
    assert done.clean, done.stdout
    assert "--image chelsea.png rocket.jpg" in done.texts["run.command"]
    assert done.texts["precision.image.1"].startswith("chelsea.png: ")
    assert done.mark("precision.top1") == PASS


def test_a_resnet_passes_and_what_it_lacks_is_left_out(run):
    done = run(*REHEARSAL, "--model", "resnet18", "--batch-sizes", "1", "2")
    assert done.clean, done.stdout
    assert not done.marks("outputs.tokens") and not done.marks("outputs.feature_map.6")
    shapes = [done.rows[f"outputs.{name}"]["shape"] for name in ("logits", "feature_map.1", "feature_map.5")]
    assert shapes == ["Bx1000", "Bx64x112x112", "Bx512x7x7"]


@pytest.mark.parametrize(
    "model",
    [
        "test_convnext",
        "test_efficientnet",
        "test_nfnet",
        "test_vit4",
        "test_swin",
        "crossvit_9_240",  # its forward_features gives two tensors
        "xcit_nano_12_p16_224",  # its patch embedding has no grid_size
        "eva02_tiny_patch14_224",  # its attention calls no Linear of its own
        "levit_128s",  # it keeps attention biases in the type that its weights had
        "lcnet_050",  # with timm's weights, or drawn ones without gain, all images look the same to it
    ],
)
def test_other_families_pass(run, model):
    done = run(*REHEARSAL, "--model", model, "--batch-sizes", "1", "2")
    assert done.clean, done.stdout


def test_weights_from_a_file_are_the_weights_that_are_used(rehearsal, run, tmp_path):
    model = validate_npu.timm.create_model("test_vit")
    validate_npu.draw_weights(model, seed=0)
    path = tmp_path / "weights.pth"
    validate_npu.torch.save({"state_dict": model.state_dict()}, path)
    done = run(*REHEARSAL, "--weights", path)
    assert done.clean
    assert done.texts["model.weights"] == "file weights.pth, its state_dict"
    assert done.texts["model.weights_sha256"] == rehearsal.texts["model.weights_sha256"]
    assert done.rows["outputs.tokens"] == rehearsal.rows["outputs.tokens"], "and so the outputs are the same"


@pytest.mark.timing
def test_help_and_usage_errors_do_not_wait_for_torch(tmp_path):
    # 0.3 s is the promise; the bare interpreter's own start is a part of it.
    for arguments, status in ((["--help"], 0), (["--iters", "none"], 2)):
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            assert start(arguments, tmp_path).status == status
            seconds.append(time.perf_counter() - begin)
        assert min(seconds) < 0.3


DEFAULT = ("--device", "cpu", "--weights", "random", "--warmup", "0", "--iters", "1")  # but for its number of batches


@pytest.fixture
def dry_run(shared):
    done = shared("dry_run", DEFAULT)
    assert done.clean, done.stdout
    return done


def test_the_log_in_the_repository_is_what_the_script_prints_today(dry_run):
    """Stages, tables, checks and their outcomes are the same; numbers are those of the machine that made the log."""
    shown = subprocess.run(["git", "show", "HEAD:validation_output.txt"], cwd=ROOT, capture_output=True, text=True)
    published = shown.stdout if shown.returncode == 0 else (ROOT / "validation_output.txt").read_text("utf-8")
    published = Log("published", published.splitlines())

    varying = {"device.environment", "device.torchvision", "throughput.doubtful"}
    varying |= {id for log in (dry_run.log, published) for id in log.texts if id.startswith("throughput.saturated")}
    assert set(dry_run.texts) - varying == set(published.texts) - varying
    assert dry_run.log.marks == published.marks and dry_run.rows.keys() == published.rows.keys()


def test_no_line_of_a_default_dry_run_is_over_99_columns(dry_run):
    assert not [line for line in dry_run.text.splitlines() if len(line) > 99]


def test_a_default_dry_run_has_at_most_70_lines(dry_run):
    assert len(dry_run.text.splitlines()) <= 70


@pytest.mark.full
def test_two_default_dry_runs_differ_only_in_lines_that_begin_with_a_tilde(dry_run, run):
    first, second = ([line for line in done.text.splitlines() if line[:1] != "~"] for done in (dry_run, run(*DEFAULT)))
    assert first == second


def test_marks_are_in_colour_on_a_terminal_only(rehearsal, tmp_path):
    terminal, stdout = pty.openpty()
    process = subprocess.Popen([sys.executable, SCRIPT, *REHEARSAL], cwd=tmp_path, stdout=stdout)
    os.close(stdout)
    shown = b""
    while chunk := read_terminal(terminal):
        shown += chunk
    assert process.wait() == 0
    assert b"\x1b[32mPASS\x1b[0m device.matmul" in shown, shown
    assert "\x1b" not in rehearsal.stdout + (tmp_path / "validation_output.txt").read_text("utf-8")


def read_terminal(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side of a terminal is closed
        return b""
