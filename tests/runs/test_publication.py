"""--report: the section of a model card, rendered by a Markdown library and compared with the rows of the log."""

import json
import os
import random
import re
import subprocess
import sys
import time

import pytest
import skimage
from conftest import SCRIPT, SMALL, Run
from markdown_it import MarkdownIt

import validate_npu as v

FRONT_MATTER = "---\nhardware: NPU\ntags:\n- NPU\n- Ascend\n---\n\n"
PRECISION = v.TEXTS["accuracy"][1]
MARKDOWN = MarkdownIt("commonmark").enable("table")


def script(folder, *arguments):
    """The script as a user runs it, on a machine without its packages."""
    (folder / "none").mkdir(exist_ok=True)
    for name in ("torch", "numpy", "timm", "torch_npu"):
        (folder / "none" / f"{name}.py").write_text("raise SystemExit('imported')")
    command, env = (
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        os.environ | {"PYTHONPATH": str(folder / "none")},
    )
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


class Rendered:
    """A report: front matter, the first line, the tables of each section as texts, the code, and all text."""

    def __init__(self, done):
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        self.source, self.first, self.tables, self.code, self.texts = done.stdout, "", {}, [], []
        self.front_matter = done.stdout.startswith(FRONT_MATTER)
        section, before = "", ""
        for token in MARKDOWN.parse(done.stdout.removeprefix(FRONT_MATTER)):
            if token.type == "inline":
                assert not {child.type for child in token.children} - {
                    "text",
                    "text_special",
                    "strong_open",
                    "strong_close",
                }
                text = "".join(child.content for child in token.children)
                self.texts.append(text)
                if before == "heading_open":
                    section = text
                elif before in ("th_open", "td_open"):
                    self.tables[section][-1][-1].append(text)
                elif not self.tables:
                    self.first += text + "\n"
            elif token.type == "table_open":
                self.tables.setdefault(section, []).append([])
            elif token.type == "tr_open":
                self.tables[section][-1].append([])
            elif token.type == "fence":
                self.code.append(token.content)
            before = token.type

    def table(self, section, index=0):
        """Row -> column -> cell."""
        header, *rows = self.tables[section][index]
        assert all(len(row) == len(header) for row in rows)
        return {row[0]: dict(zip(header, row)) for row in rows}

    def values(self, section, index=-1):
        return {label: next(iter([*cells.values()][1:])) for label, cells in self.table(section, index).items()}


@pytest.fixture
def report(tmp_path):
    return lambda *logs, language="en": Rendered(script(tmp_path, "--report", *logs, "--language", language))


@pytest.fixture
def edited(tmp_path):
    """edited(run, (pattern, text), ...): its log with each match of each pattern replaced, and new counts."""

    def edited(run, *changes, name="edited.txt"):
        text = run.text
        for pattern, new in changes:
            text, count = re.subn(pattern, lambda _, new=new: new, text, flags=re.MULTILINE)
            assert count, pattern
        marks = re.findall(r"^(PASS|WARN|FAIL|SKIP) +[a-z]+\.\S+ ", re.split(r"^\[(?:failures|summary)", text, flags=re.MULTILINE)[0],
                           flags=re.MULTILINE)  # fmt: skip
        counts = zip(("passed", "warned", "failed", "skipped"), map(marks.count, (v.PASS, v.WARN, v.FAIL, v.SKIP)))
        text = re.sub(r"\d+ passed, .* skipped", ", ".join(f"{count} {word}" for word, count in counts), text)
        (tmp_path / name).write_text(text, "utf-8")
        found = Run(tmp_path, 0, "", "")
        found.path, found.text = tmp_path / name, text
        return found

    return edited


ON_NPU, PRETRAINED = ("-emulated", ""), (r" --weights\s+random", "")


@pytest.fixture(scope="session")
def faulty(shared):
    from ascend_emulator import environment

    return shared("publication-fault", (*SMALL, "--modes", "float16"), environment(FAULT="Addmm:scale=1.01"))


