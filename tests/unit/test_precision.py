"""Stage 4: is float32 right, and does it cost what it should? A wrong module is named, and nothing is left altered."""

import copy
import math
import types

import pytest
from small_run import CPU, after_model_stage, alter, checks, first_call, not_passed

import validate_npu as v
from validate_npu import FAIL, PASS, SKIP, WARN

np, torch = v.np, v.torch


def off_by(error):
    """A difference of this size in every row and element."""
    return v.compare(np.ones((2, 8)) * (1 + error), np.ones((2, 8)))


@pytest.fixture
def run():
    """test_vit after stage 2."""
    return after_model_stage()


# --- the whole stage --------------------------------------------------------------------------------------------------


def test_a_healthy_device_passes_stage_4(run):
    found = checks(v.precision_stage(run))
    assert {entry.mark for entry in found.values()} == {PASS}
    assert {"embedding", "logits", "tokens", "feature map 1", "feature map 3", "Linear", "control"} <= {
        k[0] for k in found
    }
    assert run.errors["float32"] < 1e-5


def test_a_wrong_weight_is_found_in_the_outputs_and_where_it_is(run):
    with torch.no_grad():
        run.model.device.blocks[5].mlp.fc2.weight[3, 4] += 5
    found = checks(v.precision_stage(run))
    failed = {name for (name, *_), entry in found.items() if entry.mark == FAIL}
    assert failed == {"embedding", "logits", "tokens", "feature map 3", "Linear", "Mlp", "Block"}
    linear = next(entry for (name, *_), entry in found.items() if name == "Linear")
    assert v.Table.split(linear.text)[-1] == "blocks.5.mlp.fc2"
    assert linear.advice.startswith("an operator of Linear is wrong: run blocks.5.mlp.fc2 alone on both;")
    assert all("it begins in blocks.5.mlp.fc2" in found[name, "float32"].advice for name in ("embedding", "tokens"))


@pytest.mark.parametrize("module", ["norm", "head"])
def test_nan_never_passes(run, module):
    alter(run, module, lambda x: torch.cat([x[:-1], x[-1:] * math.nan]))
    found = not_passed(v.precision_stage(run))
    kind = type(run.model.cpu.get_submodule(module)).__name__
    assert found["logits", "float32"] == FAIL
    assert {mark for (name, *_), mark in found.items() if name == kind} == {FAIL}
    assert ("tokens" in {name for name, *_ in found}) == (module == "norm")


def lose_digits(model):
    """Tokens so far from zero that fp32 keeps two digits of what the LayerNorm leaves of them."""
    model.patch_embed.proj.bias.data += 1e5


def overflow_in_float16(model):
    model.norm.weight.data.mul_(1e5)


def both_changed(change, *arguments):
    """A run whose model is changed alike on the CPU and on the device."""
    run = after_model_stage(*arguments)
    run.model = v.Twin(copy.deepcopy(run.model.cpu), run.model.device)
    for model in run.model:
        change(model)
    run.references = v.reference_outputs(run, v.precision_images(run))
    return run


@pytest.mark.parametrize(
    ("alike", "mode", "outcome", "problem"),
    [
        (lambda model: None, "float32", PASS, ""),
        (lose_digits, "float32", WARN, "not judged: the CPU's own fp32 is as far off"),
        (overflow_in_float16, "amp-float16", WARN, "not judged: it overflows in float16 on the CPU"),
    ],
    ids=["judged", "explodes", "overflows in float16"],
)
def test_what_cannot_be_judged_is_said_and_counted(alike, mode, outcome, problem):
    run = both_changed(alike, "--modes", "amp-float16")
    found = checks(v.precision_stage(run))
    entry = found["logits", mode]
    assert entry.mark == outcome and (not problem or problem in entry.problem), entry
    assert (run.report.unjudged > 0) == (outcome == WARN)


