"""--baseline and --compare: what became worse between two logs is found, by the ids of its checks."""

import re
import time

import pytest
from conftest import start
from small_run import new_context

import validate_npu as v
from validate_npu import FAIL, PASS, WARN, Log

NO_CHECKS = "RESULT: PASS  0 checks: 0 passed, 0 warned, 0 failed, 0 skipped"
CHECKS = [f"comparison.{name}" for name in ("experiment", "checks", "outcomes", "errors", "speed")]


def log(text, name="log.txt"):
    return Log(name, text.splitlines())


def compared(old, new, *arguments):
    """id -> entry, of the checks of a comparison of two texts."""
    entries = v.compare_logs(log(old), log(new), v.parse_arguments([*arguments]))
    found = {entry.id: entry for entry in entries if entry.mark in v.OUTCOMES}
    assert list(found) == CHECKS
    return found


def worse(old, new, *arguments):
    """Name -> mark and text, of the checks that do not pass."""
    found = compared(old, new, *arguments).values()
    return {entry.id.partition(".")[2]: f"{entry.mark}: {entry.text}" for entry in found if entry.mark != PASS}


# --- changes of a log -------------------------------------------------------------------------------------------------


def in_rows(pattern, **change):
    """A change of a log: in the rows whose id matches, cells become change[column](cell)."""
    change = {column.replace("images_s", "images/s"): function for column, function in change.items()}

    def changed(text):
        lines, columns = [], []
        for line in text.splitlines():
            match = v.LINE.fullmatch(line)
            if match and match[2] == "id":
                columns = match[3].split()
            elif match and re.fullmatch(pattern, match[2]) and change.keys() <= set(columns):
                row = dict(zip(columns, match[3].split(), strict=True))
                row |= {column: function(row[column]) for column, function in change.items()}
                line = f"{match[1]} {match[2]} {' '.join(row.values())}"
            elif not match and not line[5:6].isspace():  # a legend or a title
                columns = []
            lines.append(line)
        assert lines != text.splitlines(), "the log has no such row"
        return "\n".join(lines)

    return changed


def slower(factor, batch=r"\d+"):
    """Every batch takes longer by this factor."""
    return in_rows(rf"throughput\.float32\.{batch}", images_s=lambda rate: f"{float(rate) / factor:.4f}",
                   **dict.fromkeys(("p50", "p90"), lambda ms: f"{float(ms) * factor:.4f}"))  # fmt: skip


def one_slow_batch(text):
    """Throughput falls to a third, by a single batch of hundreds: the other figures are unchanged."""
    return in_rows(r"throughput\.float32\.\d+", images_s=lambda rate: f"{float(rate) / 3:.4f}")(text)


def error(column, value, id="precision.embedding.float32"):
    return in_rows(re.escape(id), **{column: lambda _: value})


def replaced(old, new):
    def change(text):
        assert old in text, old
        return text.replace(old, new)

    return change


def mark(mark, id):
    """The check has this outcome instead of PASS."""
    return replaced(f"PASS {id}", f"{mark} {id}")


def added(line):
    return replaced("PASS precision.control", f"{line}\nPASS precision.control")


def without(pattern):
    """Without the lines that match."""

    def change(text):
        lines = [line for line in text.splitlines() if not re.match(pattern, line)]
        assert len(lines) < len(text.splitlines())
        return "\n".join(lines)

    return change


def in_a_note(mark):
    """Batch size 3 was not timed, for a reason."""
    return lambda text: re.sub(r"(?m)^~    throughput\.float32\.3 .*", f"{mark} throughput.float32.3   (a reason)", text)


