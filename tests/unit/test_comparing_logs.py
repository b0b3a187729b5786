"""--baseline and --compare: what became worse between two logs is found, and what only differs is shown."""

import re
import time

import pytest
from conftest import start

import validate_npu as v
from validate_npu import FAIL, HEADER, PASS, Log

OPTIONS = v.parse_arguments([])
CHECKS = ["experiment", "versions", "checks", "outcomes", "errors", "speed"]


def log(text, name="log.txt"):
    return Log(name, text.splitlines())


def compared(old, new, *arguments):
    """Name -> entry, of the checks of a comparison of two texts."""
    entries = v.compare_logs(log(old), log(new), v.parse_arguments([*arguments]))
    found = {entry.name: entry for entry in entries if entry.mark in v.OUTCOMES}
    assert list(found) == CHECKS
    return found


def worse(old, new, *arguments):
    """Name -> mark and problem, of the checks that do not pass."""
    found = compared(old, new, *arguments)
    return {name: f"{entry.mark}: {entry.problem}" for name, entry in found.items() if entry.mark != PASS}


def changed_lines(old, new):
    """What a comparison shows beside its checks: - old, + new."""
    entries = list(v.compare_logs(log(old), log(new), OPTIONS))
    start = [entry.name for entry in entries].index("changed lines")
    return entries[start].text, [(entry.name, *entry.text.split()) for entry in entries[start + 1 :]]


# --- changes of a log -------------------------------------------------------------------------------------------------


def in_rows(name, first_cell=None, **change):
    """A change of a log: in the rows of this name, cells become change[column](cell)."""
    change = {column.replace("images_s", "images/s"): function for column, function in change.items()}

    def changed(text):
        lines, columns = [], []
        for line in text.splitlines():
            ((mark, row, cells),) = v.Entry.read([line])
            cells = v.Table.split(cells)
            if mark == HEADER:
                columns = cells
            row = dict(zip(columns, cells)) if row == name and len(cells) == len(columns) else {}
            if change.keys() <= row.keys() and first_cell in (None, *cells[:1]):
                row |= {column: function(row[column]) for column, function in change.items()}
                line = f"{line[: v.INDENT]}{' '.join(row.values())}"
            lines.append(line)
        assert lines != text.splitlines(), "the log has no such row"
        return "\n".join(lines)

    return changed


def slower(factor, batch=None):
    """Every batch takes so many times as long."""
    return in_rows("float32", batch, images_s=lambda rate: f"{float(rate) / factor:.4f}",
                   **dict.fromkeys(("p50_ms", "p90_ms"), lambda ms: f"{float(ms) * factor:.4f}"))  # fmt: skip


def one_slow_batch(text):
    """Throughput falls to a third, by a single batch of hundreds: the other figures stay."""
    return in_rows("float32", images_s=lambda rate: f"{float(rate) / 3:.4f}")(text)


def error(column, value, name="embedding", first_cell="float32"):
    return in_rows(name, first_cell, **{column: lambda _: value})


def replaced(old, new, count=-1):
    def change(text):
        assert old in text, old
        return text.replace(old, new, count)

    return change


def without(pattern):
    """Without the lines that match."""

    def change(text):
        lines = [line for line in text.splitlines() if not re.match(pattern, line)]
        assert len(lines) < len(text.splitlines())
        return "\n".join(lines)

    return change


