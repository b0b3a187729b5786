"""Runs the real torch_npu on a machine without an NPU: README.md has the use, emulator.h the working."""

import os

from .build import installed

MARK = "ascend_emulator: the NPU of this run is emulated on the CPU; its numbers and times are not those of an Ascend"


def environment(**knobs):
    """Variables to merge into a process's environment. environment(FAULT="Addmm:nan") sets ASCEND_EMULATOR_FAULT."""
    variables = {f"ASCEND_EMULATOR_{name}": str(value) for name, value in knobs.items()}
    without = {**os.environ, **variables}.get("ASCEND_EMULATOR_WITHOUT")
    parts = {None: ["lib", "driver"], "cann": ["driver"], "driver": ["lib"]}
    if without not in parts:
        raise SystemExit(f"ascend_emulator: ASCEND_EMULATOR_WITHOUT={without}: cann or driver is expected")
    home = installed()
    path = [str(home / part) for part in parts[without]] + os.environ.get("LD_LIBRARY_PATH", "").split(":")
    variables["LD_LIBRARY_PATH"] = ":".join(filter(None, path))
    variables["ASCEND_HOME_PATH"] = str(home)
    variables["ASCEND_OPP_PATH"] = str(home / "opp")
    return variables