@pytest.fixture
def steady(rehearsal):
    """The log of a run in which all of many batches took the same time: else the spread would excuse anything."""
    ten = dict.fromkeys(("p50", "p90"), lambda _: "10")
    return in_rows(r"throughput\.float32\.\d+", iqr=lambda _: "0.0%", **ten)(rehearsal.text)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda text: text, {}),
        (slower(1.05), {}),
        (slower(0.5), {}),
        (slower(1.2), {"speed": "FAIL: throughput.float32.1: "}),
        (slower(1.2, "3"), {"speed": "FAIL: throughput.float32.3: "}),
        (one_slow_batch, {}),
        (mark("WARN", "outputs.determinism"), {"outcomes": "FAIL: outputs.determinism: PASS -> WARN"}),
        (mark("FAIL", "precision.control"), {"outcomes": "FAIL: precision.control: PASS -> FAIL"}),
        (mark("SKIP", "model.readback"), {"outcomes": "FAIL: model.readback: PASS -> SKIP"}),
        (error("err_fp64", "3.0e-03"), {"errors": "FAIL: precision.embedding.float32: err_fp64 6."}),
        (error("max_row", "3.0e-03"), {"errors": "FAIL: precision.embedding.float32: max_row 6."}),
        (error("max_elem", "3.0e-03"), {"errors": "FAIL: precision.embedding.float32: max_elem "}),
        (error("max_elem", "inf"), {"errors": "FAIL: precision.embedding.float32: max_elem "}),
        (error("batch_err", "1.0e-03", "outputs.tokens"), {"errors": "FAIL: outputs.tokens: batch_err 0.0e+00 -> "}),
        (error("max_row", "1.0e-03", "precision.modules"), {"errors": "FAIL: precision.modules: max_row 0.0e+00 -> "}),
        (error("max_row", "1.0e-03", "device.matmul"), {"errors": "FAIL: device.matmul: max_row "}),
        (error("cpu_err", "9.0e-03"), {}),
        (added("FAIL precision.new.float32 text"), {"outcomes": "FAIL: precision.new.float32: new -> FAIL"}),
        (added("WARN precision.new.float32 text"), {"outcomes": "FAIL: precision.new.float32: new -> WARN"}),
        (added("PASS precision.new.float32 text"), {}),
        (without("PASS precision.control"), {"checks": "FAIL: precision.control"}),
        (without("PASS outputs.embedding"), {"checks": "FAIL: outputs.embedding"}),
        (without(r"~    throughput\.float32\.3"), {"checks": "FAIL: throughput.float32.3"}),
        (in_a_note("SKIP"), {"outcomes": "FAIL: throughput.float32.3: PASS -> SKIP"}),
        (in_a_note("~   "), {"checks": "FAIL: throughput.float32.3"}),
        (replaced("--model test_vit", "--model test_vit2"), {"experiment": "WARN: run.command: validate_npu.py"}),
        (replaced("device.name          cpu", "device.name  npu:0, Ascend910B4"),
         {"experiment": "WARN: device.name: cpu -> npu:0, Ascend910B4"}),
        (replaced("weights_sha256 ", "weights_sha256 0"), {"experiment": "WARN: model.weights_sha256: "}),
        (replaced("inputs_sha256  ", "inputs_sha256  0"), {"experiment": "WARN: model.inputs_sha256: "}),
        (without(" +model.inputs_sha256 "), {"experiment": "WARN: model.inputs_sha256: "}),
    ],
)  # fmt: skip
def test_what_became_worse_is_found_and_nothing_else(steady, change, found):
    shown = worse(steady, change(steady))
    assert shown.keys() == found.keys(), shown
    assert all(shown[name].startswith(text) for name, text in found.items()), shown


@pytest.mark.parametrize("line", [
    "WARN device.fewer_bits        matmul keeps fewer bits than the settings promise",
    "WARN outputs.batch.64 out of device memory",
    "FAIL precision.module.Linear                 48 1.0e-02  1.0e-03 3.9e-03   256% blocks.5.mlp.fc2",
    "SKIP throughput.stage stage 3 was not finished",
])  # fmt: skip
def test_what_was_wrong_and_is_corrected_is_not_missing(steady, line):
    assert worse(added(line)(steady), steady) == {}


