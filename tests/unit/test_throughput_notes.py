"""Stage 5's notes: what the table of times means, and whether its figures can be trusted."""

import dataclasses

import pytest
from small_run import new_run

import validate_npu as v

MEASURED = v.Timing(v.FLOAT32, 4, host_ms=(9.0,) * 5, total_ms=(10.0,) * 5)  # 400 images/s
FASTER = v.Timing(v.FLOAT32, 8, host_ms=(1.0,) * 5, total_ms=(10.0,) * 5)  # 800 images/s
NO_FASTER = v.Timing(v.FLOAT32, 16, host_ms=(1.0,) * 5, total_ms=(19.9,) * 5)  # 804 images/s
SOME_SLOW = dataclasses.replace(MEASURED, total_ms=(8.0, 8.0, 10.0, 12.0, 12.0))
ONE_SLOW = dataclasses.replace(MEASURED, total_ms=(10.0, 10.0, 10.0, 10.0, 300.0))


@pytest.mark.parametrize(
    ("timings", "name", "text"),
    [
        ([MEASURED, FASTER], "host-bound", "batch 4: launching takes over 80% of the time"),
        ([FASTER], "host-bound", None),
        ([SOME_SLOW], "doubtful", "batch 4: spread over 10%"),
        ([ONE_SLOW], "doubtful", None),
        ([dataclasses.replace(MEASURED, steady=False)], "not steady", "batch 4: the warm-up ended before"),
        ([MEASURED], "not steady", None),
    ],
)
def test_the_table_is_explained(timings, name, text):
    entries = v.explain_throughput(timings, v.torch.device("cuda", 0))
    found = [entry for entry in entries if entry.name == name]
    assert all(entry.mark == v.VARIES for entry in found), "what a clock says must not show in a diff"
    assert [text in entry.text for entry in found] == ([True] if text else [])


HALF = dataclasses.replace(FASTER, mode=v.MODES["half-float16"])


@pytest.mark.parametrize(
    ("timings", "row", "sentence"),
    [
        ([MEASURED], ["float32", "fastest", "4", "400.00", "1.00", "1.0e-03"], "float32 with batch 4"),
        ([MEASURED, FASTER], ["float32", "fastest", "8", "800.00", "1.00", "1.0e-03"], "throughput still grows there"),
        ([MEASURED, FASTER, NO_FASTER], ["float32", "fastest", "16", "804.02", "1.00", "1.0e-03"], "1.00 times float32"),
        ([MEASURED, HALF], ["half-float16", "fastest", "8", "800.00", "2.00", "-"], "float32 with batch 4"),
    ],
    ids=["one size", "grows", "saturates", "half, which failed in stage 4"],
)
def test_each_modes_fastest_batch_stands_beside_its_error(timings, row, sentence):
    run = new_run("--batch-sizes", *(timing.batch for timing in timings))
    run.images, run.errors = v.torch.zeros(1, 3, 160, 160), {"float32": 1e-3}
    *rows, answer = v.fastest_mode(run, v.by_mode(timings))
    cells = [rows[-1].name, *v.Table.split(rows[-1].text)]
    assert cells[:6] == row and float(cells[6]) > 0, "TFLOP/s of test_vit"
    assert cells[7:] == ["-", "8" if timings[-1] == NO_FASTER else "-"], "no peak is known of a CPU"
    assert sentence in answer.text and ("still grows" in answer.text) == (sentence == "throughput still grows there")


@pytest.mark.parametrize("mode", ["float32", "hf32", "amp-float16", "half-bfloat16"])
def test_modes_in_half_precision_have_a_share_of_the_chips_float16_peak(monkeypatch, mode):
    """No official figure is known for float32 or HF32."""
    monkeypatch.setitem(v.FP16_PEAK, "cpu", 0.5)
    run = new_run()
    run.images = v.torch.zeros(1, 3, 160, 160)
    _, row, _ = v.fastest_mode(run, [[dataclasses.replace(MEASURED, mode=v.MODES[mode])]])
    rate = 400 * v.count_flops(run) / 1e12
    share = f"{rate / 0.5:.2%}" if v.MODES[mode].in_half else "-"
    assert rate > 0 and v.Table.split(row.text)[5:7] == [f"{rate:.3f}", share]


@pytest.mark.parametrize(
    ("chip", "peak"),
    [("Ascend910B4", 245.8), ("Ascend910B4-1", 245.8), ("Ascend910_9391", 363.7), ("Ascend310P3", 69.5), ("cpu", None)],
)
def test_the_peak_is_that_of_the_chips_name(monkeypatch, chip, peak):
    monkeypatch.setattr(v, "chip_name", lambda device: chip)
    assert v.fp16_peak(new_run().device) == peak
