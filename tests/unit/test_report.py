"""The log: it can be read back, no line is too long or broken, and its failures are enough for a bug report."""

import math
import os
import random
import resource
import subprocess
import time
from types import SimpleNamespace

import pytest
from conftest import Run
from small_run import CPU, after_model_stage, alter, differs_by, first_pass_again

import validate_npu as v
from validate_npu import FACT, FAIL, HEADER, PASS, SKIP, VARIES, WARN, Entry, Log

torch = v.torch
TABLES = {name: table for name, table in vars(v).items() if isinstance(table, v.Table)}
LIMITS = v.Tolerance(1e-3, 1e-2)


@pytest.fixture
def report():
    made = v.Report(quiet=True)
    made.timeout, made.device, made.started = 600, CPU, 0.0
    yield made
    made.timer.cancel()


def words(draw, count, longest=12):
    return ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz.,:;()-+%#~0123456789", k=draw.randint(1, longest)))
            for _ in range(count)]  # fmt: skip


def lines_of(entries):
    return [line for entry in entries for line in entry.lines()]


def read(entries):
    """Lines of entries, as a Log reads them."""
    return Log("log", ["validate_npu 3.0: test_vit on cpu", *lines_of(entries)])


# --- entries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [PASS, SKIP, WARN, FAIL, FACT, VARIES])
@pytest.mark.parametrize("seed", range(10))
def test_entries_of_any_length_are_read_as_they_were_written(mark, seed):
    draw = random.Random(seed)
    ids = [f"stage.{'x' * draw.randint(1, 40)}.{n}" for n in range(60)]
    entries = [Entry(mark, id, " ".join(words(draw, n)), width=draw.choice((22, 36))) for n, id in enumerate(ids)]
    log, lines = read(entries), lines_of(entries)
    assert log.texts == {entry.id: entry.text for entry in entries} and not log.rows
    assert log.marks == ({entry.id: mark for entry in entries} if mark in v.OUTCOMES else {})
    assert max(map(len, lines)) <= v.WIDTH == 99 < sum(map(len, lines)) / len(entries), "and many are wrapped"
    assert all(line.startswith("~") == (mark == VARIES) for line in lines), "diff -I '^~' ignores the whole entry"


def test_entries_of_all_kinds_may_follow_each_other():
    draw, marks = random.Random(0), (PASS, SKIP, WARN, FAIL, FACT, VARIES)
    entries = [Entry(draw.choice(marks), f"stage.{i}", " ".join(words(draw, draw.randint(0, 50)))) for i in range(200)]
    entries = [entry for pair in zip(entries, [v.PRODUCTS.legend("a legend " * 20), *entries]) for entry in pair[:1]]
    assert read(entries).texts == {entry.id: entry.text for entry in entries}


def test_an_entry_begins_with_its_mark_and_id_and_continues_with_an_indent():
    first, *more = Entry(WARN, "model.fallback", " ".join(["word"] * 100)).lines()
    assert first.startswith("WARN model.fallback       word ")
    assert more and all(line.startswith(" " * 10 + "w") for line in more)


@pytest.mark.parametrize("text", ["x" * 300, f"before {'x' * 300} behind", ""])
def test_a_word_that_is_longer_than_a_line_and_an_id_that_is_longer_than_its_column_are_kept(text):
    entries = [
        Entry(PASS, "stage.an_id_that_is_much_longer_than_its_column", "some text"),
        Entry(FAIL, "stage.id", text),
    ]
    assert read(entries).texts == {entry.id: entry.text for entry in entries}


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_row_has_a_cell_for_each_column_whatever_the_cells_are(name):
    table, draw = TABLES[name], random.Random(0)
    for _ in range(300):
        row = []
        for _, form in table.columns:
            number = draw.choice([0.0, 1e-9, 0.5, 12.3, 1e7, 1e12, math.inf, math.nan])
            text = draw.choice(["", "text", "two words", "a text that is longer than any column has room for"])
            row.append(draw.choice([None, text, number] if form[-1] in "efg%" else [None, text]))
        for cell, shown in zip(row, table.row(*row).split(), strict=True):
            if cell is None or isinstance(cell, str):
                assert shown == (cell or "-").replace(" ", "_")
            else:
                assert math.isfinite(cell) or str(cell) in shown


