"""No false alarm: healthy devices of every kind, random and trained weights, neither FAIL nor WARN.

The emulated Ascend is healthy by construction. A sample of the matrix runs always, all of it with --full.
"""

import itertools
import re

import pytest
import trained
from conftest import QUICK

PICTURES = trained.photographs()
MODELS = {
    "random 0": ("--model", "test_dinov3"),
    "random 1": ("--model", "test_dinov3", "--seed", "1"),
    "random 2": ("--model", "test_dinov3", "--seed", "2"),
    "trained ViT": ("--model", "test_trained_vit", "--image", *PICTURES.values()),
    "trained CNN": ("--model", "efficientnet_lite0", "--img-size", "128", "--image", PICTURES["chelsea"]),
    "24 blocks": ("--model", "test_deep_vit"),
}
WEIGHTS = {"trained ViT": trained.dinov2_vit_small, "trained CNN": trained.efficientnet_lite0}
HF32 = {
    "11 nearest": {},
    "11 truncated": {"HF32_ROUNDING": "truncate"},
    "10 bits": {"HF32_BITS": 10},
    "off": {"HF32": 0},
}
MATRIX = list(itertools.product(MODELS, HF32, ["tanh", "erf"], [0, 1e-6]))
SAMPLE = [
    ("random 0", "11 truncated", "erf", 1e-6),
    ("random 1", "off", "tanh", 1e-6),
    ("trained ViT", "11 nearest", "tanh", 1e-6),
    ("trained CNN", "11 nearest", "tanh", 1e-6),
    ("24 blocks", "10 bits", "erf", 1e-6),
]
CASES = [pytest.param(*case, marks=[] if case in SAMPLE else pytest.mark.full) for case in MATRIX]


@pytest.mark.parametrize(("model", "hf32", "gelu", "perturb"), CASES)
def test_a_healthy_device_passes_without_a_warning(run, model, hf32, gelu, perturb):
    weights = ("--weights", WEIGHTS[model]()) if model in WEIGHTS else ()
    amp = ("--modes", "amp-float16", "amp-bfloat16")
    done = run(*QUICK, *MODELS[model], *weights, *amp, GELU=gelu, PERTURB=perturb, **HF32[hf32])
    if (hf32, perturb) == ("off", 0) and (gelu == "erf" or model == "trained CNN"):  # no NPU equals the CPU bit for bit
        assert list(done.marks().values()).count("WARN") == 1 and done.mark("precision.is_device") == "WARN", done.stdout
    else:
        assert done.clean, done.stdout
    bits = {
        "11 nearest": "HF32 (11 bits, half away)",
        "11 truncated": "HF32 (11 bits, truncated)",
        "10 bits": "HF32/TF32 (10 bits, ",
    }
    assert f"convolution {bits.get(hf32, 'float32')}" in done.texts["device.fp32"]
    assert done.texts["device.fp32"].endswith(f"GELU in the {gelu} form" if gelu == "tanh" else "form")
    assert done.mark("precision.nearest") == ("PASS" if model == "trained ViT" else None), "without a classifier neighbours agree"


@pytest.mark.parametrize("kind", ["depthwise", "pointwise", "dense"])
def test_a_device_that_rounds_only_in_some_convolutions_passes(run, kind):
    done = run(*QUICK, "--model", "test_efficientnet", HF32_ONLY=kind)
    assert done.clean, done.stdout


# A library chooses its kernels by size: HF32 from so many multiply-adds on, the batch included.
FROM = {
    "resnet50": ["2e7", "1e8"],
    "mobilenetv3_large_100": ["1e7"],
    "levit_128": ["1e7"],
    "tnt_s_patch16_224": ["1e8"],
    "edgenext_xx_small": ["1e7"],
    "efficientnet_b0": ["1e7", "1e8"],
    "trained EfficientNet-Lite0": ["3e7"],
    "trained ViT": ["1e8"],
}
TRAINED = {
    "trained EfficientNet-Lite0": ("--model", "efficientnet_lite0", "--weights", trained.efficientnet_lite0),
    "trained ViT": ("--model", "test_trained_vit", "--weights", trained.dinov2_vit_small),
}
FAST = [("mobilenetv3_large_100", "1e7"), ("levit_128", "1e7"), ("trained ViT", "1e8")]
SIZES = [
    pytest.param(model, least, marks=[] if (model, least) in FAST else pytest.mark.full)
    for model, sizes in FROM.items()
    for least in sizes
]


@pytest.mark.parametrize(("model", "least"), SIZES)
def test_a_device_whose_kernels_are_chosen_by_size_passes(run, model, least):
    *which, weights = TRAINED.get(model, ("--model", model, "--weights", "random"))
    done = run(*QUICK, *which, weights() if callable(weights) else weights, HF32_FROM=least)
    assert done.clean, done.stdout

    def figures(mode):
        rows = [row for id, row in done.rows.items() if id.endswith(f".{mode}") and "expected" in row]
        return [[float(row[column]) for column in ("max_row", "expected", "cpu_err")] for row in rows]

    strict, default = figures("strict"), figures("float32")
    assert strict and all(error < 8 * cpu for error, _, cpu in strict)
    assert default and all(error < 1.6 * expected + 8 * cpu for error, expected, cpu in default)


@pytest.mark.parametrize("rounding", ["even", "tuned"])
@pytest.mark.parametrize("model", ["test_dinov3", "test_efficientnet"])
def test_a_device_whose_ties_depend_on_the_batch_passes(run, model, rounding):
    """As on an Ascend 950. The batch sizes are on both sides of the emulator's limit of 4."""
    done = run(*QUICK, "--model", model, "--batch-sizes", "1", "4", HF32_ROUNDING=rounding)
    assert done.clean, done.stdout


def test_trained_weights_and_the_road_from_file_to_label(run, tmp_path):
    """From files to labels: the network knows what is on the pictures, and the device sees what the CPU sees."""
    for name, picture in PICTURES.items():
        (tmp_path / "pictures").mkdir(exist_ok=True)
        (tmp_path / "pictures" / picture.name).write_bytes(picture.read_bytes())
    model = ("--model", "efficientnet_lite0", "--weights", trained.efficientnet_lite0(), "--image", "pictures")
    done = run(*QUICK, *model, "--batch-sizes", "1", "--iters", "1")
    assert done.clean, done.stdout
    shown = re.findall(r"precision\.image\.\d +(\w+)\.\w+: (\w+) ([\d.]+) on CPU, (\w+) ([\d.]+) on npu", done.text)
    labels = {picture: (cpu, npu) for picture, cpu, _, npu, _ in shown}
    assert labels == {"chelsea": ("tabby",) * 2, "coffee": ("espresso",) * 2, "rocket": ("missile",) * 2}
    assert all(abs(float(cpu) - float(npu)) < 0.02 for _, _, cpu, _, npu in shown)
    assert done.mark("precision.top1") == "PASS" and "3 of 3 images agree" in done.text
