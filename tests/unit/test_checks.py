"""Each check can fail: a healthy device passes, and every single thing that can be wrong with one is noticed.

The stages run for real, with a device copy of the model in which one thing is altered: see small_run.py.
"""

import contextlib
import dataclasses
import math
import threading
import time
import types

import pytest
from small_run import CPU, after_model_stage, alter, checks, first_call, new_run, not_passed
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

import validate_npu as v
from validate_npu import FAIL, PASS, SKIP, VARIES, WARN

np, torch = v.np, v.torch
NPU = types.SimpleNamespace(type="npu")


def off_by(error):
    """A difference of this size in every row and element."""
    return v.compare(np.ones((2, 8)) * (1 + error), np.ones((2, 8)))


EQUAL, GOOD, BAD, NAN = (off_by(error) for error in (0, 1e-7, 0.1, math.nan))
LIMIT = v.fp32_limit(1e-7, 0.0)


# --- stage 1: device --------------------------------------------------------------------------------------------------


class WrongProducts(torch.overrides.TorchFunctionMode):
    """A device whose matrix products of fp32 are wrong."""

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
        (WrongProducts(lambda x: x * (1 + 1e-5)), PASS),
        (WrongProducts(lambda x: x * 1.01), FAIL),
        (WrongProducts(lambda x: x.roll(1, 0)), FAIL),
        (WrongProducts(one_element_is_nan), FAIL),
    ],
    ids=["healthy", "rounds", "off by 1 %", "rows mixed up", "a NaN"],
)
def test_a_wrong_matrix_product_fails(device, outcome):
    with device:
        found = checks(v.device_stage(new_run()))
    assert found.pop(("computes", "matmul")).mark == outcome
    assert [(name, entry.mark) for (name, *_), entry in found.items()] == [("computes", PASS), ("GELU", PASS)]


HF32, FLOAT16 = v.Arithmetic(11, "half away", "HF32"), v.FLOAT16


def probe_of(convolution=(v.EXACT, EQUAL), matmul=(v.EXACT, EQUAL), gelu_error=0.0):
    forms = {"none": "none", "tanh": "tanh"}
    return v.Probe({"convolution": convolution, "matmul": matmul}, forms, dict.fromkeys(forms, gelu_error))


@pytest.mark.parametrize(
    ("documented", "found", "outcomes"),
    [
        ("float32", (v.EXACT, EQUAL), {"computes": PASS}),
        ("float32", (HF32, EQUAL), {"computes": PASS, "fewer bits": WARN}),
        ("HF32", (HF32, EQUAL), {"computes": PASS}),
        ("HF32", (v.EXACT, EQUAL), {"computes": PASS}),
        ("float16", (FLOAT16, EQUAL), {"computes": PASS}),
        ("float32", (None, off_by(2e-4)), {"computes": WARN}),  # not recognised, which is not called fewer bits
        ("HF32", (None, off_by(2e-4)), {"computes": PASS}),
        ("HF32", (None, off_by(1e-2)), {"computes": FAIL}),
    ],
)
def test_a_large_product_is_as_accurate_as_documented(documented, found, outcomes):
    entries = list(v.judge_probe(probe_of(matmul=found), {"convolution": "HF32", "matmul": documented}, CPU))
    (accurate,) = (entry for entry in entries if v.Table.split(entry.text)[:1] == ["matmul"])
    marks = {entry.name: entry.mark for entry in [accurate, *entries] if entry.mark != PASS or entry is accurate}
    assert marks == outcomes
    assert all("matmul" in entry.problem for entry in entries if entry.name == "fewer bits")


@pytest.mark.parametrize(("error", "outcome"), [(0.0, PASS), (5e-5, PASS), (1e-3, WARN), (math.nan, FAIL)])
def test_a_gelu_of_neither_form_warns_and_one_that_is_not_finite_fails(error, outcome):
    *_, gelu = v.judge_probe(probe_of(gelu_error=error), dict.fromkeys(v.PROBES, "float32"), CPU)
    assert (gelu.name, gelu.mark) == ("GELU", outcome)


