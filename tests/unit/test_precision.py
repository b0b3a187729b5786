"""Stage 4: is float32 correct, and does it cost what is expected? An incorrect module is named."""

import copy
import dataclasses
import math
import types

import pytest
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
    not_passed,
    with_references,
)

import validate_npu as v
from validate_npu import FACT, FAIL, PASS, SKIP, WARN

np, torch = v.np, v.torch
OUTPUTS = {"embedding", "logits", "tokens", "feature_map.1", "feature_map.2", "feature_map.3"}


def rows(mode, names=OUTPUTS):
    return {f"precision.{name}.{mode}" for name in names}


def stage_4(context, loaded):
    """The checks by id, and the result."""
    entries, checked = drain(v.precision_stage(context, loaded))
    return checks(entries), checked


@pytest.fixture
def run():
    """test_vit after stage 2."""
    return after_model_stage()


# --- the whole stage --------------------------------------------------------------------------------------------------


def test_a_healthy_device_passes_stage_4(run):
    found, checked = stage_4(*run)
    assert {entry.mark for entry in found.values()} == {PASS}
    assert found.keys() == rows("float32") | {"precision.modules", "precision.control"}
    assert 0 < checked.errors["float32"] < 1e-5 and checked.main == "logits" and not checked.bad_modules
    assert checked.tolerances == {"float32": run[1].references.tolerance("logits")}


def test_an_incorrect_weight_is_found_in_the_outputs_and_in_its_module(run):
    with torch.no_grad():
        run[1].device.blocks[5].mlp.fc2.weight[3, 4] += 5
    found, checked = stage_4(*run)
    failed = {id for id, entry in found.items() if entry.mark == FAIL}
    kinds = {f"precision.module.{kind}" for kind in ("Linear", "Mlp", "Block")}
    assert failed == rows("float32", {"embedding", "logits", "tokens", "feature_map.3"}) | kinds
    shown = cells(v.MODULES, found["precision.module.Linear"])
    assert (shown["worst"], shown["count"]) == ("blocks.5.mlp.fc2", "25")
    assert checked.bad_modules[0].startswith("blocks.5.mlp.fc2 (Linear, ") and "float32" not in checked.errors


@pytest.mark.parametrize("module", ["norm", "head"])
def test_nan_never_passes(run, module):
    context, loaded = run
    alter(loaded, module, lambda x: torch.cat([x[:-1], x[-1:] * math.nan]))
    found = not_passed(drain(v.precision_stage(context, loaded))[0])
    kind = type(loaded.cpu.get_submodule(module)).__name__
    assert found["precision.logits.float32"] == found[f"precision.module.{kind}"] == FAIL
    assert ("precision.tokens.float32" in found) == (module == "norm")


def lose_digits(model):
    """Tokens so far from zero that float32 keeps two digits of what the LayerNorm leaves of them."""
    model.patch_embed.proj.bias.data += 1e5


def overflow_in_float16(model):
    model.norm.weight.data.mul_(1e5)


def both_changed(change, *arguments):
    """A run whose model has the same change on the CPU and on the device."""
    context, loaded = after_model_stage(*arguments)
    loaded = loaded._replace(cpu=copy.deepcopy(loaded.cpu))
    for model in (loaded.cpu, loaded.device):
        change(model)
    return context, first_pass_again(with_references(context, loaded))


@pytest.mark.parametrize(
    ("change", "mode", "outcome", "problem", "advice"),
    [
        (lambda model: None, "float32", PASS, "", ""),
        (lose_digits, "float32", WARN, "not judged: the float32 error of the CPU is ", "use weights for which"),
        (
            overflow_in_float16,
            "amp-float16",
            WARN,
            "not judged: it overflows in float16 on the CPU as well",
            "use bfloat16",
        ),
    ],
    ids=["judged", "loses digits", "overflows in float16"],
)
def test_an_output_that_cannot_be_judged_is_a_warning_and_is_counted(change, mode, outcome, problem, advice):
    entry = stage_4(*both_changed(change, "--modes", "amp-float16"))[0][f"precision.logits.{mode}"]
    assert entry.mark == outcome and entry.unjudged == (outcome == WARN)
    assert outcome == PASS or entry.problem.startswith(problem) and entry.advice.startswith(advice)


def judged(loaded, output, e, cost, bad_modules=True, name="logits"):
    """The row of one output, whose references have these errors."""
    references = loaded.references._replace(errors={name: e}, costs={name: cost})
    least_fail = 0.0 if bad_modules else v.UNEXPLAINED
    unit = v.Unit(cost, e, v.fp32_tolerance(e, cost))
    return v.judge_output(references, least_fail, name, v.FLOAT32, [references.expected[name] * output], unit)


@pytest.mark.parametrize("output", [1.0, math.nan, math.inf])
def test_an_output_is_not_judged_if_the_float16_of_the_products_overflows_on_the_cpu_as_well(run, output):
    """As on a 310P: the expected cost is infinite."""
    entry = judged(run[1], output, 1e-7, math.inf)
    assert (entry.mark, entry.problem) == (WARN, "not judged: it overflows in float16 on the CPU as well")