def test_a_dry_run_is_stated_and_claims_nothing(report, rehearsal):
    found = report(rehearsal.path)
    assert not found.front_matter and "#+NPU" not in found.source
    no_claim = "dry run on a CPU: no claim about an NPU; random weights: no claim about precision"
    assert found.first.startswith(f"result: PASS; {no_claim}; ")
    assert (
        "validated on 5 images; this is not an evaluation on a full dataset (5 of them are seeded random images)."
        in found.first
    )
    assert "Validation (not of an NPU)" in found.texts and "Validation on an Ascend NPU" not in found.texts
    assert PRECISION not in found.tables
    assert no_claim in found.texts
    assert found.code == [f"python {rehearsal.texts['run.command']}\n"], "no CANN and no hub are needed"
    for row in found.table("Performance").values():
        assert "speed-up over the CPU" not in row, "the device is the CPU"


def test_an_emulated_run_has_the_figures_of_its_log(report, healthy):
    found, texts = report(healthy.path), healthy.texts
    assert not found.front_matter
    assert found.first.startswith(
        "result: PASS; random weights: no claim about precision; emulated device: no claim about a real NPU; "
    )
    environment, model = found.values("Environment"), found.values("Model and weights")
    for label, id in (
        ("device", "device.name"),
        ("software", "device.software"),
        ("host", "device.host"),
        ("date", "run.date"),
    ):
        assert environment[label] == texts[id]
    assert "Atlas A2" in environment["device"] and environment["devices validated"] == "1"
    assert model["model"] == v.DEFAULT_MODEL and model["weights"] == texts["model.weights"]
    assert model["SHA-256 of the weights"] == texts["model.weights_sha256"]
    outputs = found.table("Inference")
    assert len(outputs) == 5
    for name, cells in outputs.items():
        row = healthy.rows[f"outputs.{name}"]
        assert cells == {"output": name, "dtype": "float32", "check": "PASS"} | {
            key: row[key] for key in ("shape", "min", "max", "mean", "std")
        }
    assert found.values("Inference")["first 5 values npu"] == texts["precision.first_values.npu"]
    assert PRECISION not in found.tables
    header, *rows = found.tables["Performance"][0]
    assert [row[:2] for row in rows] == [["float32", "1"], ["float32", "4"], ["float32", "8"], ["float32", "16"]]
    cpu = healthy.rows["model.cpu_latency"]
    for cells in (dict(zip(header, row)) for row in rows):
        row = healthy.rows[f"throughput.float32.{cells['batch size']}"]
        names = {
            "images/s": "images/s",
            "mean (ms)": "mean",
            "p50 (ms)": "p50",
            "p99 (ms)": "p99",
            "peak memory (MiB)": "peak",
        }
        assert {name: cells[name] for name in names} == {name: row[key] for name, key in names.items()}
        assert float(cells["ms per image"]) == pytest.approx(float(row["mean"]) / int(cells["batch size"]), rel=2e-3)
        speedup = f"{float(cpu['p50_ms']) / float(row['p50']):.2f}" if cells["batch size"] == "1" else "-"
        assert cells["speed-up over the CPU"] == speedup
    assert found.values("Performance")["CPU threads"] == cpu["threads"] == "1"
    assert found.values("Notes")["throughput.copy"] == texts["throughput.copy"]
    assert found.texts[-1].endswith(f"{healthy.path.name}: {healthy.result}") and v.VERSION in found.texts[-1]