@pytest.fixture
def steady(rehearsal):
    """The log of a run, as if no batch had been slower than another: else the spread would excuse anything."""
    return in_rows("float32", spread=lambda _: "0.0%")(rehearsal.text)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda text: text, {}),
        (slower(1.05), {}),
        (slower(0.5), {}),
        (slower(1.2), {"speed": "FAIL: float32 1 of throughput: "}),
        (slower(1.2, "3"), {"speed": "FAIL: float32 3 of throughput: "}),
        (one_slow_batch, {}),
        (replaced("PASS  repeat", "WARN  repeat"), {"outcomes": "FAIL: repeat bit_for_bit of outputs: PASS -> WARN"}),
        (replaced("PASS  control", "FAIL  control"), {"outcomes": "FAIL: control of precision: PASS -> FAIL"}),
        (replaced("PASS  weights", "SKIP  weights"), {"outcomes": "FAIL: weights on cpu of model: PASS -> SKIP"}),
        (replaced("SKIP  operators", "PASS  operators"), {}),
        (error("fp64", "3.0e-03"), {"errors": "FAIL: embedding float32 of precision: fp64 "}),
        (error("row", "3.0e-03"), {"errors": "FAIL: embedding float32 of precision: row "}),
        (error("element", "3.0e-03"), {"errors": "FAIL: embedding float32 of precision: element "}),
        (error("element", "inf"), {"errors": "FAIL: embedding float32 of precision: element "}),
        (error("row", "1.0e-03", "tokens", "row_alone"), {"errors": "FAIL: tokens row_alone of outputs: row 0.0e+00 -> "}),
        (error("row", "1.0e-03", "Mlp", None), {"errors": "FAIL: Mlp worst_of_6 of precision: row 0.0e+00 -> 1.0e-03"}),
        (error("row", "1.0e-03", "computes", None), {"errors": "FAIL: computes matmul of device: row "}),
        (error("row", "1.0e-03", "float32", "against_stage_3"), {"errors": "FAIL: float32 against_stage_3 of throughput: row"}),
        (error("cpu", "9.0e-03"), {}),
        (replaced("PASS  control", "FAIL  new\nPASS  control"), {"outcomes": "FAIL: new of precision: new, FAIL"}),
        (replaced("PASS  control", "WARN  new\nPASS  control"), {"outcomes": "FAIL: new of precision: new, WARN"}),
        (replaced("PASS  control", "PASS  new\nPASS  control"), {}),
        (without("PASS  control"), {"checks": "FAIL: control of precision"}),
        (without("PASS  embedding +3 "), {"checks": "FAIL: embedding 3 of outputs"}),
        (without("~     float32 +3 "), {"checks": "FAIL: float32 3 of throughput"}),
        (replaced("test_vit on", "test_vit2 on"), {"experiment": "WARN: validate_npu: test_vit2 on cpu "}),
        (replaced("device                 cpu", "device  npu:0 Ascend910B4"), {"experiment": "WARN: device: npu:0 Ascend910B4"}),
        (replaced("weights SHA-256        ", "weights SHA-256        0"), {"experiment": "WARN: weights SHA-256: 0"}),
        (replaced("inputs SHA-256         ", "inputs SHA-256         0"), {"experiment": "WARN: inputs SHA-256: 0"}),
        (replaced("seed 0,", "seed 1,"), {"experiment": "WARN: options: weights random, batch sizes 1 3, "}),
    ],
)  # fmt: skip
def test_what_became_worse_is_found_and_nothing_else(steady, change, found):
    shown = worse(steady, change(steady))
    assert shown.keys() == found.keys(), shown
    assert all(shown[name].startswith(text) for name, text in found.items()), shown


def test_of_two_different_experiments_a_missing_check_is_no_fault(steady):
    shown = worse(steady, replaced("seed 0,", "seed 1,")(without("PASS  control")(steady)))
    assert shown.keys() == {"experiment", "checks"} and shown["checks"] == "WARN: control of precision"


def test_all_that_became_worse_is_listed(steady):
    shown = worse(steady, slower(2)(error("row", "inf", "tokens")(error("row", "inf", "logits")(steady))))
    assert re.search("logits float32 of precision: row .*; tokens float32 of precision: row ", shown["errors"])
    assert re.search("float32 1 of throughput: .*; float32 3 of throughput: ", shown["speed"])


def test_lines_that_changed_are_shown_but_not_those_that_vary(steady):
    assert changed_lines(steady, slower(2)(steady)) == ("none", [])
    text, shown = changed_lines(steady, re.sub(r"(\n +numpy +).*", r"\g<1>9", steady))
    numpy = log(steady).facts["numpy"]
    assert text == "2: - old, + new" and shown == [("-", "numpy", numpy), ("+", "numpy", "9")]


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
    old, new = (error(column, value)(steady) for value in (before, after))
    assert (compared(old, new)["errors"].mark == FAIL) == worse


