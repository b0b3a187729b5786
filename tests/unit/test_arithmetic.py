"""Emulated precision: the rounding of a device is identified, reproduced on the CPU, and its cost sets limits."""

import math

import pytest
from small_run import CPU, after_model_stage, new_context, with_references

import validate_npu as v

torch = v.torch
KNOWN = [*v.KNOWN_PRECISIONS, v.FLOAT16]


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
    rounded = v.Fp32Precision(11, rounding, "HF32").round(torch.tensor([value], dtype=dtype))
    assert rounded.dtype == dtype and rounded.item() == expected


def test_operands_that_have_no_more_bits_are_unchanged():
    x = torch.randn(100, generator=torch.Generator().manual_seed(0))
    assert torch.equal(v.EXACT.round(x), x)
    assert torch.equal(v.FLOAT16.round(x), x.half().float())
    assert v.Fp32Precision(10, "truncated", "HF32").round(x.bfloat16()).dtype == torch.bfloat16


# --- identification ---------------------------------------------------------------------------------------------------


def device_with(precision, spoil=lambda output: output):
    """A matrix product in float32 as a device computes it. In float64, for the reference, it is exact."""

    def product(a, b):
        if a.dtype == torch.float64:
            return a @ b
        rounded = (precision.round(x) for x in (a, b))
        return spoil(torch.mm(*(x.double() for x in rounded)).float())

    return product


def operands():
    """Of 13 bits, so that ties are frequent, as probe_device draws them."""
    generator = torch.Generator().manual_seed(0)
    return [
        v.Fp32Precision(13, "truncated").round(torch.randn(shape, generator=generator))
        for shape in ((64, 96), (96, 32))
    ]


@pytest.mark.parametrize("precision", KNOWN, ids=lambda precision: precision.name)
def test_each_known_precision_is_identified(precision):
    identified, found = v.identify(device_with(precision), operands(), CPU)
    assert identified == precision and found.rel_l2 < 1e-6


def last_bits(output):
    return output * (1 + 1e-6 * torch.sin(torch.arange(output.numel()).reshape(output.shape)))


@pytest.mark.parametrize(
    ("spoil", "identified"),
    [
        (last_bits, True),  # kernels differ in their last bits
        (lambda output: output * 1.01, False),
        (lambda output: output.half().float(), False),
        (lambda output: output * math.nan, False),
    ],
)
def test_an_unknown_precision_is_not_identified_and_its_error_against_float64_is_returned(spoil, identified):
    product = device_with(v.KNOWN_PRECISIONS[1], spoil)
    precision, found = v.identify(product, operands(), CPU)
    assert precision == (v.KNOWN_PRECISIONS[1] if identified else None)
    if not identified:
        exact = torch.mm(*(x.double() for x in operands())).reshape(1, -1).numpy()
        assert found == v.compare(product(*operands()).reshape(1, -1).numpy(), exact) or found.rel_l2 == math.inf


def test_a_cpu_computes_products_in_float32_and_gelu_in_the_requested_form():
    probe = v.probe_device(new_context())
    assert {kind: precision for kind, (precision, _) in probe.products.items()} == dict.fromkeys(v.PROBES, v.EXACT)
    assert probe.gelu == {"none": "none", "tanh": "tanh"} and probe.gelu_error < 1e-6
    assert str(probe) == "matmul float32, convolution float32, GELU in the requested form"


def test_kinds_of_products_that_the_model_lacks_are_not_probed():
    assert list(v.probe_device(new_context("--model", "test_vit_without_convolution")).products) == ["matmul"]


class GeluOf(torch.overrides.TorchFunctionMode):
    """A device that computes this for GELU in float32."""

    def __init__(self, gelu):
        super().__init__()
        self.gelu = gelu

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.functional.gelu and args[0].dtype == torch.float32:
            return self.gelu(args[0], kwargs["approximate"])
        return function(*args, **(kwargs or {}))


ALWAYS_TANH = {"none": "tanh", "tanh": "tanh"}


def nan_in_the_tanh_form(x, form):
    output = torch.ops.aten.gelu(x, approximate=form)
    return output.index_fill(0, torch.tensor([7]), math.nan) if form == "tanh" else output


