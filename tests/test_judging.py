"""Each check can fail: a healthy record passes, and every single thing that can be wrong with it is noticed."""

import copy
import dataclasses
import math

import pytest
import validate_npu as v
from validate_npu import FAIL, PASS, SKIP, WARN

np, torch, timm = v.np, v.torch, v.timm
CPU, NPU = torch.device("cpu"), "npu"


def outcomes(entries):
    return [entry.outcome for entry in entries if entry.outcome]


# --- compare: the metrics ---------------------------------------------------------------------------------------------

REFERENCE = np.random.default_rng(0).standard_normal((4, 10, 64))


def changed(change):
    actual = REFERENCE.copy()
    change(actual)
    return v.compare(actual, REFERENCE)


def scale_a_token(x):
    x[2, 7] *= 1.5


def swap_two_images(x):
    x[[0, 3]] = x[[3, 0]]


def put_nan(x):
    x[1, 4, 5] = math.nan


def test_equal_arrays_have_no_error():
    found = changed(lambda x: None)
    assert found.equal and found.worst_rel_l2 == 0 and found.cosine == 1 and found.norm_ratio == 1


@pytest.mark.parametrize(
    ("change", "worst_row", "worst_rel_l2"),
    [(scale_a_token, (2, 7), 0.5), (put_nan, (1, 4), math.inf)],
)
def test_the_worst_row_is_named(change, worst_row, worst_rel_l2):
    found = changed(change)
    assert found.worst_row == worst_row
    assert found.worst_rel_l2 == pytest.approx(worst_rel_l2)


def test_one_bad_row_is_not_diluted_by_the_good_ones():
    found = changed(scale_a_token)
    assert found.rel_l2 < 0.1 < found.worst_rel_l2
    assert found.norm_ratio == pytest.approx(1.5)


def test_one_bad_element_is_not_diluted_by_its_row():
    reference = np.random.default_rng(0).standard_normal((1, 100_000))
    actual = reference.copy()
    actual[0, 7] += 0.5
    found = v.compare(actual, reference)
    assert found.worst_rel_l2 < v.LAYER_FAIL_REL_L2 and found.worst_index == (0, 7)
    assert v.judge_limits(found, (v.OPERATOR_LIMIT["HF32"], v.LAYER_FAIL_REL_L2)) == FAIL


def test_swapped_images_keep_their_norms_and_are_noticed():
    found = changed(swap_two_images)
    assert found.worst_rel_l2 > 1 and found.cosine < 0.5


def test_nan_never_equals_nan():
    nan = np.full((1, 3), math.nan)
    found = v.compare(nan, nan)
    assert not found.equal and found.max_abs == found.worst_rel_l2 == found.worst_element == math.inf


def test_a_row_of_zeros_has_no_infinite_error():
    reference = np.vstack([np.ones((9, 8)), np.zeros((1, 8))])
    assert v.compare(reference + 1e-6, reference).worst_rel_l2 < 1e-4


def test_figures_are_those_of_numpy():
    a, r = REFERENCE[:, 0] + 0.01, REFERENCE[:, 0]
    found = v.compare(a, r)
    assert found.max_abs == pytest.approx(0.01) and found.mean_abs == pytest.approx(0.01)
    assert found.rel_l2 == pytest.approx(np.linalg.norm(a - r) / np.linalg.norm(r))
    assert found.reference_rms == pytest.approx(np.sqrt((r**2).mean()))


def test_shapes_that_differ_are_an_error():
    with pytest.raises(ValueError, match="shapes differ"):
        v.compare(np.ones((1, 3)), np.ones((1, 4)))


# --- the stages' judges -----------------------------------------------------------------------------------------------

ERF, TANH = v.GeluProbe(erf=1e-7, tanh=4.7e-4), v.GeluProbe(erf=4.7e-4, tanh=1e-7)


def differs(error):
    """A difference of this size in every row and element."""
    return v.compare(np.ones((2, 8)) * (1 + error), np.ones((2, 8)), 1e-3)


EQUAL, GOOD, BAD = differs(0), differs(1e-7), differs(0.1)
NAN = v.compare(np.full((2, 8), math.nan), np.ones((2, 8)))

