"""The emulated NPU computes what the CPU computes, runs asynchronously, and fails as the knobs set.

Each program below runs in a process of its own, and prints what it found as one line of JSON. Most are forked from one
that has imported torch; those in LAUNCHED are started by the launcher.
"""

import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest

if importlib.util.find_spec("torch_npu") is None or shutil.which(os.environ.get("CXX", "g++")) is None:
    pytest.skip("torch_npu and a C++ compiler are needed", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from ascend_emulator import MARK, environment
from ascend_emulator.build import VERSION, installed

EMULATOR = Path(__file__).resolve().parent.parent / "ascend_emulator"

# Each line is computed on the CPU and on the NPU, in float32, float16 and bfloat16, and must give the same bits. With
# PERTURB it must not, unless it is marked as exact, which is what does not round, or gives no floating point numbers.
OPERATORS = """
F.conv2d(image, kernel, bias, stride=2, padding=1)
F.conv2d(image, depthwise, groups=3, padding=1)
F.conv_transpose2d(image, kernel.transpose(0, 1), stride=2)
F.linear(a, b, bias8)
F.linear(a, b)
F.linear(cube, b, bias8)
a @ b
torch.mm(a, b)
cube @ cube.mT
image @ image.mT
torch.bmm(cube, cube.mT)
torch.bmm(cube, cube[:1].mT.expand(2, 8, 6))
torch.baddbmm(cube @ cube.mT, cube, cube.mT, beta=0.5)
F.scaled_dot_product_attention(heads, heads, heads)
F.scaled_dot_product_attention(heads, heads, heads, scale=0.1)
F.scaled_dot_product_attention(heads, heads, heads, is_causal=True)
F.scaled_dot_product_attention(heads, heads, heads, attn_mask=torch.ones(6, 6, device=device).tril().bool())
F.layer_norm(cube, (8,), bias8, bias8)
F.group_norm(image, 3, bias[:3], bias[:3])
F.batch_norm(image, bias[:3], bias[:3] ** 2, bias[:3], bias[:3])
F.max_pool2d(image, 3, 2, 1)  # exact
F.avg_pool2d(image, 2)
F.avg_pool2d(image, 3, 2, 1, count_include_pad=False)
F.adaptive_avg_pool2d(image, 3)
F.adaptive_avg_pool2d(image, 1)
F.gelu(a, approximate="tanh")
F.softmax(cube, -1)
F.log_softmax(cube, 1)
F.relu(a)  # exact
F.relu_(a.clone())  # exact
F.leaky_relu(a, 0.2)
F.leaky_relu(a.clone(), 0.2, inplace=True)
F.hardtanh(a, -0.5, 0.5)  # exact
F.relu6(a)  # exact
F.hardtanh_(a.clone(), -0.5, 0.5)  # exact
F.hardswish(a)
F.hardswish(a.clone(), inplace=True)
F.hardsigmoid(a)
F.hardsigmoid(a.clone(), inplace=True)
F.silu(a)
F.mish(a)
torch.sigmoid(a)
a.clone().sigmoid_()
torch.tanh(a)
a.clone().tanh_()
torch.add(a, b, alpha=2)
torch.sub(a, b, alpha=2)
a + 2
a - 2
2 - a
a * b
a * 2
a / b
a / 2
a.clone().add_(b)
a.clone().sub_(b)
a.clone().mul_(b)
a.clone().div_(b)
a.clone().add_(2)
a.clone().sub_(2)
a.clone().mul_(2)
a.clone().div_(2)
torch.addcmul(a, a, b, value=0.5)
a ** 2
2 ** a
a.abs() ** b
a.clone().pow_(2)
torch.maximum(a, b)  # exact
torch.minimum(a, b)  # exact
torch.div(a, b, rounding_mode="floor")  # exact
torch.div(a, 2, rounding_mode="trunc")  # exact
a // b  # exact
a // 0.3  # exact
a % b
a % 0.3
-a  # exact
a.clone().neg_()  # exact
a.abs()  # exact
a.clone().abs_()  # exact
a.sign()  # exact
a.sin()
a.clone().sin_()
a.cos()
a.clone().cos_()
a.exp()
a.clone().exp_()
a.abs().log()
a.erf()
a.clamp(-0.9, 0.9).erfinv()
a.abs().sqrt()
a.abs().sqrt_()
a.abs().rsqrt()
a.abs().rsqrt_()
a.reciprocal()
a.floor()  # exact
a.clone().floor_()  # exact
a.ceil()  # exact
a.clone().ceil_()  # exact
a.round()  # exact
a.trunc()  # exact
a.clamp(-0.5, 0.5)  # exact
a.clamp(min=0.1)  # exact
a.clamp_min(0.1)  # exact
a.clamp_max(0.1)  # exact
torch.nan_to_num(a / (a - a))  # exact
a == b
a != b
a < b
a <= b
a > b
a >= b
a == 0
a != 0
a < 0
a <= 0
a > 0
a >= 0
(a > 0) & (b > 0)
(a > 0) | (b > 0)
(a > 0).clone().bitwise_and_(b > 0)
torch.logical_and(a, b)
torch.logical_or(a, b)
torch.logical_not(a > 0)
~(a > 0)
a.int() & 3
a.int() | 3
a.int().bitwise_and_(3)
torch.isfinite(a / (a - a))
torch.isclose(a, b, rtol=0.5)
torch.equal(a, a)
torch.equal(a, b)
torch.allclose(a, a)
torch.where(a > 0, a, b)  # exact
a.masked_fill(a > 0, 7.0)  # exact
a.masked_fill(a > 0, b[0, 0])  # exact
cube.mean()
cube.mean(dim=(0, 2), keepdim=True)
cube.sum()
cube.sum(1)
cube.amax(1)  # exact
cube.amin((0, 1))  # exact
cube.max()  # exact
cube.min()  # exact
cube.max(1).values  # exact
cube.max(1).indices
cube.min(1).values  # exact
cube.median()  # exact
cube.argmax(1)
cube.topk(3).values  # exact
cube.topk(3).indices
cube.sort().values  # exact
(cube > -9).all()
(cube > 0).all(1)
(cube > 9).any()
(cube > 0).any(1)
cube.var(1)
cube.std(1)
cube.std()
torch.linalg.vector_norm(cube, dim=-1)
cube.norm()
cube.cumsum(1)
a.half().float()  # exact
a.long()
a.t().contiguous()  # exact
cube[:, 1::2].contiguous()  # exact
torch.zeros(3, device=device)  # exact
torch.ones(3, device=device)  # exact
torch.full((2, 3), 0.5, device=device)  # exact
torch.zeros(3, device=device).fill_(b[0, 0])  # exact
torch.arange(2, 9, 3, device=device)
torch.linspace(0, 1, 5, device=device)  # exact
torch.eye(3, device=device)  # exact
torch.cat([a, b], 1)  # exact
torch.stack([a, b], 1)  # exact
a.repeat(2, 3)  # exact
cube.roll((1, 2), (0, 1))  # exact
cube.flip(0, 1)  # exact
a.tril(1)  # exact
a.triu(-1)  # exact
F.pad(a, (1, 2), value=0.5)  # exact
F.embedding(torch.tensor([2, 0], device=device), a)  # exact
a.index_select(1, torch.tensor([2, 0], device=device))  # exact
a.gather(1, torch.tensor([[2, 0]], device=device))  # exact
a[torch.tensor([2, 0], device=device)]  # exact
cube[:, torch.tensor([2, 0], device=device)]  # exact
F.unfold(image, (3, 2), dilation=(1, 2), padding=1, stride=(2, 1))  # exact
F.interpolate(image, size=(5, 7), mode="nearest")  # exact
F.interpolate(image, scale_factor=2, mode="nearest")  # exact
F.interpolate(image, size=(5, 7), mode="bilinear")
F.interpolate(image, size=(5, 7), mode="bicubic")
a.masked_select(a > 0)  # exact
(a > 0).nonzero()
torch.empty(999, device=device).normal_(3, 2).mean().sub(3).abs() < 0.3
torch.empty(999, device=device).uniform_(3, 5).mean().sub(4).abs() < 0.3
""".strip().splitlines()


PRELUDE = """
import json, os, sys, time, warnings
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
warnings.simplefilter("ignore")
import torch
import torch.nn.functional as F
import torch_npu

torch.manual_seed(0)
linear, conv = torch.nn.Linear(8, 8), torch.nn.Conv2d(3, 4, 3)
x, image = torch.randn(6, 8), torch.randn(2, 3, 16, 16)
found = {}

def attempt(name, function):
    try:
        result = function()
        found[name] = result.tolist() if torch.is_tensor(result) else result
    except Exception as e:
        found[name] = f"{type(e).__name__}: {e}"

def error_of(a, b):
    return ((a.cpu() - b).norm() / b.norm()).item()
"""

# In one piece, because torchrun's processes share their stdout.
PRINT = """
sys.stdout.write(json.dumps(found) + chr(10))
sys.stdout.flush()
"""

# A forked process ends without C++'s own exit, which writes the trace.
EXIT = """
import ctypes
ctypes.CDLL(None).exit(0)
"""

COMPARE = f"""
torch.npu.conv.allow_hf32 = False
rounding = []
shapes = dict(a=(8, 8), b=(8, 8), cube=(2, 6, 8), heads=(2, 3, 6, 8), image=(2, 3, 9, 9),
              kernel=(4, 3, 3, 3), depthwise=(3, 1, 3, 3), bias=(4,), bias8=(8,))
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    host = {{name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}}
    npu = {{name: tensor.npu() for name, tensor in host.items()}}
    for expression in {OPERATORS!r}:
        want = eval(expression, globals(), {{**host, "device": "cpu"}})
        got = eval(expression, globals(), {{**npu, "device": "npu"}})
        if torch.is_tensor(got):
            got = got.cpu()
            same = got.dtype == want.dtype and torch.equal(got.nan_to_num(), want.nan_to_num())
        else:
            same = got == want
        found[f"{{expression}}, {{dtype}}"] = same
        if torch.is_tensor(want) and want.is_floating_point() and "# exact" not in expression:
            rounding.append(f"{{expression}}, {{dtype}}")
cast = x.to("npu", torch.float16, non_blocking=True)
torch.npu.synchronize()
found["x.to(npu, float16, non_blocking=True)"] = torch.equal(cast.cpu(), x.half())
found["rounding"] = rounding
"""

DEVICE = """
found["name before init"] = torch.npu.get_device_name(0)
found["bf16"] = torch.npu.is_bf16_supported()
found["name"] = torch.npu.get_device_properties(0).name
version = torch_npu.npu.utils.get_cann_version
found["versions"] = [version("CANN"), torch.version.cann, version("DRIVER")]
found["devices"] = torch.npu.device_count()
found["memory"] = torch.accelerator.get_memory_info(0)
blocks = []
try:
    while len(blocks) < 100:
        blocks.append(torch.empty(16 << 20, dtype=torch.uint8, device="npu"))
except torch.OutOfMemoryError as e:
    found["out of memory"] = [len(blocks), str(e)]
found["peak"] = torch.accelerator.max_memory_allocated()
blocks.clear()
torch.npu.empty_cache()
found["memory again"] = torch.accelerator.get_memory_info(0)

want, on_npu, input = conv(image), conv.npu(), image.npu()
found["hf32 by default"] = error_of(on_npu(input), want)
torch.npu.conv.allow_hf32 = False
found["hf32 off"] = error_of(on_npu(input), want)
found["matmul"] = error_of(input @ input.mT, image @ image.mT)
torch.npu.matmul.allow_hf32 = True
found["matmul hf32"] = error_of(input @ input.mT, image @ image.mT)

torch.use_deterministic_algorithms(True)
found["on npu:1"] = torch.equal(x.to("npu:1").add(1).cpu(), x + 1)
"""

TIMES = """
on_npu, input = conv.npu(), image.npu()
start, end = (torch.npu.Event(enable_timing=True) for _ in range(2))
torch.npu.synchronize()
began = time.perf_counter()
start.record()
on_npu(input)
on_npu(input)
end.record()
found["host ms"] = 1000 * (time.perf_counter() - began)
found["done early"] = end.query()
torch.accelerator.synchronize()
found["total ms"] = 1000 * (time.perf_counter() - began)
found["event ms"] = start.elapsed_time(end)
streams = torch.npu.Stream(), torch.npu.Stream()
began = time.perf_counter()
for stream in streams:
    with torch.npu.stream(stream):
        on_npu(input)
torch.npu.synchronize()
found["two streams ms"] = 1000 * (time.perf_counter() - began)
"""

# Each probe shows to what precision its operands were rounded: the other factor is 0 or 1.
VARIANT = """
x = torch.randn(2, 3, 4, 8)
x[0, 0, 0, :5] = torch.tensor([1 + 2**-12, -1 - 2**-12, 1 + 2**-11, -1 - 2**-11, 0])  # halves of the last bit

def rounded(x, bits, half):
    mantissa, exponent = torch.frexp(x.double())
    steps = (mantissa.abs() * 2 ** (bits + 1) + half).floor() * 2.0 ** -(bits + 1)
    return (mantissa.sign() * steps * 2.0 ** exponent).float()

def even(x):
    mantissa, exponent = torch.frexp(x.double())
    return ((mantissa * 2**12).round() * 2.0 ** (exponent - 12)).float()

def ibert(x):
    z = x.double() / 2**0.5
    return (x / 2 * (1 + z.sign() * (-0.2888 * (z.abs().clamp(max=1.769) - 1.769) ** 2 + 1))).float()

precisions = {"float32": x, "11 nearest": rounded(x, 11, 0.5), "10 nearest": rounded(x, 10, 0.5),
              "11 truncate": rounded(x, 11, 0), "10 truncate": rounded(x, 10, 0), "11 even": even(x)}
attended = {name: F.scaled_dot_product_attention(x, x, x) for name, x in precisions.items()}
forms = {"erf": F.gelu(x), "tanh": F.gelu(x, approximate="tanh"), "ibert": ibert(x)}
input, one, zero = x.npu(), torch.eye(8).npu(), torch.zeros(4, 8).npu()
kernel = torch.zeros(3, 3, 3, 3)
kernel[range(3), range(3), 1, 1] = 1
dense, grouped = kernel.npu(), torch.ones(3, 1, 1, 1).npu()

def probe(name, got, references=precisions):
    got = got.cpu().reshape(x.shape)
    found[name] = "".join(name for name, want in references.items() if (got - want).abs().max() < 1e-6)

probe("dense", F.conv2d(input, dense, padding=1))
probe("dense, 4 images", F.conv2d(torch.cat([input, input]), dense, padding=1)[2:])
probe("pointwise", F.conv2d(input, dense[:, :, 1:2, 1:2].contiguous()))
probe("depthwise", F.conv2d(input, grouped, groups=3))
probe("Addmm", F.linear(input.flatten(0, 2), one, zero[0]))
probe("Matmul", input @ one)
probe("Mm", torch.mm(input.flatten(0, 2), one))
probe("BatchMatMul", torch.bmm(input.flatten(0, 1), one.expand(6, 8, 8)))
probe("Baddbmm", torch.baddbmm(zero, input.flatten(0, 1), one.expand(6, 8, 8)))
probe("FlashAttentionScore", F.scaled_dot_product_attention(input, input, input), attended)
probe("gelu", F.gelu(input), forms)
probe("gelu with tanh", F.gelu(input, approximate="tanh"), forms)
torch.npu.conv.allow_hf32, torch.npu.matmul.allow_hf32 = False, True
probe("dense without HF32", F.conv2d(input, dense, padding=1))
probe("Mm with HF32", torch.mm(input.flatten(0, 2), one))
"""

PERTURBED = """
ones = torch.ones(3, 4, 32).npu()
for name, function in dict(Muls=lambda x: x * 1, Adds=lambda x: x + 0, Sqrt=torch.sqrt).items():
    found[name] = (function(ones).cpu().double() - 1).tolist()
    found[name + " again"] = (function(ones).cpu().double() - 1).tolist()
    found[name + " alone"] = (function(ones[1:2]).cpu().double() - 1).tolist()
"""

FAULTS = """
x = x.abs()
input, other = x.npu(), x.to("npu:1")
for name in ("sin", "cos", "exp", "floor", "ceil", "sqrt", "erf"):
    for call in (1, 2, 3):
        found[f"{name} {call}"] = (getattr(input, name)().cpu() - getattr(x, name)()).nan_to_num(777, 888).tolist()
for name in ("log", "sigmoid", "tanh"):
    same = [torch.allclose(getattr(input, name)().cpu(), getattr(x, name)()) for call in range(9)]
    found[name] = [call for call in range(1, 10) if not same[call - 1]]
found["erf on 1"] = (other.erf().cpu() - x.erf()).tolist()
"""

HF32_FAULTS = """
want, kernel = F.conv2d(image, conv.weight), conv.weight.npu()
for name, allowed in (("HF32", True), ("float32", False), ("HF32 again", True)):
    torch.npu.conv.allow_hf32 = torch.npu.matmul.allow_hf32 = allowed
    found[f"convolution in {name}"] = (F.conv2d(image.npu(), kernel).cpu() / want).median().item()
    found[f"matrix product in {name}"] = ((x.npu() @ x.npu().T).cpu() - x @ x.T).median().item()
torch.npu.conv.allow_hf32 = True
found["convolution of one image"] = (F.conv2d(image[:1].npu(), kernel).cpu() / want[:1]).median().item()
"""

GRAPH = """
with torch.inference_mode():
    on_npu, input, runs = conv.npu(), torch.zeros_like(image).npu(), torch.zeros(1).npu()
    side = torch.npu.Stream()
    side.wait_stream(torch.npu.current_stream())
    with torch.npu.stream(side):
        on_npu(input)
    torch.npu.current_stream().wait_stream(side)
    torch.npu.synchronize()
    graph = torch.npu.NPUGraph()
    with torch.npu.graph(graph):
        output = on_npu(input)
        runs.add_(1)
    torch.npu.synchronize()
    found["runs while captured"] = runs.item()
    for round in (1, 2):
        input.copy_(image * round)
        graph.replay()
        found[f"replay {round}"] = torch.equal(output.cpu(), conv.cpu()(image * round))
        conv.npu()
    found["runs"] = runs.item()

    def spoil():
        with torch.npu.graph(torch.npu.NPUGraph()):
            on_npu(input).cpu()
    attempt("copied while captured", spoil)
"""

STEPS = """
found["count"] = [torch.npu.is_available(), torch.npu.device_count()]
results = {}
attempt("setup", lambda: results.update(batch=x.npu(), module=linear.npu()))
attempt("forward", lambda: (results.update(output=linear(results["batch"])), torch.npu.synchronize())[1])
attempt("copy", lambda: results["output"].cpu().shape)
"""

HANG = """
import signal
x.npu()
print("started", flush=True)
signal.alarm(3)  # ends the process, whatever it waits for
"""

FALLBACK = """
linear.npu().register_forward_hook(lambda module, inputs, output: torch.i0(output))
attempt("i0", lambda: error_of(linear(x.npu()), linear.cpu()(x)))
"""

MODEL = """
import timm
torch.npu.conv.allow_hf32 = False
with torch.inference_mode():
    for name in ("vit_small_patch16_dinov3", "resnet18"):
        model = timm.create_model(name).eval()
        batch = torch.randn(1, 3, 64, 64)
        want, intermediates = model(batch), model.forward_intermediates(batch)[1]
        model.npu()
        found[name] = torch.equal(model(batch.npu()).cpu(), want)
        pairs = zip(model.forward_intermediates(batch.npu())[1], intermediates)
        found[name + " inside"] = [torch.equal(a.cpu(), b) for a, b in pairs]
        for dtype in (torch.float16, torch.bfloat16):
            with torch.autocast("npu", dtype=dtype):
                found[f"{name} autocast {dtype}"] = error_of(model(batch.npu()).float(), want)
            found[f"{name} {dtype}"] = error_of(model.to(dtype)(batch.npu().to(dtype)).float(), want)
            model.float()
"""

TORCHRUN = """
import torch.distributed as dist
dist.init_process_group("gloo")
rank = torch.tensor([dist.get_rank()])
torch.npu.set_device(rank.item())
linear.npu()(x.npu())
torch.npu.synchronize()
dist.all_reduce(rank)
found["sum"] = [rank.item(), torch.npu.current_device()]
dist.destroy_process_group()
"""

COMPATIBLE = {"TORCH_NPU_USE_COMPATIBLE_IMPL": "1"}
DATA_FAULTS = (
    "Sin:nan;Cos:inf,from=2;Exp:scale=3,once;Floor:offset=0.5,from=2,once;Ceil:element=5;"
    "Sqrt:nan,from=9;Erf:offset=1,device=1;Log:nan,every=3;Sigmoid:nan,every=3,from=2;Tanh:nan,every=4,once"
)
HF32_FAULT = "Convolution:scale=2,hf32;Matmul:offset=5,hf32;Mm:offset=5,hf32"
FLOAT32, HF32 = "float32", "11 nearest"
CONVOLUTIONS = ("dense", "dense, 4 images", "pointwise", "depthwise")
PRODUCTS = ("Addmm", "Matmul", "Mm", "BatchMatMul", "Baddbmm", "FlashAttentionScore")
AS_DOCUMENTED = {
    **dict.fromkeys(CONVOLUTIONS, HF32), "dense without HF32": FLOAT32,
    **dict.fromkeys(PRODUCTS, FLOAT32), "Mm with HF32": HF32,
    "gelu": "tanh", "gelu with tanh": "tanh",
}  # fmt: skip
VARIANTS = {  # name: (knobs, other variables, what is unlike the documented device)
    "as documented": ({}, {}, {}),
    "10 bits, erf": (
        {"HF32_BITS": "10", "GELU": "erf"}, {},
        {**dict.fromkeys([*CONVOLUTIONS, "Mm with HF32"], "10 nearest"), "gelu": "erf", "gelu with tanh": "erf"},
    ),
    "truncated, depthwise only, ibert": (
        {"HF32_ROUNDING": "truncate", "HF32_ONLY": "depthwise", "GELU": "ibert"}, {},
        {**dict.fromkeys(["dense", "dense, 4 images", "pointwise"], FLOAT32),
         **dict.fromkeys(["depthwise", "Mm with HF32"], "11 truncate"), "gelu": "ibert", "gelu with tanh": "ibert"},
    ),
    "10 bits truncated, pointwise only": (
        {"HF32_BITS": "10", "HF32_ROUNDING": "truncate", "HF32_ONLY": "pointwise"}, {},
        {**dict.fromkeys(["pointwise", "Mm with HF32"], "10 truncate"),
         **dict.fromkeys(["dense", "dense, 4 images", "depthwise"], FLOAT32)},
    ),
    "dense only, GeluV2": (
        {"HF32_ONLY": "dense", "GELU": "ibert"}, COMPATIBLE,
        {"pointwise": FLOAT32, "depthwise": FLOAT32, "gelu": "erf", "gelu with tanh": "tanh"},
    ),
    "ties to even": ({"HF32_ROUNDING": "even"}, {}, dict.fromkeys([*CONVOLUTIONS, "Mm with HF32"], "11 even")),
    "ties by the batch": (  # to even below 4 images, in convolutions only
        {"HF32_ROUNDING": "tuned"}, {}, dict.fromkeys(["dense", "pointwise", "depthwise"], "11 even"),
    ),
    # The dense convolution has 5184 multiply-adds for 2 images, the others have fewer.
    "HF32 from this size on": ({"HF32_FROM": "5184"}, {}, dict.fromkeys(["pointwise", "depthwise"], FLOAT32)),
    "HF32 from a larger size on": (
        {"HF32_FROM": "5185"}, {}, dict.fromkeys(["dense", "pointwise", "depthwise"], FLOAT32),
    ),
    "products unasked": ({"HF32_MATMUL": "1"}, {}, dict.fromkeys(PRODUCTS, HF32)),
    "only products, unasked": (
        {"HF32_MATMUL": "1", "HF32": "0"}, {},
        {**dict.fromkeys(PRODUCTS, HF32), **dict.fromkeys(CONVOLUTIONS, FLOAT32)},
    ),
}  # fmt: skip
PROGRAMS = {  # name: (code, knobs, other variables)
    "operators": (COMPARE, {}, {}),
    "compatible operators": (COMPARE, {}, COMPATIBLE),
    "device": (DEVICE, {"DEVICES": "2", "MEMORY": "100M"}, {}),
    "times": (TIMES, {"KERNEL_TIME": "Convolution=30+10"}, {}),
    "faults": (FAULTS, {"DEVICES": "2", "FAULT": DATA_FAULTS}, {}),
    "faults of HF32 only": (HF32_FAULTS, {"FAULT": HF32_FAULT, "HF32_FROM": "40000"}, {}),
    "graph": (GRAPH, {"HF32": "0"}, {}),
    "model": (MODEL, {}, COMPATIBLE),
    "perturbed operators": (COMPARE, {"PERTURB": "0.02"}, {}),
    "perturbed": (PERTURBED, {"PERTURB": "1e-6"}, {}),
    **{name: (VARIANT, knobs, variables) for name, (knobs, variables, _) in VARIANTS.items()},
    "error": (STEPS, {"FAULT": "Addmm:error=507015"}, {}),
    "async_error": (STEPS, {"FAULT": "Addmm:async_error=507015"}, {}),
    "hang": (HANG + STEPS, {"FAULT": "Addmm:hang"}, {}),
    "no device": (STEPS, {"DEVICES": "0"}, {}),
    "init": (STEPS, {"INIT_ERROR": "507899"}, {}),
    "set device": (STEPS, {"SET_DEVICE_ERROR": "507033"}, {}),
    "synchronize": (STEPS, {"SYNCHRONIZE_ERROR": "507014,from=4"}, {}),
    "missing operator": ('attempt("cosh", lambda: x.npu().cosh().cpu())', {}, {}),
    "fallback": (FALLBACK, {}, {"TORCH_NPU_FALLBACK_CPU_DISABLE": "0"}),
    "no fallback": (FALLBACK, {}, {"TORCH_NPU_FALLBACK_CPU_DISABLE": "1"}),
    "without cann": ("", {"WITHOUT": "cann"}, {}),
    "without driver": ("", {"WITHOUT": "driver"}, {}),
    "torchrun": (TORCHRUN, {"DEVICES": "2"}, {"OMP_NUM_THREADS": "1"}),
}
LAUNCHED = {"device", "hang", "without cann", "without driver", "torchrun"}


def launch(*command, **variables):
    command = [sys.executable, str(EMULATOR), *command]
    done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, timeout=120)
    return types.SimpleNamespace(code=done.returncode, output=done.stdout, errors=done.stderr)


