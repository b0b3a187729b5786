"""The log: what is written can be read again, no line is too long or broken, and the file is replaced in one step."""

import math
import random
import resource

import pytest

import validate_npu as v
from validate_npu import FACT, FAIL, HEADER, PASS, SKIP, VARIES, WARN, Entry, Log

MARKS = (PASS, SKIP, WARN, FAIL, FACT, VARIES, HEADER)
TABLES = {name: table for name, table in vars(v).items() if isinstance(table, v.Table)}


@pytest.fixture
def report():
    made = v.Report(quiet=True)
    made.timeout = 600
    yield made
    made.timer.cancel()


def words(draw, count, longest=12):
    return [
        "".join(draw.choices("abcdefghijklmnopqrstuvwxyz.,:;()-+%#0123456789", k=draw.randint(1, longest)))
        for _ in range(count)
    ]


# --- entries ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("seed", range(20))
def test_entries_of_any_length_are_read_as_they_were_written(mark, seed):
    draw = random.Random(seed)
    entries = [Entry(mark, " ".join(words(draw, draw.randint(1, 4))), " ".join(words(draw, n))) for n in range(1, 60)]
    lines = [line for entry in entries for line in entry.lines()]
    assert Entry.read(lines) == [entry[:3] for entry in entries]
    assert max(map(len, lines)) <= v.WIDTH < sum(map(len, lines)) / len(entries), "and many are wrapped"
    assert all(line.startswith(VARIES) == (mark == VARIES) for line in lines), "diff -I '^~' ignores the whole entry"


def test_entries_of_all_kinds_may_stand_one_below_the_other():
    draw = random.Random(0)
    entries = [Entry(draw.choice(MARKS), f"name {i}", " ".join(words(draw, draw.randint(1, 50)))) for i in range(200)]
    assert Entry.read([line for entry in entries for line in entry.lines()]) == [entry[:3] for entry in entries]


def test_an_entry_begins_at_the_same_column_in_each_of_its_lines():
    first, *more = Entry(WARN, "name", " ".join(["word"] * 100)).lines()
    assert first[: v.INDENT].split() == ["WARN", "name"] and first[v.INDENT :].startswith("word ")
    assert more and all(line[: v.INDENT].isspace() and line[v.INDENT] == "w" for line in more)


def test_a_name_that_is_too_long_for_its_column_and_a_word_that_is_too_long_for_a_line_are_kept():
    entries = [
        Entry(PASS, "a name that is much longer than its column", "some text"),
        Entry(FAIL, "name", "x" * 300),
        Entry(FAIL, "name", f"before {'x' * 300} behind"),
    ]
    lines = [line for entry in entries for line in entry.lines()]
    assert Entry.read(lines) == [entry[:3] for entry in entries]


@pytest.mark.parametrize(
    ("entry", "read"),
    [
        (Entry(PASS, "name", "text", "problem", "advice"), (PASS, "name", "text")),
        (Entry(FAIL, "name", "row", "problem", "advice"), (FAIL, "name", "row")),
        (Entry(FAIL, "name", "", "problem", "advice"), (FAIL, "name", "problem")),
        (Entry(PASS, "name", "", "problem"), (PASS, "name", "")),
        (Entry(SKIP, "name", "", "problem"), (SKIP, "name", "problem")),
        (Entry(PASS, "a name of 21 columns.", ""), (PASS, "a name of 21 columns.", "")),
        (Entry(FACT, "name", ""), (FACT, "name", "")),
    ],
)
def test_the_problem_stands_where_there_is_no_text_but_not_where_there_is_no_problem(entry, read):
    assert Entry.read(entry.lines()) == [read]
    assert Entry.read([line.rstrip() for line in entry.lines()]) == [read], "as the report writes them"


# --- tables -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLES)
def test_a_row_has_a_cell_for_each_column_whatever_they_hold(name):
    table = TABLES[name]
    columns = v.Table.split(table.header("title").text)
    assert len(columns) == len(set(columns)) == len(table.columns)
    draw = random.Random(0)
    for _ in range(300):
        cells = []
        for _, form in table.columns:
            number = draw.choice([0.0, 1e-9, 0.5, 12.3, 1e7, 1e12, math.inf, math.nan])
            text = draw.choice(["", "text", "two words", "a text that is longer than any column has room for"])
            cells.append(draw.choice([None, text, number] if form[-1] in "efg%" else [None, text]))
        found = v.Table.split(table.row(*cells))
        assert len(found) == len(columns), cells
        for cell, shown in zip(cells, found):
            if cell is None or isinstance(cell, str):
                assert shown == (cell or "-").replace(" ", "_")
            else:
                assert math.isfinite(cell) or str(cell) in shown


