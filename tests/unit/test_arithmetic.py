"""The device's arithmetic: it is recognised, the CPU imitates it, and what is left is judged."""

import math

import pytest

import validate_npu as v

torch = v.torch
KNOWN = [*v.ARITHMETICS, v.FLOAT16]


# --- rounding ---------------------------------------------------------------------------------------------------------

UNIT = 2.0**-11


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("rounding", "value", "expected"),
    [
        ("half away", 1 + UNIT / 2, 1 + UNIT),
        ("half away", -1 - UNIT / 2, -1 - UNIT),
        ("half away", 1 + UNIT * 0.49, 1.0),
        ("half even", 1 + UNIT / 2, 1.0),
        ("half even", 1 + UNIT * 1.5, 1 + 2 * UNIT),
        ("half even", 1 + UNIT * 0.51, 1 + UNIT),
        ("truncated", 1 + UNIT * 0.99, 1.0),
        ("truncated", -1 - UNIT * 0.99, -1.0),
        ("half away", 2 - UNIT / 4, 2.0),  # into the next power of two
        ("half away", math.inf, math.inf),
        ("half even", 0.0, 0.0),
    ],
)
def test_an_operand_is_rounded_to_the_bits_that_are_kept(dtype, rounding, value, expected):
    rounded = v.Arithmetic(11, rounding, "HF32").round(torch.tensor([value], dtype=dtype))
    assert rounded.dtype == dtype and rounded.item() == expected


def test_what_has_no_more_bits_stays_as_it_is():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(v.EXACT.round(x), x)
    assert torch.equal(v.FLOAT16.round(x), x.half().float())
    assert v.Arithmetic(10, "truncated", "HF32").round(x.bfloat16()).dtype == torch.bfloat16


# --- recognition ------------------------------------------------------------------------------------------------------


def device_with(arithmetic, spoil=lambda output: output):
    """A matrix product as a device computes it: of fp32. What the reference asks for is in fp64, and plain."""

    def product(a, b):
        if a.dtype == torch.float64:
            return a @ b
        rounded = (arithmetic.round(x) for x in (a, b))
        return spoil(torch.mm(*(x.double() for x in rounded)).float())

    return product


def probe():
    found = v.Probe(torch.device("cpu"), seed=0)
    return found, (found.draw((64, 96)), found.draw((96, 32)))


@pytest.mark.parametrize("arithmetic", KNOWN, ids=lambda a: f"{a.name or 'fp32'} {a.bits} {a.rounding}")
def test_each_known_arithmetic_is_recognised(arithmetic):
    found, operands = probe()
    recognised, difference = found.recognise(device_with(arithmetic), operands)
    assert recognised == arithmetic and difference.rel_l2 < 1e-6


def noise(output):
    return output * (1 + 1e-6 * torch.sin(torch.arange(output.numel()).reshape(output.shape)))


@pytest.mark.parametrize(
    ("spoil", "recognised"),
    [
        (noise, True),  # kernels differ in their last bits
        (lambda output: output * 1.01, False),
        (lambda output: output.half().float(), False),
        (lambda output: output * math.nan, False),
    ],
)
def test_what_is_not_known_is_not_recognised_and_excuses_nothing(spoil, recognised):
    found, operands = probe()
    arithmetic, _ = found.recognise(device_with(v.ARITHMETICS[1], spoil), operands)
    assert arithmetic == (v.ARITHMETICS[1] if recognised else None)
    assert recognised or found.of(("matmul", "1"), device_with(v.EXACT, spoil), [(8, 8), (8, 8)]) == v.EXACT


def test_the_form_of_gelu_is_that_which_is_asked_for_on_a_cpu():
    assert probe()[0].gelu == {"none": "none", "tanh": "tanh"}


# --- imitation --------------------------------------------------------------------------------------------------------

