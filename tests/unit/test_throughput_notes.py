"""Stage 5's notes: what the table of times means, and whether its figures are reliable."""

import dataclasses

import pytest
from small_run import after_model_stage, cells, marks, new_context

import validate_npu as v

GPU = v.torch.device("cuda", 0)
MEASURED = v.Timing(v.FLOAT32, 4, launch_ms=(9.0,) * 5, total_ms=(10.0,) * 5)  # 400 images/s
FASTER = v.Timing(v.FLOAT32, 8, launch_ms=(1.0,) * 5, total_ms=(10.0,) * 5)  # 800 images/s
NO_FASTER = v.Timing(v.FLOAT32, 16, launch_ms=(1.0,) * 5, total_ms=(19.9,) * 5)  # 804 images/s
SOME_SLOW = dataclasses.replace(MEASURED, total_ms=(8.0, 8.0, 10.0, 12.0, 12.0))
ONE_SLOW = dataclasses.replace(MEASURED, total_ms=(10.0, 10.0, 10.0, 10.0, 300.0))
COMPILED = v.Timing(v.MODES["float32+compile"], 4, 5000.0, launch_ms=(1.0,) * 5, total_ms=(5.0,) * 5)  # 800 images/s
HALF = dataclasses.replace(FASTER, mode=v.MODES["float16"])


@pytest.mark.parametrize(
    ("timings", "name", "text"),
    [
        ([MEASURED, FASTER], "host_bound", "float32 4: the device waits for the host; "),
        (
            [MEASURED, dataclasses.replace(MEASURED, mode=HALF.mode)],
            "host_bound",
            "float32 4, float16 4: the device waits",
        ),
        ([FASTER], "host_bound", None),
        ([SOME_SLOW], "doubtful", "float32 4: not reliable (iqr over 10%, under 5 batches, or not steady to 2%): "),
        ([dataclasses.replace(MEASURED, total_ms=(10.0,) * 4)], "doubtful", "float32 4: "),
        ([ONE_SLOW], "doubtful", None),
        ([dataclasses.replace(MEASURED, steady=False)], "doubtful", "float32 4: "),
        ([MEASURED], "doubtful", None),
        ([MEASURED, FASTER, NO_FASTER], "saturated.float32", "float32 at batch size 8: the next size gains under 5%"),
        ([MEASURED, FASTER], "saturated.float32", None),
        # 5 s at 1.25 ms less for each image
        ([MEASURED, COMPILED], "compile.float32+compile", "with the first calls: batch size 4 5.0 s (paid for after 4e+03 images)"),
        ([dataclasses.replace(MEASURED, total_ms=(5.0,) * 5), COMPILED], "compile.float32+compile",
         "with the first calls: batch size 4 5.0 s (no faster)"),
        ([dataclasses.replace(COMPILED, batch=8), MEASURED], "compile.float32+compile", "with the first calls: batch size 8 5.0 s"),
        ([MEASURED], "compile.float32+compile", None),
    ],  # fmt: skip
)
def test_the_table_is_explained(timings, name, text):
    found = [entry for entry in v.explain_throughput(timings, GPU) if entry.id == f"throughput.{name}"]
    assert all(entry.mark == v.VARIES for entry in found), "what depends on a clock must not appear in a diff"
    assert len(found) == (text is not None) and all(entry.text.startswith(text) for entry in found)


@pytest.mark.parametrize(("batches", "percentile", "iqr"), [(1, "-", "-"), (4, "-", "-"), (5, "10", "0.0%")])
def test_a_row_with_few_batches_has_no_percentiles(batches, percentile, iqr):
    entry = v.timing_entry(dataclasses.replace(MEASURED, total_ms=(10.0,) * batches), new_context())
    row = cells(v.THROUGHPUT, entry)
    assert row == {"images/s": "400.00", **dict.fromkeys(("p50", "p90", "p95", "p99"), percentile), "iqr": iqr}


def fastest(timings, errors, *arguments):
    """The rows by mode, and the sentence on the fastest mode if there is one."""
    context, loaded = after_model_stage()
    context = new_context(*arguments)
    entries = list(v.fastest_modes(context, loaded.flops, v.by_mode(timings), errors))
    rows = {
        entry.id.removeprefix("throughput.best."): cells(v.FASTEST, entry) for entry in entries if ".best." in entry.id
    }
    return rows, [entry.text for entry in entries if entry.id == "throughput.fastest"]