def test_a_system_that_does_not_tell_which_cores_are_allowed_runs_too(monkeypatch):
    """macOS, of which there is none here."""
    monkeypatch.delattr("os.sched_getaffinity")
    facts = {entry.name: entry.text for entry in v.device_stage(new_run())}
    assert facts["CPU threads"].endswith(" cores") or "OMP_NUM_THREADS" in facts["CPU threads"]


# --- stage 2: model ---------------------------------------------------------------------------------------------------


class CorruptedOnItsWay(VisionTransformer):
    """A transfer to the device that changes the last bit of one weight, where it is one way."""

    def to(self, *args, **kwargs):
        bits = self.norm.weight.data.view(torch.int32)
        bits[5] ^= 1
        return super().to(*args, **kwargs)


@register_model
def test_corrupted_on_its_way(pretrained=False, **kwargs):
    model = CorruptedOnItsWay(img_size=32, embed_dim=32, depth=1, num_heads=1)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model


test_corrupted_on_its_way.__test__ = False  # a model, not a test


@pytest.mark.parametrize(("model", "outcome"), [("test_vit", PASS), ("test_corrupted_on_its_way", FAIL)])
def test_weights_that_do_not_come_back_as_they_went_fail(model, outcome):
    found = checks(v.model_stage(new_run("--model", model)))
    marks = {name: entry.mark for (name, *_), entry in found.items()}
    assert marks == {"weights on cpu": outcome, "operators": SKIP}
    problem = next(entry.problem for (name, *_), entry in found.items() if name == "weights on cpu")
    assert problem.startswith("they differ, SHA-256 ")


class Unseen(str):
    """A device that computes what it has no kernel for on the CPU, and does not say so."""

    type = "npu"


GRAPH = v.MODES["float32+graph"]
CAUTION = "CAUTION: The operator 'aten::foo.out' is not currently supported on the NPU backend and will fall back to run"


@pytest.mark.parametrize(
    ("disabled", "rank", "names", "said", "outcome", "problem"),
    [
        ("1", "0", set(), "", PASS, ""),
        ("1", "0", set(), CAUTION, WARN, "on the CPU: aten::foo.out"),
        ("1", "0", {"addmm", "logit"}, "", WARN, "logit (its NPU kernel copies to the CPU and back)"),
        ("1", "1", set(), "", SKIP, "tells only its first process"),
        ("0", "0", set(), "", WARN, "is set to 0"),
    ],
)
def test_no_operator_fell_back_only_where_it_would_have_been_seen(
    monkeypatch, disabled, rank, names, said, outcome, problem
):
    """A torch_npu without the variable. That one which knows it passes is in the runs on an emulated NPU."""
    monkeypatch.setenv("TORCH_NPU_FALLBACK_CPU_DISABLE", disabled)
    monkeypatch.setenv("RANK", rank)
    entry = v.cpu_fallback(Unseen("cpu"), names, said)
    assert entry.mark == outcome and problem in entry.problem
    assert v.cpu_fallback(CPU, names, said).mark == SKIP


# --- stage 3: outputs -------------------------------------------------------------------------------------------------

VALUES = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)


def with_value(value):
    values = VALUES.copy()
    values[1, 3] = value
    return values


def test_a_healthy_output_passes():
    entry = v.judge_output("embedding", "2", VALUES, (8,))
    assert entry.mark == PASS and v.Table.split(entry.text)[:3] == ["2", "2x8", "float32"]
    figures = [float(cell) for cell in v.Table.split(entry.text)[3:]]
    assert figures == pytest.approx([VALUES.min(), VALUES.max(), VALUES.mean(), VALUES.std()], abs=1e-4)


@pytest.mark.parametrize(
    ("values", "expected", "problem"),
    [
        (VALUES, (9,), "batch 2: the shape should be 2x9"),
        (VALUES, (8, 1), "batch 2: the shape should be 2x8x1"),
        (VALUES.reshape(2, 2, 4), (3, 4), "batch 2: the shape should be 2x3x4"),
        (VALUES[:, :0].sum(1), (8,), "batch 2: the shape should be 2x8"),
        (with_value(math.nan), (8,), "batch 2: 1 of 16 values are NaN or infinite"),
        (with_value(math.inf), (8,), "batch 2: 1 of 16 values are NaN or infinite"),
        (np.full((2, 8), math.nan, np.float32), (8,), "batch 2: 16 of 16 values are NaN or infinite"),
        (np.vstack([VALUES[0], np.full(8, 0.5)]), (8,), "collapsed"),
        (np.vstack([VALUES[0], VALUES[0] * (1 + 1e-6)]), (8,), "different images give the same output"),
    ],
)
def test_an_output_fails_for_each_thing_that_can_be_wrong(values, expected, problem):
    with np.errstate(invalid="ignore"):
        entry = v.judge_output("embedding", "2", values, expected)
    assert entry.mark == FAIL and problem in entry.problem