@pytest.mark.parametrize("found", [1.0, math.nan, math.inf])
def test_an_output_is_not_judged_where_the_float16_of_the_chips_products_overflows_on_the_cpu_as_well(run, found):
    """As on a 310P: the expected cost is infinite."""
    output, limit = run.references.expected["logits"] * found, v.fp32_limit(1e-7, math.inf)
    entry = v.judge_error(run, "float32", "logits", output, (math.inf, 1e-7, limit), [])
    assert (entry.mark, entry.problem) == (WARN, "not judged: it overflows in float16 on the CPU as well")


def test_an_output_is_not_judged_where_the_expected_cost_is_a_tenth_of_it(run):
    output, limit = run.references.expected["logits"] * 1.1, v.fp32_limit(1e-7, 0.2)
    entry = v.judge_error(run, "float32", "logits", output, (0.2, 1e-7, limit), [])
    assert (entry.mark, entry.problem) == (WARN, "not judged: rounding costs 2.0e-01") and run.report.unjudged == 1


def test_timed_outputs_are_not_judged_either_where_the_mode_overflows():
    """A limit without bounds would let them all pass."""
    run = both_changed(overflow_in_float16, "--modes", "amp-float16")
    for stage in (v.outputs_stage, v.precision_stage):
        list(stage(run))
    found = list(checks(v.throughput_stage(run)).values())
    assert [(entry.name, entry.mark) for entry in found] == [("float32", PASS), ("amp-float16", SKIP)]
    assert found[1].problem == "not judged: on the CPU it overflows as well"


def test_nan_of_the_device_alone_fails_even_where_nothing_else_can_be_judged():
    run = both_changed(lose_digits)
    alter(run, "norm", lambda x: torch.cat([x[:-1], x[-1:] * math.nan]))
    assert not_passed(v.precision_stage(run))["logits", "float32"] == FAIL


GOOD_MODULE, BAD_MODULE = (v.Module("blocks.0", "Block", False, v.MODULE, off_by(error)) for error in (0.0, 0.1))


@pytest.mark.parametrize(
    ("error", "cost", "modules", "outcome"),
    [
        (5e-5, 0.0, [GOOD_MODULE], PASS),  # the limits are 6.4e-5 and 2.56e-4
        (1e-4, 0.0, [GOOD_MODULE], WARN),
        (1e-4, 0.0, [BAD_MODULE], WARN),
        (5e-3, 0.0, [GOOD_MODULE], WARN),  # published figures reach that, and not all are explained
        (5e-3, 0.0, [BAD_MODULE], FAIL),
        (5e-3, 0.0, [GOOD_MODULE, BAD_MODULE], FAIL),
        (2e-2, 0.0, [GOOD_MODULE], FAIL),
        (1.5e-3, 1e-3, [BAD_MODULE], PASS),  # the limits are 2.06e-3 and 4.26e-3
        (3e-3, 1e-3, [BAD_MODULE], WARN),
        (5e-3, 1e-3, [BAD_MODULE], FAIL),
        (math.nan, 1e-3, [GOOD_MODULE], FAIL),
    ],
)
def test_an_output_is_judged_by_cost_and_error_and_fails_not_below_one_percent_while_no_module_does(
    run, error, cost, modules, outcome
):
    output = run.references.expected["tokens"] * (1 + error)
    entry = v.judge_error(run, "float32", "tokens", output, (cost, 1e-6, v.fp32_limit(1e-6, cost)), modules)
    assert entry.mark == outcome
    assert ("it begins in blocks.0" in entry.advice) == (BAD_MODULE in modules)


def test_an_excess_outside_the_modules_is_a_warning_up_to_one_percent():
    """The model's own code, which is in no module, may amplify."""
    for factor, outcome in ((1 + 1e-3, WARN), (1.5, FAIL)):
        case = after_model_stage()
        original = case.model.device._pos_embed
        case.model.device._pos_embed = lambda x, f=factor: original(x) * f
        found = checks(v.precision_stage(case))
        assert found["embedding", "float32"].mark == outcome
        assert "amplified by the model, or outside the modules" in found["embedding", "float32"].advice
        assert {found[key].mark for key in found if key[0] in ("Linear", "Block", "LayerNorm")} == {PASS}


