"""Runs of the script's stages in the test's own process, on the CPU, with a device copy that a test may tamper with.

run = after_model_stage("--batch-sizes", "1", "2")
alter(run, "head", lambda logits: 1.1 * logits)
assert not_passed(v.outputs_stage(run)) == {...}
"""

import copy
import functools

import with_test_models  # noqa: F401  registers test_dinov3 and test_tiny_vit
from conftest import REHEARSAL

import validate_npu as v

CPU = v.torch.device("cpu")
v.torch.set_num_threads(1)  # two tests run side by side: with more, each waits for the other's


def new_run(*arguments, documented=None):
    """A rehearsal that has not begun. A later option replaces one of REHEARSAL."""
    options = v.parse_arguments([*REHEARSAL, *map(str, arguments)])
    report, cards = v.Report(quiet=True), v.Cards()
    report.timeout = options.timeout
    cards.connect(report, 60)
    return v.Run(options, report, cards, CPU, documented or v.fp32_arithmetic(CPU))


@functools.cache
def model_stage_done(*arguments):
    run = new_run(*arguments)
    assert not not_passed(v.model_stage(run))
    return run


def after_model_stage(*arguments):
    """A run after stage 2, with a device copy that no other test has."""
    done = model_stage_done(*arguments)
    run = new_run(*arguments)
    run.model = v.Twin(done.model.cpu, copy.deepcopy(done.model.device))
    run.probe, run.maps, run.references = done.probe, done.maps, done.references
    run.images, run.outputs = done.images, done.outputs
    run.pictures, run.picture_count = done.pictures, done.picture_count
    run.first = {name: output.copy() for name, output in done.first.items()}
    return run


def alter(run, module, change):
    """The device's module of this name ("": the whole model) computes change(output) from now on."""
    run.model.device.get_submodule(module).register_forward_hook(lambda module, inputs, output: change(output))


def first_call(run):
    """The first forward pass again: by a device that was altered before it."""
    run.first = v.forward_outputs(run.model.device, run.images[:1])


def checks(entries):
    """(name, first cell of the row) -> entry, of those that judge something."""
    return {(e.name, *v.Table.split(e.text)[:1]): e for e in entries if e.mark in v.OUTCOMES}


def not_passed(entries):
    """(name, first cell of the row) -> WARN or FAIL."""
    return {key: entry.mark for key, entry in checks(entries).items() if entry.mark in (v.WARN, v.FAIL)}