def test_an_output_is_not_judged_if_the_expected_cost_is_above_a_tenth(run):
    entry = judged(run[1], 1.1, 1e-7, 0.2)
    assert (entry.mark, entry.problem, entry.unjudged) == (WARN, "not judged: the expected cost is 2.0e-01", True)


@pytest.mark.parametrize(
    ("error", "of_healthy", "of_zeros"), [(0.1, PASS, FAIL), (0.29, PASS, FAIL), (0.31, WARN, WARN), (0.8, WARN, WARN)]
)
def test_zeros_never_pass_in_half_precision(monkeypatch, run, error, of_healthy, of_zeros):
    """Also if the error of the CPU, of which limits are a multiple, is large, as that of SAM in bfloat16."""
    context, loaded = run
    references, errors = loaded.references, dict.fromkeys(loaded.references.expected, error)
    monkeypatch.setattr(v, "worst_rows", lambda *_: errors)
    unit = v.mode_units(context, loaded, v.MODES["bfloat16"])["logits"]
    for factor, outcome in ((1 + error, of_healthy), (0, of_zeros)):
        output = [references.expected["logits"] * factor]
        entry = v.judge_output(references, 0.0, "logits", v.MODES["bfloat16"], output, unit)
        assert (entry.mark, entry.unjudged) == (outcome, outcome == WARN)
        assert outcome != WARN or entry.problem == f"not judged: the error of the CPU in this mode is {error:.1e}"


def test_timed_outputs_are_not_judged_by_a_limit_that_zeros_would_pass_either():
    context, loaded = after_model_stage("--iters", "2")
    _, outputs = drain(v.outputs_stage(context, loaded))
    checked = v.Precision("logits", {}, {"float32": v.Tolerance(0.95, 0.9)}, {}, [])
    assert marks(drain(v.throughput_stage(context, outputs, checked))[0]) == {"throughput.outputs.float32": SKIP}


def test_timed_outputs_are_not_judged_either_if_the_mode_overflows():
    """A limit without bounds would let them all pass."""
    context, loaded = both_changed(overflow_in_float16, "--modes", "amp-float16")
    _, outputs = drain(v.outputs_stage(context, loaded))
    _, checked = drain(v.precision_stage(context, loaded))
    found = checks(drain(v.throughput_stage(context, outputs, checked))[0])
    assert {id: entry.mark for id, entry in found.items()} == {
        "throughput.outputs.float32": PASS,
        "throughput.outputs.amp-float16": SKIP,
    }
    assert found["throughput.outputs.amp-float16"].text == "not judged: it overflows on the CPU as well"


def test_nan_of_the_device_fails_even_if_nothing_else_can_be_judged():
    context, loaded = both_changed(lose_digits)
    alter(loaded, "norm", lambda x: torch.cat([x[:-1], x[-1:] * math.nan]))
    assert stage_4(context, loaded)[0]["precision.logits.float32"].mark == FAIL


@pytest.mark.parametrize(
    ("error", "cost", "bad_modules", "outcome", "limit"),
    [
        (5e-5, 0.0, False, PASS, "6.4e-05"),  # the limits are 6.4e-5 and 2.56e-4
        (1e-4, 0.0, False, WARN, "6.4e-05"),
        (1e-4, 0.0, True, WARN, "6.4e-05"),
        (5e-3, 0.0, False, WARN, "6.4e-05"),  # published figures reach that, and not all are explained
        (5e-3, 0.0, True, FAIL, "2.6e-04"),
        (2e-2, 0.0, False, FAIL, "1.0e-02"),
        (1.5e-3, 1e-3, True, PASS, "2.1e-03"),  # the limits are 2.06e-3 and 4.26e-3
        (3e-3, 1e-3, True, WARN, "2.1e-03"),
        (5e-3, 1e-3, True, FAIL, "4.3e-03"),
        (5e-3, 1e-3, False, WARN, "2.1e-03"),
        (math.nan, 1e-3, False, FAIL, "1.0e-02"),
    ],
)
def test_an_output_is_judged_by_cost_and_error_and_below_one_percent_fails_only_if_a_module_does(
    run, error, cost, bad_modules, outcome, limit
):
    entry = judged(run[1], 1 + error, 1e-6, cost, bad_modules, "tokens")
    shown = cells(v.PRECISION, entry)
    assert (entry.mark, shown["limit"], shown["cpu_err"]) == (outcome, limit, "1.0e-06")
    assert shown["expected"] == f"{cost:.1e}" and shown["err_fp64"][:3] == shown["max_row"][:3]


@pytest.mark.parametrize(("factor", "outcome"), [(1 + 1e-3, WARN), (1.5, FAIL)])
def test_an_excess_outside_the_modules_is_a_warning_up_to_one_percent(run, factor, outcome):
    """The model's code between modules may amplify."""
    context, loaded = run
    original = loaded.device._pos_embed
    loaded.device._pos_embed = lambda x: original(x) * factor
    found, checked = stage_4(context, loaded)
    assert found["precision.embedding.float32"].mark == outcome and not checked.bad_modules
    assert found["precision.modules"].mark == PASS and not any("precision.module." in id for id in found)