def test_a_device_with_another_form_of_gelu_passes_and_the_log_says_what_it_costs(run):
    run.probe = v.Probe({}, {"none": "tanh", "tanh": "tanh"}, {"none": 0.0, "tanh": 0.0})
    run.references = v.reference_outputs(run, v.precision_images(run))
    for module in run.model.device.modules():
        if isinstance(module, torch.nn.GELU):
            module.approximate = "tanh"
    run.first = v.forward_outputs(run.model.device, run.images[:1], run.maps)
    entries = list(v.precision_stage(run))
    assert not not_passed(entries)
    (cost,) = (entry.text for entry in entries if entry.name == "cost")
    assert cost.startswith("embedding, worst row: GELU moves it by ")


def test_a_device_that_is_wrong_only_for_a_single_image_fails():
    """No batch of --batch-sizes 1 is compared with another one."""
    run = after_model_stage("--batch-sizes", "1")
    for module in ("norm", "head"):
        alter(run, module, lambda x: 1.5 * x if len(x) == 1 else x)
    first_call(run)
    assert not not_passed(v.outputs_stage(run)), "it does the same each time"
    names = {(name, "float32_alone"): FAIL for name in ("embedding", "logits", "tokens")}
    assert not_passed(v.precision_stage(run)) == names


def test_the_pooling_is_compared_too_although_it_is_in_no_module(run):
    original = run.model.device.forward_head
    run.model.device.forward_head = lambda x, pre_logits=False: 1.009 * original(x, pre_logits=pre_logits)
    found = checks(v.precision_stage(run))
    assert found["VisionTransformer", "worst_of_1"].mark == FAIL
    assert found["embedding", "float32"].mark == FAIL and "begins in forward_head" in found["embedding", "float32"].advice


# --- strict float32, and float32 as users run it ----------------------------------------------------------------------

TF32 = v.DOCUMENTED["TF32"]


class Accelerator:
    """test_vit on a device whose convolution rounds its operands to TF32 while `conv.allow` is True, as it is at first.

    spoil(output, allowed) is what the kernel returns; honest: whether it heeds the switch.
    """

    def __init__(self, monkeypatch, *arguments, spoil=lambda output, allowed: output, honest=True):
        after_model_stage(*arguments)  # which is kept for all tests: made while there are no switches
        self.conv, self.matmul = types.SimpleNamespace(allow=True), types.SimpleNamespace(allow=False)
        switches = {"convolution": (self.conv, "allow"), "matmul": (self.matmul, "allow")}
        monkeypatch.setattr(v, "reduced_fp32_switches", lambda device: switches)
        self.run = run = after_model_stage(*arguments)
        assert run.documented == {"convolution": "TF32", "matmul": "float32"}
        run.references = v.reference_outputs(run, v.precision_images(run))

        def kernel(module, inputs, output):
            rounding = TF32 if self.conv.allow or not honest else v.EXACT
            inputs = rounding.round(inputs[0]), rounding.round(module.weight), module.bias
            return spoil(torch.nn.functional.conv2d(*inputs, module.stride), self.conv.allow)

        run.model.device.patch_embed.proj.register_forward_hook(kernel)
        first_call(run)

    @property
    def switches(self):
        return self.conv.allow, self.matmul.allow

    def strict(self):
        images = v.precision_images(self.run)
        return v.run_strict(self.run, images, v.forward_outputs(self.run.model.device, images, self.run.maps))


def first_cells(found, cell):
    """name -> outcome of the rows with this first cell."""
    return {name: entry.mark for (name, *cells), entry in found.items() if cells == [cell]}


