"""Faults in every operator of the model, on the emulated Ascend: each is flagged, and the log names the module.

The matrix runs on test_dinov3, the default model's family made small. A sample runs always, all of it with --full, which
also makes the table in tests/README.md.
"""

import math

import pytest
import trained
from ascend_emulator import environment
from conftest import QUICK, TESTS

SMALL = (*QUICK, "--model", "test_dinov3", "--batch-sizes", "2")

# What a forward pass launches (ASCEND_EMULATOR_TRACE lists it), and the module that the comparison should name.
OPERATORS = {
    "Convolution": "Conv2d",
    "Cos": "RotaryEmbeddingDinoV3",
    "Sin": "RotaryEmbeddingDinoV3",
    "Div": "RotaryEmbeddingDinoV3",
    "Muls": "RotaryEmbeddingDinoV3",
    "LayerNorm": "LayerNorm",
    "Matmul": "Linear",  # without bias: qkv
    "Addmm": "Linear",
    "Gelu": "GELU",
    "FlashAttentionScore": "EvaAttention",
    "Neg": "EvaAttention",
    "Cat": "EvaAttention",
    "Mul": "EvaAttention",
    "Add": "EvaAttention",
    "Mean": "Eva",  # the pooling, which is in no module of its own
}
PERSISTENT = ["nan", "scale=1.01", "offset=0.05", "element=1", "error=507015"]
KINDS = [*PERSISTENT, *(f"{kind},from=5,once" for kind in PERSISTENT)]  # 5: the calls of stage 1 are over
MATRIX = [(operator, kind) for operator in OPERATORS for kind in KINDS]
SAMPLE = [(operator, KINDS[(3 * i) % 10]) for i, operator in enumerate(OPERATORS)]
SAMPLE += [("Gelu", "scale=1.01"), ("Neg", "scale=1.01"), ("Mean", "scale=1.01"), ("Sin", "element=1")]
ALL = [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.full) for case in MATRIX]


def faulty(shared, operator, kind):
    return shared(f"{operator} {kind}".replace("=", " "), SMALL, environment(FAULT=f"{operator}:{kind}"))


def noticed(done):
    """FAIL, WARN or PASS, from the result line; a device that cannot be used (exit status 2) is no PASS either."""
    if done.status == 2:
        return "FAIL"
    assert (done.status == 1) == done.result.startswith("RESULT: FAIL"), done.stdout + done.stderr
    return "FAIL" if done.status else "PASS" if " 0 warned" in done.result else "WARN"


@pytest.mark.parametrize(("operator", "kind"), ALL)
def test_a_fault_in_any_operator_is_flagged(shared, operator, kind):
    done = faulty(shared, operator, kind)
    assert noticed(done) in (("FAIL",) if kind in PERSISTENT else ("FAIL", "WARN")), done.stdout
    module = OPERATORS[operator]
    if kind == "error=507015":
        assert f"aclnn{operator}: error code 507015" in " ".join((done.stdout + done.stderr).split())
    elif kind in PERSISTENT:
        assert set(done.marks(f"precision.module.{module}").values()) <= {"FAIL", "WARN"} != set(), done.stdout
        assert done.marks(f"precision.module.{module}")
        assert operator != "Mean" or set(done.marks("precision.tokens").values()) == {"PASS"}


def other_checks(shared, name, **fault):
    """Which checks of other scripts fail: a subset of {"max_abs", "same"}."""
    done = shared(f"others {name}".replace("=", " "), ("--model", "test_dinov3", "--weights", "random"),
                  environment(**fault), TESTS / "other_checks.py")  # fmt: skip
    outcomes = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if line.endswith(("passed", "failed")))
    assert (done.status, set(outcomes)) == (0, {"max_abs", "same"}), done.stdout + done.stderr
    return {name for name, outcome in outcomes.items() if outcome == "failed"}


def test_what_other_checks_notice_of_a_fault_is_known(shared):
    """Both miss an element that is off by 1 behind each GELU; 1 % of it, and a device that fails, neither."""
    assert not other_checks(shared, "healthy")
    for kind, noticing in (("element=1", set()), ("scale=1.01", {"max_abs", "same"}), ("error=507015", {"max_abs", "same"})):
        assert other_checks(shared, f"Gelu {kind}", FAULT=f"Gelu:{kind}") == noticing, kind