@pytest.mark.parametrize("name", TABLES)
def test_a_row_is_aligned_with_its_header(name):
    table = TABLES[name]
    (first, *units), row = table.header(), table.row(*(1 if form[-1] in "efg%" else "-" for _, form in table.columns))
    for (_, form), title, cell in zip(table.columns, spans(first.text), spans(row), strict=True):
        side = 0 if form.startswith("<") else 1
        assert title[side] == cell[side]
    for unit, end in spans(units[0].text) if units else ():
        assert end in {end for _, end in spans(first.text)}
    assert all(len(entry.lines()) == 1 for entry in table.header())


def spans(text):
    """Begin and end of each word."""
    end = 0
    for word in text.split():
        begin = text.index(word, end)
        end = begin + len(word)
        yield begin, end


@pytest.mark.parametrize("figure", [1e-9, 1.2345e-5, 12345.6, 1e12, math.inf, math.nan])
@pytest.mark.parametrize("used", ["12%", "99999%"])
@pytest.mark.parametrize(
    ("table", "id"),
    [
        (v.OUTPUTS, "outputs.feature_map.3"),
        (v.PRECISION, "precision.feature_map.1.amp-bfloat16"),
        (v.MODULES, "precision.module.EvaAttentionWithALongName.float32"),
    ],
    ids=["outputs", "precision", "modules"],
)
def test_each_cell_of_a_row_is_read_back_whatever_its_figures_are(table, id, used, figure):
    """Trained weights give activations of 12345.6, and a broken device anything. Only a module's name may be cut."""
    names = [name for name, _ in table.columns]
    special = {"shape": "Bx1024x14x14", "min": -figure, "count": 12, "used": used, "worst": f"{'blocks.' * 20}fc1"}
    row = [special.get(name, figure) for name in names]
    entry = table.entry(FAIL, id, *row)
    cells = read([*table.header(), entry, table.legend("text")]).rows[id]
    assert max(map(len, entry.lines())) <= 99
    for name, cell, (_, form) in zip(names, row, table.columns, strict=True):
        if name == "worst":
            assert len(cells[name]) < 40 and cells[name].startswith("..") and cells[name].endswith(".fc1")
        else:
            assert cells[name] == (cell if isinstance(cell, str) else format(cell, form).strip())


def test_a_row_needs_a_cell_for_each_column():
    with pytest.raises(ValueError, match="zip.. argument 2 is longer"):
        v.DEVICES.row(0, "npu:1")


def test_numbers_are_printed_with_the_digits_of_their_column():
    assert v.SPEED.row(1.234, 0, 1.0, 12345.6, 1.266, 0.125).split() == [
        "1.23",
        "0.00",
        "1.00",
        "1.235e+04",
        "1.266",
        "12%",
    ]


# --- the whole log ----------------------------------------------------------------------------------------------------


def whole_log(report, path):
    report.output = str(path)
    report.line("validate_npu 3.0: test_vit on npu:0")
    report.add([Entry(FACT, "run.command", "seed 0, " * 40), Entry(VARIES, "run.date", "today")])

    def precision():
        yield from v.PRECISION.header()
        rows = [(v.PRECISION, {"err_fp64": 1e-5, "expected": expected, "cpu_err": 1e-6}) for expected in (0.0, None)]
        yield v.comparison("precision.tokens.float32", differs_by(1e-5), LIMITS, row=rows[0])
        yield v.comparison("precision.logits.float32", differs_by(math.nan), LIMITS, row=rows[1])
        yield v.PRECISION.note(SKIP, "precision.strict", "the device does not support it " * 9)
        yield v.PRECISION.legend("two words " * 30)
        yield Entry(SKIP, "precision.control", "there is none")

    report.run("precision", precision())
    report.run("throughput", iter([Entry(WARN, "throughput.outputs.float32", "it is slow " * 30, advice="wait " * 40)]))
    report.quiet = False  # so that it is written
    return report.close()