def test_a_healthy_device_with_reduced_precision_passes_both_questions(monkeypatch):
    device = Accelerator(monkeypatch)
    found = checks(v.precision_stage(device.run))
    assert {entry.mark for entry in found.values()} == {PASS}
    outputs = {"embedding", "logits", "tokens", *(f"feature map {i}" for i in (1, 2, 3))}
    assert first_cells(found, "float32_strict").keys() == first_cells(found, "float32").keys() == outputs
    assert first_cells(found, "float32_of_1").keys() == {"Conv2d"}, "only modules with a product of a reduced kind"
    assert device.switches == (True, False)


def test_the_strict_rows_have_no_cost_and_the_rows_as_run_have(monkeypatch):
    entries = checks(v.precision_stage(Accelerator(monkeypatch).run))
    columns = v.Table.split(v.ERRORS.header("").text)
    strict, as_run = (dict(zip(columns, v.Table.split(entries["tokens", what].text))) for what in ("float32_strict", "float32"))
    assert float(strict["cost"]) == 0 and float(strict["row"]) < 2e-6 < float(strict["warn"]) < 1e-4
    assert 1e-5 < float(as_run["row"]) < 1.3 * float(as_run["cost"]) < float(as_run["warn"])


def test_a_fault_of_the_reduced_precision_kernels_only_fails_in_the_module_that_is_run_a_second_time(monkeypatch):
    device = Accelerator(monkeypatch, spoil=lambda output, allowed: output * (1.01 if allowed else 1))
    found = checks(v.precision_stage(device.run))
    assert set(first_cells(found, "float32_strict").values()) == {PASS}
    assert first_cells(found, "worst_of_1")["Conv2d"] == PASS and found["Conv2d", "float32_of_1"].mark == FAIL
    assert found["feature map 1", "float32"].mark == FAIL
    assert "it begins in patch_embed.proj" in found["feature map 1", "float32"].advice


def test_a_fault_of_the_strict_kernels_only_fails_in_the_strict_rows(monkeypatch):
    device = Accelerator(monkeypatch, spoil=lambda output, allowed: output * (1 if allowed else 1.01))
    found = checks(v.precision_stage(device.run))
    assert set(first_cells(found, "float32_strict").values()) == {FAIL}
    assert first_cells(found, "worst_of_1")["Conv2d"] == FAIL and found["Conv2d", "float32_of_1"].mark == PASS
    assert set(first_cells(found, "float32").values()) == {PASS}


def refuse(output, allowed):
    if not allowed:
        raise RuntimeError("float32 kept as it is is not supported")
    return output


def test_a_strict_pass_that_raises_is_a_skip_and_modules_are_judged_with_the_limits_of_the_reduced_precision(monkeypatch):
    device = Accelerator(monkeypatch, spoil=refuse)
    strict = device.strict()
    assert (strict.outputs, strict.limit, strict.again) == (None, v.MODULE_REDUCED, {})
    assert device.switches == (True, False), "the switches are restored"
    entries = list(v.precision_stage(device.run))
    found = checks(entries)
    assert {entry.mark for entry in found.values()} == {PASS, SKIP} and not first_cells(found, "float32_strict")
    (skip,) = (entry for entry in entries if entry.mark == SKIP)
    assert skip.name == "float32 strict"
    assert skip.problem == "TF32 cannot be switched off: RuntimeError: float32 kept as it is is not supported"


def test_a_strict_pass_that_ends_the_device_ends_the_stage(monkeypatch):
    device = Accelerator(monkeypatch, spoil=refuse)
    monkeypatch.setattr(v, "still_computes", lambda device: False)
    with pytest.raises(RuntimeError, match="not supported"):
        device.strict()
    assert device.switches == (True, False)


def test_switches_that_change_nothing_are_named_with_the_precision(monkeypatch):
    device = Accelerator(monkeypatch, honest=False)
    strict = device.strict()
    assert strict.reason == "the switches change nothing: float32 is TF32 with each setting"
    assert (strict.outputs, strict.limit) == (None, v.MODULE_REDUCED)
    assert not not_passed(v.precision_stage(device.run))