VALUES = np.random.default_rng(1).standard_normal((2, 8)).astype(np.float32)
OUTPUT = v.OutputRecord("embedding", "2", VALUES, expected_shape=(2, 8), distinct=(0, 1), alone=GOOD, repeat=EQUAL)
SAME = v.same_input_limits(CPU)


def with_nan():
    values = VALUES.copy()
    values[1, 3] = math.nan
    return values


def test_a_healthy_output_passes():
    assert outcomes(v.judge_outputs([OUTPUT], [], SAME)) == [PASS, PASS]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"expected_shape": (2, 9)}, "the shape should be 2x9"),
        ({"values": with_nan()}, "1 of 16 values are NaN or infinite"),
        ({"values": np.vstack([VALUES[0], np.full(8, 0.5)])}, "collapsed"),
        ({"values": np.vstack([VALUES[0], VALUES[0] * (1 + 1e-6)])}, "different images give the same output"),
        ({"alone": BAD}, "differs from the same image alone: image 0"),
        ({"alone": NAN}, "differs from the same image alone: image 0"),
    ],
)
def test_an_output_fails_for_each_thing_that_can_be_wrong(change, problem):
    row = v.judge_outputs([dataclasses.replace(OUTPUT, **change)], [], SAME)[1]
    assert row.outcome == FAIL
    assert problem in row.problem


@pytest.mark.parametrize(("error", "outcome"), [(1e-6, PASS), (3e-4, WARN), (2e-3, FAIL)])
def test_a_row_of_a_batch_warns_before_it_fails(error, outcome):
    assert v.judge_outputs([dataclasses.replace(OUTPUT, alone=differs(error))], [], SAME)[1].outcome == outcome


@pytest.mark.parametrize(("repeat", "outcome"), [(EQUAL, PASS), (GOOD, WARN), (BAD, FAIL), (NAN, FAIL)])
def test_a_repeat_is_to_be_equal_bit_for_bit(repeat, outcome):
    assert v.judge_outputs([dataclasses.replace(OUTPUT, repeat=repeat)], [], SAME)[-1].outcome == outcome


def test_the_same_picture_twice_is_no_collapse():
    twice = dataclasses.replace(OUTPUT, values=np.vstack([VALUES[0], VALUES[0]]), distinct=(0,))
    assert v.judge_outputs([twice], [], SAME)[1].outcome == PASS


def test_a_batch_that_does_not_fit_is_a_row():
    assert outcomes(v.judge_outputs([OUTPUT], ["64"], SAME)) == [PASS, WARN, PASS]


DEVICE = v.DeviceRecord({"device": "npu:0"}, arithmetic="float32", free_bytes=1, probe=GOOD)


@pytest.mark.parametrize(("probe", "outcome"), [(GOOD, PASS), (BAD, FAIL), (NAN, FAIL)])
def test_a_wrong_matrix_product_fails(probe, outcome):
    assert outcomes(v.judge_device(dataclasses.replace(DEVICE, probe=probe))) == [outcome]


CONFIG = {"input_size": (3, 8, 8), "interpolation": "bicubic", "crop_pct": 1.0, "mean": (0.5,), "std": (0.5,)}
MODEL = v.ModelRecord(1, CONFIG, "a", "a", "b", "", jit_compile="", first_call_seconds=0.1, first_outputs={})


@pytest.mark.parametrize(("read_back", "outcome"), [("a", PASS), ("c", FAIL)])
def test_weights_that_do_not_come_back_as_they_went_fail(read_back, outcome):
    record = dataclasses.replace(MODEL, device_sha256=read_back)
    assert outcomes(v.judge_model(record, "random", 0.1, CPU)) == [outcome, SKIP]


@pytest.mark.parametrize(("fallback", "outcome"), [("refused", PASS), ("allowed", WARN), ("unseen", SKIP), ("", SKIP)])
def test_no_operator_fell_back_only_where_it_would_have_been_seen(fallback, outcome):
    assert outcomes(v.judge_model(dataclasses.replace(MODEL, fallback=fallback), "", 0.1, CPU)) == [PASS, outcome]


def precision(mode, difference, output="embedding"):
    return v.PrecisionRecord(output, mode, v.OUTPUT_LIMIT[mode], difference, floor=GOOD, against_fp32=difference)