def small_log(stage, *entries):
    lines = [line for entry in entries for line in entry.lines()]
    return "\n".join(["validate_npu 2.0: test_vit on npu:0", "Lines", "~     date", "", stage, *lines])


def one_timing(ms, spread):
    row = v.THROUGHPUT.row(4, 4000 / ms, ms, ms, ms, ms, spread, ms, "device", ms, None, 5)
    return small_log("[5/5] throughput", v.THROUGHPUT.header("mode"), v.Entry("~", "float32", row))


@pytest.mark.parametrize(
    ("arguments", "slower_by", "outcome"),
    [((), 3.2, PASS), ((), 3.5, FAIL), (("--max-slowdown", "0"), 1.7, PASS), (("--max-slowdown", "0"), 2.0, FAIL)],
)
def test_the_spread_of_both_runs_is_allowed_for(arguments, slower_by, outcome):
    """Half of 20 % and of 10 %, beside the 10 % that are allowed anyway: 10 ms may become 13.3."""
    assert compared(one_timing(10.0, 0.2), one_timing(10.0 + slower_by, 0.1), *arguments)["speed"].mark == outcome


@pytest.mark.parametrize(("times", "outcome"), [(1.0, v.WARN), (3.0, v.WARN), (4.0, v.WARN), (5.0, FAIL)])
def test_the_check_of_speed_can_always_fail(times, outcome):
    """Spreads of 95 % excuse any fall of the throughput: that is a WARN, and a median five times as long a FAIL."""
    speed = compared(one_timing(10.0, 0.95), one_timing(10.0 * times, 0.95))["speed"]
    assert speed.mark == outcome and ("too large to judge" in speed.problem) == (outcome == v.WARN)


@pytest.mark.parametrize("change", [lambda t: "\ufeff" + t, lambda t: t + "\n\n", lambda t: t.replace("\n", "\r\n")])
def test_a_log_is_read_as_it_comes_back(tmp_path, change):
    text = one_timing(10.0, 0.1) + "\n\nRESULT: PASS  1 checks"
    (tmp_path / "log.txt").write_bytes(change(text).encode("utf-8"))
    read = Log.read(str(tmp_path / "log.txt"))
    assert read.facts == log(text).facts and read.timings == log(text).timings != {}


def test_a_card_that_became_worse_is_found():
    row = v.CARDS.row(0, "npu:1", 9, 0, 0, 1e-6, "Ascend910B4")
    entries = (v.Entry(mark, "card 1", row) for mark in (PASS, FAIL))
    old, new = (small_log("[all cards]", v.CARDS.header("card"), entry) for entry in entries)
    assert worse(old, new) == {"outcomes": "FAIL: card 1 0 of all cards: PASS -> FAIL"}


def test_a_run_whose_model_did_not_load_is_compared(steady):
    """Its log ends with stage 2, so it has no checksums."""
    head, device, model, *_ = steady.split("\n\n")
    failed = v.Entry(FAIL, "model", "", "error code 507015").lines()
    shown = worse(steady, "\n\n".join([head, device, "\n".join([model.splitlines()[0], *failed])]))
    assert shown["outcomes"] == "FAIL: model of model: new, FAIL"
    assert "weights on cpu of model" in shown["checks"]


def test_a_message_of_as_many_words_as_a_row_has_cells_is_no_row():
    message = "RuntimeError: CUDA error: an illegal memory access was encountered"
    failed = v.Entry(FAIL, "precision", "", message)
    text = small_log("[4/5] precision", v.ERRORS.header("against cpu float64"), failed)
    assert len(message.split()) == len(v.ERRORS.columns)
    assert worse(text, text) == {} and not log(text).rows


def test_an_earlier_comparison_and_the_list_of_failures_are_no_part_of_a_log(steady):
    head, _, result = steady.rpartition("\n\n")
    comparison = "[comparison] with old.txt\nFAIL  speed                  it was slow\n      changed lines  none"
    more = f"{head}\n\n{comparison}\n\nFAIL  speed: it was slow\n      -> see\n\n{result}"
    assert worse(steady, more) == worse(more, steady) == {}
    assert changed_lines(steady, more) == ("none", [])