@pytest.mark.parametrize(
    ("gelu", "form", "text"),
    [
        (lambda x, form: torch.ops.aten.gelu(x, approximate="tanh"), ALWAYS_TANH, "GELU in the tanh form"),
        (lambda x, form: torch.ops.aten.gelu(x), {"none": "none", "tanh": "none"}, "GELU in the erf form"),
        (
            lambda x, form: torch.ops.aten.gelu(x) + 0.01,
            {"none": "none", "tanh": "tanh"},
            "GELU in neither erf nor tanh (differs by 1.0e-02)",
        ),
        (nan_in_the_tanh_form, {"none": "none", "tanh": "tanh"}, "GELU in neither erf nor tanh (differs by nan)"),
    ],
    ids=["tanh", "erf", "neither", "a NaN in one form"],
)
def test_the_form_of_gelu_is_identified(gelu, form, text):
    with GeluOf(gelu):
        probe = v.probe_device(new_context())
    assert probe.gelu == form and str(probe).endswith(text)


HF32, HF32_10 = v.Fp32Precision(11, "half away", "HF32"), v.Fp32Precision(10, "truncated", "HF32/TF32")


@pytest.mark.parametrize(
    ("documented", "found", "expected"),
    [
        ("float32", HF32, None),  # not documented: it is no expected cost
        ("float32", v.EXACT, None),
        ("HF32", HF32, HF32),
        ("HF32", HF32_10, HF32_10),
        ("TF32", HF32_10, HF32_10),
        ("HF32", v.EXACT, v.DOCUMENTED["HF32"]),  # the probe's size got a float32 kernel, the model's may not
        ("TF32", None, v.DOCUMENTED["TF32"]),
        ("HF32", v.FLOAT16, v.DOCUMENTED["HF32"]),
        ("float16", v.FLOAT16, v.FLOAT16),
        ("float16", HF32, v.DOCUMENTED["float16"]),
    ],
)
def test_the_rounding_is_the_measured_one_if_the_kind_is_documented_to_be_rounded(documented, found, expected):
    probe = v.Probe({"matmul": (found, None)}, {}, 0.0)
    assert probe.rounding({"matmul": documented}).get("matmul") == expected


def test_a_kind_that_was_not_probed_is_rounded_as_documented():
    assert v.Probe({}, {}, 0.0).rounding({"convolution": "HF32"}) == {"convolution": v.DOCUMENTED["HF32"]}


# --- emulation on the CPU ---------------------------------------------------------------------------------------------

BOTH = dict.fromkeys(v.PROBES, HF32)
IMAGES, WEIGHT = torch.randn(2, 8, 6, 6, generator=torch.Generator().manual_seed(1)), torch.randn(8, 8, 3, 3)
MATRIX = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2))
functional = torch.nn.functional
PRODUCTS = {
    "conv2d": ("convolution", lambda x, w: functional.conv2d(x, w), (IMAGES, WEIGHT)),
    "Conv2d": ("convolution", lambda x, w: torch.func.functional_call(CONV, {"weight": w}, x), (IMAGES, WEIGHT)),
    "depthwise": ("convolution", lambda x, w: functional.conv2d(x, w, groups=8), (IMAGES, WEIGHT[:, :1])),
    "padded": ("convolution", lambda x, w: functional.conv2d(x, w, padding="same"), (IMAGES, WEIGHT)),
    "linear": ("matmul", lambda x, w: functional.linear(x, w), (MATRIX, MATRIX[0, 0])),
    "linear with bias": ("matmul", lambda x, w: functional.linear(x, w, torch.zeros(8)), (MATRIX, MATRIX[0, 0])),
    "matmul": ("matmul", lambda x, w: x @ w, (MATRIX, MATRIX)),
    "matrix times vector": ("matmul", lambda x, w: x @ w[0, 0, 0], (MATRIX, MATRIX)),
    "einsum": ("matmul", lambda x, w: torch.einsum("bhij,bhjk->bhik", x, w), (MATRIX, MATRIX)),
    "bmm": ("matmul", lambda x, w: torch.bmm(x, w), (MATRIX[0], MATRIX[1])),
    "mm": ("matmul", lambda x, w: torch.mm(x, w), (MATRIX[0, 0], MATRIX[0, 1])),
    "addmm": ("matmul", lambda x, w: torch.addmm(torch.zeros(8), x, w), (MATRIX[0, 0], MATRIX[0, 1])),
    "baddbmm": ("matmul", lambda x, w: torch.baddbmm(torch.zeros(3, 8, 8), x, w), (MATRIX[0], MATRIX[1])),
}
CONV = torch.nn.Conv2d(8, 8, 3, bias=False)