def test_the_fastest_batch_size_of_each_mode_is_a_row_with_its_error():
    rows, _ = fastest([MEASURED, FASTER, NO_FASTER, HALF], {"float32": 1e-3})
    columns = "batch", "images/s", "speedup", "err_fp64", "share"
    assert [rows["float32"][name] for name in columns] == ["16", "804.02", "1.00", "1.0e-03", "-"]
    assert [rows["float16"][name] for name in columns] == ["8", "800.00", "0.99", "-", "-"], "it failed in stage 4"
    assert float(rows["float32"]["TFLOP/s"]) > 0 and len(rows["float32"]["bar"]) == v.BAR_WIDTH


def test_one_mode_needs_no_table_of_fastest_modes():
    assert fastest([MEASURED, FASTER], {"float32": 1e-3}) == ({}, [])


@pytest.mark.parametrize(
    ("errors", "max_error", "sentence"),
    [
        ({"float32": 1e-6, "float16": 1e-3}, 0.01, "float16 at batch size 8, 2.00 x float32"),
        ({"float32": 1e-6, "float16": 2e-2}, 0.01, "float32 at batch size 4, 1.00 x float32"),
        ({"float32": 1e-6}, 0.01, "float32 at batch size 4, 1.00 x float32"),
        ({"float32": 1e-6, "float16": 2e-2}, 0.1, "float16 at batch size 8, 2.00 x float32"),
        ({}, 0.01, None),
    ],
    ids=["accurate", "inaccurate", "failed", "a larger --max-error", "all failed"],
)
def test_the_fastest_mode_is_one_whose_error_is_at_most_max_error(errors, max_error, sentence):
    _, sentences = fastest([MEASURED, HALF], errors, "--max-error", max_error)
    assert sentences == ([f"{sentence} (error within --max-error {max_error})"] if sentence else [])


@pytest.mark.parametrize("mode", ["hf32", "amp-float16", "bfloat16"])
def test_modes_in_half_precision_have_a_share_of_the_float16_peak_of_the_chip(monkeypatch, mode):
    """No official figure is known for float32 or HF32."""
    monkeypatch.setitem(v.CHIPS, "cpu", ("a family", 0.5))
    rows, _ = fastest([MEASURED, dataclasses.replace(MEASURED, mode=v.MODES[mode])], {})
    rate = 400 * after_model_stage()[1].flops / 1e12
    share = f"{rate / 0.5:.0%}" if mode != "hf32" else "-"
    assert rate > 0 and (rows[mode]["TFLOP/s"], rows[mode]["share"]) == (f"{rate:.3f}", share)


@pytest.mark.parametrize(
    ("chip", "peak"),
    [("Ascend910B4", 245.8), ("Ascend910B4-1", 245.8), ("Ascend910_9391", 363.7), ("Ascend310P3", 69.5), ("cpu", None)],
)
def test_the_peak_is_found_by_the_name_of_the_chip(monkeypatch, chip, peak):
    monkeypatch.setattr(v, "chip_name", lambda device: chip)
    rows, _ = fastest([MEASURED, dataclasses.replace(MEASURED, mode=HALF.mode, total_ms=(0.005,))], {})
    rate = 800_000 * after_model_stage()[1].flops / 1e12
    assert rows["float16"]["share"] == (f"{rate / peak:.0%}" if peak else "-") != "0%"


@pytest.mark.parametrize(
    ("count", "last", "mark", "text"),
    [
        (100, 10.0, v.PASS, "no slower after 1 s"),
        (100, 9.0, v.PASS, "no slower after 1 s"),
        (100, 10.4, v.PASS, "no slower after 1 s"),
        (100, 12.5, v.WARN, "throughput fell by 20% in 1 s, limit 5%"),
        (10, 12.5, v.WARN, "throughput fell by 20% in 1 s, limit 5%"),
        (9, 12.5, v.SKIP, "not judged: 9 batches in 1 s"),
    ],
)
def test_sustained_load_warns_if_the_last_tenth_is_slower_than_the_first(monkeypatch, count, last, mark, text):
    tenth = max(count // 10, 5)
    total_ms = (10.0,) * (count - tenth) + (last,) * tenth
    timing = v.Timing(v.FLOAT32, 4, total_ms=total_ms, found=v.compare(*[v.np.ones((1, 2))] * 2))
    monkeypatch.setattr(v, "time_size", lambda *args, **kwargs: timing)
    context, loaded = after_model_stage("--duration", "1")
    checked = v.Precision("logits", {}, {"float32": loaded.references.tolerance()}, {}, [])
    entries = list(v.sustained_load(context, v.Outputs(loaded, None), timing, checked))
    assert marks(entries) == {"throughput.sustained": mark, "throughput.outputs.sustained.float32": v.PASS}
    figures, result, _ = entries
    assert result.text == text
    if mark == v.SKIP:
        return
    tenths = f"400.00 images/s, p99 10 ms, last tenth {4000 / last:.2f} images/s, p99 {last:.5g} ms"
    assert figures.text == f"float32.4: first tenth of 1 s {tenths}"