def test_a_device_with_another_form_of_gelu_passes_and_its_cost_is_printed(run):
    context, loaded = run
    loaded = with_references(context, loaded, probe=v.Probe({}, {"none": "tanh", "tanh": "tanh"}, 0.0))
    for module in loaded.device.modules():
        if isinstance(module, torch.nn.GELU):
            module.approximate = "tanh"
    entries, checked = drain(v.precision_stage(context, first_pass_again(loaded)))
    assert not not_passed(entries) and checked.costs.keys() == {"GELU"}
    (cost,) = (entry for entry in entries if entry.id.startswith("precision.cost."))
    assert (cost.mark, cost.id) == (FACT, "precision.cost.GELU")
    assert cost.text == f"GELU costs logits {checked.costs['GELU']:.1e}{v.AVOIDED['GELU']}"


def test_a_device_that_is_incorrect_only_for_a_single_image_fails():
    """No batch of --batch-sizes 1 is compared with another one."""
    context, loaded = after_model_stage("--batch-sizes", "1")
    for module in ("norm", "head"):
        alter(loaded, module, lambda x: 1.5 * x if len(x) == 1 else x)
    loaded = first_pass_again(loaded)
    assert not not_passed(drain(v.outputs_stage(context, loaded))[0]), "it does the same each time"
    found, _ = stage_4(context, loaded)
    failed = {id: entry for id, entry in found.items() if entry.mark != PASS}
    assert failed.keys() == rows("float32", {"embedding", "logits", "tokens"})
    assert all(entry.problem.startswith("batch size 1: ") for entry in failed.values())


def test_the_pooling_is_compared_too_although_it_is_in_no_module(run):
    context, loaded = run
    original = loaded.device.forward_head
    loaded.device.forward_head = lambda x, pre_logits=False: 1.009 * original(x, pre_logits=pre_logits)
    found, checked = stage_4(context, loaded)
    assert found["precision.module.VisionTransformer"].mark == found["precision.embedding.float32"].mark == FAIL
    assert [name.split()[0] for name in checked.bad_modules] == ["forward_head"]


def test_a_mode_that_the_cpu_cannot_compute_is_skipped_because_it_has_no_reference():
    """As torch's LSTM in float16."""

    def refuse(module, inputs):
        if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.float16:
            raise RuntimeError("not implemented for Half")

    context, loaded = after_model_stage("--modes", "amp-float16", "amp-bfloat16")
    handle = loaded.cpu.get_submodule("head").register_forward_pre_hook(refuse)
    try:
        entries, precision = drain(v.precision_stage(context, loaded))
    finally:
        handle.remove()
    assert not not_passed(entries) and checks(entries)["precision.amp-float16"].mark == SKIP
    assert checks(entries)["precision.amp-float16"].problem == "no reference, the CPU fails: not implemented for Half"
    assert precision.errors.keys() == precision.tolerances.keys() == {"float32", "amp-bfloat16"}


def test_a_mode_that_fails_does_not_end_the_other_modes():
    context, loaded = after_model_stage("--modes", "float16", "bfloat16")

    def refuse(module, args):
        if args[0].dtype == torch.float16:
            raise RuntimeError("aclnnAddmm: error code is 161002")

    loaded.device.patch_embed.proj.register_forward_pre_hook(refuse)
    found, checked = stage_4(context, loaded)
    failed = {id: entry for id, entry in found.items() if entry.mark != PASS}
    assert failed.keys() == {"precision.float16"} and failed["precision.float16"].mark == FAIL
    assert failed["precision.float16"].problem.startswith("aclnnAddmm: error code 161002, the operator does not take")
    assert rows("float32") | rows("bfloat16") <= found.keys() and checked.errors.keys() == {"float32", "bfloat16"}


@pytest.mark.parametrize("mode", ["float16", "amp-float16", "bfloat16", "amp-bfloat16"])
@pytest.mark.parametrize(("times", "outcome"), [(1, PASS), (4.5, WARN), (25, FAIL)])
def test_half_precision_is_judged_by_the_error_of_the_cpu_in_the_same_mode(mode, times, outcome):
    context, loaded = after_model_stage("--modes", mode)
    error = v.mode_units(context, loaded, v.MODES[mode])["logits"].cpu_error
    assert (1e-4 if "bf" not in mode else 1e-3) < error < 0.1
    # The difference is orthogonal to the error that the device has anyway, so that both add up to `times` that.
    other = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * error * math.sqrt(times**2 - 1)
    alter(loaded, "head", lambda x: x + other.to(x.dtype) * x.std() if x.dtype != torch.float32 and len(x) == 5 else x)
    entry = stage_4(context, loaded)[0][f"precision.logits.{mode}"]
    shown = cells(v.PRECISION, entry)
    assert entry.mark == outcome and shown["expected"] == "0.0e+00"
    assert float(shown["limit"]) == pytest.approx(max(6 * error, 1e-2) if outcome == FAIL else 3 * error, rel=0.05)