@pytest.mark.parametrize("name", PRODUCTS)
def test_the_operands_of_every_product_are_rounded(name):
    kind, compute, operands = PRODUCTS[name]
    with torch.inference_mode():
        with v.emulated_precision({kind: HF32}) as seen:
            emulated = compute(*operands)
        assert torch.allclose(emulated, compute(*map(HF32.round, operands)), atol=5e-6)
        assert not torch.allclose(emulated, compute(*operands), atol=5e-5)
        assert seen.products == {kind: 1}


@pytest.mark.parametrize("name", PRODUCTS)
def test_products_of_the_other_kind_are_counted_and_not_rounded(name):
    kind, compute, operands = PRODUCTS[name]
    rounding = {other: HF32 for other in v.PROBES if other != kind}
    with torch.inference_mode(), v.emulated_precision(rounding) as seen:
        emulated = compute(*operands)
    assert torch.allclose(emulated, compute(*operands), atol=1e-5) and seen.products == {kind: 1}


def test_a_bias_is_not_rounded():
    zeros, bias = torch.zeros(8, 8), torch.full((8,), 1 + 2.0**-20)
    with torch.inference_mode(), v.emulated_precision(BOTH):
        assert torch.equal(functional.linear(zeros, zeros, bias), bias.expand(8, 8))


def test_attention_is_rounded_inside_its_fused_operator():
    q, k, x = MATRIX.double(), MATRIX.double().flip(-1), MATRIX.double().flip(-2)
    with torch.inference_mode(), v.emulated_precision(BOTH) as seen:
        emulated = functional.scaled_dot_product_attention(q, k, x)
    scale = 8**-0.25
    weights = torch.softmax(HF32.round(q * scale) @ HF32.round((k * scale).mT), -1)
    assert torch.allclose(emulated, HF32.round(weights) @ HF32.round(x), rtol=1e-12, atol=0)
    assert seen.products == {"matmul": 2}


def test_attention_keeps_its_fused_kernel_if_matrix_products_are_not_rounded():
    q = MATRIX.double()
    with torch.inference_mode(), v.emulated_precision({"convolution": HF32}) as seen:
        emulated = functional.scaled_dot_product_attention(q, q, q)
    assert torch.equal(emulated, functional.scaled_dot_product_attention(q, q, q)) and seen.products == {"matmul": 1}


@pytest.mark.parametrize("layer", [torch.nn.GELU(), functional.gelu, torch.nn.GELU(approximate="tanh")])
def test_gelu_is_computed_in_the_form_of_the_device(layer):
    x = torch.linspace(-3, 3, 7)
    with torch.inference_mode(), v.emulated_precision(gelu=ALWAYS_TANH) as seen:
        assert torch.equal(layer(x), functional.gelu(x, approximate="tanh"))
    assert seen.gelus == (getattr(layer, "approximate", "none") == "none"), (
        "those in the requested form are not counted"
    )


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear", "bicubic"])
def test_interpolation_gives_the_same_bits_although_layers_are_decomposed(mode):
    """The first forward pass on an NPU is made in the context, and must equal a later one."""
    with torch.inference_mode():
        expected = functional.interpolate(IMAGES, size=(11, 13), mode=mode)
        with v.emulated_precision():
            assert torch.equal(functional.interpolate(IMAGES, size=(11, 13), mode=mode), expected)


def test_nothing_is_changed_outside_the_context():
    x = torch.linspace(-3, 3, 64).reshape(8, 8)
    expected = x @ x, functional.gelu(x)
    with torch.inference_mode(), v.emulated_precision(BOTH, ALWAYS_TANH):
        assert not torch.equal(x @ x, expected[0]) and not torch.equal(functional.gelu(x), expected[1])
    assert torch.equal(x @ x, expected[0]) and torch.equal(functional.gelu(x), expected[1])


# --- references -------------------------------------------------------------------------------------------------------

ERF = {"none": "none", "tanh": "tanh"}


def references(documented, gelu=ERF, model="test_vit"):
    """Of a device that is documented, and found, to round convolutions or matrix products so."""
    context, loaded = after_model_stage("--model", model)
    context = new_context("--model", model, documented=dict.fromkeys(v.PROBES, "float32") | documented)
    return with_references(context, loaded, probe=v.Probe({}, gelu, 0.0)).references