def test_a_device_that_computes_float32_in_full_with_each_setting_is_judged_strictly(monkeypatch):
    device = Accelerator(monkeypatch)
    device.conv.allow = False
    device.run.documented = {"convolution": "TF32", "matmul": "float32"}
    assert not device.strict().reason
    entries = list(v.precision_stage(device.run))
    assert not not_passed(entries) and set(first_cells(checks(entries), "float32_strict").values()) == {PASS}
    assert [entry.text for entry in entries if entry.name == "switches"] == [
        "outputs are equal bit for bit with each setting: float32 in full"
    ]


def test_switches_that_change_nothing_excuse_no_error_beyond_the_documented_precision(monkeypatch):
    device = Accelerator(monkeypatch, honest=False, spoil=lambda output, allowed: output * 1.01)
    assert not device.strict().reason
    assert FAIL in first_cells(checks(v.precision_stage(device.run)), "float32_strict").values()


def test_a_device_without_float32_products_has_no_strict_pass_and_modules_are_compared_in_its_precision(run):
    """A 310P or 910A."""
    run.documented = dict.fromkeys(v.PROBES, "float16")
    strict = v.run_strict(run, run.images, {})
    assert (strict.outputs, strict.reason) == (None, "cpu has no float32 products")
    assert strict.rounding == dict.fromkeys(v.PROBES, v.DOCUMENTED["float16"]) and strict.limit == v.MODULE_REDUCED


def test_a_device_that_reduces_nothing_is_strict_as_it_is(run):
    assert v.run_strict(run, run.images, {}) == v.Strict() and v.Strict().limit == v.MODULE
    assert not first_cells(checks(v.precision_stage(run)), "float32_strict")


def test_products_in_fewer_bits_than_documented_are_compared_with_what_10_bits_cost(monkeypatch):
    """As HF32 in matrix products that nobody asked for: the strict rows exceed their limits, the modules do not."""
    device = Accelerator(monkeypatch, spoil=lambda output, allowed: TF32.round(output))
    entries = list(v.precision_stage(device.run))
    marks = first_cells(checks(entries), "float32_strict")
    assert WARN in marks.values() and FAIL not in marks.values()
    (fact,) = (entry.text for entry in entries if entry.name == "fewer bits")
    assert fact.startswith("rounding the operands of all products to 10 bits would move logits by ")


def test_hf32_costs_what_rounding_all_products_does_and_its_modules_run_a_second_time_too(monkeypatch):
    device = Accelerator(monkeypatch, "--modes", "hf32")
    found = checks(v.precision_stage(device.run))
    assert {entry.mark for entry in found.values()} == {PASS}
    kinds = {name for name, *cells in found if cells and cells[0].startswith("hf32_of_")}
    assert kinds == {"Conv2d", "Linear"}
    columns = v.Table.split(v.ERRORS.header("").text)
    costs = [float(dict(zip(columns, v.Table.split(found["logits", mode].text)))["cost"]) for mode in ("float32", "hf32")]
    assert 0 < 1.2 * costs[0] < costs[1] and device.switches == (True, False)


@pytest.mark.parametrize("allowed", [{"convolution": False}, {"convolution": False, "matmul": True}, {}])
def test_the_switches_are_restored_after_an_exception(monkeypatch, allowed):
    device = Accelerator(monkeypatch)
    before = device.switches
    with pytest.raises(KeyError), v.allow_reduced_fp32(CPU, allowed):
        assert device.switches == (allowed.get("convolution", True), allowed.get("matmul", False))
        raise KeyError
    assert device.switches == before


# --- modules ----------------------------------------------------------------------------------------------------------