class EinsumHead(torch.nn.Module):
    """Relative positions of SAM are such a product: of a parameter and, if `mixed`, a tensor in bfloat16."""

    def __init__(self, weight, mixed):
        super().__init__()
        self.weight, self.mixed = weight, mixed

    def forward(self, x):
        x = torch.nn.functional.linear(x, torch.eye(x.shape[1]).to(x)) if self.mixed else x
        return torch.einsum("bc,kc->bk", x, self.weight)


@pytest.mark.parametrize("mixed", [False, True], ids=["two in float32", "one in bfloat16"])
def test_autocast_reaches_an_einsum_in_the_reference_of_half_precision(mixed):
    context, loaded = after_model_stage("--modes", "amp-bfloat16")
    cpu, mode = copy.deepcopy(loaded.cpu), v.MODES["amp-bfloat16"]
    cpu.head = EinsumHead(cpu.head.weight, mixed)
    loaded = with_references(context, loaded, cpu=cpu)
    with mode.active(CPU):
        errors = v.worst_rows(v.forward_outputs(cpu, loaded.references.inputs, loaded.maps), loaded.references.expected)
    units = v.mode_units(context, loaded, mode)
    assert {name: unit.cpu_error for name, unit in units.items()} == errors


# --- float32 in strict mode, and by default ---------------------------------------------------------------------------

TF32 = v.DOCUMENTED["TF32"]


class Accelerator:
    """test_vit on a device whose convolution rounds its operands to TF32 while `conv.allow` is True, as it is at first.

    spoil(output, allowed) is what the kernel returns; honest: whether the switch has an effect.
    """

    def __init__(self, monkeypatch, *arguments, spoil=lambda output, allowed: output, honest=True):
        _, loaded = after_model_stage()  # which is kept for all tests: made while there are no switches
        self.conv, self.matmul = types.SimpleNamespace(allow=True), types.SimpleNamespace(allow=False)
        switches = {"convolution": (self.conv, "allow"), "matmul": (self.matmul, "allow")}
        monkeypatch.setattr(v, "reduced_fp32_switches", lambda device: switches)
        self.context = new_context(*arguments)
        assert self.context.documented == {"convolution": "TF32", "matmul": "float32"}

        def kernel(module, inputs, output):
            rounding = TF32 if self.conv.allow or not honest else v.EXACT
            inputs = rounding.round(inputs[0]), rounding.round(module.weight), module.bias
            return spoil(torch.nn.functional.conv2d(*inputs, module.stride), self.conv.allow)

        loaded.device.patch_embed.proj.register_forward_hook(kernel)
        self.loaded = first_pass_again(with_references(self.context, loaded))

    @property
    def switches(self):
        return self.conv.allow, self.matmul.allow

    def strict(self):
        return v.judge_strictness(self.context, self.loaded, v.run_modes(self.context, self.loaded))

    def stage_4(self):
        return drain(v.precision_stage(self.context, self.loaded))[0]


def of_mode(found, mode):
    """The outcomes of the outputs in this mode."""
    return {entry.mark for id, entry in found.items() if id in rows(mode)}


def test_a_healthy_device_with_reduced_precision_passes_both_comparisons(monkeypatch):
    device = Accelerator(monkeypatch)
    found = checks(device.stage_4())
    assert {entry.mark for entry in found.values()} == {PASS}
    assert found.keys() == rows("strict") | rows("float32") | {
        "precision.modules", "precision.modules.float32", "precision.control"
    }  # fmt: skip
    shown = cells(v.MODULES, found["precision.modules.float32"])
    assert (shown["count"], shown["worst"]) == ("1", "patch_embed.proj"), (
        "only modules with a product of a reduced kind"
    )
    assert device.switches == (True, False)


def test_strict_rows_have_no_expected_cost_and_rows_of_float32_have(monkeypatch):
    found = checks(Accelerator(monkeypatch).stage_4())
    shown = [cells(v.PRECISION, found[f"precision.tokens.{mode}"]) for mode in ("strict", "float32")]
    strict, default = ({name: float(cell.rstrip("%")) for name, cell in row.items()} for row in shown)
    assert strict["expected"] == 0 and strict["max_row"] < 2e-6 < strict["limit"] < 1e-4
    assert 1e-5 < default["max_row"] < 1.3 * default["expected"] < default["limit"]


def test_a_fault_of_the_reduced_precision_kernels_fails_in_the_module_that_runs_again(monkeypatch):
    device = Accelerator(monkeypatch, spoil=lambda output, allowed: output * (1.01 if allowed else 1))
    found = checks(device.stage_4())
    assert of_mode(found, "strict") == {PASS} and found["precision.modules"].mark == PASS
    assert found["precision.module.Conv2d.float32"].mark == found["precision.feature_map.1.float32"].mark == FAIL


def test_a_fault_of_the_strict_kernels_fails_in_the_strict_rows(monkeypatch):
    device = Accelerator(monkeypatch, spoil=lambda output, allowed: output * (1 if allowed else 1.01))
    found = checks(device.stage_4())
    assert of_mode(found, "strict") == {FAIL} and of_mode(found, "float32") == {PASS}
    assert found["precision.module.Conv2d"].mark == FAIL and found["precision.modules.float32"].mark == PASS


