"""compare() measures the error of an array: no incorrect row, element or NaN is hidden by other values."""

import math

import pytest
from small_run import cells, differs_by

import validate_npu as v
from validate_npu import FAIL, PASS, WARN

np = v.np
REFERENCE = np.random.default_rng(0).standard_normal((4, 10, 64))  # (images, tokens, width)
LIMITS = v.Tolerance(1e-3, 1e-2)
OTHER_CELLS = {"err_fp64": 1e-3, "expected": 2e-4, "cpu_err": 3e-6}


def changed(change, reference=REFERENCE):
    actual = reference.copy()
    change(actual)
    return v.compare(actual, reference)


def scale_a_token(x):
    x[2, 7] *= 1.5


def put(index, value):
    return lambda x: x.__setitem__(index, value)


def test_equal_arrays_have_no_error():
    found = changed(lambda x: None)
    assert found.max_abs == found.mean_abs == found.rel_l2 == found.max_row == found.max_elem == found.error == 0
    assert found.cosine == 1 and found.nonfinite == (0, 0, 0, 0)


@pytest.mark.parametrize(
    ("change", "row_index", "error"),
    [
        (scale_a_token, (2, 7), 0.5),
        (put((1, 4, 5), math.nan), (1, 4), math.inf),
        (put((3, 9, 63), -math.inf), (3, 9), math.inf),
    ],
)
def test_the_worst_row_is_named(change, row_index, error):
    found = changed(change)
    assert found.row_index == row_index and found.max_row == pytest.approx(error)


@pytest.mark.parametrize(
    ("shape", "index", "row"),
    [((4, 10, 64), (2, 7, 5), (2, 7)), ((4, 640), (2, 453), (2,)), ((4, 8, 8, 10), (2, 1, 2, 3), (2,))],
)
def test_a_row_is_a_token_or_an_image(shape, index, row):
    found = changed(put(index, 9.0), reference := REFERENCE.reshape(shape))
    assert (found.row_index, found.element_index) == (row, index)
    assert found.values == (9.0, reference[index]), "the values on both sides are those of the worst element"


def test_one_incorrect_row_is_not_diluted_by_the_other_rows():
    found = changed(scale_a_token)
    assert found.rel_l2 < 0.1 < found.max_row


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("token", [0, 9])
def test_no_row_is_left_out(row, token):
    def scale(x):
        x[row, token] *= 1.01

    found = changed(scale)
    assert found.max_row == pytest.approx(0.01) and found.row_index == (row, token)


def test_one_incorrect_element_is_not_diluted_by_its_row():
    reference = np.random.default_rng(0).standard_normal((1, 100_000))

    def add_to_an_element(x):
        x[0, 7] += 0.5

    found = changed(add_to_an_element, reference)
    assert found.max_row < 2**-8 < found.max_elem == found.error and found.element_index == (0, 7)


def test_swapped_images_keep_their_norms_and_are_detected():
    found = changed(put([0, 3], REFERENCE[[3, 0]]))
    assert found.max_row > 1 and found.cosine < 0.6, "two of four images are swapped"


@pytest.mark.filterwarnings("ignore:invalid value")  # of infinity - infinity
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", ["device", "reference", "both"])
def test_nan_and_inf_equal_nothing_not_even_themselves_and_are_counted_on_both_sides(value, sides):
    good, bad = np.ones((2, 3)), np.array([[1, 1, 1], [1, value, 1]])
    actual, reference = good if sides == "reference" else bad, good if sides == "device" else bad
    found = v.compare(actual, reference)
    assert found.max_abs == found.mean_abs == found.rel_l2 == found.max_row == found.max_elem == math.inf
    assert (found.row_index, found.element_index) == ((1,), (1, 1))
    assert np.array_equal(found.values, (actual[1, 1], reference[1, 1]), equal_nan=True)
    count = [int(math.isnan(value)), int(math.isinf(value))]
    assert [*found.nonfinite] == count * (sides != "reference") + [0, 0] * (sides != "both") + count * (
        sides != "device"
    )
    assert v.Tolerance(1e9, 1e9).mark(found.error) == v.Tolerance(math.inf, math.inf).mark(found.error) == FAIL


def test_a_row_of_zeros_has_no_infinite_error():
    reference = np.vstack([np.ones((9, 8)), np.zeros((1, 8))])
    assert v.compare(reference + 1e-6, reference).max_row < 1e-4
    zeros = np.zeros((2, 3))
    assert v.compare(zeros, zeros).error == 0 and v.compare(zeros + 1e-3, zeros).max_row > 1e6


@pytest.mark.parametrize("change", [put((0, 2), 0.65), put((0, 3), 13.2)])
def test_an_element_near_zero_is_divided_by_the_rms_of_its_row(change):
    found = changed(change, np.array([[3.0, -4.0, 0.0, 12.0]]))  # RMS 6.5
    assert found.max_elem == pytest.approx(0.1 / v.ELEMENT_FACTOR)


