"""What the tests share: the script as a user runs it, and its functions for direct tests."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "validate_npu.py"
sys.path.insert(0, str(ROOT))

import validate_npu  # noqa: E402

validate_npu.import_packages()


class Run:
    """One finished run of the script: exit status, streams and log."""

    def __init__(self, arguments, folder, env=None, launcher=()):
        command = [sys.executable, *map(str, launcher), str(SCRIPT), *map(str, arguments)]
        done = subprocess.run(
            command, cwd=folder, env=os.environ | (env or {}), capture_output=True, text=True, timeout=600
        )
        self.finished(folder, done.returncode, done.stdout, done.stderr)

    def finished(self, folder, status, stdout, stderr):
        self.status, self.stdout, self.stderr = status, stdout, stderr
        self.log_path = Path(folder) / "validation_output.txt"
        self.log = self.log_path.read_text("utf-8") if self.log_path.exists() else None

    def outcomes(self, name):
        """The outcome words of the checks of this name, in the order of the log."""
        return [line[:4] for line in self.log.splitlines() if line[6:28].strip() == name and line[:4].isupper()]

    @property
    def result(self):
        return self.log.splitlines()[-1]


def table(log):
    """The rows of stage 5: (mode, batch) -> figures by the header's names."""
    section = log[log.index("[5/5]") :].splitlines()
    names = [name.replace(" ", "_") for name in re.split(r"\s+(?!ms|MiB)", section[1].strip())]
    rows = (re.match(r"~ +(\w+(?: graph)?) +(\d+ +[\d.]+ .*)", line) for line in section)
    return {(row[1], int(row[2].split()[0])): dict(zip(names, row[2].split())) for row in rows if row}


REHEARSAL = ("--device", "cpu", "--weights", "random", "--warmup", "1", "--iters", "3")
SMALL = (*REHEARSAL, "--model", "test_vit", "--batch-sizes", "1", "3")


@pytest.fixture
def run(tmp_path):
    """Run the script in an empty folder: run("--device", "cpu", ..., env={...})."""

    def run(*arguments, env=None, launcher=()):
        return Run(arguments, tmp_path, env, launcher)

    return run


@pytest.fixture(scope="session")
def rehearsal(tmp_path_factory):
    """A rehearsal with a small ViT, run once for all the tests that read its log."""
    return Run(SMALL, tmp_path_factory.mktemp("rehearsal"))