def test_what_stages_yield_is_what_a_log_gives_back(report, tmp_path):
    status = whole_log(report, tmp_path / "log.txt")
    log = Log.read(report.output)
    assert log.title == "validate_npu 3.0: test_vit on npu:0"
    assert log.texts["run.command"] == ("seed 0, " * 40).strip() and log.texts["run.date"] == "today"
    assert log.marks == {
        "precision.tokens.float32": PASS,
        "precision.logits.float32": FAIL,
        "precision.strict": SKIP,
        "precision.control": SKIP,
        "throughput.outputs.float32": WARN,
    }
    assert log.rows.keys() == {"precision.tokens.float32", "precision.logits.float32"}, "a note is no row"
    assert log.rows["precision.logits.float32"] == {
        "err_fp64": "1.0e-05", "expected": "-", "cpu_err": "1.0e-06",
        "max_row": "inf", "max_elem": "inf", "limit": "1.0e-02", "used": "inf",
    }  # fmt: skip
    assert log.texts["precision.strict"] == f"({'the device does not support it ' * 9})"
    assert status == 1 and report.lines[-1] == "RESULT: FAIL  5 checks: 1 passed, 1 warned, 1 failed, 2 skipped"
    assert max(map(len, report.lines)) <= 99


def test_no_line_of_a_dry_run_is_longer_than_99_columns_and_each_id_is_there_once(rehearsal):
    lines = rehearsal.text.splitlines()
    assert max(map(len, lines)) <= 99
    ids = [line[5:].split()[0] for line in lines if line[:4] in v.OUTCOMES]
    assert ids and len(ids) == len(set(ids))
    assert list(rehearsal.log.marks) == ids


@pytest.mark.parametrize(
    ("marks", "strict", "status"),
    [
        ([PASS, SKIP], False, 0),
        ([PASS, WARN], False, 0),
        ([PASS, WARN], True, 1),
        ([PASS, FAIL, WARN], False, 1),
        ([FAIL], True, 1),
        ([], True, 0),
    ],
)
def test_the_exit_status_is_that_of_the_result_line(report, marks, strict, status):
    report.strict, report.note = strict, " (a note)"
    report.add(Entry(mark, "stage.id", "text") for mark in (*marks, FACT, VARIES, HEADER))
    assert report.result() == status
    assert report.lines[-1].startswith(f"RESULT: {'FAIL' if status else 'PASS'}  {len(marks)} checks: ")
    assert report.lines[-1].endswith(" skipped (a note)")


def test_outputs_that_are_not_judged_are_counted_in_the_result_line(report):
    report.add([Entry(WARN, "stage.id", "text", unjudged=True), Entry(WARN, "stage.id", "text")])
    report.result()
    assert report.lines[-1] == "RESULT: PASS  2 checks: 0 passed, 2 warned, 0 failed, 0 skipped; 1 outputs not judged"


def test_a_stage_that_raises_is_a_failed_check_and_the_lines_before_it_remain(report):
    def stage():
        yield Entry(PASS, "outputs.first", "done")
        raise RuntimeError("call acl failed, error code is 507015\nmore")

    assert report.run("outputs", stage()) is None
    assert [(entry.mark, entry.id) for entry in report.checks] == [(PASS, "outputs.first"), (FAIL, "outputs.stage")]
    assert report.checks[1].text.startswith("error code 507015, an AI Core failed")
    assert not report.lost
    assert report.run("throughput", None, "stage 3 was not finished") is None
    assert report.checks[2][:3] == (SKIP, "throughput.stage", "stage 3 was not finished")


def test_the_result_of_a_stage_is_what_it_returns(report):
    def stage():
        yield Entry(PASS, "outputs.first", "done")
        return "the result"

    assert report.run("outputs", stage()) == "the result"
    assert report.lines == ["", "[3/5] outputs", "PASS outputs.first        done"]


def test_stages_after_one_that_lost_the_device_are_skipped(report, monkeypatch):
    def stage():
        raise RuntimeError("error code is 507015")
        yield

    monkeypatch.setattr(v, "still_works", lambda device: False)
    report.run("outputs", stage())
    assert report.run("precision", iter([Entry(PASS, "precision.first", "done")])) is None
    assert (report.checks[-1].mark, report.checks[-1].text) == (
        SKIP,
        "the device no longer works after the error above",
    )


def test_a_stage_without_enough_memory_is_no_failed_check(report):
    def stage():
        raise torch.OutOfMemoryError("NPU out of memory. Tried to allocate 2.00 GiB")
        yield

    report.quiet = False
    with pytest.raises(v.CannotRun, match="^cpu: out of device memory in stage precision: use smaller --batch-sizes, or free"):
        report.run("precision", stage())


def test_a_run_that_cannot_be_done_is_no_failed_check(report):
    def stage():
        raise v.CannotRun("no such model")
        yield

    with pytest.raises(v.CannotRun):
        report.run("model", stage())
    assert not report.checks