@pytest.mark.parametrize(
    ("documented", "gelu", "same"),
    [
        ({}, ERF, {"exact", "reduced"}),
        ({}, ALWAYS_TANH, {"reduced"}),
        ({"convolution": "HF32"}, ERF, {"exact"}),
        ({"convolution": "HF32"}, ALWAYS_TANH, set()),
    ],
)
def test_the_cost_is_attributed_to_gelu_first_then_to_the_reduced_precision(documented, gelu, same):
    found = references(documented, gelu)
    assert {name for name in ("exact", "reduced") if getattr(found, name) is found.expected} == same, (
        "no pass is made twice"
    )
    assert (found.costs["embedding"] > 1e-5) == bool(documented)
    assert all(0 < error < 2e-6 for error in found.errors.values()), (
        "e is the error of the CPU in float32, without GELU"
    )


def test_rounding_both_kinds_costs_more_than_one():
    one, both = (references(documented).costs["tokens"] for documented in
                 ({"convolution": "HF32"}, {"convolution": "HF32", "matmul": "HF32"}))  # fmt: skip
    assert 1e-5 < one < both < 1e-2


def test_a_documented_precision_of_products_that_the_model_lacks_costs_nothing():
    found = references({"convolution": "HF32"}, model="test_vit_without_convolution")
    assert set(found.costs.values()) == {0.0} and found.reduced is found.expected


def test_a_model_in_which_no_product_is_intercepted_is_an_error(monkeypatch):
    context, loaded = after_model_stage()
    monkeypatch.setattr(v, "float64_outputs", lambda cpu, inputs, maps: {"embedding": v.np.ones((1, 8))})
    with pytest.raises(RuntimeError, match="^no matmul or convolution of this model was intercepted"):
        with_references(context, loaded)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_inputs_are_one_of_each_of_five_seeds_then_the_first_images_that_differ(tmp_path, seed):
    from PIL import Image

    for i in range(5):
        for name in (f"{i}.png", f"{i} (1).png"):  # two files of one image, whose outputs are equal
            Image.new("RGB", (50, 50), (50 * i, 0, 0)).save(tmp_path / name)
    _, loaded = after_model_stage("--image", tmp_path, "--seed", seed)
    seeded, images = loaded.references.inputs[:5], loaded.references.inputs[5:]
    assert torch.equal(seeded, torch.cat([v.draw_inputs(1, (3, 160, 160), seed + i) for i in range(5)]))
    assert torch.equal(images, loaded.images) and len(images.unique(dim=0)) == len(images) == v.FIRST_IMAGES == 4
    assert torch.equal(seeded[:1], loaded.inputs[:1]), "the reference of the first forward pass is that of image 0"


# --- limits of two outputs in float32 ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "cost", "warn", "fail"),
    [
        (1e-6, 0.0, 64e-6, 256e-6),  # strict: a multiple of the float32 error of the CPU
        (0.0, 0.0, 64 * 2**-24, 256 * 2**-24),  # no error at all would leave no room
        (2**-25, 1e-3, 2e-3 + 64 * 2**-24, 4e-3 + 256 * 2**-24),
        (3.5e-6, 1e-4, 4.24e-4, 1.296e-3),
        (0.0, math.inf, math.inf, math.inf),  # float16 overflows on the CPU as well
    ],
)
def test_the_limit_is_a_multiple_of_the_expected_cost_and_of_the_error_of_the_cpu(error, cost, warn, fail):
    assert v.fp32_tolerance(error, cost) == pytest.approx((warn, fail))


@pytest.mark.parametrize(
    ("name", "cost", "tolerance"),
    [
        ("embedding", None, v.fp32_tolerance(1e-6, 2e-3)),
        ("embedding", 0.0, v.fp32_tolerance(1e-6, 0.0)),
        ("", None, v.fp32_tolerance(3e-6, 4e-3)),  # model(x)
    ],
)
def test_each_output_has_the_limit_of_its_error_and_cost(name, cost, tolerance):
    outputs = {"embedding": None, "logits": None}
    errors, costs = {"embedding": 1e-6, "logits": 3e-6}, {"embedding": 2e-3, "logits": 4e-3}
    assert v.References(None, *[outputs] * 4, errors, costs).tolerance(name, cost) == tolerance
