"""What the tests share: the script as a user runs it, its log as its own Log reads it, and its functions.

unit/ tests functions and takes seconds. runs/ runs the script, most often in a process that is forked from one that has
imported torch and timm, because the imports take longer than the run. Two tests run side by side; those that are marked
`timing` run alone.
"""

import fcntl
import functools
import multiprocessing.forkserver
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
SCRIPT, WITH_TEST_MODELS = ROOT / "validate_npu.py", TESTS / "with_test_models.py"
sys.path[:0] = [str(ROOT), str(TESTS)]

from ascend_emulator import environment

import validate_npu

validate_npu.import_packages()

# A small run of everything. Without --device it needs an (emulated) NPU.
QUICK = ("--weights", "random", "--batch-sizes", "1", "3", "--warmup", "0", "--iters", "2")
SMALL = (*QUICK, "--model", "test_vit")
REHEARSAL = (*SMALL, "--device", "cpu")
OLD_LOG = "an earlier log\n"
# one_version.py has made the CUDA build of another torch look like the CPU build.
CUDA_TORCH = validate_npu.torch.version.cuda and "TEST_CUDA_TORCH" not in os.environ
PATHS = [str(ROOT), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
SERVER_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(PATHS)}


class Run:
    """One finished run of the script: exit status, streams and log."""

    def __init__(self, folder, status, stdout, stderr):
        self.status, self.stdout, self.stderr = status, stdout, stderr
        self.path = Path(folder) / "validation_output.txt"
        self.text = self.path.read_text("utf-8") if self.path.exists() else None

    @functools.cached_property
    def log(self):
        return validate_npu.Log("log", self.text.splitlines())

    @property
    def rows(self):
        """id -> cells by column, as texts."""
        return self.log.rows

    @property
    def texts(self):
        """id -> what stands behind it, in one line."""
        return self.log.texts

    def marks(self, start=""):
        """id -> outcome of the checks whose id starts with this."""
        return {id: mark for id, mark in self.log.marks.items() if id.startswith(start)}

    def mark(self, id):
        return self.log.marks.get(id)

    @property
    def failures(self):
        """The blocks of the list of failures, each in one line: "FAIL outputs.tokens: ... next: ..."."""
        part = (self.text or self.stdout).partition("\n[failures]\n")[2].partition("\n\n")[0]
        return [" ".join(block.split()) for block in re.split(r"\n(?=FAIL |WARN )", part) if block]

    @property
    def errors(self):
        """The lines on stderr with the reason why a run was not done."""
        return [line for line in self.stderr.splitlines() if line.startswith("validate_npu.py: ")]

    @property
    def result(self):
        return (self.text or self.stdout).splitlines()[-1]

    @property
    def clean(self):
        """A run in which nothing failed or warned."""
        return self.status == 0 and " 0 warned, 0 failed" in self.result


def skip_beside_cuda(on_npu):
    if CUDA_TORCH and on_npu:
        pytest.skip(f"torch_npu refuses this CUDA build of torch: {validate_npu.install_command()}")


def start(arguments, folder, env=None, launcher=()):
    """A run in a process of its own, started as a user starts it."""
    skip_beside_cuda(env and "ASCEND_HOME_PATH" in env)
    command = [sys.executable, *map(str, launcher), str(SCRIPT), *map(str, arguments)]
    env = os.environ | (env or {})
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=600)
    return Run(folder, done.returncode, done.stdout, done.stderr)


# --- runs in forked processes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def fork():
    """fork(arguments, folder, env, script): a run in a process forked from one that has imported torch and timm.

    torch_npu is imported in each run, because it reads the emulator's knobs then. with_test_models' models are there.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["with_test_models"])
    with pytest.MonkeyPatch.context() as patch:  # the server's environment, which each run inherits
        for name, value in (environment() | SERVER_ENVIRONMENT).items():
            patch.setenv(name, value)
        multiprocessing.forkserver.ensure_running()

    def fork(arguments, folder, env=None, script=SCRIPT):
        skip_beside_cuda("cpu" not in arguments)
        process = context.Process(target=in_fork, args=(script, list(map(str, arguments)), str(folder), env or {}))
        process.start()
        process.join(300)
        process.kill()
        process.join()
        return Run(
            folder, process.exitcode, *((Path(folder) / name).read_text("utf-8") for name in ("stdout", "stderr"))
        )

    return fork


def in_fork(script, arguments, folder, env):
    os.chdir(folder)
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    for number, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = [str(script), *arguments]
    import with_test_models

    with_test_models.set_switches()
    status = 0
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        status = end.code or 0
    sys.stdout.flush()
    os._exit(status)  # torch_npu's threads after a failed launch can keep a fork from ending


@pytest.fixture
def run(fork, tmp_path):
    """run(*arguments, **knobs): a forked run in the test's own folder. env={...}: other variables."""

    def run(*arguments, env=None, **knobs):
        return fork(arguments, tmp_path, (environment(**knobs) if knobs else {}) | (env or {}))

    return run


@pytest.fixture(scope="session")
def shared(fork, tmp_path_factory):
    """shared(name, arguments, env): a forked run that is made once for all tests, in whatever process they are."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent / "shared" if "PYTEST_XDIST_WORKER" in os.environ else base / "shared"

    def shared(name, arguments, env=None, script=SCRIPT):
        folder = base / name
        folder.mkdir(parents=True, exist_ok=True)
        with open(base / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (folder / "status").exists():
                (folder / "status").write_text(str(fork(arguments, folder, env, script).status))
        streams = ((folder / stream).read_text("utf-8") for stream in ("stdout", "stderr"))
        return Run(folder, int((folder / "status").read_text()), *streams)

    return shared


@pytest.fixture(scope="session")
def rehearsal(shared):
    """A rehearsal with a small ViT."""
    return shared("rehearsal", REHEARSAL)


@pytest.fixture(scope="session")
def healthy(shared):
    """The default run but for the weights: DINOv3 ViT-S/16, every batch size, on the emulated npu:0."""
    return shared("healthy", ("--weights", "random", "--warmup", "0", "--iters", "5"))


# --- the order of tests -----------------------------------------------------------------------------------------------


def pytest_addoption(parser):
    parser.addoption(
        "--full", action="store_true", help="also the tests that take minutes, such as the whole fault matrix"
    )


def pytest_sessionstart(session):
    """The emulator is compiled, where that is still to be done, while units are tested."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        command = [sys.executable, TESTS / "ascend_emulator", "true"]
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def pytest_collection_modifyitems(config, items):
    """Units come first, and what measures time last; what takes minutes only with --full."""
    items.sort(key=lambda item: (item.get_closest_marker("timing") is not None, item.path.parent.name != "unit"))
    for item in items:
        if item.get_closest_marker("full") and not config.getoption("--full"):
            item.add_marker(pytest.mark.skip(reason="takes minutes: --full"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item):
    """A test that measures time has the machine for itself."""
    base = item.config._tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    with open(base / "machine.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX if item.get_closest_marker("timing") else fcntl.LOCK_SH)
        return (yield)