@pytest.mark.parametrize(("difference", "outcome"), [(EQUAL, PASS), (GOOD, PASS), (BAD, FAIL), (NAN, FAIL)])
def test_precision_is_judged(difference, outcome):
    # the row of the table, the card's check, the reviewers' one
    assert outcomes(v.judge_precision([precision("float32", difference)], ERF, CPU)) == [outcome] * 3


@pytest.mark.parametrize("mode", v.OUTPUT_LIMIT)
def test_each_mode_has_its_limits_and_warns_before_it_fails(mode):
    warn, fail = v.OUTPUT_LIMIT[mode]
    for error, outcome in ((0.5 * warn, PASS), (1.1 * warn, WARN), (1.1 * fail, FAIL)):
        assert outcomes(v.judge_precision([precision(mode, differs(error), "tokens")], ERF, CPU)) == [outcome]


def test_the_cpu_computes_gelu_as_the_device_does_where_that_is_explained():
    x = torch.linspace(-3, 3, 7)
    for probe, form in ((ERF, "none"), (TANH, "tanh")):
        with v.gelu_as_on_device(probe):
            assert torch.equal(torch.nn.GELU()(x), torch.nn.functional.gelu(x, approximate=form))


@pytest.mark.parametrize(
    ("probe", "is_tanh"),
    [(ERF, False), (TANH, True), (v.GeluProbe(1e-2, 9e-3), False), (v.GeluProbe(math.inf, math.inf), False)],
)
def test_only_a_gelu_that_is_close_to_the_tanh_form_is_explained_by_it(probe, is_tanh):
    assert probe.is_tanh == is_tanh


def layer(error, name="blocks.0.mlp.fc1", arithmetic="float32"):
    return v.LayerRecord(name, "Linear", arithmetic, differs(error))


NOTICED = layer(1e-2)


@pytest.mark.parametrize(
    ("error", "arithmetic", "outcome"),
    [
        (1e-6, "float32", PASS),
        (2e-4, "float32", WARN),
        (2e-4, "HF32", PASS),
        (1e-3, "HF32", WARN),
        (1e-2, "float32", FAIL),
        (1e-2, "HF32", FAIL),
        (math.nan, "float32", FAIL),
    ],
)
def test_a_layer_is_judged_by_the_type_that_it_computes_in(error, arithmetic, outcome):
    assert outcomes(v.judge_layers([layer(error, arithmetic=arithmetic)], NOTICED, CPU)) == [outcome, PASS]


def test_the_worst_and_the_first_module_out_of_limits_are_named():
    records = [layer(0, "a"), layer(3e-4, "b"), layer(2e-2, "c"), layer(0, "d")]
    entry = v.judge_layers(records, NOTICED, CPU)[1]
    assert entry.outcome == FAIL and entry.text.startswith("c ")
    assert "16 of 16 elements" in entry.problem and "first out of limits: b" in entry.problem


def test_a_control_that_is_not_noticed_fails():
    entry = v.judge_layers([layer(0)], layer(1e-6), CPU)[-1]
    assert entry.outcome == FAIL and "cannot tell" in entry.advice


def test_a_module_that_fails_is_shown_before_one_that_only_warns_by_a_larger_factor():
    entry = v.judge_layers([layer(3e-3, "warns"), layer(5e-3, "fails", "HF32")], NOTICED, CPU)[1]
    assert entry.outcome == FAIL and entry.text.startswith("fails ")


def test_a_model_without_a_module_to_alter_has_no_control():
    assert outcomes(v.judge_layers([layer(0)], None, CPU)) == [PASS, SKIP]


TIMED = v.Timing("float32", 1, host_ms=(1.0, 1.0), total_ms=(2.0, 2.0))


