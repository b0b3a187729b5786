"""Stage 4: a module that computes something else is found and named, whatever it is, and nothing is left altered."""

import copy
import math

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
    """test_vit after what stages 2 and 3 leave."""
    run = after_model_stage()
    run.maps = v.find_feature_maps(run)
    return run


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


def test_an_overflow_in_fp32_is_one_of_the_float16_that_a_310p_computes_it_in():
    entry = v.not_judged(v.Entry(PASS, "embedding", ""), v.FLOAT32, floor=1e-7)
    assert (entry.mark, entry.problem) == (WARN, "not judged: it overflows in float16 on the CPU as well")


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


def test_an_excess_outside_the_modules_is_a_warning_up_to_one_percent(run):
    """The model's own code, which is in no module, may amplify: below 1e-2, with all modules right, it is no FAIL."""
    for factor, outcome in ((1 + 1e-3, WARN), (1.5, FAIL)):
        case = after_model_stage()
        original = case.model.device._pos_embed
        case.model.device._pos_embed = lambda x, f=factor: original(x) * f
        found = checks(v.precision_stage(case))
        assert found["embedding", "float32"].mark == outcome
        assert "amplified by the model, or outside the modules" in found["embedding", "float32"].advice
        assert {found[key].mark for key in found if key[0] in ("Linear", "Block", "LayerNorm")} == {PASS}


def test_a_device_that_is_wrong_only_for_a_single_image_fails():
    """No batch of --batch-sizes 1 is compared with another one."""
    run = after_model_stage("--batch-sizes", "1")
    for module in ("norm", "head"):
        alter(run, module, lambda x: 1.5 * x if len(x) == 1 else x)
    first_call(run)
    assert not not_passed(v.outputs_stage(run)), "it does the same each time"
    names = {(name, "float32_alone"): FAIL for name in ("embedding", "logits", "tokens")}
    assert not_passed(v.precision_stage(run)) == names


def test_products_that_only_stage_4_meets_are_shown_and_judged_there(run):
    """A model that needs data does not tell them on the meta device."""

    class Rounds(v.Probe):
        def of(self, kind, function, shapes):
            self.found[kind] = v.Arithmetic(11, "half away", "HF32"), v.compare(np.ones((1, 1)), np.ones((1, 1)))
            return self.found[kind][0]

    run.probe = Rounds(CPU, 0)
    entries = list(v.precision_stage(run))
    assert "11 bits (HF32, half away)" in next(e.text for e in entries if e.name == "fp32 is computed in")
    assert [e.mark for e in entries if e.name == "fewer bits"] == [WARN]
    assert not [e for e in v.precision_stage(run) if e.name == "fewer bits"], "it is said once"


def test_the_pooling_is_compared_too_although_it_is_in_no_module(run):
    original = run.model.device.forward_head
    run.model.device.forward_head = lambda x, pre_logits=False: 1.009 * original(x, pre_logits=pre_logits)
    found = checks(v.precision_stage(run))
    assert found["VisionTransformer", "worst_of_1"].mark == FAIL
    assert found["embedding", "float32"].mark == FAIL and "begins in forward_head" in found["embedding", "float32"].advice


# --- modules ----------------------------------------------------------------------------------------------------------


def test_every_module_that_computes_is_compared(run):
    """With one that calls none of its parts' forward passes: RoPE."""
    passive = (torch.nn.Identity, torch.nn.Dropout, torch.nn.ModuleList, torch.nn.Sequential, torch.nn.Flatten)
    for each in (run, after_model_stage("--model", "test_dinov3")):
        names = [name for name, m in each.model.cpu.named_modules() if name and not isinstance(m, passive)]
        found = v.compare_modules(each, each.images[:1])
        assert sorted(module.name for module in found) == sorted([*names, "forward_head"])
        assert all(module.outcome == PASS and module.difference.size == 0 for module in found)


def test_a_module_is_compared_on_the_cpus_own_inputs(run):
    """So of all that comes behind a wrong one, only what contains it is off."""
    alter(run, "blocks.2.attn.qkv", lambda x: x * 1.01)
    found = v.compare_modules(run, run.images[:2])
    off = [module.name for module in found if module.difference.size]
    assert off == ["blocks.2.attn.qkv", "blocks.2.attn", "blocks.2"]