@pytest.fixture(scope="session")
def results(fork, tmp_path_factory):
    """results(name): what a program gave, its process, what it found and the operators that it used.

    Each runs once, when it is first needed, in whatever process the tests are.
    """
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "emulated"
    folder.mkdir(exist_ok=True)

    def run(name):
        code, knobs, variables = PROGRAMS[name]
        script, trace = folder / f"{name}.py", folder / f"{name}.trace"
        script.write_text(PRELUDE + code + PRINT + ("" if name in LAUNCHED else EXIT))
        if name in LAUNCHED:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
            command = [*(torchrun if name == "torchrun" else []), str(script)]
            variables = {**variables, **{f"ASCEND_EMULATOR_{knob}": value for knob, value in knobs.items()}}
            result = launch(*command, ASCEND_EMULATOR_TRACE=str(trace), **variables)
        else:
            (folder / name).mkdir(exist_ok=True)
            done = fork([], folder / name, environment(TRACE=trace, **knobs) | variables, script)
            result = types.SimpleNamespace(code=done.status, output=done.stdout, errors=done.stderr)
        result.found = [json.loads(line) for line in result.output.splitlines() if line.startswith("{")]
        result.used = trace.read_text().splitlines() if trace.exists() else []
        return result

    def result(name):
        done = folder / f"{name}.json"
        with open(folder / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                done.write_text(json.dumps(vars(run(name))))
        return types.SimpleNamespace(**json.loads(done.read_text()))

    return result


def found(results, name):
    result = results(name)
    assert result.code == 0 and len(result.found) == 1, result.output + result.errors
    return result.found[0]


@pytest.mark.parametrize("name", ["operators", "compatible operators"])
def test_operators_agree_with_the_cpu(results, name):
    results = dict(found(results, name))
    del results["rounding"]
    assert len(results) == 3 * len(OPERATORS) + 1
    assert [expression for expression, same in results.items() if same is not True] == []


def test_every_operator_is_compared(results):
    library = (installed() / "lib/libopapi.so").read_bytes()
    there = {name.decode() for name in re.findall(rb"aclnn(\w+?)GetWorkspaceSize\0", library)}
    used = {line.split()[0] for name in ("operators", "compatible operators") for line in results(name).used}
    assert len(there) > 150
    assert there - used == set()


def test_device_shows_that_it_is_emulated(results):
    device = found(results, "device")
    assert results("device").output.splitlines()[0] == MARK
    assert device["name"] == device["name before init"] == "Ascend910B4"
    assert device["bf16"] is True  # so torch_npu has recognised the Ascend910B4
    assert device["versions"] == [VERSION, VERSION, "25.5.0-emulated"] and VERSION.endswith("-emulated")
    assert (device["devices"], device["on npu:1"]) == (2, True)


def test_memory_is_limited(results):
    device = found(results, "device")
    assert device["memory"] == device["memory again"] == [100 << 20, 100 << 20]
    blocks, message = device["out of memory"]
    assert blocks == 5 and "NPU out of memory. Tried to allocate" in message
    assert 5 * 16 << 20 <= device["peak"] <= 100 << 20


def test_hf32_follows_the_switches(results):
    device = found(results, "device")
    assert 5e-5 < device["hf32 by default"] < 3e-4 and device["hf32 off"] == 0
    assert 5e-5 < device["matmul hf32"] < 3e-4 and device["matmul"] == 0


@pytest.mark.timing
def test_kernels_are_asynchronous_and_take_their_time(results):
    times = found(results, "times")
    kernel = 30 + 2 * 10  # a batch of two
    assert times["host ms"] < kernel and times["done early"] is False
    assert 2 * kernel <= times["total ms"] < 4 * kernel
    assert 2 * kernel <= times["event ms"] < 4 * kernel
    assert kernel <= times["two streams ms"] < 2 * kernel


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_of_the_device(results, name):
    assert found(results, name) == AS_DOCUMENTED | VARIANTS[name][2]
    if VARIANTS[name][1] != COMPATIBLE:  # there a @ b is Mm
        assert set(PRODUCTS) <= {line.split()[0] for line in results(name).used}


def test_perturbation_leaves_alone_what_does_not_round(results):
    results = dict(found(results, "perturbed operators"))
    rounding = set(results.pop("rounding"))
    differing = {expression for expression, same in results.items() if not same}
    assert differing - rounding == set()
    too_exact = {expression for expression in rounding - differing if "float32" in expression}  # others may hide it
    assert too_exact == set()


def test_perturbation_is_the_same_at_each_call_and_in_each_row(results):
    perturbed = found(results, "perturbed")
    for name in ("Muls", "Adds", "Sqrt"):
        rows = perturbed[name]
        assert perturbed[name + " again"] == rows == 3 * rows[:1] and perturbed[name + " alone"] == rows[:1]
        values = [value for line in rows[0] for value in line]
        assert -1.1e-6 < min(values) < -8e-7 and 8e-7 < max(values) < 1.1e-6 and len(set(values)) > 10
        assert abs(sum(values) / len(values)) < 2e-7
    assert perturbed["Muls"] != perturbed["Adds"] != perturbed["Sqrt"]


def test_data_faults(results):
    faults = found(results, "faults")

    def where(name, call):
        return {(i, j): v for i, row in enumerate(faults[f"{name} {call}"]) for j, v in enumerate(row) if v != 0}

    assert [where("sin", call) for call in (1, 2, 3)] == 3 * [{(3, 0): 777}]
    assert [where("cos", call) for call in (1, 2, 3)] == [{}] + 2 * [{(3, 0): 888}]
    assert [len(where("exp", call)) for call in (1, 2, 3)] == [48, 0, 0]
    assert [set(where("floor", call).values()) for call in (1, 2, 3)] == [set(), {0.5}, set()]
    assert where("ceil", 1) == {(3, 0): 5}
    assert not any(where(name, call) for name in ("sqrt", "erf") for call in (1, 2, 3))
    assert (faults["log"], faults["sigmoid"], faults["tanh"]) == ([3, 6, 9], [2, 5, 8], [4])
    assert all(abs(value - 1) < 1e-6 for row in faults["erf on 1"] for value in row)


def test_faults_of_hf32_kernels_spare_calls_in_float32(results):
    """Also where HF32 is allowed and the call is too small for it: one image has 21168 multiply-adds, two have 42336."""
    assert {name: round(value, 2) for name, value in found(results, "faults of HF32 only").items()} == {
        "convolution in HF32": 2, "convolution in float32": 1, "convolution in HF32 again": 2,
        "matrix product in HF32": 5, "matrix product in float32": 0, "matrix product in HF32 again": 5,
        "convolution of one image": 1,
    }  # fmt: skip


@pytest.mark.parametrize("name, step, message", [
    ("no device", "setup", r"No NPUs are available\n.*ERR00009"),
    ("init", "setup", r"NPU function error: aclInit, error code is 507899\n.*ERR00100 PTA call acl api failed"),
    ("set device", "setup", r"NPU function error: .*, error code is 507033\n"),
    ("synchronize", "forward", r"NPU function error: .*Synchronize.*, error code is 507014\n"),
    ("error", "forward", r"The Inner error is reported as above. .* the current working operator name is aclnnAddmm"),
    ("async_error", "forward", r"NPU function error: .*Synchronize.*, error code is 507015\n"),
    ("async_error", "copy", r"error code is 507015"),
    ("missing operator", "cosh", r"the current working operator name is Cosh[\s\S]*ascend_emulator has no operator Cosh"),
    ("graph", "copied while captured", r"error code is 507903"),
    ("no fallback", "i0", r"The operator 'aten::i0.out' would execute .* on CPU .* but CPU fallback is disabled"),
])  # fmt: skip
def test_errors(results, name, step, message):
    assert re.search(message, str(found(results, name)[step]))


def test_errors_come_no_earlier_than_they_should(results):
    assert found(results, "no device")["count"] == [False, 0]
    assert found(results, "set device")["count"] == [True, 1]
    assert found(results, "synchronize")["setup"] is None
    assert found(results, "async_error")["setup"] is None


def test_hang(results):
    result = results("hang")
    assert result.output.splitlines() == [MARK, "started"] and result.code == -signal.SIGALRM


def test_fallback_is_a_warning(results):
    assert found(results, "fallback")["i0"] == 0
    assert "The operator 'aten::i0.out' is not currently supported on the NPU backend" in results("fallback").errors


@pytest.mark.parametrize("name, library", [("without cann", "libhccl.so"), ("without driver", "libascend_hal.so")])
def test_missing_libraries(results, name, library):
    result = results(name)
    assert result.code == 1 and f"ImportError: {library}: cannot open shared object file" in result.errors


def test_graph(results):
    graph = found(results, "graph")
    assert graph["runs while captured"] == 0 and graph["runs"] == 2
    assert graph["replay 1"] and graph["replay 2"]  # bit for bit, so the knob HF32=0 holds


def test_models(results):
    model = found(results, "model")
    for name in ("vit_small_patch16_dinov3", "resnet18"):
        assert model[name] and all(model[name + " inside"])
        for dtype, limit in (("float16", 5e-3), ("bfloat16", 5e-2)):
            assert 0 < model[f"{name} torch.{dtype}"] < limit
            assert 0 < model[f"{name} autocast torch.{dtype}"] < limit


def test_torchrun(results):
    result = results("torchrun")
    assert result.code == 0, result.errors
    assert sorted(found["sum"] for found in result.found) == [[1, 0], [1, 1]]
    assert result.used.count("Addmm 1") == 2  # a line of each process


@pytest.mark.parametrize("knob, value, message", [
    ("FAULT", "Addmm", "is not OPERATOR:KIND"),
    ("FAULT", "Addmm:nann", "'nann' is not a kind of fault"),
    ("FAULT", "Addmm:nan=1", "'nan' takes no value"),
    ("FAULT", "Addmm:scale", "'scale' needs a value"),
    ("FAULT", "Addmm:scale=1x", "'1x' is not a number"),
    ("FAULT", "Addmm:nan,until=3", "'until=3' is not understood here"),
    ("FAULT", "Addmm:nan,from=0", "'0' is not an integer from 1"),
    ("FAULT", "Addmm:nan,every=0", "'0' is not an integer from 1"),
    ("FAULT", "Addmm:nan,every", "'every' is not understood here"),
    ("FAULT", "Addmm:error=507015,hf32", "'hf32' is not understood here"),
    ("FAULT", "Addmm:async_error=507015,hf32", "'hf32' is not understood here"),
    ("FAULT", "Addmm:hang,hf32", "'hf32' is not understood here"),
    ("FAULT", "Addmm:nan;", "'' is not OPERATOR:KIND"),
    ("KERNEL_TIME", "Addmm", "is not OPERATOR=MS"),
    ("KERNEL_TIME", "Addmm=1+2+3", "is not OPERATOR=MS"),
    ("KERNEL_TIME", "Addmm=-1", "'-1' is too small"),
    ("MEMORY", "32", "a size in M or G is expected"),
    ("DEVICES", "-1", "is not an integer"),
    ("HF32", "yes", "is not a number"),
    ("HF32_BITS", "12", "'12' is not one of 11, 10"),
    ("HF32_BITS", "", "'' is not one of 11, 10"),
    ("HF32_ROUNDING", "up", "'up' is not one of nearest, even, truncate, tuned"),
    ("HF32_FROM", "0", "'0' is not an integer from 1"),
    ("HF32_FROM", "1e7x", "'1e7x' is not a number"),
    ("HF32_ONLY", "grouped", "'grouped' is not one of depthwise, pointwise, dense"),
    ("HF32_MATMUL", "2", "is not an integer"),
    ("GELU", "quick", "'quick' is not one of tanh, erf, ibert"),
    ("PERTURB", "-1e-6", "'-1e-6' is too small"),
    ("PERTURB", "1e-6x", "'1e-6x' is not a number"),
    ("PLAIN_NAME", "1", "there is no such knob"),
    ("INIT_ERROR", "507008,from=2", "'from=2' is not understood here"),
    ("INIT_ERROR", "507008,every=2", "'every=2' is not understood here"),
    ("SYNCHRONIZE_ERROR", "507014,hf32", "'hf32' is not understood here"),
    ("WITHOUT", "cann", "the libraries are here"),
    ("FAULTS", "Addmm:nan", "there is no such knob"),
])  # fmt: skip
def test_malformed_knob(knob, value, message):
    load = [sys.executable, "-c", "import ctypes; ctypes.CDLL('libascendcl.so')"]
    variables = {**environment(), f"ASCEND_EMULATOR_{knob}": value}
    result = subprocess.run(load, env={**os.environ, **variables}, capture_output=True, text=True)
    assert result.returncode == 2
    assert result.stderr.startswith(f"ascend_emulator: ASCEND_EMULATOR_{knob}={value}: ") and message in result.stderr


@pytest.mark.parametrize("knob, value", [("FAULT", "Addm:nan"), ("KERNEL_TIME", "Addm=1")])
def test_knob_for_an_operator_that_is_not_there(knob, value):
    load = "import ctypes, torch; ctypes.CDLL('libopapi.so')"
    variables = {**environment(), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", f"ASCEND_EMULATOR_{knob}": value}
    result = subprocess.run(
        [sys.executable, "-c", load], env={**os.environ, **variables}, capture_output=True, text=True
    )
    assert (result.returncode, "there is no operator 'Addm'" in result.stderr) == (2, True)


def test_launcher_hands_over():
    result = launch("sh", "-c", "echo $ASCEND_HOME_PATH; exit 7")
    assert (result.code, result.output.splitlines()) == (7, [MARK, str(installed())])
    assert launch("sh", "-c", "kill -TERM $$").code == -15
