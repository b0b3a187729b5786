"""Interruptions and hostile conditions: real signals, a device that hangs, a full disk. The previous log stays."""

import fcntl
import os
import pty
import re
import resource
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from ascend_emulator import environment
from conftest import OLD_LOG, REHEARSAL, SCRIPT, SMALL, start

import validate_npu as v


class Process:
    """A run that is under way."""

    def __init__(self, folder, *arguments, env=None, **options):
        (folder / "validation_output.txt").write_text(OLD_LOG)
        self.folder, self.seen = folder, []
        command = [sys.executable, SCRIPT, *map(str, arguments)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=folder, env=os.environ | (env or {}), **(pipes | options))

    def wait_for(self, text):
        for line in self.process.stdout:
            self.seen.append(line.rstrip("\n"))
            if text in line:
                return
        raise AssertionError(f"no {text} on stdout: {self.process.stderr.read()}")

    def end(self):
        stdout, self.stderr = self.process.communicate(timeout=120)
        self.seen += stdout.splitlines()
        return self.process.returncode

    @property
    def log(self):
        return (self.folder / "validation_output.txt").read_text("utf-8")

    @property
    def half_files(self):
        return list(self.folder.glob(".validation_output*"))


def is_interrupted(run, number, stage):
    """It ended at once, with its status, one line on stderr, and the old log as it was."""
    assert run.end() == 128 + number
    lines = [line for line in run.stderr.splitlines() if line.startswith("validate_npu.py: ")]
    assert lines == [f"validate_npu.py: interrupted by {number.name} in stage {stage}"], run.stderr
    assert "Traceback" not in run.stderr
    assert run.seen[-1] == f"RESULT: NOT RUN  (exit status {128 + number}; an earlier log is unchanged)"
    assert run.log == OLD_LOG and not run.half_files


# --- signals ----------------------------------------------------------------------------------------------------------


def test_a_signal_ends_the_run_while_packages_are_imported(tmp_path):
    run = Process(tmp_path, *REHEARSAL)
    time.sleep(1)
    run.process.send_signal(signal.SIGINT)
    is_interrupted(run, signal.SIGINT, "start")


def test_a_signal_ends_the_run_in_a_stage_and_what_failed_so_far_is_listed(tmp_path):
    """NaN in each LayerNorm: stage 3 fails, and the signal comes in stage 4."""
    run = Process(tmp_path, *SMALL, "--modes", "amp-float16", env=environment(FAULT="LayerNorm:nan", KERNEL_TIME="*=5"))
    run.wait_for("[4/5] precision")
    run.process.send_signal(signal.SIGTERM)
    is_interrupted(run, signal.SIGTERM, "precision")
    assert len([line for line in run.seen if re.match(r"FAIL outputs\.embedding: batch 1: \d+ NaN and 0 Inf", line)]) == 1
    assert any(re.match(r" +\d+ more checks failed after it: ", line) for line in run.seen)


HANGS = environment(FAULT="Addmm:hang,from=60")


def test_a_signal_ends_the_run_while_the_device_hangs(tmp_path):
    run = Process(tmp_path, *SMALL, env=HANGS)
    run.wait_for("[2/5] model")
    time.sleep(3)
    run.process.send_signal(signal.SIGINT)
    assert run.end() == 130 and "interrupted by SIGINT in stage " in run.stderr
    assert run.log == OLD_LOG


def test_a_device_that_hangs_is_ended_by_the_timeout(run, tmp_path):
    """In a fork, because on a busy machine the import of torch alone takes that long."""
    (tmp_path / "validation_output.txt").write_text(OLD_LOG)
    done = run(*SMALL, "--timeout", "20", env=HANGS)
    assert done.status == 2 and len(done.errors) == 1, done.stderr
    message = r"error: stage (model|outputs) takes longer than --timeout 20 s: the device may hang \(see npu-smi info\)"
    assert re.search(message, done.stderr)
    assert done.stdout.splitlines()[-1].startswith("RESULT: NOT RUN  (exit status 2") and done.text == OLD_LOG


def test_a_device_that_hangs_after_an_error_is_lost_and_the_log_is_written(tmp_path):
    """The check after an error is the second Matmul. torch_npu itself waits without end for its queue after some errors, one run in four."""
    faults = {"SYNCHRONIZE_ERROR": "507015,from=30,once", "FAULT": "Matmul:hang,from=2"}
    run = Process(tmp_path, *SMALL, env=environment(**faults))
    assert run.end() == 1, run.stderr
    assert run.log != OLD_LOG and run.seen[-1].startswith("RESULT: FAIL")
    skipped = [line for line in run.seen if "the device no longer works after the error above" in line]
    assert skipped and all(line.startswith("SKIP ") for line in skipped)