HF32 = v.Arithmetic(11, "half away", "HF32")
IMAGES, WEIGHT = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1)), torch.randn(8, 8, 3, 3)
MATRIX = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("compute", "operands"),
    [
        (lambda x, w: torch.nn.functional.conv2d(x, w), (IMAGES, WEIGHT)),
        (lambda x, w: torch.nn.functional.conv2d(x, w, groups=8), (IMAGES, WEIGHT[:, :1])),
        (lambda x, w: torch.nn.functional.linear(x, w), (MATRIX, MATRIX[0, 0])),
        (lambda x, w: x @ w, (MATRIX, MATRIX)),
        (lambda x, w: torch.einsum("bhij,bhjk->bhik", x, w), (MATRIX, MATRIX)),
        (lambda x, w: torch.bmm(x, w), (MATRIX[0], MATRIX[1])),
    ],
    ids=["conv2d", "depthwise", "linear", "matmul", "einsum", "bmm"],
)
def test_operands_of_every_product_are_rounded(compute, operands):
    with torch.no_grad(), v.imitation(lambda *_: HF32, {}) as seen:
        imitated = compute(*operands)
    assert torch.allclose(imitated, compute(*map(HF32.round, operands)), atol=5e-6)
    assert not torch.allclose(imitated, compute(*operands), atol=5e-5)
    assert seen.rounded > 0


def test_a_bias_is_not_rounded():
    zeros, bias = torch.zeros(8, 8), torch.full((8,), 1 + 2.0**-20)
    with torch.no_grad(), v.imitation(lambda *_: HF32, {}):
        assert torch.equal(torch.nn.functional.linear(zeros, zeros, bias), bias.expand(8, 8))


def test_attention_is_rounded_inside_its_fused_operator():
    q, k, x = MATRIX.double(), MATRIX.double().flip(-1), MATRIX.double().flip(-2)
    with torch.no_grad(), v.imitation(lambda *_: HF32, {}):
        imitated = torch.nn.functional.scaled_dot_product_attention(q, k, x)
    scale = 8**-0.25
    weights = torch.softmax(HF32.round(q * scale) @ HF32.round((k * scale).mT), -1)
    assert torch.allclose(imitated, HF32.round(weights) @ HF32.round(x), rtol=1e-12, atol=0)


def test_attention_may_be_exact_where_matrix_products_are_not():
    def of(kind, *_):
        return v.EXACT if kind[0] == "attention" else HF32

    q = MATRIX.double()
    attention = torch.nn.functional.scaled_dot_product_attention
    with torch.no_grad(), v.imitation(of, {}):
        assert torch.equal(attention(q, q, q), attention(q, q, q))
        imitated = attention(q, q, q)
    assert torch.allclose(imitated, attention(q, q, q), rtol=1e-14, atol=0)


@pytest.mark.parametrize("layer", [torch.nn.GELU(), torch.nn.functional.gelu, torch.nn.GELU(approximate="tanh")])
def test_gelu_takes_the_devices_form(layer):
    x = torch.linspace(-3, 3, 7)
    with torch.no_grad(), v.imitation(lambda *_: v.EXACT, {"none": "tanh", "tanh": "tanh"}):
        assert torch.equal(layer(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_a_reference_that_does_not_round_all_products_is_an_error():
    """Under inference_mode a dispatch mode sees layers whole, and would round nothing."""
    options = v.parse_arguments(["--model", "test_vit", "--device", "cpu", "--weights", "random", "--batch-sizes", "1"])
    device = torch.device("cpu")
    run = v.Run(options, v.Report(quiet=True), v.Cards(), device, v.fp32_arithmetic(device), v.Probe(device, 0))
    list(v.model_stage(run))
    run.probe.found["convolution", "16x16/16"] = HF32, None
    plain = v.forward_outputs(run.model.cpu, run.images)
    v.reference_outputs(run, run.probe, run.images, plain)
    run.model.cpu.forward_features = torch.inference_mode()(run.model.cpu.forward_features)
    with pytest.raises(RuntimeError, match="did not round all products"):
        v.reference_outputs(run, run.probe, run.images, plain)


# --- the limit of the residual ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "plain", "cost", "fail"),
    [
        (1e-6, 1e-6, 0.0, 256e-6),  # nothing is rounded: a multiple of the CPU's own error
        (3.5e-6, 3.5e-6, 1.2e-2, 896e-6),  # the trained ViT: its cost excuses nothing that the CPU does not show
        (6.5e-4, 1e-6, 2.1e-3, 4.456e-3),  # the trained CNN: what its roundings may differ by
        (0.0, 0.0, 0.0, 256 * 2**-24),  # no error at all would leave no room
    ],
)
def test_the_limit_follows_the_model(own, plain, cost, fail):
    limit = v.residual_limit(own, plain, cost)
    assert limit.fail == pytest.approx(fail) and limit.warn <= limit.fail / 2