def test_every_module_that_computes_is_compared(run):
    """With one that calls none of its parts' forward passes: RoPE."""
    passive = (torch.nn.Identity, torch.nn.Dropout, torch.nn.ModuleList, torch.nn.Sequential, torch.nn.Flatten)
    for each in (run, after_model_stage("--model", "test_dinov3")):
        names = [name for name, m in each.model.cpu.named_modules() if name and not isinstance(m, passive)]
        found = v.compare_modules(each, each.images[:1], v.Strict())
        assert sorted(module.name for module in found) == sorted([*names, "forward_head"])
        assert all(module.outcome == PASS and module.difference.size == 0 for module in found)


def test_a_module_is_compared_on_the_cpus_own_inputs(run):
    """So of all that comes behind a wrong one, only what contains it is off."""
    alter(run, "blocks.2.attn.qkv", lambda x: x * 1.01)
    found = v.compare_modules(run, run.images[:2], v.Strict())
    off = [module.name for module in found if module.difference.size]
    assert off == ["blocks.2.attn.qkv", "blocks.2.attn", "blocks.2"]


def test_no_row_of_a_module_is_left_out(run):
    alter(run, "blocks.0.norm1", lambda x: torch.cat([x[:1], x[1:] * 1.01]))
    (found,) = v.compare_modules(run, run.images[:2], v.Strict(), only="blocks.0.norm1")
    assert found.difference.row == pytest.approx(0.01, rel=1e-3) and found.difference.row_index[0] == 1


def module(error, name="blocks.0.mlp.fc1", single=True, limit=v.MODULE, kind="Linear", mode=""):
    return v.Module(name, kind, single, limit, off_by(error), mode)


@pytest.mark.parametrize(
    ("limit", "error", "outcome"),
    [
        (v.MODULE, 1e-6, PASS),
        (v.MODULE, 2e-4, WARN),
        (v.MODULE, 1e-2, FAIL),
        (v.MODULE, math.nan, FAIL),
        (v.MODULE_REDUCED, 4e-4, PASS),  # healthy devices reach that
        (v.MODULE_REDUCED, 3e-3, WARN),
        (v.MODULE_REDUCED, 1e-2, FAIL),
    ],
)
def test_a_module_warns_before_it_fails(limit, error, outcome):
    (entry,) = checks(v.judge_modules([module(error, limit=limit)])).values()
    assert entry.mark == outcome


def test_modules_that_ran_in_reduced_precision_have_a_row_for_each_mode():
    modules = [module(1e-6), *(module(4e-4, limit=v.MODULE_REDUCED, mode=mode) for mode in ("float32", "hf32"))]
    assert list(checks(v.judge_modules(modules))) == [
        ("Linear", "worst_of_1"), ("Linear", "float32_of_1"), ("Linear", "hf32_of_1")
    ]  # fmt: skip


def test_the_worst_and_the_first_module_out_of_limits_are_named():
    modules = [module(0, "a"), module(3e-4, "b"), module(2e-2, "c"), module(2e-2, "d", False, kind="Block")]
    linear, block = checks(v.judge_modules(modules)).values()
    assert linear.mark == FAIL and v.Table.split(linear.text)[-1] == "c"
    assert linear.problem.startswith("worst of 3, c: off by 2.0e-02 at image 0")
    assert linear.advice.startswith("an operator of Linear is wrong: run c alone on both")
    assert block.advice.startswith("first out of limits: b;"), "what contains it is not accused"


def test_no_operator_is_accused_where_several_kinds_are_out():
    modules = [module(2e-2, "a"), module(2e-2, "b", kind="LayerNorm")]
    assert all(
        entry.advice.startswith("first out of limits: a;") for entry in checks(v.judge_modules(modules)).values()
    )


# --- the control ------------------------------------------------------------------------------------------------------