def test_a_run_on_an_npu_with_trained_weights_has_everything(report, edited, healthy):
    log = edited(healthy, ON_NPU, PRETRAINED)
    found = report(log.path)
    assert (
        found.front_matter
        and found.source.endswith("\n#+NPU\n")
        and found.first.startswith("result: PASS; validated on 5 images; ")
    )
    precision = found.table(PRECISION)
    assert len(precision) == 5
    for name, cells in precision.items():
        row, judged = log.rows[f"precision.published.{name}"], log.rows[f"precision.{name}.float32"]
        assert [cells[key] for key in ("max abs", "mean abs", "rel L2", "cosine")] == [
            row[key] for key in ("max_abs", "mean_abs", "rel_l2", "cosine")
        ]
        assert float(cells["normalized mean error"].removesuffix("%")) == pytest.approx(100 * float(row["nmae"]))
        assert cells["float32"] == f"PASS ({judged['used']})"
        assert cells["strict"] == f"PASS ({log.rows[f'precision.{name}.strict']['used']})"
    why = found.values(PRECISION)["errors due to HF32 and GELU"]
    assert why == f"{log.texts['precision.cost.GELU']}; {log.texts['precision.cost.HF32']}"
    (code,) = found.code
    assert "/usr/local/Ascend/cann/set_env.sh" in code and "\nexport HF_ENDPOINT=https://hf-mirror.com\n" in code
    assert code.endswith(f"\npython {log.texts['run.command']}\n")


def test_chinese_is_the_default(tmp_path, report, healthy):
    done = script(tmp_path, "--report", healthy.path)
    assert done.stdout == report(healthy.path, language="zh").source
    found = Rendered(done)
    assert found.first.startswith(
        "结论：PASS；随机权重：不作精度结论；仿真设备，不代表真实 NPU；在 5 张图像上验证；这不是完整数据集上的评测"
    )
    assert [*found.tables] == ["验证环境", "模型与权重", "推理", "性能", "说明"]
    assert all(all(texts) for texts in v.TEXTS.values()), "each text is there in both languages"


def test_a_failure_is_printed_as_a_failure(report, edited, faulty):
    assert faulty.mark("precision.logits.float32") == v.FAIL
    assert report(faulty.path).first.startswith("result: FAIL; ")
    found = report(edited(faulty, ON_NPU, PRETRAINED).path)
    assert found.first.startswith("result: FAIL; ")
    header, *rows = found.tables[PRECISION][0]
    assert header[-3:] == ["strict", "float32", "float16"]
    for row in rows:
        for mode, cell in zip(header[-3:], row[-3:]):
            id = f"precision.{row[0]}.{mode}"
            assert cell == f"{faulty.mark(id)} ({faulty.rows[id]['used']})"
    notes, failed = found.values("Notes"), [id for id, mark in faulty.marks().items() if mark == v.FAIL]
    assert [*notes][: len(failed)] == failed and all(notes[id].startswith("FAIL ") for id in failed)
    limit = faulty.rows["precision.logits.float32"]["limit"]
    assert f", limit {limit}, " in notes["precision.logits.float32"]
    top1 = found.values(PRECISION)["top-1 agrees"]
    assert top1 == "{top1}/{inputs}".format(**faulty.rows["precision.probabilities"])


def test_the_result_counts_even_where_no_check_of_a_stage_failed(report, edited, healthy):
    """With --strict a WARN fails the run, with --baseline a comparison does."""
    found = report(edited(healthy, ("^RESULT: PASS", "RESULT: FAIL"), ("^PASS outputs.det", "SKIP outputs.det")).path)
    assert found.first.startswith("result: FAIL; ") and "; some checks were not done (SKIP); " in found.first
    assert found.values("Notes")["outputs.determinism"].startswith("SKIP ")


