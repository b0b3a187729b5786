"""No limit can be loosened unnoticed: each decides a case whose outcome changes if the limit is 100 times larger.

The cases are absolute errors, and the expected outcomes are those of the present limits.
"""

import copy
import itertools
import math
import time

import pytest
from small_run import CPU, after_model_stage, differs_by, drain, marks, new_context

import validate_npu as v
from validate_npu import FAIL, PASS, WARN

np, torch = v.np, v.torch
HALF = v.MODES["float16"]


def product(documented, error):
    """Stage 1: a matmul that was not identified, with this error."""
    probe = v.Probe({"matmul": (None, differs_by(error))}, {}, 0.0)
    return marks(v.judge_probe(probe, new_context(documented={"matmul": documented})))["device.matmul"]


def gelu(error):
    return marks(v.judge_probe(v.Probe({}, {}, error), new_context()))["device.gelu"]


def module(reason, error):
    """Stage 4: a module with this error. reason: why strict mode is not supported."""
    found = v.Module("norm", "LayerNorm", "", v.Strict(reason).tolerance, differs_by(error))
    assert list(marks(v.judge_modules([found])).values()) == [found.mark]
    return found.mark


def output(error, e=1e-6, cost=0.0):
    """Stage 4: logits with this error, if modules are out of tolerance as well, so that UNEXPLAINED does not count."""
    references = after_model_stage()[1].references._replace(errors={"logits": e}, costs={"logits": cost})
    actual = references.expected["logits"] * (1 + error)
    unit = v.Unit(cost, e, references.tolerance())
    return v.judge_output(references, 0.0, "logits", v.FLOAT32, [actual], unit).mark


def output_in_half(share, error=None):
    """Stage 4: logits in float16 whose error is this many times that of the CPU. error: of the CPU, if another."""
    context, loaded = after_model_stage("--modes", "float16")
    references, unit = loaded.references, v.mode_units(context, loaded, HALF)["logits"]
    unit = v.Unit(0.0, error, v.Tolerance(3 * error, 6 * error)) if error else unit
    actual = references.expected["logits"] * (1 + share * unit.cpu_error)
    return v.judge_output(references, 0.0, "logits", HALF, [actual], unit).mark


def excess_outside_modules():
    """Stage 4: tokens are incorrect by 5 % where no module is."""
    context, loaded = after_model_stage()
    original = loaded.device._pos_embed
    loaded.device._pos_embed = lambda x: original(x) * 1.2
    return marks(drain(v.precision_stage(context, loaded))[0])["precision.embedding.float32"]


def array(change, reference):
    change(actual := reference.copy())
    return v.Tolerance(1e-3, 1e-2).mark(v.compare(actual, reference).error)


def element():
    """One incorrect element of a million."""
    return array(lambda x: x.__setitem__((0, 7), 2.0), np.ones((1, 10**6)))


def small_row():
    """An error of 5 % in a row whose norm is a fifth of the others'."""
    reference = np.vstack([np.ones((9, 8)), np.full((1, 8), 0.2)])
    return array(lambda x: x.__setitem__(9, 0.21), reference)


def identified():
    """A product whose error of 1e-4 is none of the known roundings."""
    function = lambda a, b: a @ b * (1 if a.dtype == torch.float64 else 1 + 1e-4)  # noqa: E731
    operands = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    return v.identify(function, operands, CPU)[0]


def prediction(tmp_path):
    """Another class on the device, if the first two differ by 1e-3 on the CPU, and float32 causes 4e-6."""
    from PIL import Image

    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    context, loaded = after_model_stage("--image", tmp_path)
    loaded = loaded._replace(cpu=copy.deepcopy(loaded.cpu))
    for model, second in ((loaded.cpu, 1.0), (loaded.device, 1.002)):
        model.head.weight.data.zero_()
        model.head.bias.data[:3] = torch.tensor([1.001, second, 0.0])
        model.head.bias.data[3:] = 0
    return marks(v.compare_predictions(context, loaded))["precision.top1"]


def distinct():
    """Outputs of two images that differ by 1e-4."""
    return list(v.output_problems(np.array([[1, 2.0], [1, 2.0002]]), np.eye(2) + 1, "2"))


def grown(before, after):
    logs = [v.Log("log", ["title"]) for _ in range(2)]
    for log, error in zip(logs, (before, after)):
        log.rows["precision.logits.float32"] = {"max_row": error}
    return len(list(v.grown_errors(*logs)))


def speed_with_large_spreads():
    old, new = ({"images/s": 1000 / ms, "p50": ms, "p90": ms, "iqr": 0.95} for ms in (10.0, 20.0))
    return v.compare_speed(old, new, max_slowdown=10.0)[1]


def steady():
    """The latency of each batch is 1 % above that of the batch before; after 40 batches the time is over."""
    numbers = itertools.count(1)

    def run_batch():
        number = next(numbers)
        time.sleep(number > 40)
        return 1.01**number

    return v.warm_up(run_batch, 20, 0.0, 1.0)