def test_each_problem_of_an_output_is_told():
    entry = v.judge_output("embedding", "2", np.full((2, 8), 0.5, np.float32), (9,))
    assert entry.problem == "batch 2: the shape should be 2x9; collapsed: all values of an image are equal"


def test_images_that_differ_as_little_as_an_untrained_cnn_sets_them_apart_pass():
    assert v.judge_output("embedding", "2", np.vstack([VALUES[0], VALUES[0] * 1.002]), (8,)).mark == PASS


@pytest.fixture
def run():
    """test_vit after stage 2, with batches of 1 and 3 images."""
    return after_model_stage()


DOWNSTREAM = {"embedding", "logits", "tokens"}


def test_a_healthy_device_passes_stage_3_and_every_output_of_every_batch_is_judged(run):
    found = checks(v.outputs_stage(run))
    assert {entry.mark for entry in found.values()} == {PASS}
    names = [*DOWNSTREAM, "feature map 1", "feature map 2", "feature map 3"]
    rows = {(name, cell) for name in names for cell in ("1", "3", "row_alone")}
    assert found.keys() == rows | {("repeat", "bit_for_bit")}
    assert run.images.shape == (3, 3, 160, 160) and run.outputs.shape == (3, 1000)


@pytest.mark.parametrize(
    ("module", "names"),
    [
        ("head", {"logits"}),
        ("fc_norm", {"logits", "embedding"}),
        ("norm", DOWNSTREAM),
        ("blocks.5", {*DOWNSTREAM, "feature map 3"}),
        ("blocks.4", {*DOWNSTREAM, "feature map 2", "feature map 3"}),
        ("blocks.3", {*DOWNSTREAM, "feature map 1", "feature map 2", "feature map 3"}),
    ],
)
@pytest.mark.parametrize("row", [1, 2])
def test_every_row_of_every_output_is_compared_with_that_image_alone(run, module, names, row):
    """A device that mixes up one row of a batch of 3."""

    def mix_up(x):
        return torch.cat([x[:row], x[row : row + 1].flip(-1), x[row + 1 :]]) if len(x) == 3 else x

    alter(run, module, mix_up)
    found = checks(v.outputs_stage(run))
    assert {key for key, entry in found.items() if entry.mark != PASS} == {(name, "row_alone") for name in names}
    for name in names:
        assert found[name, "row_alone"].mark == FAIL
        assert found[name, "row_alone"].problem.startswith("row alone, batch 3: off by ")
        assert f" at image {row}" in found[name, "row_alone"].problem


def test_a_nan_in_a_row_fails_and_the_batch_is_named(run):
    alter(run, "fc_norm", lambda x: torch.cat([x[:2], x[2:] * math.nan]))
    found = not_passed(v.outputs_stage(run))
    assert found == {(name, cell): FAIL for name in ("embedding", "logits") for cell in ("3", "row_alone")} | {
        ("repeat", "bit_for_bit"): FAIL
    }


@pytest.mark.parametrize(("factor", "outcome"), [(30, PASS), (120, WARN), (500, FAIL)])
def test_a_row_of_a_batch_warns_at_64_times_the_cpus_error_and_fails_at_256_times(run, factor, outcome):
    alter(run, "head", lambda x: torch.cat([x[:1], x[1:] * (1 + factor * run.references.errors["logits"])]))
    found = checks(v.outputs_stage(run))
    assert found.pop(("logits", "row_alone")).mark == outcome
    assert {entry.mark for entry in found.values()} == {PASS}


