"""Compiles the emulator once and keeps it in the user's cache, apart for each version of what it is made from."""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-Wall", "-Wno-deprecated-declarations"]
EMPTY = ["hccl", "acl_op_compiler", "ge_runner", "graph", "acl_tdt_channel"]  # torch_npu wants them; all is in ascendcl
VERSION = "8.5.0-emulated"  # as in runtime.cpp


def folder_of(package):
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(f"ascend_emulator: {package} is not installed for {sys.executable}")
    return Path(spec.submodule_search_locations[0])


def key():
    digest = hashlib.sha256()
    for file in sorted(HERE.glob("*.cpp")) + sorted(HERE.glob("*.h")) + [Path(__file__)]:
        digest.update(file.read_bytes())
    versions = [importlib.metadata.version(package) for package in ("torch", "torch_npu")]
    digest.update(repr([*versions, platform.python_version(), platform.machine()]).encode())
    return digest.hexdigest()[:16]


def cache():
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ascend_emulator"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError:
        root = Path(tempfile.gettempdir()) / f"ascend_emulator-{os.getuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
    return root


def run_all(*commands):
    """Runs the commands side by side; the compiler's own words are the error message."""
    for process in [subprocess.Popen(list(map(str, command))) for command in commands]:
        if process.wait() != 0:
            sys.exit("ascend_emulator: the compilation failed")


def compile_into(folder):
    cxx = [os.environ.get("CXX", "g++"), *FLAGS, "-I", folder_of("torch_npu") / "include/third_party/acl/inc"]
    torch = folder_of("torch")
    lib, driver = folder / "lib", folder / "driver"
    for part in ("lib", "driver", "opp", "runtime", "compiler"):  # the last three only because torch_npu looks for them
        (folder / part).mkdir()

    def library(name, *inputs, where=lib):
        file = where / f"lib{name}.so"
        return [*cxx, "-shared", f"-Wl,-soname,{file.name},--no-as-needed", "-o", file, *inputs, "-pthread"]

    run_all(library("ascend_hal", where=driver))
    run_all(
        library("ascendcl", HERE / "runtime.cpp", HERE / "knobs.cpp", "-L", driver, "-lascend_hal"),
        [*cxx, "-isystem", torch / "include", "-c", "-o", folder / "operators.o", HERE / "operators.cpp"],
    )
    ascendcl = ["-L", lib, "-lascendcl", f"-Wl,-rpath-link,{driver}:{torch / 'lib'}"]
    libtorch = ["-L", torch / "lib", "-ltorch_cpu", "-lc10"]
    run_all(library("opapi", folder / "operators.o", *ascendcl, *libtorch, "-Wl,--no-undefined"))
    run_all(*(library(name, *ascendcl) for name in EMPTY))
    (folder / "operators.o").unlink()
    (folder / "ascend_toolkit_install.info").write_text(f"package_name=ascend_emulator\nversion={VERSION}\n")
    (folder / "opp" / "version.info").write_text(f"Version={VERSION}\n")


def installed():
    """The folder of the compiled emulator, which takes half a minute to make when it is not there yet."""
    root = cache()
    done = root / key()
    if not done.exists():
        with open(root / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one compiles, the others wait
            if not done.exists():
                print("ascend_emulator: compiling, once ...", file=sys.stderr, flush=True)
                work = Path(tempfile.mkdtemp(dir=root))
                try:
                    compile_into(work)
                    work.rename(done)
                finally:
                    shutil.rmtree(work, ignore_errors=True)
    return done
