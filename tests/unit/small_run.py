"""Stages of the script in the test's process, on the CPU, with a device copy that a test may tamper with.

context, loaded = after_model_stage("--batch-sizes", "1", "2")
alter(loaded, "head", lambda logits: 1.1 * logits)
entries, outputs = drain(v.outputs_stage(context, loaded))
assert not_passed(entries) == {"outputs.logits": FAIL}
"""

import copy
import dataclasses
import functools

import with_test_models  # noqa: F401  registers test_dinov3 and test_tiny_vit
from conftest import REHEARSAL

import validate_npu as v

CPU = v.torch.device("cpu")
v.torch.set_num_threads(1)  # tests run side by side: with more threads each waits for the others


def new_context(*arguments, **changes):
    """A dry run before stage 1. A later option replaces one of REHEARSAL. changes: of fields of the Context."""
    options, ranks, report = v.parse_arguments([*REHEARSAL, *map(str, arguments)]), v.Ranks(), v.Report(quiet=True)
    ranks.connect(report, 60)
    context = v.make_context(options, CPU, ranks, report)
    return dataclasses.replace(context, report_progress=lambda *_: None, **changes)


def drain(stage):
    """The entries that a stage yields, and the result that it returns."""
    entries = []
    while True:
        try:
            entries.append(next(stage))
        except StopIteration as done:
            return entries, done.value


@functools.cache
def model_stage_done(*arguments):
    context = new_context(*arguments)
    _, probe = drain(v.device_stage(context))
    entries, loaded = drain(v.model_stage(context, probe))
    assert not not_passed(entries)
    return context, loaded


def after_model_stage(*arguments):
    """A Context, and a Loaded with a device copy that no other test has."""
    context, loaded = model_stage_done(*arguments)
    first = {name: output.copy() for name, output in loaded.first.items()}
    return context, loaded._replace(device=copy.deepcopy(loaded.device), first=first)


def alter(loaded, module, change):
    """The device's module of this name ("": the whole model) computes change(output) from now on."""
    loaded.device.get_submodule(module).register_forward_hook(lambda module, inputs, output: change(output))


def first_pass_again(loaded):
    """The same with the first forward pass of a device that was altered before it."""
    return loaded._replace(first=v.forward_outputs(loaded.device, loaded.inputs[:1]))


def with_references(context, loaded, **changes):
    """The same with references for changed fields, such as another probe or CPU model."""
    loaded = loaded._replace(**changes)
    inputs = loaded.references.inputs
    return loaded._replace(references=v.make_references(context, loaded.probe, loaded.cpu, loaded.maps, inputs))


def checks(entries):
    """id -> entry, of those that judge something."""
    return {entry.id: entry for entry in entries if entry.mark in v.OUTCOMES}


def marks(entries, start=""):
    """id -> outcome, of the checks whose id starts with this."""
    return {id: entry.mark for id, entry in checks(entries).items() if id.startswith(start)}


def not_passed(entries):
    """id -> WARN or FAIL."""
    return {id: mark for id, mark in marks(entries).items() if mark in (v.WARN, v.FAIL)}


def cells(table, entry):
    """The cells of a row by column."""
    return dict(zip((name for name, _ in table.columns), entry.text.split(), strict=True))


def differs_by(error):
    """A Difference in which every row and element has this relative error."""
    return v.compare(v.np.ones((2, 8)) * (1 + error), v.np.ones((2, 8)))