# --- files and streams ------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_no_half_log(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    run = Process(tmp_path, *REHEARSAL, preexec_fn=limit)
    assert run.end() == 2
    assert "error: the log cannot be written to validation_output.txt: File too large" in run.stderr
    assert run.seen[-1].startswith("RESULT: NOT RUN") and run.log == OLD_LOG and not run.half_files


def test_a_folder_that_is_removed_meanwhile_is_said(tmp_path):
    (tmp_path / "logs").mkdir()
    run = Process(tmp_path, *REHEARSAL, "--output", "logs/log.txt")
    run.wait_for("[3/5]")
    shutil.rmtree(tmp_path / "logs")
    assert run.end() == 2
    assert "error: the log cannot be written to logs/log.txt: No such file or directory" in run.stderr


def test_runs_at_the_same_time_on_the_same_output_leave_one_whole_log(fork, tmp_path):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    with ThreadPoolExecutor() as pool:
        runs = list(pool.map(lambda folder: fork([*REHEARSAL, "--output", "../log.txt"], folder), folders))
    assert [run.status for run in runs] == [0, 0]
    assert (tmp_path / "log.txt").read_text("utf-8") in [run.stdout for run in runs]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first", "log.txt", "second"]


@pytest.mark.parametrize("reader", ['"$@" | head -n 3; exit ${PIPESTATUS[0]}', '"$@" >&-'], ids=["head", "no stdout"])
def test_a_stdout_that_is_closed_does_not_end_the_run(tmp_path, reader):
    command = ["bash", "-c", reader, "bash", sys.executable, SCRIPT, *REHEARSAL]
    done = subprocess.run(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert "RESULT: PASS" in (tmp_path / "validation_output.txt").read_text("utf-8")


# --- surroundings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "env",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/nonexistent"},
        {"HOME": "/proc/self", "XDG_CACHE_HOME": "/proc/self"},  # a folder where not even root can write
    ],
    ids=["a locale that is not UTF-8, and no home", "a home that is read-only"],
)
def test_surroundings_do_not_matter(tmp_path, env):
    model = v.timm.create_model("test_vit")
    v.draw_weights(model, seed=0)
    v.torch.save(model.state_dict(), tmp_path / "权重.pth")
    done = start([*REHEARSAL, "--weights", "权重.pth"], tmp_path, env)
    assert done.status == 0, done.stderr
    assert done.texts["model.weights"] == "file 权重.pth"


def test_names_from_outside_cannot_break_the_log_or_a_message(run, tmp_path):
    name = "a\nRESULT: PASS\x1b[31m.pth"
    model = v.timm.create_model("test_vit")
    v.draw_weights(model, seed=0)
    v.torch.save(model.state_dict(), tmp_path / name)
    done = run(*REHEARSAL, "--weights", name)
    assert done.status == 0
    assert r"file a\nRESULT: PASS\x1b[31m.pth" in done.text and "\x1b" not in done.text
    missing = run(*REHEARSAL, "--weights", f"not-{name}")
    assert missing.status == 2 and r"not-a\nRESULT: PASS\x1b[31m.pth does not exist" in missing.stderr


# --- what a user sees meanwhile ---------------------------------------------------------------------------------------

OFTEN = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import validate_npu as v; v.HEARTBEAT_SECONDS = 0.3; sys.exit(v.main())"


def test_without_a_terminal_a_line_says_again_and_again_which_stage_is_at_work(tmp_path):
    done = subprocess.run([sys.executable, "-c", OFTEN, *REHEARSAL], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    stages = re.findall(r"^\[(\w+)\] running, \d+ s since the start$", done.stderr, re.MULTILINE)
    assert len(stages) > 3 and stages[0] == "start" and set(stages) <= {"start", *v.STAGES}
    assert "running, " not in done.stdout and "it/s" not in done.stderr, "no bars"


def test_on_a_terminal_a_bar_has_a_total_and_a_message_has_its_own_line(tmp_path):
    """Two batches of warm-up and three that are timed; then a sustained load, which Ctrl-C ends."""
    terminal, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 99, 0, 0))
    command = [sys.executable, "-c", OFTEN, *REHEARSAL, "--batch-sizes", "1", "--warmup", "2", "--iters", "3", "--duration", "20"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=end, stderr=end)
    os.close(end)
    shown = b""
    try:
        while process.poll() is None or select.select([terminal], [], [], 0)[0]:
            shown += os.read(terminal, 65536)
            if shown.count(b"float32, 1:   0%|") == 2:
                process.send_signal(signal.SIGINT)
    except OSError:  # all that was written has been read
        pass
    text = shown.decode()
    assert process.wait() == 128 + signal.SIGINT, text[-2000:]
    assert re.search(r"float32, 1: .*\| \d+/5 ", text), "the first bar has the warm-up in its total"
    assert re.search(r"(\r\n|\x1b\[A)validate_npu\.py: interrupted by SIGINT in stage throughput\r\n", text), text[-600:]
    assert "running, " not in text