def refuse(output, allowed):
    if not allowed:
        raise RuntimeError("float32 in full is not supported")
    return output


def test_a_strict_pass_that_raises_is_a_skip_and_modules_have_the_limits_of_the_reduced_precision(monkeypatch):
    device = Accelerator(monkeypatch, spoil=refuse)
    strict = device.strict()
    assert (strict.tolerance, strict.again) == (v.TOLERANCES["reduced module"], {})
    assert device.switches == (True, False), "the switches are restored"
    found = checks(device.stage_4())
    assert {entry.mark for entry in found.values()} == {PASS, SKIP} and not of_mode(found, "strict")
    assert found["precision.strict"].mark == SKIP
    assert found["precision.strict"].problem == (
        "TF32 cannot be disabled: RuntimeError: float32 in full is not supported"
    )


def test_a_strict_pass_that_ends_the_device_ends_the_stage(monkeypatch):
    device = Accelerator(monkeypatch, spoil=refuse)
    monkeypatch.setattr(v, "still_works", lambda device: False)
    with pytest.raises(RuntimeError, match="not supported"):
        device.strict()
    assert device.switches == (True, False)


def test_switches_that_change_nothing_are_named_with_the_precision(monkeypatch):
    device = Accelerator(monkeypatch, honest=False)
    strict = device.strict()
    assert strict.reason == "the settings change nothing: float32 is computed in TF32 with each of them"
    assert strict.tolerance == v.TOLERANCES["reduced module"]
    found = checks(device.stage_4())
    assert {entry.mark for entry in found.values()} == {PASS, SKIP} and found["precision.strict"].mark == SKIP


def test_switches_that_change_nothing_excuse_no_error_that_rounding_does_not_cause(monkeypatch):
    """Kernels in full float32 with each setting, and an operator that is off by less than the documented cost."""
    device = Accelerator(monkeypatch)
    device.conv.allow = False
    alter(device.loaded, "head", lambda logits: logits * (1 + 1e-4))
    device.loaded = first_pass_again(device.loaded)
    assert device.loaded.references.costs["logits"] > 1e-4
    assert not device.strict().reason
    assert WARN in of_mode(checks(device.stage_4()), "strict")


def test_a_device_that_computes_float32_in_full_with_each_setting_is_judged_strictly(monkeypatch):
    device = Accelerator(monkeypatch)
    device.conv.allow = False
    device.loaded = first_pass_again(device.loaded)
    assert not device.strict().reason
    entries = device.stage_4()
    assert not not_passed(entries) and of_mode(checks(entries), "strict") == {PASS}
    assert [entry.text for entry in entries if entry.id == "precision.switches"] == [
        "outputs are bit-identical with and without reduced-precision float32"
    ]


def test_switches_that_change_nothing_excuse_no_error_beyond_the_documented_precision(monkeypatch):
    device = Accelerator(monkeypatch, honest=False, spoil=lambda output, allowed: output * 1.01)
    assert not device.strict().reason
    assert FAIL in of_mode(checks(device.stage_4()), "strict")


def test_a_device_without_float32_products_has_no_strict_mode_and_modules_are_compared_in_its_precision(run):
    """A 310P or 910A."""
    context = new_context(documented=dict.fromkeys(v.PROBES, "float16"))
    strict = v.judge_strictness(context, run[1], {})
    assert strict.reason == "cpu has no float32 products"
    assert strict.rounding == dict.fromkeys(v.PROBES, v.DOCUMENTED["float16"])
    assert strict.tolerance == v.TOLERANCES["reduced module"]


def test_a_device_that_reduces_nothing_has_no_second_pass(run):
    assert v.judge_strictness(*run, {}) == v.Strict() and v.Strict().tolerance == v.TOLERANCES["module"]
    assert v.run_modes(*run).keys() == {v.FLOAT32}


def test_products_in_fewer_bits_than_documented_are_compared_with_what_10_bits_cost(monkeypatch):
    """As HF32 in matrix products without a setting for it: the strict rows exceed their limits, the modules do not."""
    device = Accelerator(monkeypatch, spoil=lambda output, allowed: TF32.round(output))
    entries = device.stage_4()
    assert of_mode(checks(entries), "strict") >= {WARN} and FAIL not in of_mode(checks(entries), "strict")
    (fact,) = (entry.text for entry in entries if entry.id == "precision.fewer_bits")
    assert (
        fact.startswith("the error of logits in strict mode is ")
        and "; rounding all operands to 10 bits costs " in fact
    )


def test_hf32_costs_what_rounding_all_products_does_and_its_modules_run_again(monkeypatch):
    device = Accelerator(monkeypatch, "--modes", "hf32")
    found = checks(device.stage_4())
    assert {entry.mark for entry in found.values()} == {PASS}
    modules = {id: int(cells(v.MODULES, entry)["count"]) for id, entry in found.items() if "modules" in id}
    assert modules == {"precision.modules": 65, "precision.modules.float32": 1, "precision.modules.hf32": 26}
    costs = [float(cells(v.PRECISION, found[f"precision.logits.{mode}"])["expected"]) for mode in ("float32", "hf32")]
    assert 0 < 1.2 * costs[0] < costs[1] and device.switches == (True, False)