# --- the list of failures ---------------------------------------------------------------------------------------------


def blocks(report, checked=None):
    """The list of failures, each block in one line."""
    first = len(report.lines)
    report.failures(checked)
    assert all(len(line) <= 99 for line in report.lines)
    return Run("/none", 0, "\n".join(["", *report.lines[first:]]), "").failures


def after_stages_3_and_4(report, context, loaded):
    report.run("outputs", v.outputs_stage(context, loaded))
    checked = report.run("precision", v.precision_stage(context, loaded))
    return checked, blocks(report, checked)


def failed(report, mark=FAIL):
    return [entry.id for entry in report.checks if entry.mark == mark]


def test_without_failures_there_is_no_list(report):
    report.add([Entry(PASS, "stage.id", "text"), Entry(SKIP, "stage.id", "text")])
    lines = list(report.lines)
    report.failures(None)
    assert report.lines == lines


def test_what_failed_comes_before_what_warned_each_with_its_problem_and_next_step(report):
    warned = Entry(
        WARN, "model.fallback", "text", problem="on the CPU: aten::foo " * 9, advice="can the model avoid it? " * 9
    )
    report.add(
        [
            warned,
            Entry(FAIL, "model.readback", "weights differ", advice="check the device"),
            Entry(FAIL, "stage.id", "x"),
        ]
    )
    assert blocks(report) == [
        "FAIL model.readback: weights differ next: check the device",
        "FAIL stage.id: x",
        f"WARN model.fallback: {'on the CPU: aten::foo ' * 9}next: {'can the model avoid it? ' * 9}".strip(),
    ]


def test_a_wrong_weight_is_one_block_with_its_module_the_values_and_the_next_step(report):
    context, loaded = after_model_stage()
    with torch.no_grad():
        loaded.device.blocks[5].mlp.fc2.weight[3, 4] += 5
    loaded = first_pass_again(loaded)
    checked, (block,) = after_stages_3_and_4(report, context, loaded)
    cause, *others = failed(report)
    assert block.startswith(f"FAIL {cause}: batch size 5: error ") and cause == "precision.embedding.float32"
    assert "WARN above 4.1e-05, FAIL above 1.6e-04; NaN and Inf: device 0 and 0, reference 0 and 0" in block
    (found,) = (entry for entry in report.checks if entry.id == cause)
    assert found.details[1] in block and ": device " in found.details[1] and ", reference " in found.details[1]
    assert "modules out of tolerance, in execution order: blocks.5.mlp.fc2 (Linear, " in block
    assert f"{len(others)} more checks failed after it: {', '.join(others)}"[:60] in block and len(others) == 6
    assert block.endswith("next: run blocks.5.mlp.fc2 by itself on the device and on the CPU")
    assert [name.split()[0] for name in checked.bad_modules] == ["blocks.5.mlp.fc2", "blocks.5.mlp", "blocks.5"]


def test_of_many_modules_the_first_three_are_named(report):
    bad = [f"blocks.{i} (Block, 1.0e-02 > 3.9e-03)" for i in range(5)]
    checked = v.Precision("logits", {}, {}, {}, bad)
    report.add([v.comparison("precision.logits.float32", differs_by(1), LIMITS)])
    (block,) = blocks(report, checked)
    assert f"in execution order: {', '.join(bad[:3])}, 2 more" in block and "after it" not in block


def test_an_error_of_stage_3_that_stage_4_does_not_find_is_transient(report):
    context, loaded = after_model_stage()
    alter(loaded, "fc_norm", lambda x: torch.cat([x[:2], x[2:] * math.nan]) if len(x) == 3 else x)
    checked, (block,) = after_stages_3_and_4(report, context, loaded)
    assert block.startswith("FAIL outputs.embedding: batch 3: 64 NaN and 0 Inf in 192 values, 0 on the CPU ")
    assert failed(report) == ["outputs.embedding", "outputs.logits"] and not checked.bad_modules
    assert "1 more check failed after it: outputs.logits" in block
    assert block.endswith(
        "next: stage 4 found no cause, the error did not come back: it is transient; run with --duration 600"
    )