def test_an_error_that_was_not_measured_has_not_grown(steady):
    old, new = (error("batch_err", value, "outputs.tokens")(steady) for value in ("-", "1.0e-03"))
    assert worse(old, new) == {}


def test_a_search_for_the_batch_size_may_end_earlier_but_not_for_a_reason(steady):
    searched = replaced("--batch-sizes 1 3", "--batch-sizes auto")(steady)
    assert worse(searched, without(r"~    throughput\.float32\.3")(searched)) == {}
    assert worse(searched, in_a_note("~   ")(searched)) == {"checks": "FAIL: throughput.float32.3"}


def test_in_a_different_experiment_a_missing_check_is_a_warning(steady):
    change = replaced("--batch-sizes 1 3", "--batch-sizes 1 3 --seed 1")
    shown = worse(steady, change(without("PASS precision.control")(steady)))
    assert shown.keys() == {"experiment", "checks"} and shown["checks"] == "WARN: precision.control"


def test_all_that_became_worse_is_listed(steady):
    tokens, logits = (error("max_row", "inf", f"precision.{name}.float32") for name in ("tokens", "logits"))
    shown = worse(steady, slower(2)(tokens(logits(steady))))
    assert re.search(r"precision\.logits\.float32: max_row .*; precision\.tokens\.float32: max_row ", shown["errors"])
    assert re.search(r"throughput\.float32\.1: .*; throughput\.float32\.3: ", shown["speed"])


@pytest.mark.parametrize(("before", "after", "worse"), [
    ("0.0e+00", "7.0e-06", False),  # rounding
    ("0.0e+00", "8.0e-06", True),
    ("1.0e-03", "1.2e-03", False),
    ("1.0e-03", "1.3e-03", True),
    ("1.0e-03", "1.0e-04", False),
    ("1.0e-03", "inf", True),
    ("inf", "inf", False),
])  # fmt: skip
@pytest.mark.parametrize("column", v.ERROR_COLUMNS)
def test_errors_may_grow_by_a_quarter_and_by_rounding(steady, column, before, after, worse):
    id = "outputs.tokens" if column == "batch_err" else "precision.embedding.float32"
    old, new = (error(column, value, id)(steady) for value in (before, after))
    assert (compared(old, new)["comparison.errors"].mark == FAIL) == worse


def small_log(stage, *entries):
    lines = [line for entry in entries for line in entry.lines()]
    return "\n".join(["validate_npu 3.0: test_vit on npu:0", "Lines", "~    run.date today", "", stage, *lines])


def one_timing(ms, iqr):
    row = v.THROUGHPUT.entry("~", "throughput.float32.4", 4000 / ms, ms, ms, ms, ms, iqr)
    return small_log("[5/5] throughput", *v.THROUGHPUT.header(), row)


@pytest.mark.parametrize(
    ("arguments", "slower_by", "outcome"),
    [((), 3.2, PASS), ((), 3.5, FAIL), (("--max-slowdown", "0"), 1.7, PASS), (("--max-slowdown", "0"), 2.0, FAIL)],
)
def test_half_the_spreads_of_both_runs_is_allowed(arguments, slower_by, outcome):
    """Half of 20 % and of 10 %, and the 10 % that are allowed by default: 10 ms may become 13.3."""
    old, new = one_timing(10.0, 0.2), one_timing(10.0 + slower_by, 0.1)
    assert compared(old, new, *arguments)["comparison.speed"].mark == outcome


