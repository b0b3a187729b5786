"""Runs the script that its arguments name, and says on stderr how much memory the process had at most."""

import atexit
import resource
import runpy
import sys

del sys.argv[0]


def tell():
    print(f"peak_memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", file=sys.stderr)


atexit.register(tell)
runpy.run_path(sys.argv[0], run_name="__main__")