def test_of_several_logs_each_has_a_column(report, edited, healthy, faulty):
    one, two = (
        edited(healthy, ON_NPU, PRETRAINED, name="one.txt"),
        edited(faulty, ON_NPU, PRETRAINED, name="two|two.txt"),
    )
    found = report(one.path, two.path)
    assert found.front_matter
    assert [line.partition(";")[0] for line in found.first.splitlines()] == [
        "one.txt: result: PASS",
        "two|two.txt: result: FAIL",
    ]
    assert len(found.code) == 2
    for section, tables in found.tables.items():
        assert len(tables) == 1 and tables[0][0] == ["item", "one.txt", "two|two.txt"], section
    precision, speed = found.table(PRECISION), found.table("Performance")
    for log, column in ((one, "one.txt"), (two, "two|two.txt")):
        assert precision["embedding: max abs"][column] == log.rows["precision.published.embedding"]["max_abs"]
        assert speed["float32.1: images/s"][column] == log.rows["throughput.float32.1"]["images/s"]
    assert precision["logits: max abs"]["one.txt"] == "-", "the model has no classifier"
    assert speed["float32.16: p99 (ms)"]["two|two.txt"] == "-", "it was not timed"
    assert found.table("Environment")["device"]["one.txt"] == healthy.texts["device.name"]
    assert not report(one.path, healthy.path).front_matter, "one of them was emulated"


def test_images_are_counted_and_have_their_labels(report, run, edited, tmp_path):
    names = ["a*b.png", "_b_.png"]
    for name, image in zip(names, (skimage.data.astronaut(), skimage.data.chelsea())):
        skimage.io.imsave(tmp_path / name, image)
    done = run(*SMALL, "--image", "_b_.png", "a*b.png")
    labels = {f"image {i}": done.texts[f"precision.image.{i}"] for i in (1, 2)}
    assert labels["image 1"].startswith("_b_.png: ") and labels["image 2"].startswith("a*b.png: ")
    untrained, found = report(done.path), report(edited(done, ON_NPU, PRETRAINED).path)
    for each in (untrained, found):
        assert "; validated on 7 images; this is not an evaluation on a full dataset (5 of them are " in each.first
    values = found.values("Inference")
    assert {label: values[label] for label in labels} == labels
    assert not labels.keys() & untrained.values("Inference").keys(), "labels of random weights mean nothing"
    assert found.values(PRECISION)["predictions of images"] == done.texts["precision.top1"]