def test_no_row_of_a_module_is_left_out(run):
    alter(run, "blocks.0.norm1", lambda x: torch.cat([x[:1], x[1:] * 1.01]))
    (found,) = v.compare_modules(run, run.images[:2], only="blocks.0.norm1")
    assert found.difference.row == pytest.approx(0.01, rel=1e-3) and found.difference.row_index[0] == 1


def module(error, name="blocks.0.mlp.fc1", single=True, warn=v.OPERATOR["float32"], kind="Linear"):
    return v.Module(name, kind, single, v.Limit(warn, v.MODULE_FAIL), off_by(error))


@pytest.mark.parametrize(("error", "outcome"), [(1e-6, PASS), (2e-4, WARN), (1e-2, FAIL), (math.nan, FAIL)])
def test_a_module_warns_before_it_fails(error, outcome):
    (entry,) = checks(v.judge_modules([module(error)], "")).values()
    assert entry.mark == outcome


@pytest.mark.parametrize(
    ("rounds", "warn"), [(False, v.OPERATOR["float32"]), (True, v.OPERATOR["float16"])], ids=["fp32", "HF32"]
)
def test_inside_a_composite_module_operands_may_go_the_other_way(run, rounds, warn):
    if rounds:
        run.probe.found["matmul", "1x1"] = v.Arithmetic(11, "half away", "HF32"), off_by(0)
    for found in v.compare_modules(run, run.images[:1]):
        single = found.kind in ("Linear", "LayerNorm", "Conv2d", "GELU")
        assert found.single == single and found.limit.warn == (v.OPERATOR["float32"] if single else warn)


def test_the_worst_and_the_first_module_out_of_limits_are_named():
    modules = [module(0, "a"), module(3e-4, "b"), module(2e-2, "c"), module(2e-2, "d", False, kind="Block")]
    linear, block = checks(v.judge_modules(modules, "b")).values()
    assert linear.mark == FAIL and v.Table.split(linear.text)[-1] == "c"
    assert linear.problem.startswith("worst of 3, c: off by 2.0e-02 at image 0")
    assert linear.advice.startswith("an operator of Linear is wrong: run c alone on both")
    assert block.advice.startswith("first out of limits: b;"), "what contains it is not accused"


def test_no_operator_is_accused_where_several_kinds_are_out():
    modules = [module(2e-2, "a"), module(2e-2, "b", kind="LayerNorm")]
    assert all(
        entry.advice.startswith("first out of limits: a;") for entry in checks(v.judge_modules(modules, "a")).values()
    )


# --- the control ------------------------------------------------------------------------------------------------------


def test_the_control_alters_a_weight_for_one_comparison_and_puts_it_back(run):
    modules = v.compare_modules(run, run.images[:2])
    (entry,) = v.compare_control(run, run.images[:1], modules)
    assert entry.mark == PASS and "off by 1.0e-02, noticed, as it must be" in entry.text
    assert v.sha256(run.model.cpu.state_dict()) == v.sha256(run.model.device.state_dict())
    assert all(not m.difference.size for m in v.compare_modules(run, run.images[:1])), "nor is a hook left behind"


def test_the_control_is_put_back_after_an_error(run):
    modules = v.compare_modules(run, run.images[:1])

    def fail(output):
        raise RuntimeError("error code is 507015")

    alter(run, "patch_embed.proj", fail)
    with pytest.raises(RuntimeError):
        list(v.compare_control(run, run.images[:1], modules))
    assert v.sha256(run.model.cpu.state_dict()) == v.sha256(run.model.device.state_dict())


def test_a_control_that_is_not_noticed_fails(run):
    """A device that ignores what is written into its weights."""
    modules = v.compare_modules(run, run.images[:1])
    right = {m.name: m for m in modules}["patch_embed.proj"]
    kept = run.model.device.patch_embed.proj.weight.clone()
    alter(run, "patch_embed.proj", lambda x: run.model.cpu.patch_embed.proj.forward(run.images[:1]))
    (entry,) = v.compare_control(run, run.images[:1], [right])
    assert entry.mark == FAIL and "cannot tell" in entry.advice and "not noticed" in entry.problem
    assert torch.equal(run.model.device.patch_embed.proj.weight, kept)


def test_a_model_without_a_module_to_alter_has_no_control(run):
    assert [entry.mark for entry in v.compare_control(run, run.images[:1], [])] == [SKIP]


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