# --- two versions of the script ---------------------------------------------------------------------------------------

# An excerpt of a log as version 1 wrote it, cut on the right, and of the same experiment as the fixture's.
VERSION_1 = """\
validate_npu: test_vit on cpu (rehearsal: no NPU is validated)
Lines that begin with ~ vary from run to run. Compare two logs with: diff -I '^~' OLD NEW
options: {options}
~     2026-11-24 22:34:52 +0000

[1/5] device
      device                cpu
      numpy                 2.4.6
PASS  computes              a 512 x 512 matrix product, relative L2 error 3.5e-07 (limit 1.2e-04)

[2/5] model
      weights SHA-256       {weights SHA-256}
      inputs SHA-256        {inputs SHA-256}
PASS  weights on cpu        read back, equal the host's bit for bit
SKIP  operators             only torch_npu falls back to the CPU unseen
~     loaded in             0.2 s

[3/5] outputs
                               batch  shape            dtype           min       max      mean       std
PASS  embedding                    1  1x64             float32     -2.3628    2.5748   -0.0094    0.7588
PASS  embedding                    3  3x64             float32     -2.7320    2.8120   -0.0088    0.7543
PASS  repeat                first call, model(x), forward_head(forward_features(x)): equal bit for bit

[4/5] precision
                            cpu against cpu float64     max abs  mean abs    rel L2 worst row     cosine    norms
PASS  embedding             float32                    5.12e-07  9.80e-08  1.66e-07  1.86e-07  1.0000000  1.00000
PASS  card's check          embedding, cpu float32 against cpu float32: max abs 0.00e+00 (limit 1.0e-02)
                            each module on the CPU's inputs modules  worst row  worst element  limit WARN, FAIL
PASS  Linear                blocks.0.attn.qkv                    48   0.00e+00       0.00e+00  1.2e-04, 3.9e-03
PASS  control               weight of patch_embed.proj scaled by 1.01: off by 1.0e-02, noticed, as it must be

[5/5] throughput
                             batch   images/s   p50 ms   p90 ms   p99 ms   max ms   spread  host ms
~     float32                    1      16.55    59.91    61.90    72.51    74.99     3.4%    59.91
~                           float32            1  images/s #########################       p50 ms ##
PASS  timed outputs         float32: all as those of stage 3, in float32 (limit 1.2e-04)

RESULT: PASS  13 checks: 12 passed, 0 warned, 0 failed, 1 skipped (rehearsal: no NPU is validated)
"""


@pytest.fixture
def version_1(steady):
    return VERSION_1.format_map(log(steady).facts)


def test_a_log_of_the_version_before_gives_one_warning_and_no_failure(steady, version_1):
    shown = worse(version_1, steady)
    assert shown.keys() == {"versions"}
    assert shown["versions"].startswith(f"WARN: script 1 and {v.VERSION}; ") and "only in the new log" in shown["versions"]
    assert "only in the old: " in shown["versions"] and "timed outputs of throughput" in shown["versions"]
    assert worse(steady, version_1).keys() == {"versions"}, "nor the other way round"
    assert changed_lines(version_1, steady) == ("none", []), "all lines changed, so none is shown"


@pytest.mark.parametrize("name", ["weights on cpu", "control"])
def test_what_both_versions_check_is_compared(steady, version_1, name):
    shown = worse(version_1, replaced(f"PASS  {name}", f"FAIL  {name}")(steady))
    assert shown["outcomes"].startswith(f"FAIL: {name} of ") and shown["outcomes"].endswith(": PASS -> FAIL")


@pytest.mark.parametrize("fact", ["weights SHA-256", "inputs SHA-256", "device"])
def test_another_experiment_of_another_version_is_named(steady, version_1, fact):
    value = log(steady).facts[fact]
    assert f"{fact}: {value}" in worse(version_1.replace(f" {value}\n", " another\n", 1), steady)["experiment"]