@pytest.mark.parametrize(
    ("mode", "difference", "outcome"),
    [
        ("float32", None, PASS),
        ("float32", GOOD, PASS),
        ("float32", BAD, FAIL),
        ("float32", NAN, FAIL),
        ("float16", differs(5e-3), PASS),  # half precision against stage 3's fp32
        ("float16", differs(5e-2), FAIL),
        ("float32 graph", differs(5e-3), FAIL),  # a graph against the same mode without
        ("float16 graph", differs(5e-2), FAIL),
    ],
)
def test_timed_outputs_are_judged_by_the_limit_of_their_mode(mode, difference, outcome):
    timing = dataclasses.replace(TIMED, mode=mode, difference=difference)
    assert outcomes(v.judge_timed_outputs([timing], SAME)) == [outcome]


def test_out_of_memory_is_a_row_and_the_other_batch_sizes_are_reported():
    timings = [TIMED, v.Timing("float32", 8, problem=v.OUT_OF_MEMORY)]
    entries = v.judge_throughput(timings, None, CPU, "cpu")
    assert "500.00" in entries[1].text and entries[1].varies
    assert entries[2].outcome == WARN and entries[2].problem == "batch 8: out of device memory"
    assert outcomes(v.judge_throughput(timings, None, CPU, "cpu", auto=True)) == [], "the search ends there"


# --- several cards ----------------------------------------------------------------------------------------------------


def card(rank, outputs, checks=()):
    return v.CardRecord(rank, f"node 0 npu:{rank}", np.asarray(outputs, np.float32), [], list(checks), [], [])


RIGHT, ROUNDED, WRONG = np.ones((2, 8)), np.ones((2, 8)) * (1 + 1e-6), np.ones((2, 8)) * 1.1


@pytest.mark.parametrize(
    ("outputs", "outcome", "problem"),
    [
        ([RIGHT, RIGHT, RIGHT], PASS, ""),
        ([RIGHT, RIGHT[:1], RIGHT], PASS, ""),  # of a card with less memory
        ([RIGHT, RIGHT, WRONG], FAIL, "card 2 of 3 differ from the others by 1.0e-01"),
        ([WRONG, RIGHT, RIGHT], FAIL, "card 0 of 3 differ"),
        ([RIGHT, ROUNDED, RIGHT], WARN, "card 1 of 3 differ"),
        ([RIGHT, WRONG], FAIL, "it is not known which are right"),
    ],
)
def test_cards_are_to_agree_and_the_one_that_does_not_is_named(outputs, outcome, problem):
    entries = v.judge_cards([card(rank, output) for rank, output in enumerate(outputs)], SAME)
    agreement = next(entry for entry in entries if entry.name == "agreement")
    assert agreement.outcome == outcome and problem in agreement.problem


@pytest.mark.parametrize("outcome", [PASS, WARN, FAIL])
def test_a_card_is_as_good_as_the_worst_of_its_checks(outcome):
    checks = [v.Entry("tokens", "", PASS), v.Entry("embedding", "", outcome)]
    entries = v.judge_cards([card(0, RIGHT), card(1, RIGHT, checks)], SAME)
    assert outcomes(entries)[:2] == [PASS, outcome]
    assert outcome == PASS or entries[2].problem == "not passed: embedding"