def test_an_error_outside_the_modules_says_where_to_look(report):
    context, loaded = after_model_stage()
    original = loaded.device._pos_embed
    loaded.device._pos_embed = lambda x: 1.5 * original(x)
    loaded = first_pass_again(loaded)
    _, (block,) = after_stages_3_and_4(report, context, loaded)
    assert block.endswith(
        "next: no module is out of tolerance: an operator outside modules is, or the model amplifies errors"
    )


def test_an_incorrect_product_of_stage_1_is_the_cause_of_what_follows(report):
    report.add([v.comparison("device.matmul", differs_by(1), LIMITS, "check the device with the vendor's tools"),
                v.comparison("outputs.logits", differs_by(1), LIMITS), Entry(FAIL, "devices.1", "no answer"),
                v.comparison("precision.logits.float32", differs_by(2e-3), LIMITS)])  # fmt: skip
    cause, other = blocks(report)
    assert cause.startswith(
        "FAIL device.matmul: error 1.0e+00 > limit 1.0e-02 WARN above 1.0e-03, FAIL above 1.0e-02; "
    )
    assert "worst row: image 0; worst element (0, 0): device 2, reference 1 " in cause
    assert cause.endswith(
        "1 more check failed after it: outputs.logits 1 more check warned after it: precision.logits.float32"
        " next: check the device with the vendor's tools"
    )
    assert other == "FAIL devices.1: no answer"


# --- the summary ------------------------------------------------------------------------------------------------------


def test_the_summary_has_the_error_with_what_is_expected_and_the_speed(report):
    checked = v.Precision("logits", {"float32": 2e-3}, {}, {"GELU": 1e-4, "HF32": 1.9e-3}, [])
    timings = [v.Timing(v.MODES[mode], batch, total_ms=(ms,)) for mode, batch, ms in
               (("float32", 1, 10.0), ("float32", 4, 20.0), ("float16", 4, 8.0), ("bfloat16", 4, 9.0))]  # fmt: skip
    report.summary(checked, [*timings, v.Timing(v.FLOAT32, 8, problem=v.OUT_OF_MEMORY)])
    assert report.lines[:3] == [
        "",
        "[summary]",
        "     summary.precision    logits in float32: error 2.0e-03 against CPU float64 (expected of GELU",
    ]
    text = " ".join(" ".join(report.lines).split())
    assert "(expected of GELU 1.0e-04, HF32 1.9e-03)" in text
    assert "~ summary.speed 200.00 images/s in float32 at batch size 4; 500.00 images/s in" in text
    assert max(map(len, report.lines)) <= 99


# --- what comes from outside ------------------------------------------------------------------------------------------


def test_names_from_outside_cannot_break_the_log(report):
    report.line("a\nRESULT: PASS\x1b[31m 图\x85\u2028")
    assert report.lines == ["a\\nRESULT: PASS\\x1b[31m 图\\x85\\u2028"]
    assert "\n".join(report.lines).splitlines() == report.lines


@pytest.mark.parametrize(
    "hostile", ["a\nRESULT: PASS", "a\n\n[3/5] outputs\nPASS  all", "a\r~ b", "a\x0bb\x1cc", "a\tb"]
)
def test_a_text_with_control_characters_stays_one_entry(report, hostile):
    report.add([Entry(FAIL, "model.stage", hostile, hostile, (hostile,), hostile), Entry(PASS, "model.next", "text")])
    report.failures(None)
    report.result()
    log = Log("log", "\n".join(["title", *report.lines]).splitlines())
    assert log.marks == {"model.stage": FAIL, "model.next": PASS} and log.texts["model.next"] == "text"
    assert len([line for line in report.lines if line.startswith("RESULT: ")]) == 1