@pytest.mark.parametrize("values", [{"convolution": False}, {"convolution": False, "matmul": True}, {}])
def test_the_switches_are_restored_after_an_exception(monkeypatch, values):
    device = Accelerator(monkeypatch)
    before = device.switches
    with pytest.raises(KeyError), v.set_reduced_fp32(CPU, values):
        assert device.switches == (values.get("convolution", True), values.get("matmul", False))
        raise KeyError
    assert device.switches == before


# --- modules ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["test_vit", "test_dinov3"])
def test_every_module_that_computes_is_compared(model):
    """With one that calls none of its parts' forward passes: RoPE."""
    passive = (torch.nn.Identity, torch.nn.Dropout, torch.nn.ModuleList, torch.nn.Sequential, torch.nn.Flatten)
    context, loaded = after_model_stage("--model", model)
    names = [name for name, m in loaded.cpu.named_modules() if name and not isinstance(m, passive)]
    found = v.compare_modules(context, loaded, v.Strict())
    assert sorted(module.name for module in found) == sorted([*names, "forward_head"])
    assert all(module.mark == PASS and module.found.error == 0 for module in found)


def test_a_module_is_compared_on_the_inputs_of_the_cpu(run):
    """So of all that follows an incorrect one, only the modules that contain it have an error."""
    alter(run[1], "blocks.2.attn.qkv", lambda x: x * 1.01)
    found = v.compare_modules(*run, v.Strict())
    assert [module.name for module in found if module.found.error] == ["blocks.2.attn.qkv", "blocks.2.attn", "blocks.2"]


def test_modules_that_overwrite_their_input_do_not_share_it(run):
    """Else both sides would end with the same values in the same memory."""
    context, loaded = run
    loaded = loaded._replace(cpu=copy.deepcopy(loaded.cpu))
    for model, factor in ((loaded.cpu, 2.0), (loaded.device, 2.02)):
        model.blocks[0].mlp.act.forward = lambda x, factor=factor: x.mul_(factor)
    (found,) = v.compare_modules(context, loaded, v.Strict(), only="blocks.0.mlp.act")
    assert found.found.max_row == pytest.approx(0.01, rel=1e-3)


def test_no_row_of_a_module_is_left_out(run):
    alter(run[1], "blocks.0.norm1", lambda x: torch.cat([x[:1], x[1:] * 1.01]))
    (found,) = v.compare_modules(*run, v.Strict(), only="blocks.0.norm1")
    assert found.found.max_row == pytest.approx(0.01, rel=1e-3) and found.found.row_index[0] == 1


STRICT, REDUCED = v.TOLERANCES["module"], v.TOLERANCES["reduced module"]


def module(error, name="blocks.0.mlp.fc1", tolerance=STRICT, kind="Linear", mode=""):
    return v.Module(name, kind, mode, tolerance, differs_by(error))


@pytest.mark.parametrize(
    ("tolerance", "error", "outcome", "limit"),
    [
        (STRICT, 1e-6, PASS, "1.2e-04"),
        (STRICT, 2e-4, WARN, "1.2e-04"),
        (STRICT, 1e-2, FAIL, "3.9e-03"),
        (STRICT, math.nan, FAIL, "3.9e-03"),
        (REDUCED, 4e-4, PASS, "2.0e-03"),  # healthy devices reach that
        (REDUCED, 3e-3, WARN, "2.0e-03"),
        (REDUCED, 1e-2, FAIL, "3.9e-03"),
    ],
)
def test_a_module_warns_before_it_fails(tolerance, error, outcome, limit):
    (entry,) = checks(v.judge_modules([module(error, tolerance=tolerance)])).values()
    assert (entry.mark, cells(v.MODULES, entry)["limit"]) == (outcome, limit)
    assert entry.id == ("precision.modules" if outcome == PASS else "precision.module.Linear")


def test_modules_that_ran_in_reduced_precision_have_a_row_for_each_mode():
    modules = [module(1e-6), *(module(4e-4, tolerance=REDUCED, mode=mode) for mode in ("float32", "hf32"))]
    modules.append(module(1e-2, "norm", REDUCED, "LayerNorm", "hf32"))
    assert marks(v.judge_modules(modules)) == {
        "precision.modules": PASS,
        "precision.modules.float32": PASS,
        "precision.module.LayerNorm.hf32": FAIL,
        "precision.modules.hf32": PASS,
    }


def test_only_kinds_that_are_out_of_tolerance_have_a_row_and_the_worst_is_named():
    modules = [
        module(0, "a"),
        module(3e-4, "b"),
        module(2e-2, "c"),
        module(2e-2, "d", kind="Block"),
        module(0, "e", kind="Mlp"),
    ]
    found = checks(v.judge_modules(modules))
    assert {id: entry.mark for id, entry in found.items()} == {
        "precision.module.Linear": FAIL,
        "precision.module.Block": FAIL,
        "precision.modules": PASS,
    }
    linear = found["precision.module.Linear"]
    shown = cells(v.MODULES, linear)
    assert (shown["worst"], shown["count"]) == ("c", "3") and linear.problem == "c: error 2.0e-02 > limit 3.9e-03"