def test_the_worst_batch_is_named(run):
    run = after_model_stage("--batch-sizes", "2", "3", "4")
    errors = {2: 2e-3, 3: 5e-3, 4: 3e-3}
    alter(run, "head", lambda x: x * (1 + errors.get(len(x), 0)))
    assert checks(v.outputs_stage(run))["logits", "row_alone"].problem.startswith("row alone, batch 3: off by 5.0e-03")


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda x: x, PASS),
        (lambda x: x * (1 + 1e-6), WARN),
        (lambda x: torch.cat([x[:-1], x[-1:] * (1 + 1e-6)]), WARN),
        (lambda x: x * 1.1, FAIL),
        (lambda x: x * math.nan, FAIL),
    ],
    ids=["the same", "rounding", "rounding of one row", "another", "NaN"],
)
def test_the_same_again_is_to_be_equal_bit_for_bit(run, change, outcome):
    """model(x) comes second, after forward_head(forward_features(x)), which no hook of the whole model sees."""
    alter(run, "", change)
    found = checks(v.outputs_stage(run))
    assert {key: entry.mark for key, entry in found.items() if entry.mark != PASS} == (
        {("repeat", "bit_for_bit"): outcome} if outcome != PASS else {}
    )
    assert found["repeat", "bit_for_bit"].problem.startswith("bit for bit, model(x), batch ")


@pytest.mark.parametrize("name", ["embedding", "logits", "tokens"])
@pytest.mark.parametrize(("factor", "outcome"), [(1 + 1e-6, WARN), (1.1, FAIL), (math.nan, FAIL)])
def test_the_first_call_is_compared_with_a_later_one(run, name, factor, outcome):
    run.first[name] *= np.float32(factor)
    found = checks(v.outputs_stage(run))
    assert {key: entry.mark for key, entry in found.items() if entry.mark != PASS} == {
        ("repeat", "bit_for_bit"): outcome
    }
    assert found["repeat", "bit_for_bit"].problem.startswith(f"bit for bit, first call, {name}: off by")


def test_outputs_that_are_the_same_for_every_image_fail(run):
    alter(run, "norm", lambda x: x * 0)
    first_call(run)
    found = checks(v.outputs_stage(run))
    assert "collapsed: all values of an image are equal" in found["embedding", "1"].problem
    assert "collapsed: all values of an image are equal" in found["tokens", "3"].problem
    assert "different images give the same output" in found["logits", "3"].problem
    assert found["feature map 1", "3"].mark == PASS


def test_outputs_of_another_shape_fail(run):
    alter(run, "head", lambda x: x[:, 1:])
    first_call(run)
    assert not_passed(v.outputs_stage(run)) == {("logits", "1"): FAIL, ("logits", "3"): FAIL}


def test_a_batch_whose_repeat_has_no_memory_left_is_a_warning_and_the_others_are_judged():
    run = after_model_stage("--batch-sizes", "1", "2", "3")

    def no_memory_for_3(module, args):
        if len(args[0]) == 3:
            raise torch.OutOfMemoryError("out of memory")

    run.model.device.register_forward_pre_hook(no_memory_for_3)
    found = list(v.outputs_stage(run))
    assert [(e.name, e.problem) for e in found if e.mark != PASS and e.mark in v.OUTCOMES] == [
        ("batch 3", "out of device memory")
    ]
    assert ("repeat", "bit_for_bit") in checks(found) and len(run.outputs) == 2


@pytest.fixture
def pictures(tmp_path):
    from PIL import Image

    for name, values in zip("ab", np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)):
        Image.fromarray(values).resize((200, 200)).save(tmp_path / f"{name}.png")
    return tmp_path / "a.png", tmp_path / "b.png"


def test_pictures_are_a_batch_of_their_own(pictures):
    run = after_model_stage("--image", *pictures)
    alter(run, "head", lambda x: torch.cat([x[:1], x[1:].flip(-1)]) if len(x) == 2 else x)
    found = checks(v.outputs_stage(run))
    assert {key for key, entry in found.items() if entry.mark != PASS} == {("logits", "row_alone")}
    assert found["logits", "row_alone"].problem.startswith("row alone, batch pictures: off by")
    assert found["tokens", "pictures"].mark == PASS
    assert len(run.outputs) == 3, "the timed outputs are compared with those of the seeded images"


def test_the_same_picture_twice_is_no_collapse(pictures):
    run = after_model_stage("--image", pictures[0], pictures[0])
    assert len(run.pictures) == 1
    assert not not_passed(v.outputs_stage(run))


