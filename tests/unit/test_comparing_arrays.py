"""compare() measures how far two arrays are from each other: no wrong row, element or NaN is lost in the others."""

import math

import pytest

import validate_npu as v
from validate_npu import FAIL, PASS, WARN

np = v.np
REFERENCE = np.random.default_rng(0).standard_normal((4, 10, 64))  # (images, tokens, width)


def changed(change, reference=REFERENCE):
    actual = reference.copy()
    change(actual)
    return v.compare(actual, reference)


def scale_a_token(x):
    x[2, 7] *= 1.5


def swap_two_images(x):
    x[[0, 3]] = x[[3, 0]]


def put_nan(x):
    x[1, 4, 5] = math.nan


def put_infinity(x):
    x[3, 9, 63] = -math.inf


def test_equal_arrays_have_no_error():
    found = changed(lambda x: None)
    assert found.max_abs == found.mean_abs == found.rel_l2 == found.row == found.element == found.size == 0
    assert found.cosine == 1


@pytest.mark.parametrize(
    ("change", "row_index", "row"),
    [(scale_a_token, (2, 7), 0.5), (put_nan, (1, 4), math.inf), (put_infinity, (3, 9), math.inf)],
)
def test_the_worst_row_is_named(change, row_index, row):
    found = changed(change)
    assert found.row_index == row_index
    assert found.row == pytest.approx(row)


def test_a_row_is_a_token_or_an_image():
    for shape, index, row in (
        ((4, 10, 64), (2, 7, 5), (2, 7)),
        ((4, 640), (2, 453), (2,)),
        ((4, 8, 8, 10), (2, 1, 2, 3), (2,)),
    ):
        reference = REFERENCE.reshape(shape)
        found = changed(lambda x, index=index: x.__setitem__(index, 9.0), reference)
        assert (found.row_index, found.element_index) == (row, index)


def test_one_bad_row_is_not_diluted_by_the_good_ones():
    found = changed(scale_a_token)
    assert found.rel_l2 < 0.1 < found.row


@pytest.mark.parametrize("row", [0, 3])
@pytest.mark.parametrize("token", [0, 9])
def test_no_row_is_left_out(row, token):
    def scale(x):
        x[row, token] *= 1.01

    found = changed(scale)
    assert found.row == pytest.approx(0.01) and found.row_index == (row, token)


def test_one_bad_element_is_not_diluted_by_its_row():
    reference = np.random.default_rng(0).standard_normal((1, 100_000))

    def put_element(x):
        x[0, 7] += 0.5

    found = changed(put_element, reference)
    assert found.row < v.MODULE.fail and found.element_index == (0, 7)
    assert found.size == found.element / v.ELEMENT_FACTOR
    assert v.Limit(v.OPERATOR["HF32"], v.MODULE.fail).judge(found) == FAIL


def test_swapped_images_keep_their_norms_and_are_noticed():
    found = changed(swap_two_images)
    assert found.row > 1 and found.cosine < 0.5


@pytest.mark.filterwarnings("ignore:invalid value")  # of infinity - infinity
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sides", ["device", "reference", "both"])
def test_what_is_not_finite_equals_nothing_not_even_itself(value, sides):
    good, bad = np.ones((2, 3)), np.array([[1, 1, 1], [1, value, 1]])
    found = v.compare(good if sides == "reference" else bad, good if sides == "device" else bad)
    assert found.max_abs == found.mean_abs == found.rel_l2 == found.row == found.element == found.size == math.inf
    assert (found.row_index, found.element_index) == ((1,), (1, 1))
    assert v.Limit(1e9, 1e9).judge(found) == v.Limit(math.inf, math.inf).judge(found) == FAIL


def test_a_row_of_zeros_has_no_infinite_error():
    reference = np.vstack([np.ones((9, 8)), np.zeros((1, 8))])
    assert v.compare(reference + 1e-6, reference).row < 1e-4
    zeros = np.zeros((2, 3))
    assert v.compare(zeros, zeros).size == 0 and v.compare(zeros + 1e-3, zeros).row > 1e6


def test_an_element_near_zero_is_measured_by_its_row():
    reference = np.array([[3.0, -4.0, 0.0, 12.0]])  # RMS 6.5
    assert changed(lambda x: x.__setitem__((0, 2), 0.65), reference).element == pytest.approx(0.1)
    assert changed(lambda x: x.__setitem__((0, 3), 13.2), reference).element == pytest.approx(0.1)