def test_figures_are_those_of_numpy():
    a, r = REFERENCE[:, 0] + 0.01, REFERENCE[:, 0]
    found = v.compare(a, r)
    assert found.max_abs == pytest.approx(0.01) and found.mean_abs == pytest.approx(0.01)
    assert found.rel_l2 == pytest.approx(np.linalg.norm(a - r) / np.linalg.norm(r))
    assert found.max_row == pytest.approx(max(np.linalg.norm(a - r, axis=1) / np.linalg.norm(r, axis=1)))
    assert found.nmae == pytest.approx(np.abs(a - r).mean() / np.abs(r).mean())
    assert found.cosine == pytest.approx((a * r).sum() / np.linalg.norm(a) / np.linalg.norm(r), rel=1e-9)


def test_the_arrays_are_not_changed():
    actual, reference = REFERENCE + 0.01, REFERENCE.copy()
    before = actual.copy()
    v.compare(actual, reference)
    assert np.array_equal(actual, before) and np.array_equal(reference, REFERENCE)


def test_half_precision_is_compared_in_float64():
    """In float16 the sum of a million squares is infinite, and the difference of two large numbers is rounded."""
    reference = np.full((1, 1_000_000), 3.0, np.float16)
    assert v.compare(reference * np.float16(2), reference).rel_l2 == pytest.approx(1)
    assert v.compare(np.float32([[1, 1 + 2**-23]]), np.float64([[1, 1]])).max_abs == 2**-23


def test_shapes_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"^shapes differ: \(1, 3\), reference \(1, 4\)"):
        v.compare(np.ones((1, 3)), np.ones((1, 4)))


# --- the outcome ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "outcome", "limit", "used"),
    [
        (0.0, PASS, "1.0e-03", "0%"),
        (0.9e-3, PASS, "1.0e-03", "90%"),
        (1.1e-3, WARN, "1.0e-03", "110%"),
        (0.9e-2, WARN, "1.0e-03", "900%"),
        (1.1e-2, FAIL, "1.0e-02", "110%"),
        (1e2, FAIL, "1.0e-02", "1e+06%"),
        (math.nan, FAIL, "1.0e-02", "inf"),
        (math.inf, FAIL, "1.0e-02", "inf"),
    ],
)
def test_the_limit_of_a_row_is_the_one_that_decided_its_outcome(error, outcome, limit, used):
    row = v.comparison("precision.tokens.float32", differs_by(error), LIMITS, row=(v.PRECISION, OTHER_CELLS))
    shown = cells(v.PRECISION, row)
    assert (row.mark, shown["limit"], shown["used"]) == (outcome, limit, used)
    sentence = v.comparison("outputs.determinism", differs_by(error), LIMITS)
    assert sentence.mark == outcome and sentence.text.endswith(f", limit {limit}, used {used}")


@pytest.mark.parametrize(("factor", "outcome"), [(0.9, PASS), (1.1, WARN), (9, WARN), (11, FAIL)])
def test_an_element_may_exceed_the_limit_of_its_row_by_a_factor_and_warns_before_it_fails(factor, outcome):
    reference = np.ones((1, 10**6))
    actual = reference.copy()
    actual[0, 3] += factor * 32 * 1e-3
    assert LIMITS.mark(v.compare(actual, reference).error) == outcome


def test_what_must_be_bit_identical_passes_only_then():
    tolerance = v.Tolerance(0.0, 1e-3)
    assert [tolerance.mark(differs_by(error).error) for error in (0, 1e-15, 2e-3)] == [PASS, WARN, FAIL]
    assert v.comparison("outputs.determinism", differs_by(1e-15), tolerance).text.endswith(", limit 0.0e+00, used inf")


def test_a_check_has_the_figures_of_its_row_and_the_details_of_a_bug_report():
    found = changed(scale_a_token)
    row = v.PRECISION, OTHER_CELLS
    entry = v.comparison("precision.tokens.float32", found, LIMITS, "look", "batch size 4", row)
    assert (entry.mark, entry.id, entry.advice, entry.numeric) == (FAIL, "precision.tokens.float32", "look", True)
    shown = cells(v.PRECISION, entry)
    assert [shown[name] for name in ("err_fp64", "expected", "cpu_err", "max_row", "limit")] == [
        "1.0e-03", "2.0e-04", "3.0e-06", "5.0e-01", "1.0e-02"
    ]  # fmt: skip
    assert entry.problem == "batch size 4: error 5.0e-01 > limit 1.0e-02"
    worst = f"{found.element_index}: device {found.values[0]:.6g}, reference {found.values[1]:.6g}"
    assert found.values[0] == pytest.approx(1.5 * found.values[1]) and entry.details == (
        "WARN above 1.0e-03, FAIL above 1.0e-02; NaN and Inf: device 0 and 0, reference 0 and 0",
        f"worst row: image 2, token 7; worst element {worst}",
    )


def test_nan_and_inf_are_in_the_details_with_the_first_such_value():
    actual, reference = np.ones((2, 8)), np.ones((2, 8))
    actual[1, 3:5], actual[1, 7], reference[0, 6] = math.nan, math.inf, -math.inf
    counts, place = v.comparison("outputs.logits", v.compare(actual, reference), LIMITS).details
    assert counts.endswith("NaN and Inf: device 2 and 1, reference 0 and 1")
    assert place == "worst row: image 0; worst element (0, 6): device 1, reference -inf"
