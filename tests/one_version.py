"""Runs a sample of the tests with another torch_npu: python tests/one_version.py 2.9.0 [FOLDER]

Makes a virtual environment in FOLDER (7 GB, some minutes; it is kept), and runs SAMPLE in it. Public torch is a CUDA build,
next to which torch_npu refuses to be imported. It calls torch._C._get_accelerator(), and nothing else: here the answer is the
CPU, and no GPU is visible, so that torch computes as the CPU build does.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parent
SAMPLE = ["runs/test_emulated_npu.py", "runs/test_faults.py"]
# For sitecustomize, which Python imports at its start: the answer is given when torch_npu is about to be imported.
CPU_BUILD = """
import sys

class Finder:
    def find_spec(name, path=None, target=None):
        if name == "torch_npu":
            import torch
            torch._C._get_accelerator = lambda *_: torch.device("cpu")

sys.meta_path.insert(0, Finder)
"""

version = sys.argv[1]
folder = Path(sys.argv[2] if len(sys.argv) > 2 else f".venv-{version}").resolve()
python = folder / "bin" / "python"
if not (folder / "done").exists():
    packages = [line.split("#")[0].strip() for line in (TESTS / "requirements.txt").read_text().splitlines()]
    torch = re.match(r"\d+\.\d+\.\d+", version)[0]  # of 2.9.0.post2, too
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [python, "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, f"torch=={torch}", "timm", "numpy", "pyyaml", *filter(None, packages)], check=True)
    subprocess.run([*pip, "--no-deps", f"torch-npu=={version}"], check=True)
    (folder / "sitecustomize.py").write_text(CPU_BUILD)
    (folder / "done").touch()
path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
env = os.environ | {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TEST_CUDA_TORCH": "1"}
env |= {"TEST_INTERNAL_FORMAT": "no"} if version == "2.9.0" else {}  # its convolutions for them are not emulated
sys.exit(subprocess.run([python, "-m", "pytest", *(TESTS / file for file in SAMPLE)], cwd=TESTS.parent, env=env).returncode)