# --- the control ------------------------------------------------------------------------------------------------------


def control(context, loaded, modules=None):
    modules = v.compare_modules(context, loaded, v.Strict()) if modules is None else modules
    return v.negative_control(context, loaded, v.Strict(), modules)


def same_weights(loaded):
    return v.sha256(loaded.cpu.state_dict()) == v.sha256(loaded.device.state_dict())


def test_the_control_alters_a_weight_for_one_comparison_and_restores_it(run):
    entry = control(*run)
    assert entry.mark == PASS and entry.text.endswith("scaled by 1.01: an error of 1.0e-02 is detected")
    assert same_weights(run[1])
    assert all(not m.found.error for m in v.compare_modules(*run, v.Strict())), "and no hook is left"


def test_the_control_is_detected_if_the_bias_is_nearly_the_whole_output(run):
    loaded = run[1]._replace(cpu=copy.deepcopy(run[1].cpu))
    for model in loaded.cpu, loaded.device:
        model.patch_embed.proj.bias.data.mul_(1000)
    entry = control(run[0], loaded)
    assert entry.mark == PASS and "patch_embed.proj scaled by" in entry.text


def test_the_weight_of_the_control_is_restored_after_an_error(run):
    modules = v.compare_modules(*run, v.Strict())

    def fail(output):
        raise RuntimeError("error code is 507015")

    alter(run[1], "patch_embed.proj", fail)
    with pytest.raises(RuntimeError):
        control(*run, modules)
    assert same_weights(run[1])


def test_a_control_that_is_not_detected_fails(run):
    """A device that ignores what is written into its weights."""
    context, loaded = run
    (proj,) = (m for m in v.compare_modules(context, loaded, v.Strict()) if m.name == "patch_embed.proj")
    alter(loaded, "patch_embed.proj", lambda x: loaded.cpu.patch_embed.proj.forward(loaded.references.inputs[: len(x)]))
    entry = control(context, loaded, [proj])
    assert (
        entry.mark == FAIL
        and entry.text.endswith("is not detected")
        and "cannot detect an error of 1 %" in entry.advice
    )
    assert same_weights(loaded)


def test_a_model_without_a_module_to_alter_has_no_control(run):
    assert control(*run, []).mark == SKIP


# --- predictions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "mark", "text"),
    [
        (
            [[0.9, 0.1, 0.0], [0.50, 0.51, 0.0]],
            PASS,
            "2 of 2 images agree with the CPU; smallest margin over the second 2.00e-02",
        ),
        ([[0.8, 0.2, 0.0], [0.52, 0.50, 0.0]], PASS, "1 of 2 images agree with the CPU; "),
        (
            [[0.1, 0.9, 0.0], [0.50, 0.51, 0.0]],
            FAIL,
            "1 of 2 images differ from the CPU by margins up to 8.0e-01, above the 5",
        ),
        (
            [[math.nan, 0.1, 0.0], [0.50, 0.51, 0.0]],
            FAIL,
            "1 of 2 images differ from the CPU by margins up to inf, above",
        ),
    ],
    ids=["equal", "within the margin", "beyond it", "NaN"],
)
def test_another_prediction_fails_if_the_precision_does_not_explain_it(found, mark, text):
    expected = np.array([[0.9, 0.1, 0.0], [0.50, 0.52, 0.0]])
    entry = v.judge_predictions("precision.top1", ["a.png", "b.png"], expected, np.array(found), 0.05)
    assert entry.mark == mark and entry.text.startswith(text)
    assert mark == PASS or entry.text.endswith(" that precision explains: a.png")


def test_a_prediction_fails_if_the_cpu_gives_nan_for_this_image():
    """NaN equals nothing."""
    expected = np.array([[0.9, 0.1, 0.0], [math.nan] * 3])
    entry = v.judge_predictions("precision.top1", ["a.png", "b.png"], expected, np.eye(2, 3), 0.05)
    assert entry.mark == FAIL and entry.text.endswith(" that precision explains: b.png")


@pytest.mark.parametrize("found", [0.9, math.nan])
def test_predictions_are_not_judged_if_the_cpu_overflows_as_well(found):
    entry = v.judge_predictions("precision.top1", ["a.png"], np.eye(1, 3), np.full((1, 3), found), math.inf)
    assert entry.mark == SKIP


@pytest.fixture
def images(tmp_path):
    from PIL import Image

    for i in range(9):  # more than one batch of predictions
        Image.fromarray(np.random.default_rng(i).integers(0, 256, (50, 50, 3), np.uint8)).save(tmp_path / f"{i}.png")
    return str(tmp_path)


