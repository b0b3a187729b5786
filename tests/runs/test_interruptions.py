"""Interruptions and hostile conditions: real signals, a device that hangs, a full disk. The previous log stays."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import validate_npu as v
from ascend_emulator import environment
from conftest import SCRIPT, SMALL

OLD_LOG = "an earlier log\n"


class Process:
    """A run that is under way."""

    def __init__(self, folder, *arguments, env=None, **options):
        (folder / "validation_output.txt").write_text(OLD_LOG)
        self.folder = folder
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=os.environ | (env or {}), **(pipes | options))

    def wait_for(self, text):
        for line in self.process.stdout:
            if text in line:
                return
        raise AssertionError(f"no {text} on stdout: {self.process.stderr.read()}")

    def end(self):
        stdout, self.stderr = self.process.communicate(timeout=120)
        self.last_line = stdout.splitlines()[-1] if stdout else ""
        return self.process.returncode

    @property
    def log(self):
        return (self.folder / "validation_output.txt").read_text("utf-8")

    @property
    def half_files(self):
        return list(self.folder.glob(".validation_output*"))


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["start", "device", "model", "outputs", "precision", "throughput"])
def test_a_signal_ends_the_run_at_any_stage(tmp_path, stage, number):
    run = Process(tmp_path, "--device", "cpu", "--weights", "random", "--batch-sizes", "1", "8")
    time.sleep(1) if stage == "start" else run.wait_for(f"/5] {stage}")
    run.process.send_signal(number)
    assert run.end() == 128 + number
    lines = [line for line in run.stderr.splitlines() if line.startswith("validate_npu.py: ")]
    assert len(lines) == 1 and re.fullmatch(rf"validate_npu.py: interrupted by {number.name} in stage \w+", lines[0]), (
        run.stderr
    )
    assert "Traceback" not in run.stderr
    assert run.last_line == f"RESULT: NOT RUN  (exit status {128 + number}; an earlier log is left as it was)"
    assert run.log == OLD_LOG and not run.half_files


HANGS = environment(FAULT="Addmm:hang,from=20")
ON_NPU = ("--weights", "random", "--model", "test_vit", "--batch-sizes", "1", "--iters", "2", "--warmup", "0")


def test_a_device_that_hangs_is_ended_by_the_timeout(tmp_path):
    run = Process(tmp_path, *ON_NPU, "--timeout", "6", env=HANGS)
    assert run.end() == 2
    assert "error: stage model takes longer than --timeout 6 s: does the device hang? see npu-smi info" in run.stderr
    assert run.last_line.startswith("RESULT: NOT RUN  (exit status 2") and run.log == OLD_LOG


def test_a_signal_ends_the_run_also_while_the_device_hangs(tmp_path):
    run = Process(tmp_path, *ON_NPU, env=HANGS)
    run.wait_for("[2/5] model")
    time.sleep(2)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130
    assert "validate_npu.py: interrupted by SIGINT in stage model" in run.stderr
    assert run.log == OLD_LOG


# --- files and streams ------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_half_log(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))  # noqa: E731
    run = Process(tmp_path, *SMALL, preexec_fn=limit)
    assert run.end() == 2
    assert "error: the log cannot be written to validation_output.txt: File too large" in run.stderr
    assert run.last_line.startswith("RESULT: NOT RUN") and run.log == OLD_LOG and not run.half_files


def test_a_folder_that_is_removed_meanwhile_is_said(tmp_path):
    (tmp_path / "logs").mkdir()
    run = Process(tmp_path, *SMALL, "--output", "logs/log.txt")
    run.wait_for("[3/5]")
    shutil.rmtree(tmp_path / "logs")
    assert run.end() == 2
    assert "error: the log cannot be written to logs/log.txt: No such file or directory" in run.stderr


def test_runs_at_the_same_time_on_the_same_output_leave_one_whole_log(tmp_path):
    runs = [Process(tmp_path, *SMALL) for _ in range(2)]
    assert [run.end() for run in runs] == [0, 0]
    lines = runs[0].log.splitlines()
    assert lines[0].startswith("validate_npu: ") and lines[-1].startswith("RESULT: PASS") and not runs[0].half_files


@pytest.mark.parametrize("reader", ["head -n 3", "true"])
def test_a_stdout_that_is_closed_early_does_not_end_the_run(tmp_path, reader):
    command = ["bash", "-c", f'"$@" | {reader}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, SCRIPT, *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "RESULT: PASS" in (tmp_path / "validation_output.txt").read_text("utf-8")


def test_without_a_stdout_the_log_is_written(tmp_path):
    done = subprocess.run(
        ["bash", "-c", '"$@" >&-', "bash", sys.executable, SCRIPT, *SMALL],
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "RESULT: PASS" in (tmp_path / "validation_output.txt").read_text("utf-8")


# --- surroundings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"HOME": "/nonexistent"},
        {"HOME": "/proc/self", "XDG_CACHE_HOME": "/proc/self"},  # a folder where not even root can write
    ],
    ids=["a locale that is not UTF-8", "no home", "a home that is read-only"],
)
def test_surroundings_do_not_matter(run, tmp_path, env):
    model = v.timm.create_model("test_vit")
    v.draw_weights(model, seed=0)
    v.torch.save(model.state_dict(), tmp_path / "权重.pth")
    done = run(*SMALL, "--weights", "权重.pth", env=env)
    assert done.status == 0, done.stderr
    assert "file 权重.pth" in done.log


def test_names_from_outside_cannot_break_the_log_or_a_message(run, tmp_path):
    name = "a\nRESULT: PASS\x1b[31m.pth"
    v.torch.save(v.timm.create_model("test_vit").state_dict(), tmp_path / name)
    done = run(*SMALL, "--weights", name)
    assert done.status == 0
    assert r"file a\nRESULT: PASS\x1b[31m.pth" in done.log and "\x1b" not in done.log
    missing = run(*SMALL, "--weights", f"not-{name}")
    assert missing.status == 2 and r"not-a\nRESULT: PASS\x1b[31m.pth does not exist" in missing.stderr
