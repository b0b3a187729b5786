"""Runs the script that its arguments name, and prints the peak memory of the process on stderr."""

import atexit
import resource
import runpy
import sys

del sys.argv[0]


def print_peak():
    print(f"peak_memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB", file=sys.stderr)


atexit.register(print_peak)
runpy.run_path(sys.argv[0], run_name="__main__")