@pytest.mark.parametrize(("mean", "p50", "p90", "outcome"), [
    (1.3, 1.3, 1.3, FAIL),
    (1.3, 1.3, 1.0, PASS),
    (1.3, 1.0, 1.3, PASS),  # a few slow batches
    (1.0, 1.3, 1.3, PASS),
    (1.0, 1.4, 1.0, FAIL),  # the median rose by more than 10 % and both spreads
])  # fmt: skip
def test_throughput_p50_and_p90_must_all_be_slower_unless_the_median_exceeds_the_spreads(mean, p50, p90, outcome):
    """The factors by which the time of a batch grew, at spreads of 10 %."""
    old = {"images/s": 100.0, "p50": 10.0, "p90": 10.0, "iqr": 0.1}
    new = {"images/s": 100.0 / mean, "p50": 10.0 * p50, "p90": 10.0 * p90, "iqr": 0.1}
    assert v.compare_speed(old, new, 10.0)[1] == outcome


@pytest.mark.parametrize(
    ("times", "outcome"), [(0.5, PASS), (1.0, PASS), (1.1, PASS), (1.2, WARN), (3.0, WARN), (4.0, WARN), (5.0, FAIL)]
)
def test_the_check_of_speed_can_always_fail(times, outcome):
    """Spreads of 95 % excuse any fall of the throughput: that is a WARN, and a median five times as long a FAIL."""
    speed = compared(one_timing(10.0, 0.95), one_timing(10.0 * times, 0.95))["comparison.speed"]
    assert speed.mark == outcome and ("not judged: large spreads" in speed.text) == (outcome == WARN)


@pytest.mark.parametrize(("batches", "times", "outcome"), [
    ((4, 4), 1.0, PASS), ((4, 4), 1.1, PASS), ((4, 4), 1.2, WARN), ((4, 4), 9.0, WARN), ((4, 4), 0.1, PASS),
    ((4, 5), 9.0, WARN), ((5, 4), 9.0, WARN), ((5, 5), 9.0, FAIL),
])  # fmt: skip
def test_rows_with_fewer_than_five_batches_can_only_warn(batches, times, outcome):
    def timed(count, ms):
        entry = v.timing_entry(v.Timing(v.FLOAT32, 4, total_ms=(ms,) * count), new_context())
        return small_log("[5/5] throughput", *v.THROUGHPUT.header(), entry)

    old, new = map(timed, batches, (10.0, 10.0 * times))
    speed = compared(old, new)["comparison.speed"]
    assert speed.mark == outcome and ("or few batches" in speed.text) == (outcome == WARN)


def test_each_device_is_compared_with_itself():
    """Device 1 became slower, device 2 was always slow, and device 3 has lost a row. Rows together are not compared."""

    def of(rates):
        rows = (v.THROUGHPUT.entry("~", f"devices.{rank}.float32.4", 4000 / ms, *[ms] * 4, 0.0) for rank, ms in rates.items())  # fmt: skip
        return small_log("[devices]", *v.THROUGHPUT.header(), *rows)

    shown = worse(of({1: 10.0, 2: 20.0, 3: 10.0, "together.1": 1.0}), of({1: 14.0, 2: 20.0, "together.1": 9.0}))
    assert shown == {"speed": "FAIL: devices.1.float32.4: 400.00 -> 285.71 images/s", "checks": "FAIL: devices.3.float32.4"}


def test_speeds_have_a_table_whose_lines_vary():
    entries = list(v.compare_logs(log(one_timing(10.0, 0.0)), log(one_timing(12.5, 0.0)), v.parse_arguments([])))
    assert [entry.mark for entry in entries[:3]] == ["#", "~", "#"]
    row = dict(zip(entries[0].text.split(), entries[1].text.split(), strict=True))
    assert entries[1].id == "comparison.throughput.float32.4"
    assert row == {
        "old": "400.00",
        "new": "320.00",
        "ratio": "0.80",
        "old_p50": "10",
        "new_p50": "12.5",
        "allowed": "10%",
    }


@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t, lambda t: t + "\n\n", lambda t: t.replace("\n", "\r\n")])
def test_a_log_is_read_as_editors_and_mail_change_it(tmp_path, change):
    text = one_timing(10.0, 0.1) + f"\n\n{NO_CHECKS}"
    (tmp_path / "log.txt").write_bytes(change(text).encode("utf-8"))
    read = Log.read(str(tmp_path / "log.txt"))
    assert read.texts == log(text).texts and read.speeds == log(text).speeds != {}


