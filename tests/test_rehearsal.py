"""What a run promises, seen on a rehearsal: the script is run as a user does, and its log is read."""

import re
import subprocess

import matplotlib.cbook
import pytest
from conftest import REHEARSAL, ROOT, SMALL

STAGES = ["[1/5] device", "[2/5] model", "[3/5] outputs", "[4/5] precision", "[5/5] throughput"]


def test_the_stages_run_in_sequence_and_the_verdict_comes_last(rehearsal):
    assert rehearsal.status == 0, rehearsal.stdout + rehearsal.stderr
    assert re.findall(r"^\[.*", rehearsal.log, re.M) == STAGES
    assert re.match(r"RESULT: PASS  \d+ checks: \d+ passed, 0 warned, 0 failed, 1 skipped", rehearsal.result)
    assert not re.search("^(FAIL|WARN)", rehearsal.log, re.M)


def test_stdout_shows_the_lines_of_the_log(rehearsal):
    assert rehearsal.stdout == rehearsal.log


def test_a_rehearsal_says_that_no_npu_was_validated_at_the_top_and_in_the_result(rehearsal):
    assert "no NPU is validated" in rehearsal.log.splitlines()[0]
    assert "no NPU is validated" in rehearsal.result


def test_no_line_shows_a_path_or_an_address_of_this_machine(rehearsal):
    assert not re.search(r"0x[0-9a-f]{6}|/(home|root|tmp|work|usr)/", rehearsal.log)


def test_two_runs_differ_only_in_lines_that_begin_with_a_tilde(rehearsal, run, tmp_path):
    again = run(*SMALL)
    assert again.status == 0
    assert again.log != rehearsal.log  # the date at least: diff has something to ignore
    diff = subprocess.run(["diff", "-I", "^~", rehearsal.log_path, again.log_path], capture_output=True, text=True)
    assert (diff.returncode, diff.stdout) == (0, "")


def test_another_seed_is_another_experiment(rehearsal, run):
    other = run(*SMALL, "--seed", "1")
    for name in ("weights SHA-256", "inputs SHA-256"):
        sums = [re.search(rf"{name}\s+(\w{{64}})", log)[1] for log in (rehearsal.log, other.log)]
        assert sums[0] != sums[1]


def test_a_photograph_goes_through_the_models_own_transforms(run):
    with matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=True) as photograph:
        done = run(
            *SMALL,
            "--image",
            photograph.name,
            photograph.name.replace("grace_hopper.jpg", "Minduka_Present_Blue_Pack.png"),
        )
    assert done.status == 0, done.stdout
    pictures = [line for line in done.log.splitlines() if " pictures " in line and line.startswith("PASS")]
    assert any("2x101x64" in line for line in pictures), "tokens of two pictures"
    assert "pictures 2" in done.log


def test_a_resnet_passes_and_what_it_lacks_is_left_out(run):
    done = run(*REHEARSAL, "--model", "resnet18", "--batch-sizes", "1", "2")
    assert done.status == 0, done.stdout
    assert "tokens" not in done.log
    assert re.search(r"PASS  logits +1  1x1000 ", done.log)
    assert re.search(r"PASS  feature map 5 +2  2x512x7x7 ", done.log)


@pytest.mark.parametrize(
    "model",
    [
        "test_convnext",
        "test_efficientnet",
        "test_nfnet",
        "test_vit4",
        "swin_tiny_patch4_window7_224",
        "crossvit_9_240",  # its forward_features gives two tensors
        "xcit_nano_12_p16_224",  # its patch embedding tells no grid
        "eva02_tiny_patch14_224",  # its attention calls no Linear of its own
        "lcnet_050",  # with timm's weights, or drawn ones without gain, all images look the same to it
    ],
)
def test_other_families_pass(run, model):
    done = run(*REHEARSAL, "--model", model, "--batch-sizes", "1", "2")
    assert done.status == 0, done.stdout


def test_weights_from_a_file_are_the_weights_that_are_used(rehearsal, run, tmp_path):
    import validate_npu

    model = validate_npu.timm.create_model("test_vit")
    validate_npu.draw_weights(model, seed=0)
    path = tmp_path / "weights.pth"
    validate_npu.torch.save({"state_dict": model.state_dict()}, path)
    done = run(*SMALL, "--weights", path)
    assert done.status == 0
    sums = {re.search(r"weights SHA-256\s+(\w{64})", log)[1] for log in (rehearsal.log, done.log)}
    assert len(sums) == 1
    assert "file weights.pth" in done.log


def test_help_and_usage_errors_do_not_wait_for_torch(run):
    # 0.3 s is the promise; the bare interpreter's own start is a part of it.
    import time

    for arguments, status in ((["--help"], 0), (["--iters", "none"], 2)):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            assert run(*arguments).status == status
            seconds.append(time.perf_counter() - start)
        assert min(seconds) < 0.3


def test_the_log_in_the_repository_is_what_the_script_prints_today(run):
    """Stages, checks and their outcomes are the same; numbers are those of the machine that made the log."""
    shown = subprocess.run(["git", "show", "HEAD:validation_output.txt"], cwd=ROOT, capture_output=True, text=True)
    published = shown.stdout if shown.returncode == 0 else (ROOT / "validation_output.txt").read_text("utf-8")
    today = run("--device", "cpu", "--weights", "random")
    assert today.status == 0, today.stdout

    def checks(log):
        return [line[:28] for line in log.splitlines() if not line.startswith("~")]

    assert checks(today.log) == checks(published)