@pytest.mark.full
def test_the_table_of_what_is_caught_is_that_of_the_readme(shared):
    """One pass sees a fault that strikes once, or does not: no figure for other checks there."""
    healthy = other_checks(shared, "healthy")
    rows = [f"| none | 1 | 0 | 0 | {int('max_abs' in healthy)} | {int('same' in healthy)} |"]
    for kind in KINDS:
        verdicts = [noticed(faulty(shared, operator, kind)) for operator in OPERATORS]
        name, others = kind.replace(",from=5,once", ", once"), ["-", "-"]
        if kind in PERSISTENT:
            found = [other_checks(shared, f"{op} {kind}", FAULT=f"{op}:{kind}") for op in OPERATORS]
            others = [sum(check in noticing for noticing in found) for check in ("max_abs", "same")]
        cells = [name, len(verdicts), verdicts.count("FAIL"), verdicts.count("WARN"), *others]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    table = "\n".join(rows)
    assert table in (TESTS / "README.md").read_text("utf-8"), f"the table is now:\n{table}"


# --- in one layer only, and on trained weights ------------------------------------------------------------------------

LAYERS = {"Addmm": 3 * 3, "Matmul": 3, "Gelu": 3, "FlashAttentionScore": 3, "LayerNorm": 7}  # calls in a pass


@pytest.mark.parametrize(
    "operator", [pytest.param(name, marks=[] if name != "Matmul" else pytest.mark.full) for name in LAYERS]
)
def test_one_percent_in_one_layer_fails(run, operator):
    """Every n-th call: it strikes in the same layer of each pass, and stays far above what is healthy."""
    done = run(*SMALL, FAULT=f"{operator}:scale=1.01,from=2,every={LAYERS[operator]}")
    assert noticed(done) == "FAIL", done.stdout


TRAINED = ["Addmm", "Gelu", "FlashAttentionScore", "LayerNorm", "Convolution", "Mul", "Add"]


EVERYWHERE, ONE_LAYER = "", ",from=2,every=12"
TRAINED = [
    pytest.param(name, where, marks=[] if where and name in ("Gelu", "Addmm") else pytest.mark.full)
    for name in TRAINED
    for where in (EVERYWHERE, ONE_LAYER)
]


@pytest.mark.parametrize(("operator", "where"), TRAINED, ids=lambda value: value or "everywhere")
def test_one_percent_fails_on_a_trained_vit_too(run, operator, where):
    picture = trained.photographs()["chelsea"]
    weights = ("--model", "test_trained_vit", "--weights", trained.dinov2_vit_small(), "--image", picture)
    done = run(*SMALL, *weights, FAULT=f"{operator}:scale=1.01{where}")
    assert noticed(done) == "FAIL", done.stdout


def outcomes(done, mode):
    """The outcomes of all outputs in a mode."""
    return {mark for id, mark in done.marks("precision.").items() if id.endswith(f".{mode}") and "module" not in id}


@pytest.mark.parametrize("model", ["test_dinov3", "test_efficientnet"])
def test_a_fault_of_the_reduced_precision_kernels_only_fails_where_they_run_and_not_strictly(run, model):
    done = run(*SMALL, "--model", model, FAULT="Convolution:scale=1.01,hf32")
    assert noticed(done) == "FAIL", done.stdout
    assert outcomes(done, "strict") == {"PASS"} and "FAIL" in outcomes(done, "float32")
    assert done.mark("precision.modules") == "PASS" and done.mark("precision.module.Conv2d.float32") == "FAIL"


def test_hf32_in_matrix_products_that_nobody_asked_for_is_a_warning_in_the_strict_rows(run):
    done = run(*SMALL, HF32_MATMUL=1)
    assert noticed(done) == "WARN", done.stdout
    assert outcomes(done, "strict") == {"WARN"} and done.mark("device.fewer_bits") == "WARN"
    assert "rounding all operands to 10 bits costs" in done.texts["precision.fewer_bits"]


def test_the_i_bert_form_of_gelu_fails_and_is_named(run):
    done = run(*SMALL, GELU="ibert")
    assert noticed(done) == "FAIL" and done.mark("device.gelu") == "WARN", done.stdout
    assert done.mark("precision.module.GELU") == "FAIL" and outcomes(done, "strict") == {"FAIL"}


def test_strict_makes_a_warning_fail(run):
    assert [run(*SMALL, *strict, HF32_MATMUL=1).status for strict in ((), ("--strict",))] == [0, 1]


def test_faults_are_flagged_on_the_default_model_too(run):
    done = run(*QUICK, "--batch-sizes", "1", "--img-size", "64", FAULT="Neg:scale=1.01")
    assert noticed(done) == "FAIL" and done.mark("precision.module.EvaAttention") == "FAIL"
    assert math.isfinite(float(done.rows["precision.module.EvaAttention"]["max_row"]))