@pytest.mark.parametrize("name", TABLES)
def test_a_row_that_fits_its_columns_is_aligned_with_the_header_and_fits_a_line(name):
    table = TABLES[name]
    header = table.header("title")
    row = table.row(*(1 if form[-1] in "efg%" else "-" for _, form in table.columns))
    for (_, form), title, cell in zip(table.columns, *(list(spans(text)) for text in (header.text, row)), strict=True):
        side = 0 if form.startswith("<") else 1
        assert title[side] == cell[side]
    assert len(header.lines()) == len(Entry(VARIES, "name", row).lines()) == 1


def spans(text):
    """Begin and end of each word."""
    end = 0
    for word in text.split():
        begin = text.index(word, end)
        end = begin + len(word)
        yield begin, end


def test_a_row_needs_a_cell_for_each_column():
    with pytest.raises(ValueError, match="zip.. argument 2 is longer"):
        v.CONTENTION.row("float32", 4)


def test_numbers_are_shown_with_the_digits_of_their_column():
    row = v.SPEED.row(4, 1.234, 0, 1.0, 12345.6, 1.266, 0.125)
    assert v.Table.split(row) == ["4", "1.23", "0.00", "1.00", "12345.60", "1.27", "12.5%"]


# --- the whole log ----------------------------------------------------------------------------------------------------


def whole_log(report):
    report.line("validate_npu 2.0: test_vit on npu:0")
    report.line("Lines that begin with ~ vary from run to run.")
    report.add([Entry(FACT, "options", "seed 0, " * 40), Entry(VARIES, "date", "today")])
    errors = [
        v.ERRORS.header("against cpu float64"),
        v.ERRORS.row("float32", 1e-5, 2e-5, 3e-5, 4e-5, 1.5, 1e-3, 1e-2, None),
        v.ERRORS.row("row alone", None, None, None, math.inf, 4e-5, 1e-3, 1e-2, "batch 4"),
    ]
    entries = [
        errors[0],
        Entry(PASS, "embedding", errors[1]),
        Entry(FAIL, "tokens", errors[2], "it is wrong", "mend it"),
    ]
    report.stage("[4/5] precision", iter([*entries, Entry(SKIP, "control", "", "there is none")]))
    report.stage("[5/5] throughput", iter([Entry(WARN, "batch 4", "", "it is slow " * 30, "wait " * 40)]))
    return report.result()


def test_what_stages_yield_is_what_a_log_gives_back(report):
    status = whole_log(report)
    log = Log("", report.lines)
    assert (log.version, log.facts["validate_npu"]) == ("2.0", "test_vit on npu:0")
    assert log.facts["options"] == ("seed 0, " * 40).strip()
    precision, throughput = "[4/5] precision", "[5/5] throughput"
    assert log.marks == {
        (precision, "embedding", "float32"): PASS,
        (precision, "tokens", "row_alone"): FAIL,
        (precision, "control", ""): SKIP,
        (throughput, "batch 4", ""): WARN,
    }
    assert log.rows.keys() == {(precision, "embedding", "float32"), (precision, "tokens", "row_alone")}
    cells = log.rows[precision, "tokens", "row_alone"]
    assert (cells["row"], cells["cpu"], cells["where"]) == ("inf", "-", "batch_4")
    assert not any(line.startswith(VARIES) for line in log.stable)
    assert status == 1 and report.lines[-1] == "RESULT: FAIL  4 checks: 1 passed, 1 warned, 1 failed, 1 skipped"


def test_what_failed_comes_last_with_what_to_do_then_what_warned(report):
    whole_log(report)
    blocks = "\n".join(report.lines).split("\n\n")[3:]
    fail, warn = (" ".join(block.split()) for block in blocks[:2])
    assert fail == "FAIL tokens: it is wrong -> mend it"
    assert warn == " ".join(["WARN batch 4:", *["it is slow"] * 30, "->", *["wait"] * 40])
    assert len(blocks) == 3 and blocks[2].startswith("RESULT: ")
    assert max(map(len, report.lines)) <= v.WIDTH


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
    report.add(Entry(mark, "name", "text") for mark in (*marks, FACT, VARIES, HEADER))
    assert report.result() == status
    assert report.lines[-1].startswith(f"RESULT: {'FAIL' if status else 'PASS'}  {len(marks)} checks: ")
    assert report.lines[-1].endswith(" skipped (a note)")


def test_a_stage_that_raises_is_a_failed_check_and_the_lines_before_it_stay(report):
    def stage():
        yield Entry(PASS, "first", "done")
        raise RuntimeError("call acl failed, error code is 507015\nmore")

    assert report.stage("[3/5] outputs", stage()) is False
    assert [entry[:2] for entry in report.checks] == [(PASS, "first"), (FAIL, "outputs")]
    assert report.checks[1].problem.startswith("error code 507015, an AI Core failed")
    assert report.stage("[4/5] precision", iter([Entry(PASS, "next", "done")])) is True