def test_the_control_alters_a_weight_for_one_comparison_and_puts_it_back(run):
    modules = v.compare_modules(run, run.images[:2], v.Strict())
    (entry,) = v.compare_control(run, run.images[:1], modules, v.Strict())
    assert entry.mark == PASS and "off by 1.0e-02, noticed, as it must be" in entry.text
    assert v.sha256(run.model.cpu.state_dict()) == v.sha256(run.model.device.state_dict())
    assert all(not m.difference.size for m in v.compare_modules(run, run.images[:1], v.Strict())), "nor is a hook left behind"


def test_the_control_is_put_back_after_an_error(run):
    modules = v.compare_modules(run, run.images[:1], v.Strict())

    def fail(output):
        raise RuntimeError("error code is 507015")

    alter(run, "patch_embed.proj", fail)
    with pytest.raises(RuntimeError):
        list(v.compare_control(run, run.images[:1], modules, v.Strict()))
    assert v.sha256(run.model.cpu.state_dict()) == v.sha256(run.model.device.state_dict())


def test_a_control_that_is_not_noticed_fails(run):
    """A device that ignores what is written into its weights."""
    modules = v.compare_modules(run, run.images[:1], v.Strict())
    right = {m.name: m for m in modules}["patch_embed.proj"]
    kept = run.model.device.patch_embed.proj.weight.clone()
    alter(run, "patch_embed.proj", lambda x: run.model.cpu.patch_embed.proj.forward(run.images[:1]))
    (entry,) = v.compare_control(run, run.images[:1], [right], v.Strict())
    assert entry.mark == FAIL and "cannot tell" in entry.advice and "not noticed" in entry.problem
    assert torch.equal(run.model.device.patch_embed.proj.weight, kept)


def test_a_model_without_a_module_to_alter_has_no_control(run):
    assert [entry.mark for entry in v.compare_control(run, run.images[:1], [], v.Strict())] == [SKIP]


# --- what users ask of the result -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "mark", "said"),
    [
        ([[0.9, 0.1, 0.0], [0.50, 0.51, 0.0]], PASS, "2 of 2 pictures agree with the CPU; smallest margin 2.00e-02"),
        ([[0.8, 0.2, 0.0], [0.52, 0.50, 0.0]], PASS, "1 of 2 pictures agree with the CPU"),
        ([[0.1, 0.9, 0.0], [0.50, 0.51, 0.0]], FAIL, "1 of 2 pictures differ from the CPU by margins up to 8.0e-01"),
        ([[math.nan, 0.1, 0.0], [0.50, 0.51, 0.0]], FAIL, "1 of 2 pictures differ"),
    ],
    ids=["the same", "within what is explained", "beyond it", "NaN"],
)
def test_another_answer_fails_where_the_arithmetic_does_not_explain_it(found, mark, said):
    right = np.array([[0.9, 0.1, 0.0], [0.50, 0.52, 0.0]])
    entry = v.judge_answers("top-1", ["a.png", "b.png"], right, np.array(found), explained=0.05)
    assert entry.mark == mark and said in (entry.problem if mark == FAIL else entry.text)
    assert mark == PASS or entry.problem.endswith(": a.png")
    assert ("margins up to inf" in entry.problem) == (not np.isfinite(found).all())


@pytest.mark.parametrize("found", [0.9, math.nan])
def test_answers_are_not_judged_where_the_cpu_overflows_as_well(found):
    entry = v.judge_answers("top-1", ["a.png"], np.eye(1, 3), np.full((1, 3), found), explained=math.inf)
    assert entry.mark == SKIP


def test_a_device_that_mixes_up_the_classes_is_noticed(tmp_path):
    from PIL import Image

    for i in range(9):  # more than one batch of them
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    run = after_model_stage("--image", str(tmp_path))
    assert run.picture_count == 9 and len(run.pictures) == v.PICTURES
    assert [entry.mark for entry in v.precision_stage(run) if entry.name == "top-1"] == [PASS]
    alter(run, "head", lambda x: x.roll(1, dims=-1))
    assert [entry.mark for entry in v.precision_stage(run) if entry.name == "top-1"] == [FAIL]
