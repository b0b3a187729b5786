"""python tests/ascend_emulator (SCRIPT.py | -m MODULE | COMMAND) [ARGUMENT ...]: runs it with an emulated NPU."""

import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ascend_emulator import MARK, environment


def main():
    command = sys.argv[1:]
    if not command:
        sys.exit(__doc__)
    if command[0] == "-m" or command[0].endswith(".py"):
        command.insert(0, sys.executable)
    program = shutil.which(command[0])
    if program is None:
        sys.exit(f"ascend_emulator: there is no command {command[0]}")
    variables = environment()
    print(MARK, flush=True)
    os.execve(program, command, {**os.environ, **variables})  # signals and the exit status are the program's own


main()