def test_a_run_that_cannot_be_done_is_no_failed_check(report):
    def stage():
        raise v.CannotRun("no such model")
        yield

    with pytest.raises(v.CannotRun):
        report.stage("[2/5] model", stage())
    assert not report.checks


# --- what comes from outside ------------------------------------------------------------------------------------------


def test_names_from_outside_cannot_break_the_log(report):
    report.line("a\nRESULT: PASS\x1b[31m 图\x85\u2028")
    assert report.lines == ["a\\nRESULT: PASS\\x1b[31m 图\\x85\\u2028"]
    assert "\n".join(report.lines).splitlines() == report.lines


@pytest.mark.parametrize(
    "hostile", ["a\nRESULT: PASS", "a\n\n[3/5] outputs\nPASS  all", "a\r~ b", "a\x0bb\x1cc", "a\tb"]
)
def test_a_text_with_control_characters_stays_one_entry(report, hostile):
    report.add([Entry(FAIL, "model", "", hostile, hostile), Entry(PASS, "next", "text")])
    read = Entry.read("\n".join(report.lines).splitlines())
    assert [(mark, name) for mark, name, _ in read] == [(FAIL, "model"), (PASS, "next")]
    report.result()
    assert len([line for line in report.lines if line.startswith("RESULT: ")]) == 1


def test_bytes_of_a_file_name_that_are_no_utf_8_are_shown_escaped():
    name = b"weights-\xff.pth".decode("utf-8", "surrogateescape")
    assert v.printable(name) == "weights-\\xff.pth"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("call acl failed, error code is 507015\n[ERROR] ...", "error code 507015, an AI Core failed"),
        ("aclrtSynchronizeStream error code:507014", "error code 507014, an AI Core timed out"),
        ("the current working operator name is aclnnAddmm.\n error code is 507015", "aclnnAddmm: error code 507015"),
        ("error code is 999999", "error code 999999, see ~/ascend/log"),
        ("aclnnAddmm failed", "aclnnAddmm failed on the device, see ~/ascend/log"),
        (
            "error code is 507015\nEZ9999: Inner Error!\nEZ9999: [PID: 12] 2026-11-25-10:00:00.123.456 vector error, core 0",
            "an AI Core failed: see ~/ascend/log for the operator (EZ9999: vector error, core 0)",
        ),
        ("error code is 507054\nHBM MULTI BIT ECC ERROR", "the card's memory is broken: take it out of use (HBM MULTI BIT"),
        ("aclnnCast: error code is 161002\nEZ1001: dtype not supported", "aclnnCast: error code 161002, the operator does"),
        ("error code is 561112", "CANN's kernel package for this chip is not installed"),
        ("error code is 207018\nEL0004: Failed to allocate memory", "out of device memory: use smaller --batch-sizes"),
        ("error code is 500001", "CANN's compiler failed: its Python packages"),
        ("The operator 'aten::foo' would execute its main computation on CPU through", "aten::foo has no NPU kernel"),
        ("\n  something else\nmore", "RuntimeError: something else"),
        ("", "RuntimeError: RuntimeError"),
        ("x" * 1000, "RuntimeError: " + "x" * 300),
    ],
)
def test_device_errors_are_told_in_one_line(text, line):
    shown = v.explain(RuntimeError(text))
    assert line in shown and "\n" not in shown


# --- the file ---------------------------------------------------------------------------------------------------------


def test_the_log_is_replaced_whole_and_a_link_stays_a_link(report, tmp_path):
    (tmp_path / "real.txt").write_text("old")
    (tmp_path / "link.txt").symlink_to("real.txt")
    report.output = str(tmp_path / "link.txt")
    report.line("new 图")
    report.write()
    assert (tmp_path / "link.txt").is_symlink() and (tmp_path / "real.txt").read_text("utf-8") == "new 图\n"
    assert len(list(tmp_path.iterdir())) == 2


def test_whoever_reads_the_log_while_it_is_replaced_has_the_old_one_to_its_end(report, tmp_path):
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
        with pytest.raises(
            v.CannotRun, match="the log cannot be written to .*log.txt: File too large; its lines are on std"
        ):
            report.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "log.txt").read_text() == "old\n"
    assert len(list(tmp_path.iterdir())) == 1, "and no half of the new one"


def test_one_of_several_cards_writes(tmp_path):
    for quiet in (True, False):
        report = v.Report(quiet)
        report.output = str(tmp_path / "log.txt")
        assert report.finish() == 0
        assert (tmp_path / "log.txt").exists() != quiet
