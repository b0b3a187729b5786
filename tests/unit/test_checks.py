"""Each check can fail: a healthy device passes, and each single fault of one is detected.

The stages run for real, with a device copy of the model in which one thing is altered: see small_run.py.
"""

import contextlib
import dataclasses
import math
import re
import threading
import time
import types

import pytest
from conftest import REHEARSAL
from small_run import (
    CPU,
    after_model_stage,
    alter,
    cells,
    checks,
    differs_by,
    drain,
    first_pass_again,
    marks,
    new_context,
)
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

import validate_npu as v
from validate_npu import FACT, FAIL, PASS, SKIP, VARIES, WARN

np, torch = v.np, v.torch
EQUAL, GOOD, BAD, NAN = (differs_by(error) for error in (0, 1e-7, 0.1, math.nan))
LIMIT = v.fp32_tolerance(1e-7, 0.0)


# --- stage 1: device --------------------------------------------------------------------------------------------------


class IncorrectProducts(torch.overrides.TorchFunctionMode):
    """A device whose matrix products in float32 are changed."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        is_product = getattr(function, "__name__", "") in ("matmul", "__matmul__", "mm")
        return self.change(result) if is_product and result.dtype == torch.float32 else result


def one_element_is_nan(x):
    x[3, 4] = math.nan
    return x


@pytest.mark.parametrize(
    ("device", "outcome"),
    [
        (contextlib.nullcontext(), PASS),
        (IncorrectProducts(lambda x: x * (1 + 1e-5)), PASS),
        (IncorrectProducts(lambda x: x * 1.01), FAIL),
        (IncorrectProducts(lambda x: x.roll(1, 0)), FAIL),
        (IncorrectProducts(one_element_is_nan), FAIL),
    ],
    ids=["healthy", "rounds", "an error of 1 %", "rows mixed up", "a NaN"],
)
def test_an_incorrect_matrix_product_fails(device, outcome):
    with device:
        found = marks(drain(v.device_stage(new_context()))[0])
    assert found == {"device.matmul": outcome, "device.convolution": PASS, "device.gelu": PASS}


def test_the_facts_of_a_bug_report_are_in_stage_1():
    entries, probe = drain(v.device_stage(new_context()))
    facts = {entry.id: entry.text for entry in entries if entry.mark == FACT}
    assert facts["device.name"] == "cpu" and facts["device.fp32"] == str(probe)
    assert f"torch {torch.__version__}, timm {v.timm.__version__}, numpy " in facts["device.software"]
    assert " GiB, " in facts["device.host"] and facts["device.host"].rpartition(" cores")[1]


HF32, FLOAT16 = v.Fp32Precision(11, "half away", "HF32"), v.FLOAT16


def probe_of(matmul=(v.EXACT, EQUAL), gelu_error=0.0):
    return v.Probe(
        {"convolution": (v.EXACT, EQUAL), "matmul": matmul}, dict.fromkeys(("none", "tanh"), "tanh"), gelu_error
    )


@pytest.mark.parametrize(
    ("documented", "precision", "error", "outcome", "limit"),
    [
        ("float32", v.EXACT, 0, PASS, "1.2e-04"),
        ("float32", HF32, 0, PASS, "1.2e-04"),
        ("HF32", HF32, 0, PASS, "4.9e-04"),
        ("HF32", v.EXACT, 0, PASS, "4.9e-04"),
        ("float16", FLOAT16, 0, PASS, "9.8e-04"),
        ("float32", None, 2e-4, WARN, "1.2e-04"),  # not identified, which is not called fewer bits
        ("HF32", None, 2e-4, PASS, "4.9e-04"),
        ("HF32", None, 1e-2, FAIL, "3.9e-03"),
        ("TF32", None, 1e-2, FAIL, "7.8e-03"),
    ],
)
def test_a_large_product_is_as_accurate_as_documented(documented, precision, error, outcome, limit):
    context = new_context(documented={"convolution": "HF32", "matmul": documented})
    found = checks(v.judge_probe(probe_of((precision, differs_by(error))), context))
    shown = cells(v.PRODUCTS, found["device.matmul"])
    assert (found["device.matmul"].mark, shown["limit"]) == (outcome, limit)
    assert shown["precision"] == (precision.name.replace(" ", "_") if precision else "-")
    others = {"device.convolution": PASS, "device.matmul": outcome, "device.gelu": PASS}
    fewer = documented == "float32" and precision == HF32
    assert marks(found.values()) == others | ({"device.fewer_bits": WARN} if fewer else {})
    assert not fewer or found["device.fewer_bits"].text.startswith("matmul keeps fewer bits than ")


@pytest.mark.parametrize(("error", "outcome"), [(0.0, PASS), (5e-5, PASS), (1e-3, WARN), (math.nan, FAIL)])
def test_a_gelu_of_neither_form_warns_and_one_that_is_not_finite_fails(error, outcome):
    *_, gelu = v.judge_probe(probe_of(gelu_error=error), new_context())
    assert (gelu.id, gelu.mark) == ("device.gelu", outcome)
    assert gelu.text == f"max abs error {error:.1e} against the tanh form, limit 1.0e-04"


def test_a_system_that_does_not_report_which_cores_are_allowed_runs_too(monkeypatch):
    """macOS, of which there is none here."""
    monkeypatch.delattr("os.sched_getaffinity")
    assert " threads, " in v.host_name()


# --- stage 2: model ---------------------------------------------------------------------------------------------------


class CorruptedInTransfer(VisionTransformer):
    """A transfer to the device that changes the last bit of one weight."""

    def to(self, *args, **kwargs):
        bits = self.norm.weight.data.view(torch.int32)
        bits[5] ^= 1
        return super().to(*args, **kwargs)


@register_model
def test_corrupted_in_transfer(pretrained=False, **kwargs):
    model = CorruptedInTransfer(img_size=32, embed_dim=32, depth=1, num_heads=1)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model


test_corrupted_in_transfer.__test__ = False  # a model, not a test


@pytest.mark.parametrize(("model", "outcome"), [("test_vit", PASS), ("test_corrupted_in_transfer", FAIL)])
def test_weights_that_are_not_bit_identical_on_the_device_fail(model, outcome):
    context = new_context("--model", model)
    found = checks(drain(v.model_stage(context, v.probe_device(context)))[0])
    assert marks(found.values()) == {"model.readback": outcome}
    assert outcome == PASS or found["model.readback"].text.startswith("weights on cpu differ from the host's: SHA-256 ")


class WithoutNpu(str):
    """A device that computes what it has no kernel for on the CPU, without an error."""

    type = "npu"


GRAPH = v.MODES["float32+graph"]
CAUTION = (
    "CAUTION: The operator 'aten::foo.out' is not currently supported on the NPU backend and will fall back to run"
)


@pytest.mark.parametrize(
    ("disabled", "rank", "names", "printed", "outcome", "text"),
    [
        ("1", "0", set(), "", PASS, "printed no warning"),
        ("1", "0", set(), CAUTION, WARN, "on the CPU: aten::foo.out"),
        ("1", "0", {"addmm", "logit"}, "", WARN, "on the CPU: logit (its NPU kernel copies to the CPU and back)"),
        ("1", "1", set(), "", SKIP, "only in its first process"),
        ("0", "0", set(), "", WARN, "is set to 0"),
    ],
)
def test_no_operator_fell_back_only_if_that_would_have_been_detected(
    monkeypatch, disabled, rank, names, printed, outcome, text
):
    """A torch_npu without the variable. One that knows it passes: see the runs on an emulated NPU."""
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", disabled)
    monkeypatch.setenv("RANK", rank)
    entry = v.judge_fallback(WithoutNpu("cpu"), names, printed)
    assert (entry.id, entry.mark) == ("model.fallback", outcome) and text in entry.text


# --- stage 3: outputs -------------------------------------------------------------------------------------------------

VALUES = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)


def with_value(value):
    values = VALUES.copy()
    values[1, 3] = value
    return values


def problems(values, expected=(1, 8)):
    on_cpu = np.random.default_rng(2).standard_normal(expected).astype(np.float32)
    return list(v.output_problems(values, on_cpu, "2"))


def test_a_healthy_output_passes_and_its_row_has_its_figures():
    assert problems(VALUES) == []
    entry = v.judge_record("outputs.embedding", VALUES, [], [], LIMIT)
    shown = cells(v.OUTPUTS, entry)
    assert entry.mark == PASS and (shown["shape"], shown["batch_err"], shown["limit"]) == ("Bx8", "-", "-")
    figures = [float(shown[name]) for name in ("min", "max", "mean", "std")]
    assert figures == pytest.approx([VALUES.min(), VALUES.max(), VALUES.mean(), VALUES.std()], rel=0.1)


@pytest.mark.filterwarnings("ignore:invalid value")  # of infinity - infinity
@pytest.mark.parametrize(
    ("values", "expected", "problem"),
    [
        (VALUES, (1, 9), "batch 2: 8 float32 for an image, on the CPU 9 float32"),
        (VALUES, (1, 8, 1), "batch 2: 8 float32 for an image, on the CPU 8x1 float32"),
        (VALUES.reshape(2, 2, 4), (1, 3, 4), "batch 2: 2x4 float32 for an image, on the CPU 3x4 float32"),
        (VALUES.astype(np.float16), (1, 8), "batch 2: 8 float16 for an image, on the CPU 8 float32"),
        (with_value(math.nan), (1, 8), "batch 2: 1 NaN and 0 Inf in 16 values, 0 on the CPU"),
        (with_value(-math.inf), (1, 8), "batch 2: 0 NaN and 1 Inf in 16 values, 0 on the CPU"),
        (np.full((2, 8), math.nan, np.float32), (1, 8), "batch 2: 16 NaN and 0 Inf in 16 values, 0 on the CPU"),
        (np.float32([VALUES[0], np.full(8, 0.5)]), (1, 8), "batch 2: collapsed: all values of an image are equal"),
        (
            np.float32([VALUES[0], VALUES[0] * (1 + 1e-6)]),
            (1, 8),
            "batch 2: different images give the same output (rel",
        ),
    ],
)
def test_an_output_fails_for_each_property_that_can_be_incorrect(values, expected, problem):
    (found,) = problems(values, expected)
    assert found.startswith(problem)
    entry = v.judge_record("outputs.embedding", values, [found], [(EQUAL, "batch 2")], LIMIT)
    assert entry.mark == FAIL and entry.problem == found


def test_nan_and_inf_are_counted_on_both_sides():
    on_cpu = np.float32([[1, math.inf, math.nan, 1]])
    (found,) = v.output_problems(np.float32([[1, math.inf, math.inf, math.nan]]), on_cpu, "1")
    assert found == "batch 1: 1 NaN and 2 Inf in 4 values, 2 on the CPU"


@pytest.mark.parametrize(
    ("values", "on_cpu"),
    [
        (VALUES[[0, 0, 1]], VALUES[[0, 0, 1]]),  # two files with one image
        (np.full((2, 8), 0.5, np.float32), np.full((3, 8), 0.5, np.float32)),  # a classifier that was not trained
        (VALUES[:, :1] * 0 + 1, VALUES[:, :1]),  # one logit: of 256 images two are nearly equal in 4 of 10 runs
    ],
)
def test_outputs_that_are_equal_on_the_cpu_as_well_are_no_fault_of_the_device(values, on_cpu):
    assert list(v.output_problems(values, on_cpu, "3")) == []
    other = np.random.default_rng(2).standard_normal(on_cpu.shape)
    assert values.shape[1] == 1 or list(v.output_problems(values, other.astype(np.float32), "3")) != []


def test_images_that_differ_as_little_as_an_untrained_cnn_sets_them_apart_pass():
    assert problems(np.vstack([VALUES[0], VALUES[0] * np.float32(1.002)])) == []


@pytest.fixture
def run():
    """test_vit after stage 2, with batches of 1 and 3 images."""
    return after_model_stage()


def stage_3(context, loaded):
    """The checks by id, and the result."""
    entries, outputs = drain(v.outputs_stage(context, loaded))
    return checks(entries), outputs


def apart(found):
    """id -> outcome, of the checks that do not pass."""
    return {id: entry.mark for id, entry in found.items() if entry.mark != PASS}


def ids(*names):
    return {f"outputs.{name}" for name in names}


DOWNSTREAM = ["embedding", "logits", "tokens"]
MAPS = ["feature_map.1", "feature_map.2", "feature_map.3"]


def test_a_healthy_device_passes_stage_3_and_every_output_is_judged(run):
    found, outputs = stage_3(*run)
    assert apart(found) == {} and found.keys() == ids(*DOWNSTREAM, *MAPS, "determinism")
    assert all(cells(v.OUTPUTS, found[f"outputs.{name}"])["batch_err"] != "-" for name in (*DOWNSTREAM, *MAPS))
    assert run[1].inputs.shape == (3, 3, 160, 160) and outputs.eager.shape == (3, 1000)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("head", ["logits"]),
        ("fc_norm", ["logits", "embedding"]),
        ("norm", DOWNSTREAM),
        ("blocks.5", [*DOWNSTREAM, *MAPS[2:]]),
        ("blocks.4", [*DOWNSTREAM, *MAPS[1:]]),
        ("blocks.3", [*DOWNSTREAM, *MAPS]),
    ],
)
@pytest.mark.parametrize("row", [1, 2])
def test_every_row_of_every_output_is_compared_with_that_image_at_batch_size_1(run, module, names, row):
    """A device that mixes up one row of a batch of 3."""

    def mix_up(x):
        return torch.cat([x[:row], x[row : row + 1].flip(-1), x[row + 1 :]]) if len(x) == 3 else x

    alter(run[1], module, mix_up)
    found, _ = stage_3(*run)
    assert apart(found) == dict.fromkeys(ids(*names), FAIL)
    for id in ids(*names):
        assert found[id].problem.startswith("batch 3 against batch size 1: error ")
        assert f"worst row: image {row}" in found[id].details[1]


def test_a_nan_in_a_row_fails_and_the_batch_is_named(run):
    alter(run[1], "fc_norm", lambda x: torch.cat([x[:2], x[2:] * math.nan]))
    found, _ = stage_3(*run)
    assert apart(found) == dict.fromkeys(ids("embedding", "logits"), FAIL)
    assert found["outputs.embedding"].problem == "batch 3: 64 NaN and 0 Inf in 192 values, 0 on the CPU"


@pytest.mark.parametrize(("factor", "outcome", "limit"), [(30, PASS, 64), (120, WARN, 64), (500, FAIL, 256)])
def test_a_row_of_a_batch_warns_at_64_times_the_error_of_the_cpu_and_fails_at_256_times(run, factor, outcome, limit):
    error = run[1].references.errors["logits"]
    alter(run[1], "head", lambda x: torch.cat([x[:1], x[1:] * (1 + factor * error)]))
    found, _ = stage_3(*run)
    assert apart(found) == ({"outputs.logits": outcome} if outcome != PASS else {})
    shown = cells(v.OUTPUTS, found["outputs.logits"])
    assert shown["limit"] == f"{limit * error:.1e}" and float(shown["used"][:-1]) == pytest.approx(
        100 * factor / limit, abs=3
    )


def test_the_worst_batch_is_named():
    context, loaded = after_model_stage("--batch-sizes", "2", "3", "4")
    errors = {2: 2e-3, 3: 5e-3, 4: 3e-3}
    alter(loaded, "head", lambda x: x * (1 + errors.get(len(x), 0)))
    found, _ = stage_3(context, loaded)
    assert found["outputs.logits"].problem.startswith("batch 3 against batch size 1: error 5.0e-03 > limit ")


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda x: x, PASS),
        (lambda x: x * (1 + 1e-6), WARN),
        (lambda x: torch.cat([x[:-1], x[-1:] * (1 + 1e-6)]), WARN),
        (lambda x: x * 1.1, FAIL),
        (lambda x: x * math.nan, FAIL),
    ],
    ids=["unchanged", "rounding", "rounding of one row", "another", "NaN"],
)
def test_a_second_run_must_be_bit_identical(run, change, outcome):
    """model(x) comes second, after forward_head(forward_features(x)), which no hook of the whole model sees."""
    alter(run[1], "", change)
    found, _ = stage_3(*run)
    assert apart(found) == ({"outputs.determinism": outcome} if outcome != PASS else {})
    start = "two runs are bit-identical" if outcome == PASS else "batch size "
    assert found["outputs.determinism"].text.startswith(start)


def test_algorithms_are_deterministic_in_the_stage_only_and_operators_that_have_none_are_named(run):
    alter(run[1], "head", lambda x: x.clone().put_(torch.tensor([0]), x[0, :1]))
    found, _ = stage_3(*run)
    assert found["outputs.determinism"].text.endswith("; torch has no deterministic kernel for put_)")
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", DOWNSTREAM)
@pytest.mark.parametrize(("factor", "outcome"), [(1 + 1e-6, WARN), (1.1, FAIL), (math.nan, FAIL)])
def test_the_first_forward_pass_is_compared_with_a_later_one(name, factor, outcome):
    """Even if --batch-sizes has no 1."""
    context, loaded = after_model_stage("--batch-sizes", "3")
    loaded.first[name] *= np.float32(factor)
    found, _ = stage_3(context, loaded)
    assert apart(found) == {"outputs.determinism": outcome}
    assert found["outputs.determinism"].problem.startswith(f"first forward pass, {name}: error ")


def test_outputs_that_are_equal_for_every_image_fail(run):
    context, loaded = run
    alter(loaded, "norm", lambda x: x * 0)
    found, _ = stage_3(context, first_pass_again(loaded))
    assert apart(found) == dict.fromkeys(ids(*DOWNSTREAM), FAIL)
    for name in ("embedding", "tokens"):
        assert found[f"outputs.{name}"].problem.startswith(
            "batch 1: collapsed: all values of an image are equal; batch 3: "
        )
    assert "batch 3: different images give the same output" in found["outputs.logits"].problem


def test_outputs_of_another_shape_fail(run):
    context, loaded = run
    alter(loaded, "head", lambda x: x[:, 1:])
    found, _ = stage_3(context, first_pass_again(loaded))
    assert apart(found) == {"outputs.logits": FAIL}
    assert found["outputs.logits"].problem.startswith(
        "batch 1: 999 float32 for an image, on the CPU 1000 float32; batch 3"
    )


def test_a_batch_without_memory_for_its_second_run_is_a_warning_and_the_others_are_judged():
    context, loaded = after_model_stage("--batch-sizes", "1", "2", "3")

    def no_memory_for_3(module, args):
        if len(args[0]) == 3:
            raise torch.OutOfMemoryError("out of memory")

    loaded.device.register_forward_pre_hook(no_memory_for_3)
    found, outputs = stage_3(context, loaded)
    assert apart(found) == {"outputs.batch.3": WARN} and found["outputs.batch.3"].text == "out of device memory"
    assert "outputs.determinism" in found and len(outputs.eager) == 2


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    for name, values in zip("ab", np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)):
        Image.fromarray(values).resize((200, 200)).save(tmp_path / f"{name}.png")
    return tmp_path / "a.png", tmp_path / "b.png"


def test_images_are_a_batch_of_their_own(images):
    context, loaded = after_model_stage("--image", *images)
    alter(loaded, "head", lambda x: torch.cat([x[:1], x[1:].flip(-1)]) if len(x) == 2 else x)
    found, outputs = stage_3(context, loaded)
    assert apart(found) == {"outputs.logits": FAIL}
    assert found["outputs.logits"].problem.startswith("batch images against batch size 1: error ")
    assert len(outputs.eager) == 3, "timed outputs are compared with those of the seeded inputs"


def test_the_same_image_twice_is_no_collapse(images):
    context, loaded = after_model_stage("--image", images[0], images[0])
    assert len(loaded.images) == 1
    assert apart(stage_3(context, loaded)[0]) == {}
    copied = images[0].with_name("copy.png")
    copied.write_bytes(images[0].read_bytes())
    context, loaded = after_model_stage("--image", *images, copied)
    assert len(loaded.images) == 2
    assert apart(stage_3(context, loaded)[0]) == {}


# --- stage 5: throughput ----------------------------------------------------------------------------------------------

TIMED = v.Timing(v.FLOAT32, 1, launch_ms=(1.0, 1.0), total_ms=(2.0, 2.0), found=EQUAL)


def test_out_of_memory_is_a_row_and_the_other_batch_sizes_are_reported():
    row = v.timing_entry(TIMED, new_context())
    assert (row.mark, row.id) == (VARIES, "throughput.float32.1")
    assert cells(v.THROUGHPUT, row)["images/s"] == "500.00"
    timing = v.Timing(v.FLOAT32, 8, problem=v.OUT_OF_MEMORY)
    entry = v.timing_entry(timing, new_context())
    assert (entry.mark, entry.id, entry.problem) == (WARN, "throughput.float32.8", "out of device memory")
    assert v.timing_entry(timing, new_context("--batch-sizes", "auto")).mark == VARIES, "the search ends there"
    assert [group[0].batch for group in v.by_mode([TIMED, timing])] == [1]


class NoReplay:
    """A device module whose graphs replay nothing."""

    Stream = current_stream = lambda *_: types.SimpleNamespace(wait_stream=lambda stream: None)
    CUDAGraph = lambda *_: types.SimpleNamespace(replay=lambda: None)  # noqa: E731
    stream = graph = lambda *_: contextlib.nullcontext()


def test_a_graph_that_is_not_replayed_gives_an_incorrect_output(monkeypatch):
    """It is captured with zeros: with the inputs themselves the output of the capture would be correct."""
    monkeypatch.setattr(torch, "get_device_module", lambda kind: NoReplay())
    inputs = torch.ones(2, 3)
    replay = v.captured(lambda x: x * 2, inputs, CPU)
    assert replay(inputs).eq(0).all()


def test_a_graph_that_cannot_be_captured_is_skipped():
    entry = v.timing_entry(v.Timing(GRAPH, 8, problem="it cannot be captured", mark=SKIP), new_context())
    assert (entry.mark, entry.id, entry.problem) == (SKIP, "throughput.float32+graph.8", "it cannot be captured")


@pytest.mark.parametrize(
    ("mode", "found", "outcome"),
    [
        (v.FLOAT32, EQUAL, PASS),
        (v.FLOAT32, GOOD, PASS),
        (v.FLOAT32, BAD, FAIL),
        (v.FLOAT32, NAN, FAIL),
        (v.MODES["amp-float16"], differs_by(5e-3), PASS),  # half precision against float32 of stage 3
        (v.MODES["amp-float16"], differs_by(5e-2), FAIL),
        (GRAPH, differs_by(5e-3), FAIL),  # a graph against the same mode without
        (v.MODES["amp-float16+graph"], differs_by(5e-2), FAIL),
        (v.MODES["amp-float16+graph"], NAN, FAIL),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("i", [0, 1], ids=["smaller batch", "larger batch"])
def test_timed_outputs_are_judged_by_the_limit_of_their_mode(mode, found, outcome, i):
    def timings(mode):
        return [dataclasses.replace(TIMED, mode=mode, batch=batch) for batch in (1, 4)]

    altered = timings(mode)
    altered[i] = dataclasses.replace(altered[i], found=found)
    tolerances = {"float32": LIMIT, "amp-float16": v.Tolerance(7e-3, 3e-2)}  # as stage 4 found them
    checked = v.Precision("logits", {}, tolerances, {}, [])
    eager = timings(v.MODES[mode.base]) if mode.graph else []
    *_, entry = v.judge_timed_outputs([*eager, *altered], checked)
    assert (entry.id, entry.mark) == (f"throughput.outputs.{mode.name}", outcome)
    reference = f"{mode.base} without graph" if mode.graph else "stage 3"
    what = f"batch size {altered[i if found is not EQUAL else 0].batch} against {reference}"
    assert entry.text.startswith(f"{what}: error {found.error:.1e}, limit ")
    limit = tolerances[mode.base].limit(outcome)
    assert entry.text.endswith(f", limit {limit:.1e}, used {v.used_text(found.error, limit)}")


class Counted:
    """A hook that changes the output of one call of a batch size."""

    def __init__(self, call=0, change=None, batch=0):
        self.call, self.change, self.batch, self.calls = call, change, batch, {}

    def __call__(self, output):
        self.calls[len(output)] = call = self.calls.get(len(output), 0) + 1
        return self.change(output) if (call, len(output)) == (self.call, self.batch) else output


def after_outputs_stage(*arguments):
    """The Context, the Outputs, and limits as stage 4 leaves them."""
    context, loaded = after_model_stage("--iters", "3", *arguments)
    found, outputs = stage_3(context, loaded)
    assert apart(found) == {}
    return context, outputs, v.Precision("logits", {}, {"float32": loaded.references.tolerance()}, {}, [])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("call", "outcome"), [(1, PASS), (2, FAIL), (3, FAIL), (4, FAIL)])
@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: torch.cat([x[:-1], x[-1:] * math.nan])])
def test_every_timed_batch_is_compared(batch, call, outcome, change):
    """The first call is not timed; three are."""
    context, outputs, checked = after_outputs_stage()
    alter(outputs.loaded, "", Counted(call, change, batch))
    found = checks(drain(v.throughput_stage(context, outputs, checked))[0])
    assert marks(found.values()) == {"throughput.outputs.float32": outcome}
    assert outcome == PASS or found["throughput.outputs.float32"].problem.startswith(f"batch size {batch} against stage 3: error ")


def test_without_warm_up_only_the_first_batch_and_those_that_are_timed_run():
    context, outputs, checked = after_outputs_stage("--warmup", "0")
    alter(outputs.loaded, "", counted := Counted())
    _, timings = drain(v.throughput_stage(context, outputs, checked))
    assert counted.calls[1] == counted.calls[3] == 1 + 3
    assert [len(timing.total_ms) for timing in timings] == [3, 3]


def test_a_warm_up_runs_at_least_its_batches(monkeypatch):
    monkeypatch.setitem(v.WARMUP_SECONDS, "cpu", (0.2, 60.0))  # the time limit of a busy machine would end it
    context, outputs, checked = after_outputs_stage("--batch-sizes", "1", "--warmup", "7")
    alter(outputs.loaded, "", counted := Counted())
    drain(v.throughput_stage(context, outputs, checked))
    assert counted.calls[1] >= 1 + 7 + 3


def test_a_batch_that_stage_3_had_no_memory_for_is_compared_with_the_images_that_it_has():
    context, outputs, checked = after_outputs_stage("--batch-sizes", "3")
    outputs = outputs._replace(eager=outputs.eager[:1])
    assert [*outputs.rows(3)] == [0, 0, 0]
    assert marks(drain(v.throughput_stage(context, outputs, checked))[0]) == {"throughput.outputs.float32": PASS}


@pytest.mark.parametrize("distance", [3, 6])
def test_a_row_that_is_computed_from_the_row_of_another_tile_is_detected(distance):
    """The batch repeats the 3 images of stage 3: an incorrect row must not be a correct one of another repetition."""
    context, outputs, checked = after_outputs_stage("--batch-sizes", "1", "3")
    context = dataclasses.replace(context, options=v.parse_arguments([*REHEARSAL, "--batch-sizes", "3", "12"]))

    def shift(output):
        return torch.cat([output[:distance], output[:-distance]]) if len(output) > distance else output

    alter(outputs.loaded, "", shift)
    assert marks(drain(v.throughput_stage(context, outputs, checked))[0]) == {"throughput.outputs.float32": FAIL}


def test_timed_outputs_of_a_mode_without_a_limit_from_stage_4_are_skipped():
    for checked in (None, v.Precision("logits", {}, {}, {}, [])):
        (entry,) = v.judge_timed_outputs([TIMED], checked)
        assert (entry.mark, entry.text) == (SKIP, "not judged: stage 4 gave no limit for this mode")


# --- several devices --------------------------------------------------------------------------------------------------


@pytest.fixture
def two_ranks():
    """Two ranks of one run, in this process, with a store of torch. A rank waits half a second for the other."""
    store, both = torch.distributed.HashStore(), [v.Ranks(), v.Ranks()]
    for rank, ranks in enumerate(both):
        ranks.connect(v.Report(quiet=True), seconds=0.5)
        ranks.report.timeout = 600
        ranks.rank, ranks.size, ranks.store = rank, 2, store
    yield both
    for ranks in both:
        ranks.report.timer.cancel()  # which would end this process as one that hangs


def test_ranks_exchange_values_and_one_that_does_not_answer_is_lost(two_ranks):
    waiting, working = two_ranks

    def work():
        time.sleep(0.2)
        working.gather("end", "done")

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.gather("end", "waited") == ["waited", "done"]
    thread.join()
    with pytest.raises(v.RanksLost) as lost:
        waiting.gather("another step")
    assert lost.value.args == ([1],)


def test_a_rank_that_waits_for_another_one_is_not_ended_by_its_own_timeout(two_ranks):
    """--timeout is 0.1 s here. gather() waits for half a second beside it."""
    report, ended = two_ranks[0].report, []
    report.timeout, report.abort = 0.1, lambda *reason: ended.append(reason)
    report.restart_timeout("model")
    with pytest.raises(v.RanksLost):
        two_ranks[0].gather("end")
    assert not ended and report.stage == "model"


@pytest.mark.parametrize("broken", [0, 1])
@pytest.mark.parametrize(
    ("error", "text"),
    [(v.CannotRun("no such model"), "no such model"), (MemoryError("of the host"), "MemoryError: of the host")],
)
def test_what_one_rank_cannot_do_ends_all_with_its_reason(two_ranks, broken, error, text):
    def task(rank):
        if rank == broken:
            raise error
        return "loaded"

    problems = [None, None]

    def all_or_none(rank):
        try:
            two_ranks[rank].all_or_none("model", lambda: task(rank))
        except v.CannotRun as error:
            problems[rank] = str(error)

    threads = [threading.Thread(target=all_or_none, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == [f"rank {broken}: {text}"] * 2


def rank_result(rank, eager, found=(), alone=(), together=()):
    """alone, together: timings."""
    place = 0, f"npu:{rank}", "Ascend910B4", f"eeee-0{rank}" if rank else ""
    return v.RankResult(rank, place, np.asarray(eager, np.float32), 1e-6, list(found), list(alone), list(together))


def timed(rate, spread=0.0, batches=8):
    """A row with batch size 4. spread: iqr over median."""
    usual, half = 4000 / rate, 4000 / rate * spread / 2
    return v.Timing(v.FLOAT32, 4, total_ms=(usual - half, usual + half) * (batches // 2), launch_ms=(1.0,) * batches)


CORRECT, ROUNDED, INCORRECT = np.ones((2, 8)), np.ones((2, 8)) * (1 + 1e-6), np.ones((2, 8)) * 1.1
ONE_ROW = np.vstack([np.ones((1, 8)), np.ones((1, 8)) * 1.1])


@pytest.mark.parametrize(
    ("outputs", "outcome", "problem"),
    [
        ([CORRECT, CORRECT, CORRECT], PASS, ""),
        ([CORRECT, CORRECT[:1], CORRECT], PASS, ""),  # of a device with less memory
        ([CORRECT, CORRECT, INCORRECT], FAIL, "rank 2 of 3 differs from the others: error 1.0e-01 > limit "),
        ([INCORRECT, CORRECT, CORRECT], FAIL, "rank 0 of 3 differs from the others: "),
        ([CORRECT, ONE_ROW, CORRECT], FAIL, "rank 1 of 3 differs from the others: "),
        ([CORRECT, CORRECT * math.nan, CORRECT], FAIL, "rank 1 of 3 differs from the others: "),
        ([CORRECT * math.nan, CORRECT * math.nan, CORRECT], FAIL, "rank 2 of 3 differs"),
        ([CORRECT, ROUNDED, CORRECT], WARN, "rank 1 of 3 differs from the others: "),
        (
            [CORRECT, ROUNDED, INCORRECT, CORRECT, CORRECT],
            FAIL,
            "rank 1, 2 of 5 differs from the others: error 1.0e-01 > ",
        ),
        ([CORRECT, INCORRECT], FAIL, "rank 1 of 2 differs from the others (no majority: see the precision of each): "),
    ],
)
def test_devices_must_agree_and_one_that_differs_is_named(outputs, outcome, problem):
    results = [rank_result(rank, output) for rank, output in enumerate(outputs)]
    agreement = checks(v.judge_ranks(results, LIMIT))["devices.agreement"]
    assert agreement.mark == outcome and (outcome == PASS or agreement.problem.startswith(problem))


@pytest.mark.parametrize("outcome", [PASS, SKIP, WARN, FAIL])
def test_a_device_has_the_outcome_of_the_worst_of_its_checks(outcome):
    found = [(PASS, "outputs.tokens"), (outcome, "outputs.embedding"), (PASS, "outputs.logits")]
    entries = checks(v.judge_ranks([rank_result(0, CORRECT), rank_result(1, CORRECT, found)], LIMIT))
    first, second = entries["devices.0"], entries["devices.1"]
    assert (first.mark, second.mark) == (PASS, PASS if outcome == SKIP else outcome)
    assert outcome in (PASS, SKIP) or second.problem == "not passed: outputs.embedding"
    assert second.advice == "run it by itself for its whole log, on node 0: --device npu:1"
    shown = cells(v.DEVICES, second)
    assert (shown["device"], shown["checks"], shown["err_fp64"]) == ("npu:1", "3", "1.0e-06")
    assert (shown["failed"], shown["warned"]) == (str(int(outcome == FAIL)), str(int(outcome == WARN)))


def test_the_uuids_of_the_devices_are_listed_if_torch_has_them():
    entries = {entry.id: entry.text for entry in v.judge_ranks([rank_result(0, CORRECT), rank_result(1, CORRECT)], LIMIT)}
    assert entries["devices.uuids"] == "rank 1 eeee-01"
    assert "devices.uuids" not in {entry.id for entry in v.judge_ranks([rank_result(0, CORRECT)], LIMIT)}


def test_each_device_has_rows_alone_and_together():
    """Those of rank 0 alone are in stage 5."""
    results = [rank_result(0, CORRECT, (), [timed(100)], [timed(50)]), rank_result(1, CORRECT, (), [timed(200)], [timed(60)])]
    rows = {entry.id: cells(v.THROUGHPUT, entry) for entry in v.judge_speeds(results, new_context()) if entry.mark == VARIES}
    assert {id: row["images/s"] for id, row in rows.items()} == {
        "devices.1.float32.4": "200.00", "devices.together.0.float32.4": "50.00", "devices.together.1.float32.4": "60.00"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rates", "options", "outcome", "problem"),
    [
        ([100, 100, 100], {}, PASS, "no row of at least 5 batches is below the median of the devices by more than 10% and"),
        ([100, 91, 95, 109], {}, PASS, "no row of at least 5 "),
        ([100, 85], {}, WARN, "rank 1: float32.4 85.00 images/s, median 100.00"),
        ([85, 100], {}, WARN, "rank 0: float32.4 85.00 "),
        ([100, 60, 101, 99], {}, WARN, "rank 1: float32.4 60.00 "),
        ([100, 60, 101, 70, 99, 98], {}, WARN, "rank 1: float32.4 60.00 .*; rank 3: float32.4 70.00 "),
        ([100, 160, 101], {}, PASS, "no row of at least 5 "),  # faster is not slower
        ([100, 85, 100], {"max_slowdown": 20}, PASS, "no row of at least 5 batches is below the median of the devices by more than 20%"),
        ([100, 85, 100], {"spread": 0.2}, PASS, "no row of at least 5 "),
        ([100, 60, 100], {"spread": 0.2}, WARN, "rank 1: float32.4 60.00 "),
        ([100, 10, 100], {"batches": 4}, PASS, "no row of at least 5 batches is "),
        ([], {}, PASS, "no row "),
    ],
)  # fmt: skip
def test_a_device_that_is_slower_than_the_others_is_named(rates, options, outcome, problem):
    how = {name: value for name, value in options.items() if name != "max_slowdown"}
    results = [rank_result(rank, CORRECT, (), [timed(rate, **how)]) for rank, rate in enumerate(rates)]
    context = new_context("--max-slowdown", options.get("max_slowdown", 10))
    found = checks(v.judge_speeds(results or [rank_result(0, CORRECT)], context))["devices.speed"]
    assert found.mark == outcome and re.match(problem, found.text), found.text


def test_under_torchrun_the_device_is_that_of_the_local_rank(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    ranks = v.Ranks()
    assert [ranks.device_name(name) for name in ("npu", "cpu")] == ["npu:3", "cpu"]
    with pytest.raises(v.CannotRun, match="uses the device of its LOCAL_RANK: --device takes no index"):
        ranks.device_name("npu:1")


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", v.MODES.values(), ids=lambda mode: mode.name)
def test_a_mode_is_the_precision_of_the_forward_pass(mode):
    linear, inputs = torch.nn.Linear(4, 4).to(mode.dtype), torch.ones(2, 4, dtype=mode.dtype)
    with mode.active(CPU):
        assert linear(inputs).dtype == getattr(torch, mode.amp or mode.half or "float32")
    assert linear(inputs).dtype == mode.dtype


def test_modes_that_differ_have_names_that_differ_and_only_a_compiled_mode_has_outputs_of_its_own():
    assert len(v.MODES) == len(set(v.MODES.values())) == 3 * len(v.BASE_MODES)
    assert [mode.name for mode in v.BASE_MODES] == [
        "float32", "hf32", "amp-float16", "amp-bfloat16", "float16", "bfloat16"
    ]  # fmt: skip
    for name, mode in v.MODES.items():
        plain = v.MODES[mode.compiled or mode.base]
        assert mode.name == name and plain in v.BASE_MODES and mode.base == (name if mode.compiled else plain.name)
        assert dataclasses.replace(mode, name=plain.name, base=plain.name, graph=False, compiled="") == plain


def test_float32_is_always_validated_and_each_mode_once():
    context = new_context("--modes", "float16", "float16", "float32")
    assert [mode.name for mode in context.modes] == ["float32", "float16"]


def test_a_mode_that_the_device_does_not_support_is_refused():
    reasons = r"hf32: cpu has no reduced-precision float32; float16\+graph: a CPU has no graphs to capture"
    with pytest.raises(v.CannotRun, match=f"^--modes {reasons}$"):
        new_context("--modes", "float16", "hf32", "float16+graph")


def test_weights_are_restored_after_half_precision_and_after_float64():
    _, loaded = after_model_stage("--model", "test_dinov3")
    before = v.sha256(dict(enumerate(v.tensors_of(loaded.device))))
    with v.in_mode(loaded, v.MODES["bfloat16"]) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert v.sha256(dict(enumerate(v.tensors_of(loaded.device)))) == before
    outputs = v.float64_outputs(loaded.cpu, loaded.inputs, loaded.maps)
    assert {output.dtype for output in outputs.values()} == {np.dtype("float64")}
    assert v.sha256(dict(enumerate(v.tensors_of(loaded.cpu)))) == before