def a_later_version(text):
    return text.replace(f"validate_npu {v.VERSION}", "validate_npu 9.1", 1)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda text: text, {}),
        (slower(1.2, "3"), {"speed": "FAIL: float32 3 of throughput: "}),
        (replaced("PASS  repeat", "WARN  repeat"), {"outcomes": "FAIL: repeat bit_for_bit of outputs: PASS -> WARN"}),
        (error("element", "3.0e-03"), {"errors": "FAIL: embedding float32 of precision: element "}),
        (replaced("PASS  control", "FAIL  new\nPASS  control"), {}),
        (without("PASS  control"), {}),
        (without("~     float32 +3 "), {}),
    ],
)
def test_of_two_versions_the_rows_that_both_have_are_compared(steady, change, found):
    shown = worse(steady, a_later_version(change(steady)))
    versions = shown.pop("versions")
    assert versions.startswith(f"WARN: script {v.VERSION} and 9.1; ")
    assert shown.keys() == found.keys(), shown
    assert all(shown[name].startswith(text) for name, text in found.items()), shown


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
        ("a poem\n", "old.txt is not a whole log of validate_npu.py"),
        ("", "old.txt is not a whole log of validate_npu.py"),
        ("\n\n", "old.txt is not a whole log of validate_npu.py"),
        ("validate_npu: test_vit on npu:0\n[1/5] device\n", "old.txt is not a whole log of validate_npu.py"),
        ("validate_npu 2.0: test_vit on npu:0\n\n[1/5] device\n", "old.txt is not a whole log of validate_npu.py"),
        ("RESULT: PASS  1 checks\n", "old.txt is not a whole log of validate_npu.py"),
        (b"\xff\xfe\x00", "the log .*old.txt cannot be read"),
    ],
)
def test_a_file_that_is_no_whole_log_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "old.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(v.CannotRun, match=message):
        Log.read(str(tmp_path / "old.txt"))


@pytest.mark.parametrize("part", [0.2, 0.5, 0.9, 0.98])
def test_the_beginning_of_a_log_is_refused(tmp_path, steady, part):
    (tmp_path / "old.txt").write_text(steady[: int(part * len(steady))].rpartition("\n")[0])
    with pytest.raises(v.CannotRun, match="its first line, or its last, the RESULT line, is not there"):
        Log.read(str(tmp_path / "old.txt"))


def test_a_log_without_its_first_line_is_refused(tmp_path, steady):
    (tmp_path / "old.txt").write_text(steady.partition("\n")[2])
    with pytest.raises(v.CannotRun, match="its first line, or its last, the RESULT line, is not there"):
        Log.read(str(tmp_path / "old.txt"))


def test_a_log_without_any_stage_is_refused_or_has_no_checks(tmp_path):
    (tmp_path / "log.txt").write_text("validate_npu 2.0: test_vit on cpu\n\nRESULT: PASS  0 checks\n")
    try:
        assert not Log.read(str(tmp_path / "log.txt")).marks
    except v.CannotRun:
        pass


def test_logs_are_compared_by_a_command(tmp_path, steady):
    (tmp_path / "old.txt").write_text(steady)
    (tmp_path / "new.txt").write_text(slower(1.2)(steady))
    same, slow = (start(["--compare", "old.txt", name], tmp_path) for name in ("old.txt", "new.txt"))
    assert same.status == 0 and same.result == "RESULT: PASS  6 checks: 6 passed, 0 warned, 0 failed, 0 skipped"
    assert slow.status == 1 and slow.result.startswith("RESULT: FAIL  6 checks: 5 passed")
    assert any(block.startswith("FAIL  speed: float32 1 of throughput") for block in slow.stdout.split("\n\n"))
    assert same.text is slow.text is None, "nothing was run, so there is no log"
    assert not same.stderr and not slow.stderr


@pytest.mark.timing
def test_two_logs_are_compared_without_torch(tmp_path, rehearsal):
    (tmp_path / "log.txt").write_text(rehearsal.text)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        assert start(["--compare", "log.txt", "log.txt"], tmp_path).status == 0
        seconds.append(time.perf_counter() - begin)
    assert min(seconds) < 0.5