def test_a_device_that_became_worse_is_found():
    entries = (v.DEVICES.entry(mark, "devices.1", 0, "npu:1", 9, 0, 0, 1e-6, "Ascend910B4") for mark in (PASS, FAIL))
    old, new = (small_log("[devices]", *v.DEVICES.header(), entry) for entry in entries)
    assert worse(old, new) == {"outcomes": "FAIL: devices.1: PASS -> FAIL"}


def test_a_run_whose_model_did_not_load_is_compared(steady):
    """Its log ends with stage 2, so it has no checksums."""
    head, device, model, *_ = steady.split("\n\n")
    failed = v.Entry(FAIL, "model.stage", "error code 507015").lines()
    shown = worse(steady, "\n\n".join([head, device, "\n".join([model.splitlines()[0], *failed])]))
    assert shown["outcomes"] == "FAIL: model.stage: new -> FAIL"
    assert "model.readback" in shown["checks"] and "model.weights_sha256: " in shown["experiment"]


def test_a_message_with_as_many_words_as_a_row_has_cells_is_no_row():
    message = "RuntimeError: CUDA error: an illegal memory access"
    note = v.PRECISION.note(FAIL, "precision.float16", message)
    text = small_log("[4/5] precision", *v.PRECISION.header(), note)
    assert len(message.split()) == len(v.PRECISION.columns)
    assert worse(text, text) == {} and not log(text).rows and log(text).marks == {"precision.float16": FAIL}


@pytest.mark.parametrize("part", ["[comparison] with old.txt", "[failures]", "[summary]"])
def test_an_earlier_comparison_the_failures_and_the_summary_are_no_part_of_a_log(steady, part):
    head, _, end = steady.partition("\n\n[summary]")
    more = f"{head}\n\n{part}\nFAIL comparison.speed      it was slow\n     next: see\n\n[summary]{end}"
    assert worse(steady, more) == worse(more, steady) == {}
    assert log(more).texts == log(steady).texts and "summary.precision" not in log(steady).texts


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("line_end", ["\n", "\r\n", "\r"])
def test_a_log_is_read_with_the_line_ends_of_any_system(tmp_path, steady, line_end):
    (tmp_path / "log.txt").write_bytes(steady.replace("\n", line_end).encode())
    read = Log.read(str(tmp_path / "log.txt"))
    assert vars(read) == vars(log(steady))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the log .*old.txt cannot be read"),
        ("a poem\n", "old.txt is not a complete log of validate_npu.py"),
        ("", "old.txt is not a complete log of validate_npu.py"),
        ("\n\n", "old.txt is not a complete log of validate_npu.py"),
        ("validate_npu: test_vit on npu:0\n[1/5] device\n", "old.txt is not a complete log of validate_npu.py"),
        ("validate_npu 3.0: test_vit on npu:0\n\n[1/5] device\n", "old.txt is not a complete log of validate_npu.py"),
        (
            "validate_npu: test_vit on npu:0\n\nRESULT: PASS\n",
            "old.txt is a log of version 1, this script is version 3.0",
        ),
        (
            "validate_npu 2.3: test_vit on npu:0\n\nRESULT: PASS\n",
            "old.txt is a log of version 2.3, this script is version 3",
        ),
        ("validate_npu 3.0: test_vit on npu:0\n\nRESULT: NOT RUN  (exit status 2; ...)\n", "old.txt is not a complete log"),
        ("RESULT: PASS  1 checks\n", "old.txt is not a complete log of validate_npu.py"),
        (b"\xff\xfe\x00", "old.txt is not a complete log of validate_npu.py"),
    ],
)
def test_a_file_that_is_no_complete_log_of_this_version_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "old.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(v.CannotRun, match=message):
        Log.read(str(tmp_path / "old.txt"))


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.98])
def test_the_beginning_of_a_log_is_refused(tmp_path, steady, part):
    (tmp_path / "old.txt").write_text(steady[: int(part * len(steady))].rpartition("\n")[0])
    with pytest.raises(v.CannotRun, match="its first or its last line is missing"):
        Log.read(str(tmp_path / "old.txt"))