# --- inputs and weights -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "test_vit", "resnet18", "convnext_atto"])
def test_random_weights_let_every_block_matter(name):
    """With timm's own initialisation, LayerScale (1e-5) or a zeroed BatchNorm hides whatever a block computes."""
    model = timm.create_model(name).eval()
    v.draw_weights(model, seed=0)
    images = v.draw_images(1, timm.data.resolve_model_data_config(model)["input_size"], seed=0)
    before = v.forward_outputs(model, images)["embedding"]
    matrices = [(key, p) for key, p in model.named_parameters() if p.ndim > 1 and not key.startswith(("head", "fc"))]
    for key, parameter in matrices[:: 1 + len(matrices) // 12]:
        parameter.data *= 1.05
        moved = v.compare(v.forward_outputs(model, images)["embedding"], before).rel_l2
        parameter.data /= 1.05
        assert moved > 1e-4, f"{key}: 5 % move the embedding by {moved:.1e}"


def test_inputs_and_weights_are_those_of_the_seed():
    a, b = timm.create_model("test_vit"), timm.create_model("test_vit")
    v.draw_weights(a, seed=3)
    v.draw_weights(b, seed=3)
    assert v.sha256(a.state_dict()) == v.sha256(b.state_dict())
    assert torch.equal(v.draw_images(2, (3, 8, 8), 3), v.draw_images(5, (3, 8, 8), 3)[:2]), "batches share images"
    b.norm.weight.data[0] += 1e-7
    assert v.sha256(a.state_dict()) != v.sha256(b.state_dict())


def test_feature_maps_are_those_of_features_only_with_the_same_weights():
    model = timm.create_model("test_vit").eval()
    v.draw_weights(model, seed=0)
    maps = v.feature_extractor("test_vit", model)
    images = v.draw_images(1, (3, 160, 160), 0)
    expected = model.forward_intermediates(images, indices=3, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(maps(images), expected, strict=True))


# --- what is compared with what ---------------------------------------------------------------------------------------


@pytest.fixture
def vit():
    """test_vit and its feature extractor, with drawn weights."""
    model = timm.create_model("test_vit").eval()
    v.draw_weights(model, seed=0)
    return model, v.feature_extractor("test_vit", model)


IMAGES = v.draw_images(2, (3, 160, 160), 0)


def test_feature_maps_of_the_device_are_compared_with_those_of_the_cpu(vit):
    model, maps = vit
    other = copy.deepcopy(maps)
    other.model.blocks[-1].mlp.fc2.weight.data *= 1.1
    for on_device, outcome in ((maps, PASS), (other, FAIL)):
        records, _ = v.measure_precision((model, model), (maps, on_device), IMAGES, CPU, ["float32"], ERF)
        entries = v.judge_precision(records, ERF, CPU)
        assert [entry.outcome for entry in entries if entry.name == "feature map 3"] == [outcome]


class SecondRowIsWrong(torch.nn.Module):
    """A device that mixes up what is not the first image of a batch."""

    def __init__(self, module):
        super().__init__()
        self.module, self.feature_info = module, module.feature_info

    def forward(self, images):
        return [torch.cat([x[:1], x[1:].flip(2)]) for x in self.module(images)]


def test_every_row_of_every_output_is_compared_with_the_image_alone(vit):
    model, maps = vit
    batches = {"1": IMAGES[:1], "2": IMAGES}
    for extractor, outcome in ((maps, PASS), (SecondRowIsWrong(maps), FAIL)):
        records, direct = v.measure_outputs(model, extractor, batches, v.forward_outputs(model, IMAGES[:1]), CPU)
        entries = v.judge_outputs(records, [], SAME)
        assert [entry.outcome for entry in entries if entry.name == "feature map 1"] == [PASS, outcome]
        assert direct.keys() == batches.keys()


def test_the_control_alters_a_weight_for_one_comparison_and_puts_it_back(vit):
    model, device_model = vit[0], copy.deepcopy(vit[0])
    records, control = v.measure_layers(model, device_model, IMAGES, CPU)
    assert control.difference.worst_rel_l2 == pytest.approx(0.01, rel=0.2)
    assert all(record.difference.equal for record in records), "the altered weight is in no other comparison"
    assert v.sha256(model.state_dict()) == v.sha256(device_model.state_dict())


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("call acl failed, error code is 507015\n[ERROR] ...", "error code 507015, an AI Core failed"),
        ("aclrtSynchronizeStream error code:507014", "error code 507014, an AI Core timed out"),
        ("the current working operator name is aclnnAddmm.\n error code is 507015", "aclnnAddmm: error code 507015"),
        ("error code is 999999", "error code 999999, see ~/ascend/log"),
        ("The operator 'aten::foo' would execute its main computation on CPU through", "aten::foo has no NPU kernel"),
        ("\n  something else\nmore", "RuntimeError: something else"),
    ],
)
def test_device_errors_are_told_in_one_line(text, line):
    assert line in v.explain(RuntimeError(text))


def test_names_from_outside_cannot_break_the_log(capsys):
    report = v.Report()
    report.line("a\nRESULT: PASS\x1b[31m 图")
    assert report.lines == ["a\\nRESULT: PASS\\x1b[31m 图"]


def test_the_log_is_replaced_whole_and_a_link_stays_a_link(tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    report = v.Report()
    report.line("new")
    report.write(str(tmp_path / "link.txt"))
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text() == "new\n"
    assert len(list(tmp_path.iterdir())) == 2
