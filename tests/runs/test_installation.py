"""Hosts whose torch, torch_npu or CANN is missing, broken or does not match: status 2, and one line with what to do.

The real torch_npu is imported where its own checks are what fails. Else a package of its name raises what was reported
from the field, in the place where it does.
"""

import pytest
from conftest import SMALL, start

import validate_npu as v

SET_ENV = "source /usr/local/Ascend/cann/set_env.sh (before CANN 8.5: /usr/local/Ascend/ascend-toolkit/set_env.sh)"
CPU_BUILDS = "-r requirements.txt --extra-index-url https://download.pytorch.org/whl/cpu"
FOR_8_5 = f"pip install torch==2.9.0 torch-npu==2.9.0 {CPU_BUILDS}"  # the emulated CANN is 8.5


def is_told(done, *messages):
    assert done.status == 2, done.stdout + done.stderr
    assert len(done.errors) == 1 and all(message in done.errors[0] for message in messages), done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert "pip install torch_npu._C" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("RESULT: NOT RUN  (exit status 2")


@pytest.mark.parametrize(
    "env",
    [{"ASCEND_HOME_PATH": "/nonexistent"}, {"ASCEND_OPP_PATH": ""}, {"ASCEND_OPP_PATH": "/nonexistent"}],
    ids=lambda env: "=".join(*env.items()),
)
def test_a_stale_environment_of_cann(run, env):
    """The real torch_npu raises a bare Exception for each."""
    is_told(run(*SMALL, env=env), "CANN's environment is not set, or of another place", SET_ENV)


@pytest.mark.parametrize(
    ("raises", "messages"),
    [
        ("raise RuntimeError('Two accelerators cannot be used at the same time in PyTorch: npu and cuda.')",
         ["this torch is built for another accelerator", FOR_8_5]),
        ("assert False, 'Torch not compiled with CUDA enabled'", ["this torch is built for another accelerator", FOR_8_5]),
        ("import torch_npu._C", ["this torch_npu is broken, or made for another Python: pip install --force-reinstall"]),
        ("import tbe", ["tbe is a part of CANN", SET_ENV]),
        ("import no_such_yaml", ["torch_npu needs no_such_yaml: pip install no_such_yaml"]),
        ("raise ModuleNotFoundError(\"No module named 'yaml'\")", ["pip install pyyaml"]),
        ("raise AttributeError(\"module 'torch._C' has no attribute '_x'\")",
         ["must be the same version, and match CANN (AttributeError: module", FOR_8_5]),
        ("def broken(:", ["SyntaxError"]),
        ("raise ImportError('libtorch_npu.so: undefined symbol: _ZN3c10')", ["must be the same version", "undefined symbol"]),
        ("raise ImportError('/usr/lib/libgomp.so.1: cannot allocate memory in static TLS block')",
         ["export LD_PRELOAD=/usr/lib/libgomp.so.1"]),
        ("raise OSError('libascend_hal.so: cannot open shared object file')", ["the Ascend driver is missing"]),
        ("raise ImportError('libhccl.so: cannot open shared object file')", ["(libhccl.so not found)", SET_ENV]),
    ],
)  # fmt: skip
def test_whatever_the_import_of_torch_npu_raises(run, tmp_path, raises, messages):
    (tmp_path / "torch_npu").mkdir()
    (tmp_path / "torch_npu" / "__init__.py").write_text(raises)
    is_told(run(*SMALL, env={"PYTHONPATH": str(tmp_path)}), *messages)


def test_next_to_a_cuda_build_of_torch_2_14_it_is_known_before_the_import(monkeypatch):
    """The import would abort the process (a duplicated allocator option), which no Python code can catch."""
    monkeypatch.setattr(v.torch.version, "cuda", "13.0")
    monkeypatch.setattr(v.torch, "__version__", "2.14.0")
    with pytest.raises(v.CannotRun, match="this torch is built for another accelerator, and torch_npu needs the CPU build"):
        v.find_npu()


@pytest.mark.parametrize(
    ("package", "raises", "message"),
    [
        ("timm", "raise AttributeError(\"module 'numpy' has no attribute 'bool'\")", "AttributeError: module 'numpy' has no"),
        ("numpy", "def broken(:", "cannot be imported (SyntaxError"),
        ("torch", "import torch_that_is_not_there", "No module named 'torch_that_is_not_there'): pip install -r requirements"),
    ],
)  # fmt: skip
def test_whatever_the_import_of_another_package_raises(tmp_path, package, raises, message):
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text(raises)
    is_told(start(SMALL, tmp_path, {"PYTHONPATH": str(tmp_path)}), message)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("share/info/runtime/version.info", "Version=9.1.0\n", "pip install torch==2.12.0 torch-npu==2.12.0 -r"),
        ("aarch64-linux/ascend_toolkit_install.info", "package_name=x\nversion=9.0.0\n", "torch==2.10.0 torch-npu==2.10.0"),
        ("aarch64-linux/ascend_toolkit_install.info", "version=8.1.RC1\n",
         "README lists torch and torch_npu for CANN 8.1.RC1"),
        ("nothing", "", f"pip install {CPU_BUILDS}"),
    ],
)  # fmt: skip
def test_the_install_line_is_that_of_the_hosts_cann(tmp_path, monkeypatch, file, text, message):
    path = tmp_path / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    monkeypatch.setenv("ASCEND_HOME_PATH", str(tmp_path))
    assert message in v.install_command()


@pytest.mark.parametrize("text", ["Version=25.2.0\npackage=driver", "version = 25.2.0", "[x]\nVersion=[25.2.0:x]\n"])
def test_a_version_is_read_from_the_vendors_file(tmp_path, text):
    (tmp_path / "version.info").write_text(text)
    assert v.version_in(f"{tmp_path}/nothing", f"{tmp_path}/*.info") == "25.2.0"


@pytest.mark.parametrize("data", [b"", b"\xff\xfe\x00", b"Versions: many"])
def test_a_file_that_says_no_version_says_none(tmp_path, data):
    (tmp_path / "version.info").write_bytes(data)
    assert v.version_in(f"{tmp_path}/version.info") == ""
