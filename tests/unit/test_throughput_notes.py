"""Stage 5's notes: what the table of times means, and whether its figures can be trusted."""

import dataclasses

import pytest

import validate_npu as v

MEASURED = v.Timing(v.FLOAT32, 4, host_ms=(9.0,) * 5, total_ms=(10.0,) * 5)  # 400 images/s
FASTER = v.Timing(v.FLOAT32, 8, host_ms=(1.0,) * 5, total_ms=(10.0,) * 5)  # 800 images/s
NO_FASTER = v.Timing(v.FLOAT32, 16, host_ms=(1.0,) * 5, total_ms=(19.9,) * 5)  # 804 images/s
SOME_SLOW = dataclasses.replace(MEASURED, total_ms=(8.0, 8.0, 10.0, 12.0, 12.0))
ONE_SLOW = dataclasses.replace(MEASURED, total_ms=(10.0, 10.0, 10.0, 10.0, 300.0))
GROWS = "batch 8 with 800.00 images/s; the largest that was tried, and throughput still grows"


@pytest.mark.parametrize(
    ("timings", "name", "text"),
    [
        ([MEASURED, FASTER], "best", GROWS),
        ([MEASURED, FASTER, NO_FASTER], "best", "batch 16 with 804.02 images/s; it saturates at batch 8"),
        ([MEASURED], "TFLOP/s", "4.000 at batch 4"),
        ([MEASURED, FASTER], "host-bound", "batch 4: launching takes over 80% of the time"),
        ([FASTER], "host-bound", None),
        ([SOME_SLOW], "doubtful", "batch 4: spread over 10%"),
        ([ONE_SLOW], "doubtful", None),
        ([dataclasses.replace(MEASURED, steady=False)], "not steady", "batch 4: the warm-up ended before"),
        ([MEASURED], "not steady", None),
    ],
)
def test_the_table_is_explained(timings, name, text):
    entries = v.explain_throughput(timings, 10**10, v.torch.device("cuda", 0), chip="some chip")
    found = [entry for entry in entries if entry.name == name]
    assert all(entry.mark == v.VARIES for entry in found), "what a clock says must not show in a diff"
    assert [text in entry.text for entry in found] == ([True] if text else [])


def test_the_share_of_a_known_chips_peak_is_said():
    entries = v.explain_throughput([MEASURED], 10**10, v.torch.device("cuda", 0), chip="Ascend910B4")
    assert any("4.000 at batch 4, 1.63% of the 245.8 that Ascend910B4 has in fp16" in entry.text for entry in entries)