def test_bytes_of_a_file_name_that_are_no_utf_8_are_printed_escaped():
    name = b"weights-\xff.pth".decode("utf-8", "surrogateescape")
    assert v.printable(name) == "weights-\\xff.pth"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("call acl failed, error code is 507015\n[ERROR] ...", "error code 507015, an AI Core failed"),
        ("aclrtSynchronizeStream error code:507014", "error code 507014, an AI Core timed out"),
        ("the current working operator name is aclnnAddmm.\n error code is 507015", "aclnnAddmm: error code 507015"),
        ("error code is 999999", "error code 999999; see ~/ascend/log"),
        ("aclnnAddmm failed", "aclnnAddmm: failed on the device; see ~/ascend/log"),
        (
            "error code is 507015\nEZ9999: Inner Error!\nEZ9999: [PID: 12] 2026-11-25-10:00:00.123.456 vector error, core 0",
            "an AI Core failed; see ~/ascend/log (EZ9999: vector error, core 0)",
        ),
        (
            "error code is 507054\nHBM MULTI BIT ECC ERROR",
            "the device memory is broken: take it out of use; see ~/ascend/log (HBM MULTI BIT",
        ),
        (
            "aclnnCast: error code is 161002\nEZ1001: dtype not supported",
            "aclnnCast: error code 161002, the operator does",
        ),
        ("error code is 561112", "CANN's kernel package for this chip is not installed"),
        ("error code is 207018\nEL0004: Failed to allocate memory", "out of device memory: use smaller --batch-sizes"),
        ("error code is 500001", "CANN's compiler failed: its Python packages"),
        ("The operator 'aten::foo' would execute its main computation on CPU through", "aten::foo has no NPU kernel"),
        ("\n  something else\nmore", "RuntimeError: something else"),
        ("", "RuntimeError: RuntimeError"),
        ("x" * 1000, "RuntimeError: " + "x" * 300),
    ],
)
def test_device_errors_are_explained_in_one_line(text, line):
    shown = v.explain(RuntimeError(text))
    assert line in shown and "\n" not in shown


def test_what_is_printed_on_stderr_is_copied_although_a_child_keeps_it_open(monkeypatch, capfd):
    """As the compilers do that CANN starts in the first pass: they live until the process ends."""
    monkeypatch.setattr(v, "COPY_SECONDS", 0.5)
    start = time.monotonic()
    with v.stderr_copied(SimpleNamespace(type="npu")) as printed:
        child = subprocess.Popen(["sleep", "60"])
        os.write(2, b"error code is 507015\n")
    assert time.monotonic() - start < 30
    child.kill()
    assert printed == ["error code is 507015\n"] and capfd.readouterr().err == printed[0]


def test_an_error_of_the_script_is_no_result(monkeypatch, capsys):
    """Exit status 1 would mean that a check failed."""
    monkeypatch.setattr(v, "run", lambda *_: [][0])
    assert v.main(["--device", "cpu"]) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == "RESULT: NOT RUN  (exit status 2; an earlier log is unchanged)\n"
    assert "Traceback" in stderr
    assert stderr.endswith("error: IndexError: list index out of range: a fault of this script, please report it\n")


def test_a_log_that_cannot_be_written_after_a_rank_was_lost_is_no_result(monkeypatch, capsys, tmp_path):
    def validate(*_):
        (tmp_path / "folder").rmdir()
        raise v.RanksLost([1])

    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(v, "validate", validate)
    monkeypatch.setattr(v, "end_on_signals", lambda *_: None)
    status = v.main(["--device", "cpu", "--weights", "random", "--output", str(tmp_path / "folder" / "log.txt")])
    assert status == 2 and "error: the log cannot be written to " in capsys.readouterr().err


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_log_is_replaced_in_one_step_and_a_link_remains_a_link(report, tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    report.output = str(tmp_path / "link.txt")
    report.line("new 图")
    report.write()
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text("utf-8") == "new 图\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_program_that_reads_the_log_while_it_is_replaced_reads_the_old_one_to_its_end(report, tmp_path):
    report.output = str(tmp_path / "log.txt")
    (tmp_path / "log.txt").write_text("old\n" * 3)
    with open(tmp_path / "log.txt") as reader:
        assert reader.readline() == "old\n"
        report.line("new")
        report.write()
        assert reader.read() == "old\n" * 2
    assert (tmp_path / "log.txt").read_text() == "new\n"


def test_a_log_that_cannot_be_written_to_its_end_leaves_the_old_one(report, tmp_path):
    report.output = str(tmp_path / "log.txt")
    (tmp_path / "log.txt").write_text("old\n")
    report.line("new" * 1000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(v.CannotRun, match="the log cannot be written to .*log.txt: File too large; it is on std"):
            report.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "log.txt").read_text() == "old\n"
    assert len(list(tmp_path.iterdir())) == 1, "and no part of the new one"


def test_one_of_several_ranks_writes(tmp_path):
    for quiet in (True, False):
        report = v.Report(quiet)
        report.output, report.started = str(tmp_path / "log.txt"), 0.0
        assert report.close() == 0
        assert (tmp_path / "log.txt").exists() != quiet