def sustained(monkeypatch):
    """Throughput falls by 20 % in a second."""
    timing = v.Timing(v.FLOAT32, 1, total_ms=(8.0,) * 10 + (10.0,) * 10, found=differs_by(0))
    monkeypatch.setattr(v, "time_size", lambda *args, **kwargs: timing)
    context, loaded = after_model_stage("--duration", "1")
    return marks(v.sustained_load(context, v.Outputs(loaded, None), timing, None))["throughput.sustained"]


def saturated():
    """Twice the batch size in the same time."""
    timings = [TIMING, v.Timing(v.FLOAT32, 8, total_ms=(10.0,))]
    return sum(entry.id == "throughput.saturated.float32" for entry in v.explain_throughput(timings, CPU))


TIMING = v.Timing(v.FLOAT32, 4, launch_ms=(9.0,) * 5, total_ms=(8.0, 9.0, 10.0, 11.0, 12.0))
# limit -> case, its outcome, and its outcome with a limit that is 100 times larger
CASES = {
    "UNIT float32": (lambda: product("float32", 2e-3), FAIL, PASS),
    "UNIT HF32": (lambda: product("HF32", 2e-3), WARN, PASS),
    "UNIT TF32": (lambda: product("TF32", 9e-3), FAIL, PASS),
    "UNIT float16": (lambda: product("float16", 9e-3), FAIL, PASS),
    "operator warn": (lambda: product("TF32", 2e-3), WARN, PASS),
    "operator fail": (lambda: product("TF32", 1e-2), FAIL, WARN),
    "gelu warn": (lambda: gelu(1e-3), WARN, PASS),
    "module warn": (lambda: module("", 5e-4), WARN, PASS),
    "module fail": (lambda: module("", 1e-2), FAIL, WARN),
    "reduced module warn": (lambda: module("no strict mode", 3e-3), WARN, PASS),
    "reduced module fail": (lambda: module("no strict mode", 1e-2), FAIL, WARN),
    "cpu error warn": (lambda: output(1e-4), WARN, PASS),
    "cpu error fail": (lambda: output(4e-4), FAIL, WARN),
    "expected cost warn": (lambda: output(3e-3, cost=1e-3), WARN, PASS),
    "expected cost fail": (lambda: output(6e-3, cost=1e-3), FAIL, WARN),
    "half warn": (lambda: output_in_half(4), WARN, PASS),
    "half fail": (lambda: output_in_half(8), FAIL, WARN),
    "UNEXPLAINED": (excess_outside_modules, FAIL, WARN),
    "ELEMENT_FACTOR": (element, FAIL, PASS),
    "ROW_NORM_FLOOR": (small_row, FAIL, WARN),
    "MAX_CPU_ERROR": (lambda: output(1e-9, e=2e-3), WARN, PASS),
    "MAX_EXPECTED_COST": (lambda: output(1e-9, cost=0.2), WARN, PASS),
    "MAX_LIMIT": (lambda: output_in_half(1, error=0.31), WARN, PASS),
    "IDENTIFIED": (identified, None, v.EXACT),
    "PREDICTION_FACTOR": (prediction, FAIL, PASS),
    "DISTINCT_REL_L2": (distinct, [], ["batch 2: different images give the same output (relative distance 8.9e-05)"]),
    "ERROR_GROWTH": (lambda: grown("1.0e-03", "1.0e-02"), 1, 0),
    "ROUNDING": (lambda: grown("0.0e+00", "1.0e-04"), 1, 0),
    "MAX_TOLERATED_SLOWDOWN": (speed_with_large_spreads, WARN, PASS),
    "STEADY": (steady, False, True),
    "SUSTAINED_SLOWDOWN": (sustained, WARN, PASS),
    "HOST_BOUND": (lambda: TIMING.host_bound, True, False),
    "MAX_IQR": (lambda: [e.id for e in v.explain_throughput([TIMING], CPU)], ["throughput.doubtful"], []),
    "SATURATION_GAIN": (saturated, 0, 1),
}


def test_each_limit_has_a_case():
    tables = {f"{name} {part}" for name, limit in v.TOLERANCES.items() for part in v.Tolerance._fields
              if math.isfinite(getattr(limit, part))}  # fmt: skip
    assert tables | {f"UNIT {name}" for name in v.UNIT} == {name for name in CASES if " " in name}
    assert all(hasattr(v, name) for name in CASES if " " not in name)


def loosen(monkeypatch, name):
    """The limit is 100 times larger."""
    key, _, part = name.rpartition(" ")
    if not key:
        monkeypatch.setattr(v, name, 100 * getattr(v, name))
    elif key == "UNIT":
        monkeypatch.setitem(v.UNIT, part, 100 * v.UNIT[part])
    else:
        limit = v.TOLERANCES[key]
        monkeypatch.setitem(v.TOLERANCES, key, limit._replace(**{part: 100 * getattr(limit, part)}))


@pytest.mark.parametrize("name", CASES)
def test_each_limit_decides_an_outcome(monkeypatch, request, name):
    case, outcome, if_larger = CASES[name]
    needed = {arg: request.getfixturevalue(arg) for arg in ("tmp_path", "monkeypatch")
              if arg in case.__code__.co_varnames[: case.__code__.co_argcount]}  # fmt: skip
    assert case(**needed) == outcome
    loosen(monkeypatch, name)
    assert case(**needed) == if_larger