def test_the_command_for_several_devices(report, edited, healthy):
    rows = [
        v.DEVICES.entry(v.PASS, f"devices.{i}", i // 2, f"npu:{i % 2}", 25, 0, 0, 1e-4, "Ascend910B4") for i in range(4)
    ]
    lines = [line for entry in (*v.DEVICES.header(), *rows, v.DEVICES.legend("")) for line in entry.lines()]
    found = report(edited(healthy, (r"\n\[summary\]", "\n[devices]\n" + "\n".join(lines) + "\n\n[summary]")).path)
    assert found.code[0].endswith(f"\ntorchrun --nnodes 2 --nproc-per-node 2 {healthy.texts['run.command']}\n")
    assert found.values("Environment")["devices validated"] == "4"


# The table "性能参考" of the published model card: batch size, images/s, ms per batch. Batches of 16 take 1.1 ms an image.
CARD = [("1", "30.89", "32.38"), ("4", "233.97", "17.10"), ("8", "463.21", "17.27"), ("16", "927.35", "17.25")]


def test_the_published_card_comes_out_as_it_was_published(report, edited, healthy):
    changes = []
    for batch, rate, ms in CARD:
        rate, ms, id = float(rate), float(ms), f"throughput.float32.{batch}"
        line = v.THROUGHPUT.entry(v.VARIES, id, rate, ms, ms, ms, ms, 0.01).lines()[0]
        changes.append((rf"^~    {re.escape(id)} .*%$", line))  # the table of latencies has no percentages
        line = v.LATENCY.entry(v.VARIES, id, ms, ms, ms, ms, "host", 50.0, 88.0, 100).lines()[0]
        changes.append((rf"^~    {re.escape(id)} .* (device|host) .*", line))
    log = edited(healthy, ON_NPU, PRETRAINED, *changes)
    header, *rows = report(log.path).tables["Performance"][0]
    columns = [header.index(name) for name in ("batch size", "images/s", "mean (ms)")]
    assert [[float(row[i]) for i in columns] for row in rows] == [[*map(float, row)] for row in CARD]
    assert round(float(rows[-1][header.index("ms per image")]), 1) == 1.1


@pytest.mark.parametrize("seed", range(3))
def test_text_of_a_log_is_never_markup(report, edited, healthy, seed):
    draw = random.Random(seed)
    pieces = [
        *"|<>*_`[]()\\~&#!-+.:1a",
        "<b>",
        "&lt;",
        "[a](b)",
        "**a**",
        "_a_",
        "a_b",
        "\\|",
        "``",
        "~~",
        "![a](b)",
        "![",
        "<!--",
        "\\\\",
    ]
    texts = ["".join(draw.choices(pieces, k=12)) for _ in range(20)]
    texts[0] = r"a|b <c> *d* _e_ `f` [g](h) \ i~j &lt; k\|l __m__ **n**"
    for text in texts:
        (inline,) = (token for token in MARKDOWN.parse(f"| {v.escape(text)} |\n| --- |\n") if token.type == "inline")
        assert "".join(child.content for child in inline.children) == text
    log = edited(
        healthy,
        (r"(?<=^     device.host          )[^\n]*", texts[0]),
        ("validate_npu.py --weights", "validate_npu.py --image '```' --weights"),
    )
    found = report(log.path)
    assert found.values("Environment")["host"] == texts[0]
    assert f"python {log.texts['run.command']}\n" in found.code[0] and "```" in found.code[0]


def test_json_has_the_same_content(tmp_path, report, edited, healthy):
    log = edited(healthy, ON_NPU, PRETRAINED)
    done = script(tmp_path, "--report", log.path, healthy.path, "--json")
    content, emulated = json.loads(done.stdout)
    found = report(log.path)
    assert content["result"] == healthy.result and content["statements"] == ["PASS"]
    assert emulated["statements"] == ["PASS", "random_weights", "emulated"] and emulated["accuracy"] == {}
    names = {key: texts[1] for key, texts in v.TEXTS.items()}
    for section in ("inference", "accuracy"):
        rows = {name: row for name, row in content[section].items() if isinstance(row, dict)}
        printed = found.table(names[section])
        assert {name: {names.get(key, key): cell for key, cell in row.items()} for name, row in rows.items()} == {
            name: {key: cell for key, cell in row.items() if key != "output"} for name, row in printed.items()
        }
    assert {names[key]: text for key, text in content["environment"].items()} == found.values("Environment")
    assert content["performance"]["float32.4"]["images/s"] == healthy.rows["throughput.float32.4"]["images/s"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: None, "cannot be read"),
        (lambda text: "a poem\n", "is not a complete log"),
        (lambda text: text[: len(text) // 2], "is not a complete log"),
        (lambda text: text.replace(f"validate_npu {v.VERSION}: ", "validate_npu 2.3: ", 1), "is a log of version 2.3"),
        (lambda text: text.replace("validate_npu.py --model", "validate_npu.py --muddle"), "the command in the log"),
        (lambda text: text.replace("     run.command ", "     run.comment "), "the command in the log"),
    ],
)
def test_what_is_no_complete_log_is_refused_in_one_line(tmp_path, rehearsal, change, message):
    text = change(rehearsal.text)
    if text is not None:
        (tmp_path / "log.txt").write_text(text)
    for more in ((), ("--json",), ("--language", "en")):
        done = script(tmp_path, "--report", rehearsal.path, "log.txt", *more)
        assert done.returncode == 2 and done.stdout == "", "stdout may be a model card"
        assert len(done.stderr.splitlines()) == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_json_without_a_report_is_refused(tmp_path):
    done = script(tmp_path, "--json")
    assert done.returncode == 2 and "--json is for --report" in done.stderr


@pytest.mark.timing
def test_a_report_takes_less_than_a_second(tmp_path, healthy):
    started = time.perf_counter()
    Rendered(script(tmp_path, "--report", healthy.path))
    assert time.perf_counter() - started < 1
