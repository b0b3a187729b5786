"""What a run promises, seen on a rehearsal: the script is run as a user does, and its log is read."""

import re
import subprocess
import time

import pytest
import trained
from conftest import REHEARSAL, ROOT, SMALL, start

import validate_npu
from validate_npu import FAIL, SKIP, WARN, Entry, Log

STAGES = ["[1/5] device", "[2/5] model", "[3/5] outputs", "[4/5] precision", "[5/5] throughput"]


def test_the_stages_run_in_sequence_and_the_verdict_comes_last(rehearsal):
    assert rehearsal.status == 0, rehearsal.stdout + rehearsal.stderr
    assert re.findall(r"^\[.*", rehearsal.text, re.MULTILINE) == STAGES
    assert re.match(r"RESULT: PASS  \d+ checks: \d+ passed, 0 warned, 0 failed, 1 skipped", rehearsal.result)
    marks = list(rehearsal.log.marks.values())
    assert marks.count(SKIP) == 1 and not {FAIL, WARN} & set(marks) and not rehearsal.failures
    assert f" {len(marks)} checks: " in rehearsal.result, "no two checks have the same place in the log"


def test_stdout_shows_the_lines_of_the_log(rehearsal):
    assert rehearsal.stdout == rehearsal.text


def test_a_rehearsal_says_that_no_npu_was_validated_at_the_top_and_in_the_result(rehearsal):
    assert "no NPU is validated" in rehearsal.text.splitlines()[0]
    assert "no NPU is validated" in rehearsal.result


def test_no_line_shows_a_path_or_an_address_of_this_machine(rehearsal):
    assert not re.search(r"0x[0-9a-f]{6}|/(home|root|tmp|work|usr)/", rehearsal.text)


def test_no_line_is_too_long_for_a_terminal_whether_all_passes_or_everything_fails(rehearsal, run):
    failing = run(*SMALL, "--model", "test_dinov3", "--modes", "amp-float16", "amp-bfloat16", FAULT="Addmm:nan")
    assert failing.status == 1 and len(failing.failures) > 20
    for done in (rehearsal, failing):
        assert max(map(len, done.text.splitlines())) <= 120


def test_two_runs_differ_only_in_lines_that_begin_with_a_tilde(rehearsal, run):
    again = run(*REHEARSAL)
    assert again.clean
    assert again.text != rehearsal.text  # the date at least: diff has something to ignore
    diff = subprocess.run(["diff", "-I", "^~", rehearsal.path, again.path], capture_output=True, text=True)
    assert (diff.returncode, diff.stdout) == (0, "")


def test_another_seed_is_another_experiment(rehearsal, run):
    other = run(*REHEARSAL, "--seed", "1")
    assert other.clean
    for name in ("weights SHA-256", "inputs SHA-256"):
        assert len(other.log.facts[name]) == 64 and other.log.facts[name] != rehearsal.log.facts[name]


def test_a_photograph_goes_through_the_models_own_transforms(run):
    photographs = trained.photographs()
    done = run(*REHEARSAL, "--image", photographs["chelsea"], photographs["rocket"])
    assert done.clean, done.stdout
    rows = done.rows("outputs")
    assert rows["tokens", "pictures"]["shape"] == "2x101x64", "tokens of two pictures"
    assert ", pictures 2, " in done.log.facts["options"]


def test_a_resnet_passes_and_what_it_lacks_is_left_out(run):
    done = run(*REHEARSAL, "--model", "resnet18", "--batch-sizes", "1", "2")
    assert done.clean, done.stdout
    rows = done.rows("outputs")
    assert not done.marks("tokens") and not done.marks("feature map 6")
    assert rows["logits", "1"]["shape"] == "1x1000"
    assert [rows[f"feature map {i}", "2"]["shape"] for i in (1, 5)] == ["2x64x112x112", "2x512x7x7"]


@pytest.mark.parametrize(
    "model",
    [
        "test_convnext",
        "test_efficientnet",
        "test_nfnet",
        "test_vit4",
        "test_swin",
        "crossvit_9_240",  # its forward_features gives two tensors
        "xcit_nano_12_p16_224",  # its patch embedding tells no grid
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
    assert done.log.facts["weights"] == "file weights.pth, its state_dict"
    assert done.log.facts["weights SHA-256"] == rehearsal.log.facts["weights SHA-256"]
    assert done.rows("outputs") == rehearsal.rows("outputs"), "and so the outputs are the same"


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


def test_the_log_in_the_repository_is_what_the_script_prints_today(run):
    """Stages, tables, checks and their outcomes are the same; numbers are those of the machine that made the log."""
    shown = subprocess.run(["git", "show", "HEAD:validation_output.txt"], cwd=ROOT, capture_output=True, text=True)
    published = shown.stdout if shown.returncode == 0 else (ROOT / "validation_output.txt").read_text("utf-8")
    today = run("--device", "cpu", "--weights", "random", "--warmup", "0", "--iters", "1")
    assert today.clean, today.stdout
    published = Log("published", published.splitlines())

    def lines(log):
        found = [(mark, name) for mark, name, _ in Entry.read(log.stable)]
        return [line for line in found if line != ("", "environment")]  # which is there where a variable is set

    assert lines(today.log) == lines(published)
    assert today.log.marks == published.marks and today.log.rows.keys() == published.rows.keys()