def test_a_device_that_mixes_up_the_classes_fails(images):
    context, loaded = after_model_stage("--image", images)
    assert len(loaded.images) == v.FIRST_IMAGES == 4
    entries, _ = drain(v.precision_stage(context, loaded))
    top1 = checks(entries)["precision.top1"]
    assert top1.mark == PASS and top1.text.startswith("9 of 9 images agree with the CPU; ")
    facts = [entry for entry in entries if entry.id.startswith("precision.image.")]
    assert [entry.id for entry in facts] == [f"precision.image.{n}" for n in (1, 2, 3, 4)]
    assert facts[0].text.startswith("0.png: ") and " on CPU, " in facts[0].text and facts[0].text.endswith(" on cpu")
    alter(loaded, "head", lambda x: x.roll(1, dims=-1))
    assert marks(drain(v.precision_stage(context, loaded))[0], "precision.top1") == {"precision.top1": FAIL}


def test_the_predictions_of_a_model_with_one_class_are_not_compared(images):
    context, loaded = after_model_stage("--image", images)
    alike = [copy.deepcopy(loaded.cpu) for _ in range(2)]
    for model in alike:
        model.reset_classifier(1)
    loaded = loaded._replace(cpu=alike[0], device=alike[1])
    (entry,) = v.compare_predictions(context, loaded)
    assert (entry.mark, entry.id, entry.text) == (SKIP, "precision.top1", "the model has one class")


def test_the_nearest_neighbours_of_a_model_without_classes_are_compared(images):
    context, loaded = after_model_stage("--image", images, "--model", "test_dinov3")
    assert marks(drain(v.precision_stage(context, loaded))[0], "precision.nearest") == {"precision.nearest": PASS}
    alter(loaded, "", lambda x: x * torch.linspace(-1, 1, x.shape[-1]))
    assert marks(drain(v.precision_stage(context, loaded))[0], "precision.nearest") == {"precision.nearest": FAIL}


# --- facts for a report -----------------------------------------------------------------------------------------------


def facts(context, loaded, change=None):
    """The facts of stage 4 by id, if the device adds `change` to the logits of the five seeded inputs."""
    if change is not None:
        alter(loaded, "head", lambda x: x + change if x.shape == change.shape else x)
    return {entry.id: entry for entry in drain(v.precision_stage(context, loaded))[0] if entry.mark == FACT}


CHANGE = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 1, 1, 9, 1])[:, None] / 20


def test_published_figures_are_those_of_numpy_for_the_worst_image(run):
    cpu = run[1].references.float32["logits"].astype(np.float64)
    difference = CHANGE.numpy().astype(np.float64)
    device = cpu + difference
    size, norm = np.abs(difference), np.linalg.norm
    published = {entry.id: entry for entry in v.published_figures(run[1].references, {"logits": cpu + CHANGE.numpy()})}
    shown = cells(v.PUBLISHED, published["precision.published.logits"])
    worst = {name: float(shown[name]) for name in ("max_abs", "mean_abs", "rel_l2", "nmae")}
    assert worst == pytest.approx({
        "max_abs": size.max(),
        "mean_abs": size.mean(1).max(),
        "rel_l2": (norm(difference, axis=1) / norm(cpu, axis=1)).max(),
        "nmae": (size.mean(1) / np.abs(cpu).mean(1)).max(),
    }, rel=0.05)  # fmt: skip
    cosine = ((device * cpu).sum(1) / norm(device, axis=1) / norm(cpu, axis=1)).min()
    assert float(shown["cosine"]) == pytest.approx(cosine, abs=1e-6) and cosine < 0.999


def test_probabilities_are_compared(run):
    cpu = run[1].references.float32["logits"]
    device = cpu + CHANGE.numpy()
    found = facts(*run, CHANGE)
    probabilities = [torch.softmax(torch.from_numpy(rows), -1) for rows in (device, cpu)]
    shown = cells(v.PROBABILITIES, found["precision.probabilities"])
    assert float(shown["max_abs"]) == pytest.approx(float((probabilities[0] - probabilities[1]).abs().max()), rel=0.05)
    same = int(np.sum(device.argmax(1) == cpu.argmax(1)))
    assert (shown["top1"], shown["inputs"]) == (str(same), "5") and same < 5


def test_a_model_without_classes_has_no_probabilities():
    assert "precision.probabilities" not in facts(*after_model_stage("--model", "test_dinov3"))


@pytest.mark.parametrize(
    ("precision", "factor", "model", "warned"),
    [
        ("HF32", 1, "test_vit", True),
        ("HF32", 1 + 1e-6, "test_vit", False),
        ("float32", 1, "test_vit", False),
        ("HF32", 1, "test_vit_without_convolution", False),
    ],
)
def test_a_device_that_equals_the_cpu_bit_for_bit_although_it_reduces_convolutions_is_a_warning(
    precision, factor, model, warned
):
    """It may not have computed at all."""
    context, loaded = after_model_stage("--model", model)
    documented = {"convolution": precision, "matmul": "float32"}
    npu = dataclasses.replace(context, device=torch.device("cuda"), documented=documented)
    outputs = {name: output * np.float32(factor) for name, output in loaded.references.float32.items()}
    assert marks(v.explain_precision(npu, loaded, {v.FLOAT32: outputs}, {})) == (
        {"precision.is_device": WARN} if warned else {}
    )


def test_the_context_never_changes(run):
    with pytest.raises(dataclasses.FrozenInstanceError):
        run[0].documented = {}