def test_figures_are_those_of_numpy():
    a, r = REFERENCE[:, 0] + 0.01, REFERENCE[:, 0]
    found = v.compare(a, r)
    assert found.max_abs == pytest.approx(0.01) and found.mean_abs == pytest.approx(0.01)
    assert found.rel_l2 == pytest.approx(np.linalg.norm(a - r) / np.linalg.norm(r))
    assert found.row == pytest.approx(max(np.linalg.norm(a - r, axis=1) / np.linalg.norm(r, axis=1)))
    cosines = (a * r).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(r, axis=1)
    assert found.cosine == pytest.approx(min(cosines))
    assert found.reference_rms == pytest.approx(np.sqrt((r**2).mean()))


def test_the_arrays_stay_as_they_are():
    actual, reference = REFERENCE + 0.01, REFERENCE.copy()
    before = actual.copy()
    v.compare(actual, reference)
    assert np.array_equal(actual, before) and np.array_equal(reference, REFERENCE)


def test_half_precision_is_compared_in_double():
    """In float16 the sum of a million squares is infinite, and the difference of two large numbers is rounded."""
    reference = np.full((1, 1_000_000), 3.0, np.float16)
    assert v.compare(reference, reference).reference_rms == pytest.approx(3)
    assert v.compare(np.float32([[1, 1 + 2**-23]]), np.float64([[1, 1]])).max_abs == 2**-23


def test_shapes_that_differ_are_an_error():
    with pytest.raises(ValueError, match=r"the shapes differ: \(1, 3\) on the device, \(1, 4\) on the CPU"):
        v.compare(np.ones((1, 3)), np.ones((1, 4)))


# --- the outcome ------------------------------------------------------------------------------------------------------


def off_by(error):
    """A difference of this size in every row and element."""
    return v.compare(np.ones((2, 8)) * (1 + error), np.ones((2, 8)))


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(0.0, PASS), (0.9e-3, PASS), (1.1e-3, WARN), (0.9e-2, WARN), (1.1e-2, FAIL), (math.nan, FAIL), (math.inf, FAIL)],
)
def test_a_row_warns_before_it_fails(error, outcome):
    assert v.Limit(1e-3, 1e-2).judge(off_by(error)) == outcome


@pytest.mark.parametrize(("factor", "outcome"), [(0.9, PASS), (1.1, WARN), (9, WARN), (11, FAIL)])
def test_an_element_may_be_off_by_more_than_its_row_and_warns_before_it_fails(factor, outcome):
    reference = np.ones((1, 10**6))
    actual = reference.copy()
    actual[0, 3] += factor * v.ELEMENT_FACTOR * 1e-3
    assert v.Limit(1e-3, 1e-2).judge(v.compare(actual, reference)) == outcome


def test_what_is_to_be_equal_bit_for_bit_passes_only_then():
    limit = v.Limit(0.0, 1e-3)
    assert [limit.judge(off_by(error)) for error in (0, 1e-15, 2e-3)] == [PASS, WARN, FAIL]


def test_a_line_says_what_was_compared_how_far_it_is_off_and_where():
    actual = REFERENCE.copy()
    scale_a_token(actual)
    limit = v.Limit(1e-3, 1e-2)
    entry = v.judged(
        "tokens", "row alone", v.compare(actual, REFERENCE), limit, "look", against=(1e-3, 2e-4, 3e-6), where="batch 4"
    )
    assert (entry.mark, entry.name, entry.advice) == (FAIL, "tokens", "look")
    cells = dict(zip(v.Table.split(v.ERRORS.header("").text), v.Table.split(entry.text), strict=True))
    assert (cells["what"], cells["row"], cells["element"], cells["where"]) == (
        "row_alone",
        "5.0e-01",
        "5.0e-01",
        "batch_4",
    )
    assert (cells["warn"], cells["fail"]) == ("1.0e-03", "1.0e-02")
    assert (cells["fp64"], cells["cost"], cells["cpu"]) == ("1.0e-03", "2.0e-04", "3.0e-06")
    assert entry.problem.startswith(
        "row alone, batch 4: off by 5.0e-01 at image 2, token 7, by 5.0e-01 at index (2, 7, "
    )


def test_a_line_without_a_place_or_a_floor_has_none():
    entry = v.judged("logits", "float32", off_by(0), v.Limit(1e-3, 1e-2), "look")
    cells = dict(zip(v.Table.split(v.ERRORS.header("").text), v.Table.split(entry.text), strict=True))
    assert entry.mark == PASS and (cells["fp64"], cells["cpu"], cells["where"]) == ("-", "-", "-")
    assert entry.problem.startswith("float32: off by 0.0e+00 at image 0, ")