@pytest.mark.parametrize(
    "change",
    [
        replaced("PASS outputs.tokens", "FAIL outputs.tokens"),
        without("PASS precision"),
        lambda text: text.replace("RESULT: PASS", "RESULT: FAIL").replace("PASS outputs.tokens", "FAIL outputs.tokens"),
    ],
    ids=["a failed check", "no stage 4", "other counts"],
)
def test_a_log_whose_last_line_does_not_count_its_checks_is_refused(tmp_path, steady, change):
    (tmp_path / "old.txt").write_text(change(steady))
    with pytest.raises(v.CannotRun, match="old.txt was cut or edited"):
        Log.read(str(tmp_path / "old.txt"))


def test_a_result_that_contradicts_its_own_counts_is_refused(tmp_path, steady):
    failed = steady.replace("PASS outputs.tokens", "FAIL outputs.tokens").replace(" 0 failed", " 1 failed")
    passed = int(re.search(r"(\d+) passed", steady)[1])
    failed = failed.replace(f" {passed} passed", f" {passed - 1} passed")
    (tmp_path / "old.txt").write_text(failed)
    with pytest.raises(v.CannotRun, match="old.txt was cut or edited"):
        Log.read(str(tmp_path / "old.txt"))
    (tmp_path / "old.txt").write_text(failed.replace("RESULT: PASS", "RESULT: FAIL"))
    assert Log.read(str(tmp_path / "old.txt")).marks["outputs.tokens"] == FAIL


def test_a_log_without_its_first_line_is_refused(tmp_path, steady):
    (tmp_path / "old.txt").write_text(steady.partition("\n")[2])
    with pytest.raises(v.CannotRun, match="its first or its last line is missing"):
        Log.read(str(tmp_path / "old.txt"))


def test_a_log_without_any_stage_has_no_checks(tmp_path):
    (tmp_path / "log.txt").write_text(f"validate_npu 3.0: test_vit on cpu\n\n{NO_CHECKS}\n")
    read = Log.read(str(tmp_path / "log.txt"))
    assert not read.marks and not read.texts and not read.rows


def test_logs_are_compared_by_a_command(tmp_path, steady):
    (tmp_path / "old.txt").write_text(steady)
    (tmp_path / "new.txt").write_text(slower(1.2)(steady))
    (tmp_path / "old_version.txt").write_text(steady.replace("validate_npu 3.0", "validate_npu 2.3", 1))
    same, slow, version = (
        start(["--compare", "old.txt", name], tmp_path) for name in ("old.txt", "new.txt", "old_version.txt")
    )
    assert same.status == 0 and same.result == "RESULT: PASS  5 checks: 5 passed, 0 warned, 0 failed, 0 skipped"
    assert slow.status == 1 and slow.result.startswith("RESULT: FAIL  5 checks: 4 passed")
    (block,) = slow.failures
    assert block.startswith("FAIL comparison.speed: throughput.float32.1: ")
    assert block.endswith("next: see what changed between the runs: versions and settings of stage 1, other work on the"
                          " host or the device")  # fmt: skip
    assert same.text is slow.text is None, "nothing was run, so there is no log"
    assert not same.stderr and not slow.stderr
    assert version.status == 2 and "old_version.txt is a log of version 2.3" in version.stderr


@pytest.mark.timing
def test_two_logs_are_compared_without_torch(tmp_path, rehearsal):
    (tmp_path / "log.txt").write_text(rehearsal.text)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        assert start(["--compare", "log.txt", "log.txt"], tmp_path).status == 0
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.5