# --- stage 5: throughput ----------------------------------------------------------------------------------------------

TIMED = v.Timing(v.FLOAT32, 1, host_ms=(1.0, 1.0), total_ms=(2.0, 2.0), difference=EQUAL)


def test_out_of_memory_is_a_row_and_the_other_batch_sizes_are_reported():
    row = v.judge_timing(TIMED, new_run())
    assert row.mark == VARIES and v.Table.split(row.text)[:2] == ["1", "500.00"]
    timing = v.Timing(v.FLOAT32, 8, problem=v.OUT_OF_MEMORY)
    entry = v.judge_timing(timing, new_run())
    assert (entry.mark, entry.problem) == (WARN, "batch 8: out of device memory")
    assert v.judge_timing(timing, new_run("--batch-sizes", "auto")).mark == VARIES, "the search ends there"
    assert [group[0].batch for group in v.by_mode([TIMED, timing])] == [1]


def test_what_cannot_be_captured_is_skipped():
    entry = v.judge_timing(v.Timing(GRAPH, 8, problem="it cannot be captured", outcome=SKIP), new_run())
    assert (entry.mark, entry.name, entry.problem) == (SKIP, "float32+graph", "it cannot be captured")


@pytest.mark.parametrize(
    ("mode", "difference", "outcome"),
    [
        (v.FLOAT32, EQUAL, PASS),
        (v.FLOAT32, GOOD, PASS),
        (v.FLOAT32, BAD, FAIL),
        (v.FLOAT32, NAN, FAIL),
        (v.MODES["amp-float16"], off_by(5e-3), PASS),  # half precision against stage 3's fp32
        (v.MODES["amp-float16"], off_by(5e-2), FAIL),
        (GRAPH, off_by(5e-3), FAIL),  # a graph against the same mode without
        (v.MODES["amp-float16+graph"], off_by(5e-2), FAIL),
        (v.MODES["amp-float16+graph"], NAN, FAIL),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_timed_outputs_are_judged_by_the_limit_of_their_mode(mode, difference, outcome):
    timings = [dataclasses.replace(TIMED, mode=mode, batch=batch, difference=EQUAL) for batch in (1, 4)]
    for i in (0, 1):  # whichever of the batches is wrong
        wrong = [*timings]
        wrong[i] = dataclasses.replace(wrong[i], difference=difference)
        run = new_run()
        run.limits = {"float32": LIMIT, "amp-float16": v.Limit(7e-3, 3e-2)}  # as stage 4 found them
        eager = [dataclasses.replace(TIMED, mode=v.MODES[mode.base], batch=batch, difference=EQUAL) for batch in (1, 4)]
        *_, entry = v.judge_timed_outputs(run, [*(eager if mode.graph else []), *wrong])
        assert (entry.name, entry.mark) == (mode.name, outcome)
        assert f"against {'eager' if mode.graph else 'stage 3'}" in entry.problem
        assert difference is EQUAL or f"batch {wrong[i].batch}: off by" in entry.problem


class Counted:
    """A hook that changes the output of one call of a batch size."""

    def __init__(self, call, change, batch):
        self.call, self.change, self.batch, self.calls = call, change, batch, {}

    def __call__(self, output):
        self.calls[len(output)] = call = self.calls.get(len(output), 0) + 1
        return self.change(output) if (call, len(output)) == (self.call, self.batch) else output


def after_outputs_stage(*arguments):
    run = after_model_stage("--iters", "3", *arguments)
    assert not not_passed(v.outputs_stage(run))
    run.limits = {"float32": run.references.limit()}  # as stage 4 leaves them
    return run


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("call", "outcome"), [(1, PASS), (2, FAIL), (3, FAIL), (4, FAIL)])
@pytest.mark.parametrize("change", [lambda x: x * 1.01, lambda x: torch.cat([x[:-1], x[-1:] * math.nan])])
def test_every_timed_batch_is_compared(batch, call, outcome, change):
    """The first call is not timed; three are."""
    run = after_outputs_stage()
    alter(run, "", Counted(call, change, batch))
    found = checks(v.throughput_stage(run))
    assert {key: entry.mark for key, entry in found.items()} == {("float32", "against_stage_3"): outcome}
    assert outcome == PASS or f"batch {batch}: off by" in found["float32", "against_stage_3"].problem


def test_without_warm_up_no_batch_is_run_but_the_first_and_those_that_are_timed():
    run = after_outputs_stage("--warmup", "0")
    alter(run, "", counted := Counted(0, None, 0))
    entries = [entry for entry in v.throughput_stage(run) if entry.name == "float32" and entry.mark == VARIES]
    rows = [entry for entry in entries if len(v.Table.split(entry.text)) == len(v.THROUGHPUT.columns)]
    assert counted.calls[1] == counted.calls[3] == 1 + 3, "three are too few to time the first row once more"
    assert [v.Table.split(row.text)[-1] for row in rows] == ["3", "3"], "and the log says how many"


def test_a_warm_up_runs_at_least_its_batches():
    run = after_outputs_stage("--batch-sizes", "1", "--warmup", "7")
    alter(run, "", counted := Counted(0, None, 0))
    list(v.throughput_stage(run))
    assert counted.calls[1] >= 1 + 7 + 3


def test_a_stage_3_that_failed_leaves_no_false_alarm_for_stage_5():
    """Of a larger batch nothing is known then, but the first image's outputs."""
    run = after_model_stage("--batch-sizes", "3")
    run.limits = {"float32": run.references.limit()}
    assert len(run.outputs) == 1 < len(run.images)
    assert {entry.mark for entry in checks(v.throughput_stage(run)).values()} == {PASS}


def test_timed_outputs_of_a_mode_without_a_limit_from_stage_4_are_skipped():
    (entry,) = checks(v.judge_timed_outputs(new_run(), [TIMED])).values()
    assert (entry.mark, entry.problem) == (SKIP, "stage 4 gives no limit for it")


# --- several cards ----------------------------------------------------------------------------------------------------


@pytest.fixture
def two_cards():
    """Two cards of one run, in this process, with a store of torch's own. A card waits half a second for the other."""
    store, both = torch.distributed.HashStore(), [v.Cards(), v.Cards()]
    for rank, cards in enumerate(both):
        cards.connect(new_run("--timeout", "1").report, seconds=0.5)
        cards.rank, cards.size, cards.store = rank, 2, store
        cards.report.begin("throughput")
    yield both
    for cards in both:
        cards.report.timer.cancel()  # which would end this process as one that hangs


def test_a_card_that_goes_on_with_a_long_stage_is_waited_for_and_one_that_does_nothing_is_lost(two_cards):
    waiting, working = two_cards

    def work():
        for _ in range(12):
            working.goes_on()
            time.sleep(0.2)
        working.gather("end", "done")

    thread = threading.Thread(target=work)
    thread.start()
    assert waiting.gather("end", "waited") == ["waited", "done"]
    thread.join()
    with pytest.raises(v.CardsLost) as lost:
        waiting.gather("another step")
    assert lost.value.args == ([1],)


def card(rank, outputs, checks=()):
    place = 0, f"npu:{rank}", "Ascend910B4"
    rates = {("float32", 4): 100.0 * (1 + rank)}
    half = {key: rate / 2 for key, rate in rates.items()}
    return v.Card(f"card {rank}", place, np.asarray(outputs, np.float32), 1e-6, list(checks), rates, half)


RIGHT, ROUNDED, WRONG = np.ones((2, 8)), np.ones((2, 8)) * (1 + 1e-6), np.ones((2, 8)) * 1.1
ONE_ROW = np.vstack([np.ones((1, 8)), np.ones((1, 8)) * 1.1])


@pytest.mark.parametrize(
    ("outputs", "outcome", "problem"),
    [
        ([RIGHT, RIGHT, RIGHT], PASS, ""),
        ([RIGHT, RIGHT[:1], RIGHT], PASS, ""),  # of a card with less memory
        ([RIGHT, RIGHT, WRONG], FAIL, "card 2 of 3 differ from the others by 1.0e-01"),
        ([WRONG, RIGHT, RIGHT], FAIL, "card 0 of 3 differ"),
        ([RIGHT, ONE_ROW, RIGHT], FAIL, "card 1 of 3 differ"),
        ([RIGHT, RIGHT * math.nan, RIGHT], FAIL, "card 1 of 3 differ"),
        ([RIGHT * math.nan, RIGHT * math.nan, RIGHT], FAIL, ""),
        ([RIGHT, ROUNDED, RIGHT], WARN, "card 1 of 3 differ"),
        ([RIGHT, ROUNDED, WRONG, RIGHT, RIGHT], FAIL, "card 1, card 2 of 5 differ from the others by 1.0e-01"),
        ([RIGHT, WRONG], FAIL, "it is not known which are right"),
    ],
)
def test_cards_are_to_agree_and_the_one_that_does_not_is_named(outputs, outcome, problem):
    cards = [card(rank, output) for rank, output in enumerate(outputs)]
    agreement = v.judge_agreement(cards, LIMIT)
    assert agreement.mark == outcome and problem in agreement.problem
    assert agreement in v.judge_cards(cards, LIMIT), "the whole stage says so, too"


@pytest.mark.parametrize("outcome", [PASS, SKIP, WARN, FAIL])
def test_a_card_is_as_good_as_the_worst_of_its_checks(outcome):
    cards = [card(0, RIGHT), card(1, RIGHT, [(PASS, "tokens"), (outcome, "embedding"), (PASS, "logits")])]
    first, second = (
        entry for entry in v.judge_cards(cards, LIMIT) if entry.name in ("card 0", "card 1") and entry.mark != VARIES
    )
    assert (first.mark, second.mark) == (PASS, PASS if outcome == SKIP else outcome)
    assert outcome in (PASS, SKIP) or second.problem == "not passed: embedding"
    cells = dict(zip(v.Table.split(v.CARDS.header("").text), v.Table.split(second.text), strict=True))
    assert (cells["device"], cells["checks"], cells["embedding_row"]) == ("npu:1", "3", "1.0e-06")
    assert (cells["failed"], cells["warned"]) == (str(int(outcome == FAIL)), str(int(outcome == WARN)))


def test_what_cards_cost_each_other_is_a_row_for_each_and_one_for_all():
    entries = [e for e in v.judge_cards([card(0, RIGHT), card(1, RIGHT)], LIMIT) if e.mark == VARIES]
    assert [(e.name, *v.Table.split(e.text)) for e in entries] == [
        ("card 0", "float32", "4", "100.00", "50.00", "0.50"),
        ("card 1", "float32", "4", "200.00", "100.00", "0.50"),
        ("total", "float32", "4", "300.00", "150.00", "0.50"),
    ]


def test_under_torchrun_the_device_is_that_of_the_local_rank(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.setenv(name, "3")
    cards = v.Cards()
    assert [cards.device_name(name) for name in ("npu", "cpu")] == ["npu:3", "cpu"]
    with pytest.raises(v.CannotRun, match="takes the card of its LOCAL_RANK: --device npu, without an index"):
        cards.device_name("npu:1")


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", v.MODES.values(), ids=lambda mode: mode.name)
def test_a_mode_is_what_the_forward_pass_computes_in(mode):
    linear, inputs = torch.nn.Linear(4, 4).to(mode.dtype), torch.ones(2, 4, dtype=mode.dtype)
    with mode.active(CPU):
        assert linear(inputs).dtype == getattr(torch, mode.amp or mode.half or "float32")
    assert linear(inputs).dtype == mode.dtype


def test_modes_that_differ_have_names_that_differ_and_a_graph_the_outputs_of_its_base():
    assert len(v.MODES) == len(set(v.MODES.values())) == 2 * len(v.BASES)
    for name, mode in v.MODES.items():
        base = v.MODES[mode.base]
        assert mode.name == name and not base.graph and base in v.BASES
        assert dataclasses.replace(mode, name=base.name, graph=False) == base


def test_weights_come_back_from_half_precision_as_they_were():
    run = after_model_stage("--model", "test_dinov3")
    before = v.sha256(dict(enumerate(v.tensors_of(run.model.device))))
    with run.in_mode(v.MODES["half-bfloat16"]) as model:
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert v.sha256(dict(enumerate(v.tensors_of(run.model.device)))) == before
    with v.widened(run.model.cpu) as model:
        assert {tensor.dtype for tensor in v.tensors_of(model)} == {torch.float64}
    assert v.sha256(dict(enumerate(v.tensors_of(run.model.cpu)))) == before
