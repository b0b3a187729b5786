#!/usr/bin/env python3
"""Validate a timm model on a Huawei Ascend NPU, and write a log that proves the result.

    python validate_npu.py                                   # npu:0, pretrained weights
    python validate_npu.py --device cpu --weights random     # CPU dry run, without an NPU
    python validate_npu.py --weights my.pth --image photos/  # a checkpoint of your own, with your images
    python validate_npu.py --modes float16 float32+graph     # faster modes
    torchrun --nproc-per-node 8 validate_npu.py              # all devices of a host
    python validate_npu.py --compare old.txt new.txt         # what became worse
    python validate_npu.py --report validation_output.txt    # a section for a model card, from a log

Method. The reference is the same model with the same weights and inputs on the CPU in float64, with the form of GELU
that the device computes. Each output of the model is compared with it twice:

    strict     Reduced-precision float32 (HF32 on Ascend, TF32 on CUDA) is disabled on the device.
    float32    Default settings, as users run the model. On a CPU, which has no such precision, the only one.

e is the error of the CPU in float32. C, the expected cost, is the error that the documented precision causes: it is
measured by rounding the operands of all products of the documented kinds on the CPU in float64. In strict mode C is 0.
WARN above 2 C + 64 e, FAIL above 4 C + 256 e; while each single module passes, FAIL not below 1e-2. In half precision
the limits are 3 and 6 times the error of the CPU in the same mode. All errors are relative L2 errors of the worst row
(an image, or a token of an image), or of the worst element divided by 32, whichever is larger. A batch against single
images, timed outputs and graphs are compared in the same way, with the limits of their mode. Repeated computations and
devices that differ at all are a WARN. Each module also runs on the device by itself, on the inputs that it has on the
CPU, so that an error is seen where it arises. As a negative control one layer of the device is scaled by 1.01; a run
that does not detect it fails.

NaN, Inf and overflow. compare() counts them on both sides. NaN and Inf equal nothing, so each of them on the device is
a FAIL. If half precision overflows on the CPU as well, the output is "not judged": WARN in stage 4, SKIP in stage 5. If
the CPU gives NaN or Inf in float32, the run ends with exit status 2.

Where things are, from top to bottom:

    Tolerances          TOLERANCES: all limits with their sources. MODES: the ways to run the model
    The run             validate() calls the stages. A stage is a generator: it yields lines and returns its result
    Stages 1 to 5       device_stage(), model_stage(), outputs_stage(), precision_stage(), throughput_stage()
    Emulated precision  probe_device() measures the precision of the device, emulated_precision() reproduces it
    Comparing arrays    compare() measures, comparison() makes a check of it
    Comparing logs      Log reads a log, compare_logs() finds what became worse
    For publication     publication() makes a section of a model card from logs
    Several devices     communication between the processes of torchrun, and devices_stage()
    Ascend              everything that belongs to one vendor: versions, switches, error codes, installation
    The report          Entry is a line, Table its columns, Report prints and writes them
    The command line    options, and main()

To add an autocast dtype, add it to the dtypes of the amp- line under BASE_MODES. To add a check, yield it from a stage;
it is printed, counted and compared between logs by its id:

    found = compare(actual, reference)                       # two arrays of shape (B, ...)
    yield comparison("outputs.flipped", found, Tolerance(warn=1e-5, fail=1e-3))

Exit status: 0 no check failed, 1 a check failed (--strict: or warned), 2 the run could not be done, 130, 143 a signal.
"""

from __future__ import annotations

# Modules that are slow to import, or rarely needed, are imported in the functions that use them.
import argparse
import collections
import contextlib
import copy
import dataclasses
import difflib
import functools
import glob
import hashlib
import itertools
import json
import math
import os
import pickle
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from importlib.util import find_spec
from typing import NamedTuple, TypeVar

VERSION = "3.0"  # of the log: logs of different versions are not comparable
DEFAULT_MODEL = "vit_small_patch16_dinov3.lvd1689m"
T = TypeVar("T")
Stage = Generator  # Stage[T] yields entries, and returns T
STAGES = ("device", "model", "outputs", "precision", "throughput")
PASS, SKIP, WARN, FAIL = OUTCOMES = "PASS", "SKIP", "WARN", "FAIL"  # from the best to the worst
FACT, VARIES, HEADER = "", "~", "#"  # marks of lines that are not checks

# --- Tolerances -------------------------------------------------------------------------------------------------------

class Tolerance(NamedTuple):
    """Limits on a relative L2 error (of GELU in stage 1: an absolute error). WARN above `warn`, FAIL above `fail`."""

    warn: float
    fail: float

    def mark(self, error: float) -> str:
        """The outcome. An error that is infinite or NaN fails, whatever the limits are."""
        if not math.isfinite(error) or not error <= self.fail:
            return FAIL
        return PASS if error <= self.warn else WARN

    def limit(self, mark: str) -> float:
        """The limit that decided the outcome: the one that is printed."""
        return self.fail if mark == FAIL else self.warn


# Unit roundoff that Huawei's operator precision standard allows one operator, by the precision of its operands. The
# standard divides by elements. Here the norm of the row divides, because features cross zero.
UNIT = {"float32": 2**-13, "HF32": 2**-11, "TF32": 2**-10, "float16": 2**-10}
# All limits, each to be multiplied by the unit that its comment names.
TOLERANCES = {
    # A large matmul or convolution of stage 1. Unit: UNIT[precision]. Source: the standard above; 8 units of TF32 are
    # below an error of 1 %.
    "operator": Tolerance(1, 8),
    # GELU of stage 1. Unit: 1, absolute error. Source: erf and tanh differ by 4.7e-4, kernels of one form by 1e-6.
    "gelu": Tolerance(1e-4, math.inf),
    # A module on the inputs of the CPU. Unit: 1. Source: the standard for float32, and 8 times that for HF32; an error
    # of 1 % is above it. Of 11 healthy models on an H200 none warned (tests/README.md, "Healthy and faulty").
    "module": Tolerance(2**-13, 2**-8),
    # The same with operands rounded to HF32, TF32 or float16. Source: single convolutions on an H200 reach 4e-4.
    "reduced module": Tolerance(2**-9, 2**-8),
    # Two outputs in float32: the sum of both. Units: e and C. Source: healthy devices reach 7.9 e (with each output
    # perturbed by 1e-6, in 24 blocks: 41 e) and 1.5 C, the smallest fault that must fail 385 e (tests/README.md).
    "cpu error": Tolerance(64, 256),
    "expected cost": Tolerance(2, 4),
    # An output in half precision. Unit: the error of the CPU in the same mode. Source: torch._dynamo.utils.same allows
    # 3 times in half precision; healthy devices reach 1.04 times. FAIL is never above MAX_LIMIT.
    "half": Tolerance(3, 6),
}
# While no module fails, an output fails only above this, and else warns: published figures of healthy NPUs reach
# 1.9e-2, and not all of them are explained.
UNEXPLAINED = 1e-2
# One element may exceed the limit of its row by this factor: the largest of a million normally distributed errors is 5
# times their RMS, real errors have heavier tails (17 to 21 on healthy devices).
ELEMENT_FACTOR = 32
ROW_NORM_FLOOR = 0.1  # row norms are clamped to this share of the RMS row norm, to avoid dividing by zero
# If the float32 error of the CPU is above the first, or the expected cost above the second, outputs cannot be used to
# judge the device.
MAX_CPU_ERROR, MAX_EXPECTED_COST = 1e-3, 0.1
MAX_LIMIT = 0.9  # of half precision: an output of zeros, which has an error of 1, must fail
# The precision of a large product is identified if its relative L2 error is below this: kernels in float32 differ from
# each other by 1e-6, 11 bits from 10 by 1e-4.
IDENTIFIED = 2**-16
# The device may predict another class, or nearest neighbour, if the margin on the CPU is below this many times the
# error that the documented precision causes: two values enter a margin, and other images may have four times the error.
PREDICTION_FACTOR = 8
EXPLAINED = 0.2  # an error is due to rounding if its cosine to the effect of rounding is above this; else it is near 0
CONTROL_SCALE = 1.01  # the negative control: the parameters of one layer are scaled by this
# Outputs of two images that are closer than this are the same output. Rounding moves them by 1e-7 to 1e-6. A CNN with
# random weights, which averages over the image, may set them only 2e-3 apart (lcnet_050).
DISTINCT_REL_L2 = 1e-5
# Between two logs an error is worse if it grew by more than this share, and is above 64 units of float32 rounding.
ERROR_GROWTH, ROUNDING = 0.25, 2**-17
MAX_TOLERATED_SLOWDOWN = 50  # percent: if the spreads of two runs allow a larger one, speed is not judged


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run the model. Every difference between modes is a field here. Names are never parsed."""

    name: str  # in the log, and for --modes
    base: str  # the name of the mode without graph, which gives the same outputs
    amp: str = ""  # dtype of autocast
    half: str = ""  # dtype of weights and inputs
    hf32: bool = False  # HF32 (TF32 on CUDA) in matrix products, too
    strict: bool = False  # no reduced-precision float32
    graph: bool = False  # captured as an NPU or CUDA graph, and replayed
    compiled: str = ""  # the name of the mode that torch.compile compiles. Its outputs are validated as well

    @property
    def in_half(self) -> bool:
        return bool(self.amp or self.half)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return getattr(torch, self.half or "float32")

    @contextlib.contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Inside, a forward pass runs in this mode. With `half`, model and inputs must have its dtype."""
        switches = dict.fromkeys(reduced_fp32_switches(device), self.hf32) if self.hf32 or self.strict else {}
        autocast = torch.autocast(device.type, getattr(torch, self.amp)) if self.amp else contextlib.nullcontext()
        with set_reduced_fp32(device, switches), autocast:
            yield

    def unsupported_reason(self, device: torch.device) -> str:
        """Why the device cannot run in this mode, "" if it can."""
        if not supports_dtype(device, self.amp or self.half):
            return f"{device} does not support {self.amp or self.half}"
        if self.hf32 and not (reduced_fp32_switches(device) and supports_dtype(device, "bfloat16")):
            return f"{device} has no reduced-precision float32"
        return "a CPU has no graphs to capture" if self.graph and device.type == "cpu" else ""


FLOAT32, STRICT = Mode("float32", "float32"), Mode("strict", "strict", strict=True)
BASE_MODES = [FLOAT32, Mode("hf32", "hf32", hf32=True)]
BASE_MODES += [Mode(f"amp-{dtype}", f"amp-{dtype}", amp=dtype) for dtype in ("float16", "bfloat16")]
BASE_MODES += [Mode(dtype, dtype, half=dtype) for dtype in ("float16", "bfloat16")]
BASE_NAMES = ", ".join(mode.name for mode in BASE_MODES)
GRAPH_MODES = [dataclasses.replace(mode, name=f"{mode.name}+graph", graph=True) for mode in BASE_MODES]
COMPILED_MODES = [dataclasses.replace(mode, name=f"{mode.name}+compile", base=f"{mode.name}+compile",
                                      compiled=mode.name) for mode in BASE_MODES]  # fmt: skip
MODES = {mode.name: mode for mode in BASE_MODES + GRAPH_MODES + COMPILED_MODES}

# Operands of the products of stage 1, large enough for the kernels that models get. A convolution has padding 1.
PROBES = {"matmul": ((1024, 1024), (1024, 1024)), "convolution": ((4, 64, 56, 56), (64, 64, 3, 3))}
PRECISION_SEEDS, MODULE_INPUTS = 5, 2  # stage 4 has one input of each seed; modules get the first of them
FIRST_IMAGES, IMAGE_BATCH = 4, 8  # images that stages 3 and 4 use beside seeded inputs; batch size of predictions
DEFAULT_BATCH_SIZES, MAX_AUTO_BATCH = [1, 4, 8, 16], 1024
SATURATION_GAIN = 1.05  # --batch-sizes auto ends if the double batch size gives less than 5 % more throughput
# (least, most) seconds of warm-up for each batch size, and most seconds of timing. At least a second, because an idle
# device runs at a low clock, and its latency is stable there, too. A CPU dry run should end in half a minute.
WARMUP_SECONDS = {"cpu": (0.2, 0.5), "accelerator": (1.0, 30.0)}
TIMED_SECONDS = {"cpu": 1.0, "accelerator": 30.0}
STEADY, STEADY_BATCHES = 0.02, 10  # steady: the median of 10 batches is within 2 % of the median of the 10 before
SUSTAINED_SLOWDOWN = 0.05  # how much throughput may fall under sustained load, beside the spreads
HOST_BOUND = 0.8  # a row is host-bound if launching takes this share of its time (as in trtexec)
MAX_IQR = 0.1  # interquartile range over median, as in torch.utils.benchmark
FEWEST_BATCHES = 5  # a row with fewer timed batches has no percentiles, and is not judged
HEARTBEAT_SECONDS = 30  # without a terminal, until the next line that names the stage
COPY_SECONDS = 2  # until what was printed on stderr has been copied
ALIVE_SECONDS = 30  # until a device that reported an error must have computed a small matmul
ROLL_CALL_SECONDS = 5  # until each rank must have answered when torchrun ends a run
MIB, GIB = 2**20, 2**30
OUT_OF_MEMORY = "out of device memory"

# --- The run ----------------------------------------------------------------------------------------------------------

class CannotRun(Exception):
    """The run cannot be done. The message is one line: what is wrong, and what to do. Exit status 2."""


class DeviceLost(Exception):
    """The device no longer executes operators. The message names the event after which it stopped."""


@dataclasses.dataclass(frozen=True)
class Context:
    """The experiment. Fixed before stage 1, and never changed."""

    options: argparse.Namespace
    device: torch.device
    ranks: Ranks
    documented: dict[str, str]  # precision of float32 products by kind, "convolution" and "matmul": a key of UNIT
    modes: tuple[Mode, ...]  # to validate and to time
    unsupported: dict[Mode, str]  # requested modes that lack a compiler, with the reason
    meta_model: torch.nn.Module | None  # the model on the meta device, without memory; None if timm cannot build it
    compiler: str  # the backend of torch.compile, "" if it is not needed, or if none can be used
    report_progress: Callable  # (seconds, what): restart the timeout, add `seconds`, and name `what` if it is over

    @property
    def batch_sizes(self) -> list[int]:
        return self.options.batch_sizes or DEFAULT_BATCH_SIZES


def make_context(options: argparse.Namespace, device: torch.device, ranks: Ranks, report: Report) -> Context:
    """Raises CannotRun if the device cannot run in a mode of --modes. Modes that lack a compiler are skipped."""
    modes = tuple(dict.fromkeys([FLOAT32, *(MODES[name] for name in options.modes)]))
    if reasons := [f"{mode.name}: {reason}" for mode in modes if (reason := mode.unsupported_reason(device))]:
        raise CannotRun(f"--modes {'; '.join(reasons)}")
    compiler, lacks = "", ""
    if any(mode.compiled for mode in modes):
        folder = tempfile.TemporaryDirectory(prefix="validate_npu.", ignore_cleanup_errors=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = report.caches.enter_context(folder)
        report.caches.callback(os.environ.pop, "TORCHINDUCTOR_CACHE_DIR", "")  # else handlers at exit make it again
        with contextlib.suppress(AttributeError):  # they would stay in another folder
            torch._inductor.config.cpp_cache_precompile_headers = False
        compiler, lacks = find_compiler(device, options.compile_backend)
    unsupported = {mode: lacks for mode in modes if mode.compiled and lacks}
    modes = tuple(mode for mode in modes if mode not in unsupported)
    meta_model = None
    with contextlib.suppress(Exception), torch.device("meta"):
        meta_model = create_model(options).eval()
    progress = lambda seconds=0.0, what="": report.restart_timeout(report.stage, seconds, what)  # noqa: E731
    return Context(options, device, ranks, fp32_precision(device), modes, unsupported, meta_model, compiler, progress)


def validate(context: Context, report: Report, baseline: Log | None) -> int:
    """Run the five stages in sequence, and write the log. Returns the exit status. Raises CannotRun and RanksLost."""
    ranks, timings = context.ranks, None
    report.head(context)
    probe = on_all_ranks(ranks, report, "stage 1 was not finished on it", report.run("device", device_stage(context)))
    loaded = report.run("model", probe and model_stage(context, probe), "stage 1 was not finished")
    loaded = probe and on_all_ranks(ranks, report, "the model does not run on it", loaded)
    outputs = report.run("outputs", loaded and outputs_stage(context, loaded), "the model does not run")
    checked = report.run("precision", loaded and precision_stage(context, loaded), "the model does not run")
    for _ in ranks.turns():
        stage = outputs and throughput_stage(context, outputs, checked)
        timings = report.run("throughput", stage, "stage 3 was not finished")
    if ranks.size > 1 and loaded:
        report.run("devices", devices_stage(context, report, outputs, checked, timings))
    if baseline:
        stage = compare_logs(baseline, Log("this run", report.lines), context.options)
        report.run("comparison", stage, detail=f"with {baseline.name}")
    return report.close(checked, timings)


def on_all_ranks(ranks: Ranks, report: Report, problem: str, result: T | None) -> T | None:
    """The result of a stage; None if a rank has none, so that no rank waits for it in a later stage."""
    broken = [rank for rank, works in enumerate(ranks.gather(problem, result is not None)) if not works]
    if broken and ranks.size > 1:
        advice = "run it by itself for its whole log"
        report.add(Entry(FAIL, f"devices.{rank}", problem, advice=advice) for rank in broken)
    return None if broken else result


# --- Stage 1: device --------------------------------------------------------------------------------------------------

def device_stage(context: Context) -> Stage[Probe]:
    """Versions, settings, memory, and the precision of large products."""
    device = context.device
    name, free = str(device), None
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        free, total = module.mem_get_info(device)
        chip = chip_name(device)
        family = next((f" ({family})" for name, (family, _) in CHIPS.items() if chip.startswith(name)), "")
        name += f", {chip}{family}, {total / GIB:.1f} GiB, {module.device_count()} visible"
    software = {"torch": torch.__version__, **accelerator_versions(device), "timm": timm.__version__}
    software |= {"numpy": np.__version__, "Python": platform.python_version()}
    probe = probe_device(context)
    facts = {
        "name": name,
        "uuid": device_uuid(device),
        "software": ", ".join(f"{name} {version}" for name, version in software.items()),
        "host": host_name(),
        "settings": ", ".join(settings(device)),
        "environment": " ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ),
        "compiler": context.compiler and f"torch.compile with {context.compiler}",
        "fp32": str(probe),
    }
    yield from (Entry(FACT, f"device.{name}", text) for name, text in facts.items() if text)
    if hasattr(torch, "torchvision_schemas"):
        yield Entry(FACT, "device.torchvision", "imported without its compiled operators, which are for another torch")
    if free is not None:
        yield Entry(VARIES, "device.free_memory", f"{free / GIB:.1f} GiB")
    yield from judge_probe(probe, context)
    return probe


def host_name() -> str:
    """Processor, memory, system and threads of the host, which is often the bottleneck."""
    processor, system = platform.machine(), platform.system()
    with contextlib.suppress(OSError, TypeError):
        known = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
        processor = f"{re.search('Model name: *(.*)', known)[1]} {processor}"
    with contextlib.suppress(OSError):
        release = platform.freedesktop_os_release()
        system = f"{release['NAME']} {release.get('VERSION_ID', '')}".strip()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    threads, cores = torch.get_num_threads(), os.cpu_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores
    text = f"{processor}, {memory:.0f} GiB, {system}, {threads} threads, {allowed} of {cores} cores"
    return text + (" (OMP_NUM_THREADS or CPU_AFFINITY_CONF slow the reference down)" if threads < cores // 2 else "")


def judge_probe(probe: Probe, context: Context) -> Iterator[Entry]:
    """Large products and GELU are as accurate as documented, and keep as many bits."""
    yield from PRODUCTS.header()
    for kind, (precision, found) in probe.products.items():
        advice = f"a plain {kind} is incorrect: check the device with the vendor's tools"
        tolerance = Tolerance(*(UNIT[context.documented[kind]] * factor for factor in TOLERANCES["operator"]))
        row = PRODUCTS, {"precision": precision and precision.name}
        yield comparison(f"device.{kind}", found, tolerance, advice, row=row)
    yield PRODUCTS.legend("one large product against the CPU in the identified precision, or in float64")
    fewer = [kind for kind, (precision, _) in probe.products.items()
             if precision and precision.bits < DOCUMENTED.get(context.documented[kind], EXACT).bits]  # fmt: skip
    if fewer:
        problem = f"{', '.join(fewer)} keeps fewer bits than the settings and the chip's documentation promise"
        advice = "find what sets it: allow_hf32, allow_tf32, torch.npu.matmul.cube_math_type"
        yield Entry(WARN, "device.fewer_bits", problem, advice=advice)
    error, tolerance = probe.gelu_error, TOLERANCES["gelu"]
    text = f"max abs error {error:.1e} against the {probe.gelu_form} form, limit {tolerance.warn:.1e}"
    advice = "precision.module.GELU shows what it costs"
    yield Entry(tolerance.mark(error), "device.gelu", text, advice=advice, numeric=True)


# --- Stage 2: model ---------------------------------------------------------------------------------------------------

class Loaded(NamedTuple):
    """The model and its inputs."""

    cpu: torch.nn.Module  # in float32
    device: torch.nn.Module  # its copy on the device
    inputs: torch.Tensor  # seeded, (largest batch size, C, H, W), float32, on the CPU
    images: torch.Tensor | None  # the first FIRST_IMAGES of --image, (N, C, H, W)
    first: dict[str, np.ndarray]  # outputs of the first forward pass on the device, at batch size 1
    maps: FeatureMaps | None  # None if timm has no feature maps for this model
    flops: int | None  # of the forward pass of one image
    probe: Probe
    references: References


def model_stage(context: Context, probe: Probe) -> Stage[Loaded]:
    """Weights and inputs, the first forward pass, in which each operator must have a kernel, and the references."""
    options, device, ranks = context.options, context.device, context.ranks
    ranks.all_or_none("memory", lambda: check_memory(context))
    cpu, source = ranks.all_or_none("model", lambda: load_model(options))
    sent = sha256(cpu.state_dict())
    if len(set(ranks.gather("weights", sent))) > 1:
        raise CannotRun("the processes have different weights: copy the same file, or hub cache, to each host")
    config = timm.data.resolve_model_data_config(cpu)
    inputs = draw_inputs(max(context.batch_sizes), config["input_size"], options.seed)
    images = ranks.all_or_none("images", lambda: first_images(options.image, config))
    if images is not None:
        yield Entry(FACT, "model.images", str(len(images)))
    model = copy.deepcopy(cpu).to(device)

    mean, std = (" ".join(f"{value:g}" for value in config[name]) for name in ("mean", "std"))
    received, flops = sha256(model.state_dict()), count_flops(context, inputs.shape[1:])
    parameters = sum(parameter.numel() for parameter in cpu.parameters())
    text = f"{parameters:,} parameters" + (f", {flops / 1e9:.1f} GFLOP per image" if flops else "")
    text += f", embedding {cpu.num_features}" if hasattr(cpu, "num_features") else ""
    yield Entry(FACT, "model.size", f"{text}, {getattr(cpu, 'num_classes', 0) or 'no'} classes")
    text = f"{shape_text(config['input_size'])} {config['interpolation']}, crop {config['crop_pct']:g}"
    yield Entry(FACT, "model.preprocessing", f"{text}, mean {mean}, std {std}")
    yield Entry(FACT, "model.weights", source)
    yield Entry(FACT, "model.weights_sha256", sent)
    named = {"inputs": inputs} if images is None else {"inputs": inputs, "images": images}
    yield Entry(FACT, "model.inputs_sha256", sha256(named))
    text = "are bit-identical to the host's" if sent == received else f"differ from the host's: SHA-256 {received}"
    advice = "the device's memory, or the transfer to it and back, corrupts data: check the device"
    yield Entry(PASS if sent == received else FAIL, "model.readback", f"weights on {device} {text}", advice=advice)

    started = time.perf_counter()
    recorded = emulated_precision() if device.type == "npu" else contextlib.nullcontext()
    with deterministic_algorithms(), recorded as seen, stderr_copied(device) as printed:
        first = forward_outputs(model, inputs[:1].to(device))
    seconds = f"first forward pass {time.perf_counter() - started:.2f} s"
    seconds += " with kernel compilation" if device.type != "cpu" else ""
    if seen:
        yield judge_fallback(device, seen.names, "".join(printed))
    started = time.perf_counter()
    maps = find_feature_maps(options, cpu, inputs[:1])
    # One input of each of several seeds, as published figures have it, then the first images.
    seeded = [draw_inputs(1, config["input_size"], options.seed + i) for i in range(PRECISION_SEEDS)]
    compared = torch.cat(seeded if images is None else [*seeded, images])
    references = make_references(context, probe, cpu, maps, compared)
    yield Entry(VARIES, "model.time", f"{seconds}, references on the CPU {time.perf_counter() - started:.1f} s")
    if device.type != "cpu":  # else stage 5 times it
        with torch.inference_mode():
            cpu_ms = [time_batch(cpu, inputs[:1], torch.device("cpu"))[1] for _ in range(3)]
        yield from CPU_LATENCY.header()
        yield CPU_LATENCY.entry(VARIES, "model.cpu_latency", np.median(cpu_ms), 1, torch.get_num_threads())
    return Loaded(cpu, model, inputs, images, first, maps, flops, probe, references)


def check_memory(context: Context, root: str = "/") -> None:
    """Raises CannotRun if the system, or the limit of its container (cgroup v2), leaves less memory than is needed."""

    def number(path: str, pattern: str, missing: float = math.inf) -> float:
        with contextlib.suppress(OSError, TypeError), open(os.path.join(root, path), encoding="utf-8") as file:
            return int(re.search(pattern, file.read(), re.MULTILINE)[1])
        return missing  # no such file, or "max", which is no limit

    # Bytes of a parameter: float64 replaces float32 for the reference. In a dry run the device's copy is here, too.
    each, processes = 12 if context.device.type == "cpu" else 8, context.ranks.local_size
    model, cgroup = context.meta_model, "sys/fs/cgroup/memory"
    needed = processes * each * sum(parameter.numel() for parameter in model.parameters()) if model else 0
    used = number(f"{cgroup}.current", r"(\d+)", 0) - number(f"{cgroup}.stat", r"^file (\d+)", 0)
    left = min(1024 * number("proc/meminfo", r"^MemAvailable: *(\d+)"), number(f"{cgroup}.max", r"(\d+)") - used)
    if needed > left:
        problem = f"{context.options.model} needs {needed / GIB:.1f} GiB of host memory ({each} bytes a parameter"
        problem += f", {processes} processes)" if processes > 1 else ")"
        raise CannotRun(f"{problem}, and {left / GIB:.1f} GiB are available in this host or its container")


def load_model(options: argparse.Namespace) -> tuple[torch.nn.Module, str]:
    """The timm model in eval mode on the CPU, in float32, and the source of its weights. Raises CannotRun."""
    name, weights = options.model.removeprefix("timm/"), options.weights
    if weights == "pretrained" and name.startswith("local-dir:"):
        weights = name.removeprefix("local-dir:")
    pretrained = weights == "pretrained"
    refused = check_hub(name) if pretrained or name.startswith("hf-hub:") else None
    try:
        model = create_model(options, pretrained=pretrained).eval()
    except Exception as error:  # huggingface_hub, its HTTP client, safetensors and timm each have their own
        raise CannotRun(hub_failure(name, error, refused)) from error
    if refused:
        warn_user(f"the hub does not give the weights ({describe(refused)}): those in its cache are used")
    if pretrained:
        origin = getattr(model, "pretrained_cfg", {})
        source = f"pretrained, {origin.get('hf_hub_id') or origin.get('url') or name}"
    elif weights == "random":
        source = f"random, seed {options.seed}"
    else:
        source = load_weights_file(options, model, weights)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    try:
        if weights == "random":
            draw_weights(model, options.seed)
        check_outputs(model, draw_inputs(2, size, options.seed))
    except CannotRun:
        raise
    except Exception as error:
        raise CannotRun(f"{name} does not take inputs of {shape_text(size)} on the CPU: {describe(error)}") from error
    if options.rope_bf16:  # as the original DINOv3 stores them
        rope = getattr(model, "rope", None)
        if not hasattr(rope, "periods"):
            raise CannotRun("--rope-bf16: this model has no RoPE periods")
        rope.periods = rope.periods.to(torch.bfloat16).to(torch.float32)
        source += ", RoPE periods rounded to bfloat16"
    return model, source


def check_outputs(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Raises CannotRun if the outputs of model(x) and of forward_outputs() on the CPU cannot judge a device."""
    with torch.inference_mode():
        whole, parts = tensors_in(model(images)), forward_outputs(model, images[:1])
    if not whole or not parts:
        raise CannotRun("the forward pass of the model gives no tensor of floats with a batch dimension")
    first, main = to_host(whole[0]), parts[main_output(parts)]
    if not all(np.isfinite(output).all() for output in (first, *parts.values())):
        names, found = {module: name for name, module in model.named_modules()}, []

        def look(module, args, output) -> None:
            if not all(tensor.isfinite().all() for tensor in tensors_in(output)):
                found.append(names.get(module) or "the model")

        with torch.nn.modules.module.register_module_forward_hook(look):
            model(images)
        problem = "the model gives NaN or Inf on the CPU, too, so that it cannot validate a device"
        raise CannotRun(f"{problem}; it begins in {found[0] if found else 'the model'}")
    if first[:1].shape != main.shape or compare(first[:1], main).max_row > MAX_CPU_ERROR:
        problem = "model(x) is not forward_head(forward_features(x)), is random, or depends on other images"
        raise CannotRun(f"{problem}, so that its outputs cannot be judged")


def create_model(options: argparse.Namespace, **more) -> torch.nn.Module:
    """timm.create_model, with img_size of --img-size for models that take it; others run at any size."""
    name = options.model.removeprefix("timm/")
    config = os.path.join(name.removeprefix("local-dir:"), "config.json")
    if name.startswith("local-dir:") and os.path.isfile(config):
        with open(config, encoding="utf-8") as file:
            config = json.load(file)
        if {"architecture", "architectures"} <= config.keys():  # of transformers, for a model of timm
            name, more = config["architecture"], {**(config.get("model_args") or {}), **more}
    if not options.img_size:
        return timm.create_model(name, **more)
    size = options.img_size[0], options.img_size[-1]
    try:
        model = timm.create_model(name, img_size=size, **more)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **more)
    channels = model.pretrained_cfg.get("input_size", (3,))[0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, *size)}  # for the transforms
    return model


def check_name(name: str) -> None:
    """Raises CannotRun if timm has no model of this name, with the nearest names."""
    name = name.removeprefix("timm/")
    known = name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name.split(".")[0])
    if known and not name.endswith(WEIGHT_FILES):
        return
    near = ", ".join(difflib.get_close_matches(name, timm.list_models() + timm.list_pretrained(), n=3, cutoff=0.5))
    advice = f"near: {near}" if near else "timm.list_models() has their names"
    if name.endswith(WEIGHT_FILES) or os.path.exists(name):
        advice = f"it is a path: use --model {'local-dir:FOLDER' if os.path.isdir(name) else 'NAME --weights FILE'}"
    raise CannotRun(f"timm {timm.__version__} has no model {name!r}; {advice}")


def hub_failure(name: str, error: Exception, refused: Exception | None) -> str:
    """Why the model or its weights could not be loaded, and what to do. refused: what check_hub() returned."""
    not_cached = refused is not None and type(error).__name__ == "LocalEntryNotFoundError"
    error = refused if not_cached else error
    text = f"{type(error).__name__}: {error}"
    if re.search("No pretrained weights|Invalid pretrained tag", text):
        near = ", ".join(timm.list_pretrained(name.split(".")[0] + "*")[:5]) or "none"
        return f"{first_line(error)}; pretrained variants: {near}; or --weights random or FILE"
    advice = next((advice for pattern, advice in HUB_ERRORS.items() if re.search(pattern, text)), "")
    if not advice or name.startswith("local-dir:") and isinstance(error, OSError):
        return f"timm cannot build {name} ({describe(error)})"
    advice = unreachable_hub() if not_cached and advice == STORAGE else advice
    if name.startswith(("hf-hub:", "local-dir:")):  # without its config.json there is no model
        return f"{name} could not be loaded ({describe(error)}): {advice}"
    return f"the weights of {name} could not be loaded ({describe(error)}): {advice}, or use --weights FILE or random"


def unreachable_hub() -> str:
    """What to do if the hub, or the proxy before it, does not answer."""
    import urllib.request

    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    scheme, _, host = endpoint.partition("://")
    proxy = urllib.request.getproxies().get(scheme)
    if proxy and not urllib.request.proxy_bypass(host):
        return f"the proxy {re.sub('//.*@', '//', proxy)} does not answer: correct or unset {scheme.upper()}_PROXY"
    if "HF_ENDPOINT" in os.environ:
        return f"HF_ENDPOINT={endpoint} does not answer: correct or unset it"
    return f"{endpoint} does not answer: set HF_ENDPOINT=https://hf-mirror.com"


def check_hub(name: str) -> Exception | None:
    """Request the metadata of the file that timm loads first. After an error, the result, only the cache is used."""
    from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url, utils

    repository, file = name.removeprefix("hf-hub:"), "config.json"
    if repository == name:
        with contextlib.suppress(RuntimeError):  # timm names the tag that it does not know
            if known := timm.get_pretrained_cfg(name):
                repository, file = known.hf_hub_id, known.hf_hub_filename or "model.safetensors"
    if constants.HF_HUB_OFFLINE or not repository or repository == name:
        return None
    repository, _, revision = repository.partition("@")
    try:
        found = get_hf_file_metadata(hf_hub_url(repository, file, revision=revision or None))
        if found.commit_hash and found.etag:
            return None
        refused = ValueError(f"{constants.ENDPOINT} does not send X-Repo-Commit and ETag, the headers of a hub")
    except utils.EntryNotFoundError:  # timm requests other names, too
        return None
    except Exception as error:  # of requests, or of httpx from huggingface_hub 1.0 on
        refused = error
    constants.HF_HUB_OFFLINE = True
    getattr(utils, "reset_sessions", lambda: None)()  # before 1.0 a session keeps its first setting
    return refused


def load_weights_file(options: argparse.Namespace, model: torch.nn.Module, path: str) -> str:
    """Load a checkpoint into the model, with its number of classes. Returns what was loaded. Raises CannotRun."""
    file = find_weights_file(path)
    checkpoint = read_checkpoint(file)
    original, notes = unwrap(checkpoint, model.state_dict())
    try:
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = convert(dict(original), model) if convert else original
    except Exception as error:
        raise CannotRun(f"timm cannot convert the weights file {file}: {first_line(error)}") from error
    classifier = model.pretrained_cfg.get("classifier")
    if isinstance(classifier, str) and hasattr(model, "reset_classifier"):
        weight = state.get(f"{classifier}.weight")
        if (classes := 0 if weight is None else len(weight)) != getattr(model, "num_classes", 0):
            model.reset_classifier(classes)
            notes.append(f"{classes} classes, as in the file")
    expected = model.state_dict()
    problems = {
        "missing": [key for key in expected if key not in state and not key.endswith("num_batches_tracked")],
        "unexpected": [key for key in state if key not in expected and state[key].ndim],  # counters are no weights
        "of another shape": [key for key in state if key in expected and state[key].shape != expected[key].shape],
    }
    listed = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
              for kind, keys in problems.items() if keys]  # fmt: skip
    if listed:
        names = " ".join(key for _, tensors in nested_tensors(checkpoint) for key in tensors)
        hints = [hint for pattern, hint in FOREIGN_KEYS.items() if re.search(pattern, names)]
        if any(key.startswith(f"{classifier}.0.") for key in problems["unexpected"]):
            hints.append(f"its {classifier} is a Sequential: save its Linear as {classifier}.weight and .bias")
        hints += matching_size(options, original, problems["of another shape"])
        top = ", ".join(list(dict.fromkeys(str(key).split(".")[0] for key in checkpoint))[:6])
        problem = f"the weights file {file} is of another model than --model: keys {'; '.join(listed)}"
        raise CannotRun(f"{problem}; {'; '.join(hints) or f'the file has {top}'}")
    if resampled := [key for key in original if key in state and original[key].numel() != state[key].numel()]:
        key, more = resampled[0], f" and {len(resampled) - 1} more" if len(resampled) > 1 else ""
        text = f"{key}{more} resampled from {shape_text(original[key].shape)} to {shape_text(state[key].shape)}"
        notes.append("; ".join([text, *matching_size(options, original, resampled)]))
    state = {key: tensor for key, tensor in state.items() if key in expected}
    name = os.path.relpath(file, os.path.dirname(os.path.abspath(path)))  # a folder, too, if it was given
    notes = [f"file {name}", *notes, *check_tensors(file, state)]
    model.load_state_dict(state, strict=False)  # what else is missing was listed
    return ", ".join(notes)


def matching_size(options: argparse.Namespace, original: dict[str, torch.Tensor], keys: list[str]) -> list[str]:
    """An image size for which these tensors of the model have the shapes of the file, as advice; or none."""
    for size in IMAGE_SIZES if keys else ():
        with contextlib.suppress(Exception), torch.device("meta"):
            state = create_model(argparse.Namespace(**{**vars(options), "img_size": [size]})).state_dict()
            if all(state[key].shape == original[key].shape for key in keys):
                return [f"the file fits --img-size {size}"]
    return []


def find_weights_file(path: str) -> str:
    """The file at this path; in a folder, as git or the hub leaves it, its weights, safetensors first."""
    if os.path.isfile(path):
        return path
    if not os.path.isdir(path):
        raise CannotRun(f"{path} does not exist (--weights takes pretrained, random, a file or a folder)")
    names = "model.safetensors", "*.safetensors.index.json", "*.safetensors", "pytorch_model.bin", "*.bin.index.json"
    for folder in ("", "snapshots/*"):  # the second in the hub's cache, models--ORGANISATION--NAME
        for name in (*names, *(f"*{end}" for end in WEIGHT_FILES)):
            if found := sorted(glob.glob(os.path.join(glob.escape(path), folder, name))):
                return found[0]
    raise CannotRun(f"the folder {path} has no weights: it needs a file {', '.join(WEIGHT_FILES)}")


def read_checkpoint(path: str) -> dict:
    """The content of a checkpoint, all shards of an index. No code in it is executed. Raises CannotRun."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if start[8:9] == b"{":  # after the length of the header, whatever the name of the file is
            return safetensors.torch.load_file(path)
        if start.startswith(b"PK"):
            start = " ".join(["PK", *zipfile.ZipFile(path).namelist()]).encode()
        if kind := next((kind for begins, kind in FOREIGN_FILES.items() if re.match(begins, start, re.DOTALL)), ""):
            raise CannotRun(f"the weights file {path} cannot be read: {kind}")
        if start.lstrip().startswith(b"{"):
            with open(path, encoding="utf-8") as file:
                shards = sorted(set(json.load(file)["weight_map"].values()))
            parts = [read_checkpoint(os.path.join(os.path.dirname(path), shard)) for shard in shards]
            return {key: value for part in parts for key, value in part.items()}
        numbers = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")]
        scalar = (np._core if hasattr(np, "_core") else np.core).multiarray.scalar
        with torch.serialization.safe_globals([argparse.Namespace, np.dtype, scalar, *numbers]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise CannotRun(f"the weights file {path} holds a {type(state).__name__}, not a state dict")
        return state
    except CannotRun:
        raise
    except Exception as error:  # pickle, zipfile, safetensors, struct: a damaged file fails in many ways
        reason = getattr(error, "strerror", None) or f"{describe(error)}; it may be cut: copy it again"
        if "weights_only" in str(error):
            reason = "it holds more than tensors: save the model's state_dict() instead"
        raise CannotRun(f"the weights file {path} cannot be read: {reason}") from error


def unwrap(checkpoint: dict, expected: dict) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The tensors of the dictionary, and behind the prefix, under which most of the model's own keys are found.

    Of several with as many keys EMA or a teacher is taken, else the first. If none has half of the keys, the dictionary
    with most tensors is taken, without their common prefix: timm may convert its names. Also returns notes for the log.
    """
    candidates = []
    for place, tensors in nested_tensors(checkpoint):
        tensors = {key if key in expected else WRAPPED.sub("", key): tensor for key, tensor in tensors.items()}
        common = os.path.commonprefix(list(tensors)).rpartition(".")
        starts = ((key, cut) for key in tensors for cut in (0, *(dot.end() for dot in re.finditer(r"\.", key))))
        counts = collections.Counter(key[:cut] for key, cut in starts if key[cut:] in expected)
        for prefix in dict.fromkeys(["".join(common[:2]), *counts]):
            kept = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
            is_average = bool(re.search(r"(?<![a-z])ema(?![a-z])|teacher", f"{place} {prefix}"))
            rank = (counts[prefix], is_average) if counts[prefix] > len(expected) / 2 else (0, len(kept))
            candidates.append((rank, place, prefix, kept, len(tensors) - len(kept)))
    _, place, prefix, state, others = max(candidates, key=lambda candidate: candidate[0])
    notes = [f"its {place}"] if place else []
    notes += [f"prefix {prefix} stripped" + (f" ({others} other tensors dropped)" if others else "")] if prefix else []
    return state, notes


def nested_tensors(checkpoint: dict, place: str = "") -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """The place and the tensors of a dictionary, and of each dictionary in it: "model.state_dict"."""
    yield place, {str(key): value for key, value in checkpoint.items() if isinstance(value, torch.Tensor)}
    for key, value in checkpoint.items():
        if isinstance(value, dict):
            yield from nested_tensors(value, f"{place}.{key}" if place else str(key))


def check_tensors(path: str, state: dict[str, torch.Tensor]) -> list[str]:
    """Their dtypes, for the log. Raises CannotRun if tensors are quantised, not finite, or all zero."""
    integers = torch.int8, torch.uint8  # of quantised weights; other integers are indices
    matrices = {key: value for key, value in state.items()
                if value.ndim > 1 and (value.is_floating_point() or value.dtype in integers)}  # fmt: skip
    dtypes = {key: str(value.dtype).removeprefix("torch.") for key, value in matrices.items()}
    problems = [f"is quantised ({key} is {dtypes[key]})" for key in dtypes if matrices[key].dtype.itemsize == 1]
    problems = problems or [f"has NaN or Inf in {key}" for key, value in state.items() if not value.isfinite().all()]
    if matrices and not any(value.any() for value in matrices.values()):
        problems.append("is all zeros")
    if problems:
        raise CannotRun(f"the weights file {path} {problems[0]}, so that it cannot validate a device")
    kinds = set(dtypes.values()) - {"float32"}
    return [f"from {', '.join(sorted(kinds))}"] if kinds else []


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw weights with which every block matters to the output, and activations are of order 1, in place.

    timm's own initialisation hides blocks (LayerScale of 1e-5, zeroed BatchNorms, uniform attention). Layers are scaled
    in a pass over two images (arXiv:1511.06422), by powers of two, so that all hosts get the same weights.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1, generator=generator)
        elif parameter.ndim <= 1 or parameter[0].numel() == 1:
            parameter.data.uniform_(0.75, 1.25, generator=generator)
        elif parameter.shape[0] == 1:
            parameter.data.normal_(0, 0.5, generator=generator)
        else:
            parameter.data.normal_(0, math.sqrt(1 / parameter[0].numel()), generator=generator)

    def scale(module, args, output):  # at the first call: later modules see the scaled output
        handles.pop(module).remove()
        power = 2.0 ** -round(math.log2(max(float(output.square().mean().sqrt()), 2**-20)))
        if hasattr(module, "running_var"):
            module.running_var.mul_(power**-2)
        else:
            module.weight.mul_(power)
        return module.forward(*args)

    layers = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.modules.batchnorm._BatchNorm)
    handles = {m: m.register_forward_hook(scale) for m in model.modules() if isinstance(m, layers)}
    with torch.no_grad():
        model(draw_inputs(2, timm.data.resolve_model_data_config(model)["input_size"], seed))
    for handle in handles.values():  # of modules that were not called
        handle.remove()


def draw_inputs(count: int, size: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Seeded inputs, (count, *size), float32: fine noise over coarse patches, in which images differ, of variance 1."""
    generator, inputs = torch.Generator().manual_seed(seed), []
    for _ in range(count):
        coarse = torch.randn(1, size[0], 8, 8, generator=generator)
        fine = torch.randn(1, *size, generator=generator)
        inputs.append((torch.nn.functional.interpolate(coarse, size[1:]) + fine) / math.sqrt(2))
    return torch.cat(inputs)


def image_files(given: list[str]) -> list[str]:
    """The files that --image names: files, folders and patterns. Raises CannotRun if there is none."""

    def images(pattern: str) -> list[str]:  # none that is hidden
        return sorted(path for path in glob.glob(pattern) if path.lower().endswith(IMAGE_FILES))

    files = []
    for name in given:
        if os.path.isdir(name):
            found = images(f"{glob.escape(name)}/*")
            deeper = [] if found else images(f"{glob.escape(name)}/*/*")
            advice = f": use --image '{name}/*/*{deeper[0][-4:]}' for those in its folders" if deeper else ""
            problem = f"the folder {name} has no images that can be read{advice}"
        else:
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            problem = f"the image {name} does not exist"
        if not found:
            raise CannotRun(problem)
        files += found
    return list(dict.fromkeys(files))


def load_images(given: list[str], config: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and images, (C, H, W), float32, one by one, through the model's own timm transforms. Raises CannotRun."""
    from PIL import Image
    from tqdm import tqdm

    channels, means, paths = config["input_size"][0], len(config["mean"]), image_files(given)
    if channels not in IMAGE_MODES or channels != means:
        problem = f"the model takes {channels} channel(s), and its pretrained_cfg has {means} means"
        raise CannotRun(f"{problem}: --image needs 1 or 3 channels, with as many means in config.json")
    transform = timm.data.create_transform(**config, is_training=False)
    for path in tqdm(paths, desc="images", leave=False, disable=True if len(paths) < 16 else None):
        try:
            image = Image.open(path)
            low, high = image.getextrema() if image.mode[0] in "IF" else (0, 255)
            if not (low >= 0 and 1 < high <= 255):
                raise ValueError(f"it has values from {low:g} to {high:g}, which become black or white in 8 bits")
            yield os.path.basename(path), transform(image.convert(IMAGE_MODES[channels]))
        except Exception as error:  # each of Pillow's readers has its own
            raise CannotRun(f"the image {path} cannot be read: {describe(error)}") from error


def first_images(given: list[str], config: dict) -> torch.Tensor | None:
    """The first FIRST_IMAGES that differ. All are read, so that one that cannot be read ends the run here."""
    images = []
    for _, image in load_images(given, config) if given else ():
        if len(images) < FIRST_IMAGES and not any(torch.equal(image, other) for other in images):
            images.append(image)
    return torch.stack(images) if images else None


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


class FeatureMaps(NamedTuple):
    """The intermediate features that features_only=True gives."""

    indices: list[int]  # of forward_intermediates
    channels_last: bool
    in_one_pass: bool  # forward_intermediates also gives what forward_features gives


def find_feature_maps(options: argparse.Namespace, cpu: torch.nn.Module, image: torch.Tensor) -> FeatureMaps | None:
    """Which feature maps features_only=True gives; None if timm has none for this model."""
    try:
        with torch.device("meta"):
            maps = create_model(options, features_only=True)
        info, last = maps.feature_info, str(getattr(maps, "output_fmt", "NCHW")).endswith("NHWC")
        with torch.no_grad():
            unpooled = cpu.forward_features(image)
            final, _ = cpu.forward_intermediates(image, indices=info.out_indices)
        same = isinstance(unpooled, torch.Tensor) and torch.equal(unpooled, final)
        return FeatureMaps(list(info.out_indices), last, same)
    except Exception:  # models without feature maps fail in many ways; no device takes part
        return None


def forward_outputs(model, inputs: torch.Tensor, maps: FeatureMaps | None = None) -> dict[str, np.ndarray]:
    """The outputs of one forward pass, on the host. The inputs are on the model's device and in its dtype.

    "embedding", (B, C); "logits" of a classifier; "tokens", (B, N, C), else "unpooled"; "feature_map.1" and so on.
    """
    # Under inference_mode emulated_precision() would see whole operators such as einsum, and hide them from autocast.
    with torch.inference_mode(not torch.is_autocast_enabled("cpu")), torch.no_grad():
        unpooled, found, classes = None, [], getattr(model, "num_classes", 0)
        try:
            if maps:
                unpooled, found = model.forward_intermediates(inputs, indices=maps.indices)
            if not (maps and maps.in_one_pass):
                unpooled = model.forward_features(inputs)
            outputs = numbered("embedding", model.forward_head(unpooled, pre_logits=True))
            if classes:
                outputs |= numbered("logits", model.forward_head(unpooled))
        except (NotImplementedError, TypeError, AttributeError):  # it has no such method: model(x) is its output
            outputs = numbered("logits" if classes else "embedding", model(inputs))
        outputs |= numbered("tokens" if getattr(unpooled, "ndim", 0) == 3 else "unpooled", unpooled)
        order = (0, 2, 3, 1) if maps and maps.channels_last else (0, 1, 2, 3)
        outputs |= {f"feature_map.{i}": output.permute(order) for i, output in enumerate(found, 1)}
        return {name: to_host(output) for name, output in outputs.items()}


def tensors_in(output) -> list[torch.Tensor]:
    """The tensors of an output, which may be a tuple, a list or a dict of them."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() and leaf.ndim]


def numbered(name: str, output) -> dict[str, torch.Tensor]:
    """A tensor by this name; those of a tuple, a list or a dict by NAME.1, NAME.2 and so on."""
    if isinstance(output, torch.Tensor):
        return {name: output}
    return {f"{name}.{i}": tensor for i, tensor in enumerate(tensors_in(output), 1)}


def main_output(outputs: dict[str, np.ndarray]) -> str:
    """The name of the output of model(x), the first of several."""
    return next((name for name in outputs if name.startswith("logits")), next(iter(outputs)))


def count_flops(context: Context, shape: tuple[int, ...]) -> int | None:
    """Floating point operations of one image, with attention; None if the model does not run on meta tensors."""
    from torch.utils.flop_counter import FlopCounterMode

    with contextlib.suppress(Exception), torch.inference_mode(), FlopCounterMode(display=False) as counter:
        context.meta_model(torch.empty(1, *shape, device="meta"))
        return counter.get_total_flops()


class References(NamedTuple):
    """Outputs of the CPU for the inputs of stage 4, as forward_outputs() gives them, and the units of limits."""

    inputs: torch.Tensor  # (B, C, H, W), float32
    exact: dict[str, np.ndarray]  # float64
    expected: dict[str, np.ndarray]  # float64, with the device's form of GELU: the reference
    reduced: dict[str, np.ndarray]  # the reference with operands rounded to the documented precision
    float32: dict[str, np.ndarray]
    errors: dict[str, float]  # e by output: float32 against exact, worst row
    costs: dict[str, float]  # C by output: reduced against expected, worst row

    @property
    def main(self) -> str:
        """The name of the output of model(x)."""
        return main_output(self.exact)

    @property
    def gelu_cost(self) -> float:
        """The error of model(x) that the device's form of GELU causes, worst row."""
        return compare(self.expected[self.main], self.exact[self.main]).max_row

    def tolerance(self, name: str = "", cost: float | None = None) -> Tolerance:
        """For the difference of two outputs in float32. name: of the output, default model(x). cost: C, if another."""
        name = name or self.main
        return fp32_tolerance(self.errors[name], self.costs[name] if cost is None else cost)


def fp32_tolerance(error: float, cost: float) -> Tolerance:
    """C x "expected cost" + e x "cpu error" of TOLERANCES. e is at least the rounding of float32."""
    of_cost, of_error, error = TOLERANCES["expected cost"], TOLERANCES["cpu error"], max(error, 2**-24)
    return Tolerance(of_cost.warn * cost + of_error.warn * error, of_cost.fail * cost + of_error.fail * error)


def make_references(
    context: Context, probe: Probe, cpu: torch.nn.Module, maps: FeatureMaps | None, inputs: torch.Tensor
) -> References:
    """One pass in float32, and at most three in float64. Raises RuntimeError if no product was intercepted."""
    float32 = forward_outputs(cpu, inputs, maps)
    with emulated_precision(gelu=probe.gelu) as seen:
        expected = exact = float64_outputs(cpu, inputs, maps)
    if not seen.products:
        raise RuntimeError("no matmul or convolution of this model was intercepted, so the reference is invalid")
    if seen.gelus:
        exact = float64_outputs(cpu, inputs, maps)
    reduced, rounding = expected, probe.rounding(context.documented)
    if rounding.keys() & seen.products:
        with emulated_precision(rounding, probe.gelu):
            reduced = float64_outputs(cpu, inputs, maps)
    errors, costs = worst_rows(float32, exact), worst_rows(reduced, expected)
    return References(inputs, exact, expected, reduced, float32, errors, costs)


def float64_outputs(cpu: torch.nn.Module, inputs: torch.Tensor, maps: FeatureMaps | None) -> dict[str, np.ndarray]:
    """Its outputs in float64, without a second copy of its weights. Afterwards they are unchanged."""
    dtypes = [tensor.dtype for tensor in tensors_of(cpu)]
    try:
        return forward_outputs(cpu.double(), inputs.double(), maps)
    finally:
        for tensor, dtype in zip(tensors_of(cpu), dtypes):
            tensor.data = tensor.data.to(dtype)
        clear_cached_biases(cpu)


def worst_rows(outputs: dict[str, np.ndarray], references: dict[str, np.ndarray]) -> dict[str, float]:
    """The relative L2 error of the worst row, by output."""
    return {name: compare(output, references[name]).max_row for name, output in outputs.items()}


def clear_cached_biases(model: torch.nn.Module) -> torch.nn.Module:
    """The same model. Some models of timm cache attention biases in the dtype that the weights had, until train()."""
    return model.train().eval()


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


# --- Stage 3: outputs -------------------------------------------------------------------------------------------------

class Outputs(NamedTuple):
    """What stage 5 runs, and compares with."""

    loaded: Loaded
    eager: np.ndarray  # model(inputs) on the device in float32, for the largest batch size that fits

    def rows(self, size: int) -> np.ndarray:
        """The indices of the inputs that make a batch. Repetitions are shifted: no row equals that of another tile."""
        return (np.arange(size) + np.arange(size) // len(self.eager)) % len(self.eager)


def outputs_stage(context: Context, loaded: Loaded) -> Stage[Outputs]:
    """Each output of each batch has the shape of the CPU's, is finite, and equals that of batch size 1."""
    references, device = loaded.references, context.device
    largest, problems, repeats, found = {}, {}, [], {}  # by output; found: in a batch against batch size 1
    with deterministic_algorithms() as nondeterministic:
        singles = single_image_outputs(loaded, loaded.inputs, device)
        batches = {str(size): (loaded.inputs[:size], singles) for size in [1, *context.batch_sizes]}
        if loaded.images is not None:
            batches["images"] = loaded.images, single_image_outputs(loaded, loaded.images, device)
        for batch, (inputs, single) in batches.items():
            again = None
            try:
                outputs = forward_outputs(loaded.device, inputs.to(device), loaded.maps)
                with torch.inference_mode():
                    again = to_host(loaded.device(inputs.to(device)))
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                yield Entry(WARN, f"outputs.batch.{batch}", OUT_OF_MEMORY, advice=FREE_MEMORY)
            if again is None:
                require_working(device, f"it ran out of memory with batch size {batch}")
                continue
            for name, output in outputs.items():
                on_cpu = references.float32[name]
                on_cpu = on_cpu[PRECISION_SEEDS:] if batch == "images" else on_cpu[:PRECISION_SEEDS]
                problems.setdefault(name, []).extend(output_problems(output, on_cpu, batch))
                if len(inputs) > 1 and output.shape[1:] == single[name].shape[1:]:
                    found.setdefault(name, []).append((compare(output, single[name][: len(inputs)]), f"batch {batch}"))
            repeats.append((again, outputs[references.main], f"batch size {batch}"))
            if batch == "1":
                repeats += [(loaded.first[name], outputs[name], f"first forward pass, {name}") for name in loaded.first]
            largest = outputs if batch != "images" or not largest else largest
    yield from OUTPUTS.header()
    for name, output in largest.items():
        yield judge_record(f"outputs.{name}", output, problems[name], found.get(name, []), references.tolerance(name))
    legend = "min to std: the largest. batch_err: a batch against batch size 1"
    yield OUTPUTS.legend(f"batch sizes {' '.join(batches)}. {legend}")
    yield judge_determinism(repeats, references.tolerance(), nondeterministic)
    return Outputs(loaded, largest.get(references.main, loaded.first[references.main]))


def single_image_outputs(loaded: Loaded, inputs: torch.Tensor, device: torch.device) -> dict[str, np.ndarray]:
    """The outputs of each image at batch size 1, concatenated."""
    singles = [forward_outputs(loaded.device, image[None].to(device), loaded.maps) for image in inputs]
    return {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}


def output_problems(output: np.ndarray, on_cpu: np.ndarray, batch: str) -> Iterator[str]:
    """What is wrong with an output, (B, ...), by itself. on_cpu: of the same images, or of other seeded ones."""
    rows, cpu_rows = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (output, on_cpu))
    if (output.shape[1:], output.dtype) != (on_cpu.shape[1:], on_cpu.dtype):
        shapes = (f"{shape_text(x.shape[1:])} {x.dtype}" for x in (output, on_cpu))
        yield f"batch {batch}: {' for an image, on the CPU '.join(shapes)}"
    elif not np.isfinite(rows).all():
        counts = f"{np.isnan(rows).sum()} NaN and {np.isinf(rows).sum()} Inf in {rows.size} values"
        yield f"batch {batch}: {counts}, {np.count_nonzero(~np.isfinite(on_cpu))} on the CPU"
    elif rows.shape[1] == 1:  # one number is equal to itself, and may be that of another image
        return
    elif rows.std(axis=1).min() == 0 < cpu_rows.std(axis=1).min():
        yield f"batch {batch}: collapsed: all values of an image are equal"
    elif (distance := smallest_distance(rows)) < DISTINCT_REL_L2 <= smallest_distance(cpu_rows):
        yield f"batch {batch}: different images give the same output (relative distance {distance:.1e})"


def smallest_distance(rows: np.ndarray) -> float:
    """The distance of the two nearest rows over the largest norm; inf if there is one row."""
    distance = torch.pdist(torch.from_numpy(rows)).min().item() if len(rows) > 1 else math.inf
    return distance / max(np.linalg.norm(rows, axis=1).max(), np.finfo(np.float64).tiny)


def judge_record(id: str, output: np.ndarray, problems: list[str], found: list[tuple], tolerance: Tolerance) -> Entry:
    """A row of the table of outputs. output: of the largest batch. found: differences, and in which batch."""
    cells = {"shape": f"Bx{shape_text(output.shape[1:])}"}
    cells |= {name: getattr(np.asarray(output, np.float64), name)() for name in ("min", "max", "mean", "std")}
    entry = OUTPUTS.entry(PASS, id, *cells.values(), None, None, None, numeric=True)
    if found:
        worst, what = max(found, key=lambda pair: pair[0].error)
        advice = "torch.npu.set_deterministic_level(3) makes results independent of the batch size (CANN 9.2 or later)"
        entry = comparison(id, worst, tolerance, advice, f"{what} against batch size 1", (OUTPUTS, cells))
    if problems:
        entry = entry._replace(mark=FAIL, problem="; ".join(problems[:3]), details=())
    return entry


def judge_determinism(repeats: list[tuple], tolerance: Tolerance, nondeterministic: set[str]) -> Entry:
    """The same computation twice gives the same bits. repeats: two arrays, and what they are."""
    named = f"; torch has no deterministic kernel for {', '.join(sorted(nondeterministic))}" if nondeterministic else ""
    different = [(compare(a, b), what) for a, b, what in repeats if a.tobytes() != b.tobytes()]
    if not different:
        return Entry(PASS, "outputs.determinism", f"two runs are bit-identical (deterministic algorithms{named})")
    worst, what = max(different, key=lambda pair: pair[0].error)
    advice = "the device gives other results for the same computation, with deterministic algorithms: is it healthy?"
    return comparison("outputs.determinism", worst, tolerance._replace(warn=0.0), advice + named, what=what)


# --- Stage 4: precision -----------------------------------------------------------------------------------------------

class Precision(NamedTuple):
    """What stage 4 found, for stage 5 and the summary."""

    main: str  # the output of model(x): "logits" or "embedding"
    errors: dict[str, float]  # by base mode: error of model(x) against float64, worst row; not of modes that failed
    tolerances: dict[str, Tolerance]  # by base mode: for timed outputs
    costs: dict[str, float]  # what the form of GELU, and then reduced-precision float32, cost model(x)
    bad_modules: list[str]  # modules out of tolerance, in execution order


class Unit(NamedTuple):
    """The units of the limit of one output, and the tolerance that follows from them."""

    cost: float
    cpu_error: float
    tolerance: Tolerance


class Strict(NamedTuple):
    """Whether the device can run in strict mode, and how modules are compared."""

    reason: str = ""  # why it cannot
    rounding: dict[str, Fp32Precision] = {}  # what the CPU rounds operands of modules to in that case
    again: dict[str, dict[str, bool]] = {}  # mode -> switch by kind: with these, modules with such products run again

    @property
    def tolerance(self) -> Tolerance:
        """Of modules."""
        return TOLERANCES["reduced module" if self.reason else "module"]


def precision_stage(context: Context, loaded: Loaded) -> Stage[Precision]:
    """The same weights and inputs on the device and on the CPU: each output in each mode, then each module."""
    references, main = loaded.references, loaded.references.main
    for mode, reason in context.unsupported.items():
        yield Entry(SKIP, f"precision.{mode.name}", reason)
    with deterministic_algorithms():
        results = run_modes(context, loaded)
        strict = judge_strictness(context, loaded, results)
        modules = compare_modules(context, loaded, strict)
        control = negative_control(context, loaded, strict, modules)
        least_fail = 0.0 if any(module.mark == FAIL for module in modules) else UNEXPLAINED
        errors, tolerances = {}, {}
        yield from PRECISION.header()
        for mode, outputs in results.items():
            if mode == STRICT and strict.reason:
                continue
            error, tolerance = yield from judge_mode(context, loaded, mode, outputs, least_fail)
            errors |= {} if error is None else {mode.name: error}
            tolerances |= {} if tolerance is None else {mode.name: tolerance}
        if strict.reason:
            yield PRECISION.note(SKIP, "precision.strict", strict.reason)
        images = f" and {len(loaded.images)} images" if loaded.images is not None else ""
        yield PRECISION.legend(f"one input of {PRECISION_SEEDS} seeds{images}. {LIMITS_TEXT}")
        costs = {"GELU": references.gelu_cost, reduced_names(context.documented): references.costs[main]}
        costs = {name: cost for name, cost in costs.items() if cost}
        yield from explain_precision(context, loaded, results, costs)
        if loaded.images is not None:
            yield from compare_predictions(context, loaded)
        yield from judge_modules(modules)
        yield control
    bad = {}  # the first of each module, which may fail in strict mode and by default
    for module in (module for module in modules if module.mark != PASS):
        limit = module.tolerance.limit(module.mark)
        bad.setdefault(module.name, f"{module.name} ({module.kind}, {module.found.error:.1e} > {limit:.1e})")
    return Precision(main, errors, tolerances, costs, list(bad.values()))


def run_modes(context: Context, loaded: Loaded) -> dict[Mode, dict[str, np.ndarray] | str | CannotCapture]:
    """The outputs of the device in each base mode, by name, of a compiled mode only model(x); or why there are none."""
    device, inputs, results = context.device, loaded.references.inputs, {}
    strict = [STRICT] if reduced_names(context.documented) in ("HF32", "TF32") else []
    for mode in dict.fromkeys([*strict, *(MODES[mode.base] for mode in context.modes)]):
        try:
            batch = inputs.to(device, mode.dtype)
            with in_mode(loaded, mode) as model, mode.active(device):
                if mode.compiled:
                    with forward_pass(context, mode, model, batch) as forward:
                        results[mode] = {loaded.references.main: to_host(forward(batch))}
                else:
                    results[mode] = forward_outputs(model, batch, loaded.maps)
        except CannotCapture as problem:
            results[mode] = problem
        except RuntimeError as error:
            if mode == FLOAT32 or not still_works(device):
                raise
            results[mode] = explain(error)
    return results


def judge_strictness(context: Context, loaded: Loaded, results: dict) -> Strict:
    """Whether the results in strict mode count: not if the mode fails, or if its switches change nothing."""
    references, device = loaded.references, context.device
    switches, reduced = reduced_fp32_switches(device), reduced_names(context.documented)
    if reduced == "float16":
        return Strict(f"{device} has no float32 products", loaded.probe.rounding(context.documented))
    again = {"hf32": dict.fromkeys(switches, True)} if MODES["hf32"] in context.modes else {}
    if not reduced:
        return Strict(again=again)
    strict = results[STRICT]
    if isinstance(strict, str):
        return Strict(f"{reduced} cannot be disabled: {strict}")
    if same_bits(strict, results[FLOAT32]):
        errors = worst_rows(strict, references.expected)
        as_reduced = all(error <= references.tolerance(name).warn for name, error in errors.items())
        as_float32 = all(error <= references.tolerance(name, 0.0).warn for name, error in errors.items())
        error, rounding = (part[references.main] - references.expected[references.main]
                           for part in (strict, references.reduced))  # fmt: skip
        if as_reduced and not as_float32 and compare(error, rounding).cosine > EXPLAINED:
            return Strict(f"the settings change nothing: float32 is computed in {reduced} with each of them")
    return Strict(again={"float32": {kind: getattr(*switch) for kind, switch in switches.items()}} | again)


def judge_mode(context: Context, loaded: Loaded, mode: Mode, outputs, least_fail: float) -> Stage[tuple]:
    """The rows of one mode. One that fails does not end the others. outputs: see run_modes().

    Returns the error of model(x), None if a row failed, and the tolerance for timed outputs, None without a reference.
    """
    references, main = loaded.references, loaded.references.main
    if not isinstance(outputs, dict):
        mark = SKIP if isinstance(outputs, CannotCapture) else FAIL
        yield PRECISION.note(mark, f"precision.{mode.name}", str(outputs))
        return None, None
    try:
        units = mode_units(context, loaded, mode)
    except RuntimeError as error:  # such as a LSTM in float16
        if not mode.in_half:
            raise
        yield PRECISION.note(SKIP, f"precision.{mode.name}", f"no reference, the CPU fails: {first_line(error)}")
        return None, None
    expanded = False
    if mode.compiled:  # it may expand GELU in the form that the model requests, although its operator computes another
        exact, expected = (compare(outputs[main], part[main]) for part in (references.exact, references.expected))
        expanded = exact.max_row < expected.max_row
    used = references._replace(expected=references.exact) if expanded else references
    # The first forward pass, at batch size 1, is compared, too: stage 3 compares it with the device only.
    parts = [outputs, loaded.first] if mode == FLOAT32 else [outputs]
    entries = [judge_output(used, least_fail, name, mode, [part[name] for part in parts if name in part], units[name])
               for name in outputs]  # fmt: skip
    yield from entries
    failed = any(entry.mark == FAIL for entry in entries)
    error = None if failed else compare(outputs[main], references.exact[main]).max_row
    # Timed outputs are compared with those of stage 3 in float32, which may cost C as well.
    timed = references.tolerance(cost=references.costs[main] + (references.gelu_cost if expanded else 0.0))
    return error, Tolerance(*map(max, units[main].tolerance, timed))


def mode_units(context: Context, loaded: Loaded, mode: Mode) -> dict[str, Unit]:
    """The unit of the limit of each output. In half precision it is the error of the CPU in the same mode."""
    references = loaded.references
    if mode.in_half:
        model = clear_cached_biases(copy.deepcopy(loaded.cpu).to(mode.dtype)) if mode.half else loaded.cpu
        with emulated_precision(gelu=loaded.probe.gelu), mode.active(torch.device("cpu")):
            half = forward_outputs(model, references.inputs.to(mode.dtype), loaded.maps)
        errors, (warn, fail) = worst_rows(half, references.expected), TOLERANCES["half"]
        return {name: Unit(0.0, error, Tolerance(warn * error, min(fail * error, MAX_LIMIT)))
                for name, error in errors.items()}  # fmt: skip
    costs = dict.fromkeys(references.costs, 0.0) if mode == STRICT else references.costs
    if mode.hf32:
        with mode.active(context.device):
            rounding = probe_device(context).rounding(fp32_precision(context.device))
        with emulated_precision(rounding, loaded.probe.gelu):
            costs = worst_rows(float64_outputs(loaded.cpu, references.inputs, loaded.maps), references.expected)
    return {name: Unit(cost, references.errors[name], references.tolerance(name, cost)) for name, cost in costs.items()}


def judge_output(references: References, least_fail: float, name: str, mode: Mode, outputs: list, unit: Unit) -> Entry:
    """A row of the table of stage 4. outputs: for all inputs of the references, and for the first at batch size 1."""
    compared = [(compare(output, references.expected[name][: len(output)]), output) for output in outputs]
    found, worst = max(compared, key=lambda pair: pair[0].error)
    error, exact = references.errors[name], references.exact[name][: len(worst)]
    tolerance = unit.tolerance._replace(fail=max(unit.tolerance.fail, least_fail))
    cells = {"err_fp64": compare(worst, exact).max_row, "expected": unit.cost, "cpu_err": unit.cpu_error}
    id, what = f"precision.{name}.{mode.name}", f"batch size {len(worst)}"
    entry = comparison(id, found, tolerance, what=what, row=(PRECISION, cells))
    advice = "use weights for which this precision is sufficient"
    if not math.isfinite(tolerance.warn):
        problem, advice = f"it overflows in {mode.amp or mode.half or 'float16'} on the CPU as well", "use bfloat16"
    elif not math.isfinite(found.error):  # fails, whatever the limits are
        return entry
    elif error > MAX_CPU_ERROR:
        problem = f"the float32 error of the CPU is {error:.1e}"
    elif unit.cost > MAX_EXPECTED_COST:
        problem = f"the expected cost is {unit.cost:.1e}"
    elif tolerance.warn > MAX_LIMIT:
        problem = f"the error of the CPU in this mode is {unit.cpu_error:.1e}"
    else:
        return entry
    problem = f"not judged: {problem}"
    return entry._replace(mark=WARN, problem=problem, advice=advice, details=(), numeric=False, unjudged=True)


@contextlib.contextmanager
def in_mode(loaded: Loaded, mode: Mode) -> Iterator[torch.nn.Module]:
    """Inside, the model on the device has weights in the dtype of the mode. Afterwards they are the CPU's again."""
    try:
        yield clear_cached_biases(loaded.device.to(mode.dtype)) if mode.half else loaded.device
    finally:
        if mode.half:
            clear_cached_biases(loaded.device.float())
            for here, there in zip(tensors_of(loaded.device), tensors_of(loaded.cpu)):
                here.data.copy_(there)


def explain_precision(context: Context, loaded: Loaded, results: dict, costs: dict[str, float]) -> Iterator[Entry]:
    """Facts that explain the table: expected costs, the switches, and the figures of published adaptations."""
    references, main, device = loaded.references, loaded.references.main, results[FLOAT32]
    for name, cost in costs.items():
        yield Entry(FACT, f"precision.cost.{name}", f"{name} costs {main} {cost:.1e}{AVOIDED[name]}")
    if isinstance(strict := results.get(STRICT), dict):
        if same_bits(strict, results[FLOAT32]):
            text = "outputs are bit-identical with and without reduced-precision float32"
            yield Entry(FACT, "precision.switches", text)
        error = compare(strict[main], references.expected[main]).max_row
        if error > references.tolerance(main, 0.0).warn:
            with emulated_precision(dict.fromkeys(PROBES, DOCUMENTED["TF32"]), loaded.probe.gelu):
                reduced = float64_outputs(loaded.cpu, references.inputs, loaded.maps)
            cost = compare(reduced[main], references.expected[main]).max_row
            rounding = f"rounding all operands to 10 bits costs {cost:.1e}"
            yield Entry(FACT, "precision.fewer_bits", f"the error of {main} in strict mode is {error:.1e}; {rounding}")
    output, on_cpu = (np.asarray(part[main], np.float64) for part in (device, references.float32))
    if context.device.type != "cpu":
        yield from published_figures(references, device)
        for place, values in ((context.device.type, output), ("cpu", on_cpu)):
            text = " ".join(f"{value:.6g}" for value in values[0].reshape(-1)[:5])
            yield Entry(FACT, f"precision.first_values.{place}", f"{main}, image 0: {text}")
    if main == "logits" and output.shape[1] > 1:
        probabilities = [torch.softmax(torch.from_numpy(values), -1).numpy() for values in (output, on_cpu)]
        difference, agree = np.abs(np.subtract(*probabilities)).max(), np.sum(output.argmax(1) == on_cpu.argmax(1))
        yield from PROBABILITIES.header()
        yield PROBABILITIES.entry(FACT, "precision.probabilities", difference, agree, len(output))
        yield PROBABILITIES.legend("softmax: the largest difference, and the inputs whose top-1 agrees")
    convolutions = context.documented["convolution"] != "float32" and "convolution" in loaded.probe.products
    if context.device.type != "cpu" and convolutions and np.array_equal(output, on_cpu):
        precision = context.documented["convolution"]
        problem = f"{main} equals the CPU's float32 bit for bit although convolutions are in {precision}"
        yield Entry(WARN, "precision.is_device", problem, advice="make sure that the device computed, not the CPU")


def published_figures(references: References, device: dict[str, np.ndarray]) -> Iterator[Entry]:
    """The error measures of published adaptations for each output of the device in float32, without a limit."""
    yield from PUBLISHED.header()
    for name, output in device.items():
        on_cpu = references.float32[name]
        found = [compare(output[i : i + 1], on_cpu[i : i + 1]) for i in range(len(output))]
        worst = [max(getattr(each, figure) for each in found) for figure in ("max_abs", "mean_abs", "rel_l2", "nmae")]
        yield PUBLISHED.entry(FACT, f"precision.published.{name}", *worst, min(each.cosine for each in found))
    yield PUBLISHED.legend("the worst image, against CPU float32, without a limit. nmae: mean |d| / mean |cpu|")


def compare_predictions(context: Context, loaded: Loaded) -> Iterator[Entry]:
    """The same top-1, or nearest neighbour without a classifier, for each image whose margin exceeds the precision."""
    references, name = loaded.references, loaded.references.main
    readable = load_images(context.options.image, timm.data.resolve_model_data_config(loaded.cpu))
    names, outputs = [], []
    while batch := list(itertools.islice(readable, IMAGE_BATCH)):
        names += [name for name, _ in batch]
        inputs = torch.stack([image for _, image in batch])
        with torch.inference_mode():
            outputs.append((to_host(loaded.cpu(inputs)), to_host(loaded.device(inputs.to(context.device)))))
    expected, found = (np.concatenate(part).reshape(len(names), -1).astype(np.float64) for part in zip(*outputs))
    exact = references.exact[name]
    reduced, float32 = compare(references.reduced[name], exact), compare(references.float32[name], exact)
    if expected.shape[1] == 1:
        yield Entry(SKIP, "precision.top1", "the model has one class")
    elif name == "logits":
        margin = PREDICTION_FACTOR * (reduced.max_abs + float32.max_abs)
        yield judge_predictions("precision.top1", names, expected, found, margin)
        yield from label_images(context, loaded, names[:FIRST_IMAGES], expected, found)
    elif len(expected) > 2:
        rows = [outputs / np.linalg.norm(outputs, axis=1, keepdims=True) for outputs in (expected, found)]
        cosines = [row @ row.T - 3 * np.eye(len(row)) for row in rows]  # no image is its own neighbour
        margin = PREDICTION_FACTOR * (reduced.max_row + float32.max_row)
        yield judge_predictions("precision.nearest", names, *cosines, margin)


def judge_predictions(id: str, names: list[str], expected: np.ndarray, found: np.ndarray, margin: float) -> Entry:
    """The largest of each row is the same on both. margin: of the CPU, below which the device may choose another."""
    if not math.isfinite(margin):
        return Entry(SKIP, id, "not judged: it overflows on the CPU as well")
    order, rows = np.argsort(-expected, axis=1), np.arange(len(expected))
    chosen = np.argmax(found, axis=1)
    margins = expected[rows, order[:, 0]] - expected[rows, order[:, 1]]
    lost = expected[rows, order[:, 0]] - expected[rows, chosen]
    lost[~np.isfinite(found).all(axis=1)] = np.inf
    different = np.flatnonzero(~(lost <= margin))
    text = f"{int(np.sum(chosen == order[:, 0]))} of {len(expected)} images agree with the CPU; smallest margin over"
    text += f" the second {margins.min():.2e}; below {margin:.1e} a difference is not counted as an error"
    problem = f"{len(different)} of {len(expected)} images differ from the CPU by margins up to {lost.max():.1e}, above"
    problem += f" the {margin:.1e} that precision explains: {', '.join(names[i] for i in different[:5])}"
    return Entry(FAIL if len(different) else PASS, id, problem if len(different) else text, numeric=True)


def label_images(context: Context, loaded: Loaded, images: list[str], *logits: np.ndarray) -> Iterator[Entry]:
    """The classes of the first images with their probabilities, by timm's names. logits: of the CPU, of the device."""
    subset = timm.data.infer_imagenet_subset(loaded.cpu)
    names = timm.data.ImageNetInfo(subset).index_to_description if subset else "class {}".format
    probabilities = [torch.softmax(torch.from_numpy(rows), -1).max(-1) for rows in logits]
    for i, image in enumerate(images):
        texts = [f"{names(int(best.indices[i])).split(',')[0]} {best.values[i]:.3f} on {place}"
                 for place, best in zip(("CPU", context.device.type), probabilities)]  # fmt: skip
        yield Entry(FACT, f"precision.image.{i + 1}", f"{image}: {', '.join(texts)}")


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of the model on the device, on the inputs that it has on the CPU, against its output on the CPU."""

    name: str  # "blocks.3.attn"
    kind: str  # "EvaAttention"
    mode: str  # "" for strict; "float32" or "hf32" if it ran with reduced-precision float32
    tolerance: Tolerance
    found: Difference

    @property
    def mark(self) -> str:
        return self.tolerance.mark(self.found.error)


def compare_modules(
    context: Context, loaded: Loaded, strict: Strict, only: str = "", images: int = MODULE_INPUTS
) -> list[Module]:
    """Run each module also on the device, on the inputs that it has on the CPU. In execution order, parts first.

    Composite modules (attention, MLP, blocks) run as a whole, too: what they compute between their parts is in none.
    """
    passive = (torch.nn.Identity, torch.nn.Dropout, torch.nn.ModuleList, torch.nn.Sequential, torch.nn.Flatten)
    names = {m: name for name, m in loaded.cpu.named_modules()
             if name and only in ("", name) and not isinstance(m, passive)}  # fmt: skip
    found, calls, device = [], [], context.device  # calls: a stack, because modules contain modules
    on_device = lambda module: loaded.device.get_submodule(names[module])  # noqa: E731

    def record(module, actual, expected, mode: str = "") -> None:
        if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
            difference = compare(np.atleast_2d(to_host(actual)), np.atleast_2d(to_host(expected)))
            tolerance = TOLERANCES["reduced module"] if mode else strict.tolerance
            found.append(Module(names[module], type(module).__name__, mode, tolerance, difference))

    def before(module, args, kwargs) -> None:  # before the module runs on the CPU, because it may overwrite its input
        # On the CPU a copy. torch_npu takes no channels_last tensor from the host.
        move = torch.clone if device.type == "cpu" else lambda x: x.contiguous().to(device)
        inputs = [torch.utils._pytree.tree_map_only(torch.Tensor, move, (args, kwargs)) for _ in range(2)]
        calls.append((on_device(module)(*inputs[0][0], **inputs[0][1]), inputs[1], seen.products.copy()))

    def after(module, args, kwargs, output) -> None:
        actual, (args, kwargs), products = calls.pop()
        record(module, actual, output)
        for mode, switches in strict.again.items() if not any(module.children()) else ():
            if any(switches.get(kind) for kind in seen.products - products):
                with set_reduced_fp32(device, switches):
                    again = on_device(module)(*args, **kwargs)
                record(module, again, output, mode)

    with contextlib.ExitStack() as stack, torch.inference_mode():
        seen = stack.enter_context(emulated_precision(strict.rounding, loaded.probe.gelu))
        stack.enter_context((FLOAT32 if strict.reason else STRICT).active(device))
        # RoPE has no forward pass of its own: the model calls get_embed(), and every attention uses the table.
        grid = getattr(getattr(loaded.cpu, "patch_embed", None), "grid_size", None)
        for module in (m for m in names if hasattr(m, "get_embed") and grid):
            record(module, on_device(module).get_embed(shape=grid), module.get_embed(shape=grid))
        for module in names:
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after, with_kwargs=True).remove)
        outputs = forward_outputs(loaded.cpu, loaded.references.inputs[:images])
        unpooled = outputs.get("tokens", outputs.get("unpooled"))
        if not only and unpooled is not None:  # the pooling is in no module
            names[loaded.cpu] = "forward_head"
            with contextlib.suppress(NotImplementedError, TypeError, AttributeError, KeyError):
                inputs = torch.from_numpy(np.ascontiguousarray(unpooled)).to(device)
                pooled = loaded.device.forward_head(inputs, pre_logits=True)
                record(loaded.cpu, pooled, torch.from_numpy(outputs["embedding"]))
    return found


def negative_control(context: Context, loaded: Loaded, strict: Strict, modules: list[Module]) -> Entry:
    """The comparison of modules must detect one layer on the device that is scaled by CONTROL_SCALE, and restored."""
    plain = (torch.nn.Linear, torch.nn.Conv2d)  # a subclass may normalise its weight
    name = next((m.name for m in modules if type(loaded.cpu.get_submodule(m.name)) in plain), None)
    if name is None:
        return Entry(SKIP, "precision.control", "the model calls no plain linear or convolution to alter")
    module = loaded.device.get_submodule(name)
    saved = copy.deepcopy(module.state_dict())
    try:
        for parameter in module.parameters():
            parameter.data.mul_(CONTROL_SCALE)
        control = compare_modules(context, loaded, strict._replace(again={}), name, images=1)[0]
    finally:
        module.load_state_dict(saved)
    text = f"{name} scaled by {CONTROL_SCALE}: an error of {control.found.error:.1e}"
    if control.mark == PASS:
        advice = "do not trust this validation: its comparison of modules cannot detect an error of 1 %"
        return Entry(FAIL, "precision.control", f"{text} is not detected", advice=advice)
    return Entry(PASS, "precision.control", f"{text} is detected")


def judge_modules(modules: list[Module]) -> Iterator[Entry]:
    """All modules in one row for each mode. A kind of module that is out of tolerance has a row of its own."""
    yield from MODULES.header()
    for mode in dict.fromkeys(module.mode for module in modules):
        suffix, group = f".{mode}" if mode else "", [module for module in modules if module.mode == mode]
        bad = dict.fromkeys(module.kind for module in group if module.mark != PASS)
        parts = {f"precision.module.{kind}{suffix}": [each for each in group if each.kind == kind] for kind in bad}
        parts[f"precision.modules{suffix}"] = [module for module in group if module.kind not in bad]
        for id, part in parts.items():
            if part:
                worst = max(part, key=lambda module: module.found.error)
                row = MODULES, {"count": len(part), "worst": worst.name}
                yield comparison(id, worst.found, worst.tolerance, what=worst.name, row=row)
    yield MODULES.legend(f"each by itself on the inputs of the CPU. FAIL above {TOLERANCES['module'].fail:.1e}")


# --- Emulated precision: measured on the device, reproduced on the CPU ------------------------------------------------

class Fp32Precision(NamedTuple):
    """How the operands of a product in float32 are rounded."""

    bits: int = 23  # explicit mantissa bits that are kept; 23 is no rounding
    rounding: str = ""  # "half away", "half even" or "truncated"
    format: str = "float32"

    @property
    def name(self) -> str:
        return self.format if self.bits == 23 else f"{self.format} ({self.bits} bits, {self.rounding})"

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """x, rounded; only float32 and float64, because half precision has no more bits than this."""
        if self.bits == 23 or x.dtype not in (torch.float32, torch.float64):
            return x
        if self.format == "float16":
            return x.to(torch.float16).to(x.dtype)
        integer, mantissa = (torch.int32, 23) if x.dtype == torch.float32 else (torch.int64, 52)
        bits, dropped = x.contiguous().view(integer), mantissa - self.bits
        if self.rounding == "half away":  # from zero: the sign bit is separate
            bits = bits + (1 << (dropped - 1))
        elif self.rounding == "half even":
            bits = bits + (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        return (bits & -(1 << dropped)).view(x.dtype)


EXACT, FLOAT16 = Fp32Precision(), Fp32Precision(10, "half even", "float16")
# HF32 keeps 11 bits on the 910B, and 10 on the other chips that have it (Huawei's operator tests).
KNOWN_PRECISIONS = [EXACT, *(Fp32Precision(bits, rounding, "HF32" if bits == 11 else "HF32/TF32")
                             for bits in (11, 10) for rounding in ("half away", "half even", "truncated"))]  # fmt: skip
# Used if a probe does not identify it. Fewer bits cost more, so 10 bits of HF32 are the safe choice.
DOCUMENTED = {name: Fp32Precision(10, "half even", name) for name in ("HF32", "TF32", "float16")}


@dataclasses.dataclass(frozen=True)
class Probe:
    """The rounding of large products in float32, which need not be that of each layer, and the form of GELU."""

    products: dict[str, tuple[Fp32Precision | None, Difference]]  # see identify(), by kind: a key of PROBES
    gelu: dict[str, str]  # requested form -> computed form: CANN computes tanh for both
    gelu_error: float  # largest absolute difference from that form; NaN if the device gives NaN

    def rounding(self, documented: dict[str, str]) -> dict[str, Fp32Precision]:
        """How operands are rounded, for the kinds of products that are documented to be rounded."""
        rounding = {}
        for kind, name in documented.items():
            found = self.products.get(kind, (None,))[0]
            if name != "float32":
                known = found and found.bits < 23 and (found.format == "float16") == (name == "float16")
                rounding[kind] = found if known else DOCUMENTED[name]
        return rounding

    @property
    def gelu_form(self) -> str:
        """The form that is computed for both: "tanh" or "erf"; "requested" if each is computed as requested."""
        forms = set(self.gelu.values())
        return "requested" if len(forms) > 1 else "tanh" if forms == {"tanh"} else "erf"

    def __str__(self) -> str:
        texts = [f"{kind} {precision.name if precision else f'not identified (error {found.rel_l2:.1e})'}"
                 for kind, (precision, found) in self.products.items()]  # fmt: skip
        matches = self.gelu_error <= TOLERANCES["gelu"].warn
        gelu = f"the {self.gelu_form} form" if matches else f"neither erf nor tanh (differs by {self.gelu_error:.1e})"
        return ", ".join([*texts, f"GELU in {gelu}"])


def probe_device(context: Context) -> Probe:
    """Run the products of PROBES and GELU on the device: only the kinds of products that the model has, if known."""
    device, generator = context.device, torch.Generator().manual_seed(context.options.seed)
    functions = {"matmul": torch.matmul, "convolution": functools.partial(torch.nn.functional.conv2d, padding=1)}
    with contextlib.suppress(Exception), emulated_precision() as seen, torch.inference_mode():
        size = timm.data.resolve_model_data_config(context.meta_model)["input_size"]
        context.meta_model(torch.empty(1, *size, device="meta"))
        functions = {kind: function for kind, function in functions.items() if kind in seen.products}
    # Operands with 13 bits of mantissa, so that ties are frequent: rounding modes differ only on ties.
    draw = lambda shape: Fp32Precision(13, "truncated", "").round(torch.randn(shape, generator=generator))  # noqa: E731
    products = {kind: identify(function, list(map(draw, PROBES[kind])), device) for kind, function in functions.items()}
    x, gelu, forms, errors = torch.linspace(-6, 6, 4097), torch.nn.functional.gelu, {}, []
    expected = {form: gelu(x.double(), approximate=form) for form in ("none", "tanh")}
    for requested in expected:
        actual = gelu(x.to(device), approximate=requested).cpu().double()
        apart = {form: float((reference - actual).abs().max()) for form, reference in expected.items()}
        form = min(apart, key=apart.get)
        forms[requested] = form if apart[form] <= TOLERANCES["gelu"].warn else requested
        errors.append(apart[form])
    return Probe(products, forms, float(np.max(errors)))  # NaN if one is


def identify(function: Callable, operands: list, device: torch.device) -> tuple[Fp32Precision | None, Difference]:
    """Which of KNOWN_PRECISIONS the device computes in, and the difference from it; or None, and that from float64."""
    on_device = [operand.to(device) for operand in operands]
    actual = to_host(function(*on_device)).reshape(1, -1)
    for precision in KNOWN_PRECISIONS:
        reference = function(*(precision.round(operand.double()) for operand in operands))
        found = compare(actual, to_host(reference).reshape(1, -1))
        if precision == EXACT:
            exact = found
        if found.rel_l2 < IDENTIFIED:
            if (precision.bits, precision.rounding) == (10, "half even"):  # as float16, which ends at 65504
                large = to_host(function(on_device[0] * 2.0**17, *on_device[1:])).reshape(1, -1) / 2.0**17
                precision = precision if compare(large, actual).rel_l2 < 0.01 else FLOAT16
            return precision, found
    return None, exact


def emulated_precision(rounding: dict[str, Fp32Precision] = {}, gelu: dict[str, str] = {}):
    """A context in which the CPU rounds the operands of products, and computes the form of GELU, as a device does.

    rounding: by kind of product, "convolution" or "matmul" (with attention). gelu: the form by the requested form.
    Under inference_mode a dispatch mode sees layers whole and decomposes them (as torch.utils.flop_counter does), so
    that no product is hidden; decompositions in Python, such as that of interpolation, round differently, and are not
    used. It records the names of all operators, and counts the products by kind and the GELUs that it changed.
    """
    aten = torch.ops.aten
    attention, composite = aten.scaled_dot_product_attention.default, torch._C.DispatchKey.CompositeImplicitAutograd
    first_operand = {aten.mm.default: 0, aten.bmm.default: 0, aten.mv.default: 0, aten.addmm.default: 1,
                     aten.baddbmm.default: 1}  # fmt: skip

    class EmulatedPrecision(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names, self.products, self.gelus = set(), collections.Counter(), 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            self.names.add(function.overloadpacket.__name__)
            tensors = (x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
            on_host = all(x.device.type in ("cpu", "meta") for x in tensors)
            kind = "convolution" if function is aten.convolution.default else "matmul"
            if kind == "convolution" or function in first_operand:
                self.products[kind] += 1
                first = first_operand.get(function, 0)
                if on_host and kind in rounding:
                    args = tuple(rounding[kind].round(x) if i in (first, first + 1) else x for i, x in enumerate(args))
            elif function is attention and "matmul" not in rounding:
                self.products[kind] += 1  # the fused kernel
            elif function in (aten.gelu.default, aten.gelu_.default):
                requested = kwargs.get("approximate", "none")
                if on_host and gelu.get(requested, requested) != requested:
                    kwargs["approximate"], self.gelus = gelu[requested], self.gelus + 1
            elif on_host and (function is aten.matmul.default or composite not in function.py_kernels):
                unfused = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
                with self, unfused if function is attention else contextlib.nullcontext():
                    result = function.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*args, **kwargs)

    return EmulatedPrecision()


@contextlib.contextmanager
def deterministic_algorithms() -> Iterator[set[str]]:
    """Inside, torch uses deterministic algorithms. The set has the operators that it names as having none."""
    names: set[str] = set()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
        try:
            yield names
        finally:
            torch.use_deterministic_algorithms(False)
            found = (re.match(r"(\S+) does not have a deterministic implementation", str(w.message)) for w in caught)
            names |= {match[1] for match in found if match}


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> bool:
    return all(a[name].tobytes() == b[name].tobytes() for name in a)


def reduced_names(documented: dict[str, str]) -> str:
    """The documented precisions other than float32: "HF32", or ""."""
    return " ".join(sorted(set(documented.values()) - {"float32"}))


# --- Stage 5: throughput ----------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Timing:
    """The timed batches of one mode and batch size. Without any, `problem` has the reason."""

    mode: Mode
    batch: int
    first_ms: float = 0.0  # first call, with compilation or capture
    steady: bool = True  # the latency was stable before the time limit of the warm-up
    launch_ms: tuple[float, ...] = ()  # of each batch, until all operators were launched
    total_ms: tuple[float, ...] = ()  # of each batch, until the device had finished
    peak_bytes: int | None = None
    output: np.ndarray | None = None  # of the last batch
    found: Difference | None = None  # of the timed output with the largest error
    problem: str = ""
    mark: str = WARN  # of the problem

    @property
    def name(self) -> str:
        return f"{self.mode.name}.{self.batch}"

    @property
    def throughput(self) -> float:
        """Images per second, from the time of all timed batches."""
        return 1000 * self.batch * len(self.total_ms) / sum(self.total_ms)

    @property
    def host_bound(self) -> bool:
        return bool(np.median(self.launch_ms) >= HOST_BOUND * np.median(self.total_ms))

    @property
    def iqr(self) -> float:
        """Interquartile range over median."""
        low, middle, high = np.percentile(self.total_ms, (25, 50, 75))
        return float((high - low) / middle)

    @property
    def figures(self) -> dict[str, float]:
        """The row of the table. Percentiles and the iqr of fewer than FEWEST_BATCHES batches are NaN."""
        figures = [*np.percentile(self.total_ms, (50, 90, 95, 99)), self.iqr]
        figures = figures if len(self.total_ms) >= FEWEST_BATCHES else [math.nan] * len(figures)
        return dict(zip(("images/s", "p50", "p90", "p95", "p99", "iqr"), [self.throughput, *figures]))


def throughput_stage(context: Context, outputs: Outputs, checked: Precision | None) -> Stage[list[Timing]]:
    """The latency of a batch for each mode and batch size, and that the timed outputs are correct."""
    timings, errors = [], checked.errors if checked else {}
    yield from THROUGHPUT.header()
    for timing in time_all(context, outputs, context.options.batch_sizes or None):
        timings.append(timing)
        yield timing_entry(timing, context)
    groups = by_mode(timings)
    timed = sum(groups, [])
    yield THROUGHPUT.legend("p50 to p99: latency of a synchronized batch. iqr: interquartile range / p50")
    if context.device.type != "cpu":
        yield from LATENCY.header()
        for timing in timed:
            ms, peak = timing.total_ms, timing.peak_bytes and timing.peak_bytes / MIB
            bound = "host" if timing.host_bound else "device"
            cells = min(ms), np.mean(ms), max(ms), np.median(timing.launch_ms), bound, timing.first_ms, peak, len(ms)
            yield LATENCY.entry(VARIES, f"throughput.{timing.name}", *cells)
        limit = f"{HOST_BOUND:.0%} of p50"
        yield LATENCY.legend(f"launch: until the host has launched all; bound by the host from {limit} on")
        if timed:
            rows = outputs.rows(timed[-1].batch)
            yield copy_entry(outputs.loaded.inputs[rows], outputs.eager[rows], context.device)
    yield from explain_throughput(timed, context.device)
    if groups:
        yield from fastest_modes(context, outputs.loaded.flops, groups, errors)
        yield from judge_timed_outputs(timings, checked)
    if groups and context.options.duration:
        best = fastest_within(context, timed, errors) or groups[0][-1]
        yield from sustained_load(context, outputs, best, checked)
    return timings


def time_batch(forward: Callable, inputs: torch.Tensor, device: torch.device) -> tuple[float, float, torch.Tensor]:
    """One forward pass: milliseconds until all is launched, milliseconds until the device has finished, the output."""
    start = time.perf_counter()
    output = forward(inputs)
    if device.type != "cpu":
        # torch_npu launches from a second thread: this waits for it. (torch.accelerator's stream cannot, in 2.9.0.)
        torch.get_device_module(device.type).current_stream(device).query()
    launched = time.perf_counter()
    synchronize(device)
    return 1000 * (launched - start), 1000 * (time.perf_counter() - start), output


def time_size(context: Context, outputs: Outputs, mode: Mode, size: int, eager=None, seconds: float = 0.0) -> Timing:
    """Warm up, and time batches of one size, each synchronized, in a mode that the model is in.

    Each timed output is compared while no clock runs. eager: the expected outputs, default those of stage 3. seconds:
    of timing, without a warm-up; 0: as in the options.
    """
    from tqdm import tqdm

    device, options, kind = context.device, context.options, "cpu" if context.device.type == "cpu" else "accelerator"
    rows, steady, (least, most) = outputs.rows(size), True, WARMUP_SECONDS[kind]
    inputs = outputs.loaded.inputs[rows].to(device, mode.dtype)
    reference = outputs.eager[rows] if eager is None else eager
    launch_ms, total_ms, peak, worst = [], [], None, compare(reference, reference)
    if device.type != "cpu":  # the memory functions of torch.accelerator need torch_npu 2.13
        module = torch.get_device_module(device.type)
        with contextlib.suppress(RuntimeError):  # torch_npu 2.9.0 refuses after a capture that failed
            module.empty_cache()
        module.reset_peak_memory_stats(device)
    bar = tqdm(total=options.warmup + options.iters, desc=f"{mode.name}, {size}", leave=False, disable=None)
    started = time.perf_counter()
    with bar, forward_pass(context, mode, outputs.loaded.device, inputs) as forward:

        def run_batch() -> tuple[float, float, torch.Tensor]:
            bar.update()
            return time_batch(forward, inputs, device)

        call_ms = time_batch(forward, inputs, device)[1]
        first_ms = 1000 * (time.perf_counter() - started)
        if options.warmup and not seconds:
            most -= call_ms / 1000 if kind == "cpu" else 0  # nothing is compiled in the first call
            steady = warm_up(lambda: run_batch()[1], options.warmup, least, most)
        bar.total = bar.n + (round(1000 * seconds / call_ms) if seconds else options.iters)
        end = time.perf_counter() + (seconds or TIMED_SECONDS[kind])
        most_batches = math.inf if seconds else options.iters
        while not total_ms or time.perf_counter() <= end and len(total_ms) < most_batches:
            launch, total, output = run_batch()
            launch_ms.append(launch)
            total_ms.append(total)
            output = to_host(output)
            if not np.array_equal(output, reference):
                worst = max(worst, compare(output, reference), key=lambda found: found.error)
    if device.type != "cpu":
        peak = module.max_memory_allocated(device)
    return Timing(mode, size, first_ms, steady, tuple(launch_ms), tuple(total_ms), peak, output, worst)


def warm_up(run_batch: Callable[[], float], count: int, least: float, most: float) -> bool:
    """Run batches, at least `count` and `least` seconds, until the latency is steady or `most` seconds are over."""
    times, steady, start = [], False, time.perf_counter()
    while (seconds := time.perf_counter() - start) < most and (seconds < least or len(times) < count or not steady):
        times.append(run_batch())
        recent, earlier = times[-STEADY_BATCHES:], times[-2 * STEADY_BATCHES : -STEADY_BATCHES]
        if len(earlier) == STEADY_BATCHES:
            steady = bool(abs(np.median(recent) / np.median(earlier) - 1) < STEADY)
    return steady


def time_all(context: Context, outputs: Outputs, sizes: list[int] | None) -> Iterator[Timing]:
    """Each mode with each batch size; a failure ends only its mode. sizes None: doubled until that gains too little."""
    eager = {}  # (base, batch size) -> output of the mode without graph, which the graph must reproduce
    for mode in context.modes:
        smaller = 0.0  # throughput of the smaller batch size
        for size in sizes or (2**i for i in range(MAX_AUTO_BATCH.bit_length())):
            context.report_progress()
            with in_mode(outputs.loaded, mode):
                try:
                    timing = time_size(context, outputs, mode, size, eager.get((mode.base, size)))
                except CannotCapture as problem:
                    timing = Timing(mode, size, problem=str(problem), mark=SKIP)
                except RuntimeError as error:
                    out_of_memory = is_out_of_memory(error)
                    if not out_of_memory and (mode == FLOAT32 or not still_works(context.device)):
                        raise
                    problem, mark = (OUT_OF_MEMORY, WARN) if out_of_memory else (explain(error), FAIL)
                    timing = Timing(mode, size, problem=problem, mark=mark)
            eager.setdefault((mode.base, size), timing.output)
            yield timing
            if timing.problem:
                require_working(context.device, f"{timing.name}: {timing.problem}")
            failed = timing.problem not in ("", OUT_OF_MEMORY)
            if failed or not sizes and (timing.problem or timing.throughput < SATURATION_GAIN * smaller):
                break
            smaller = 0.0 if timing.problem else timing.throughput
    synchronize(context.device)  # an error that is first reported when Python exits would come after the verdict


class CannotCapture(Exception):
    """The forward pass cannot be captured as a graph, or compiled, for the reason in the message."""


@contextlib.contextmanager
def forward_pass(context: Context, mode: Mode, model: torch.nn.Module, inputs: torch.Tensor) -> Iterator[Callable]:
    """Inside, a function runs the model, which is in this mode, on inputs of this shape. Raises CannotCapture."""
    program = model

    def forward(inputs):  # enters the mode in each call, as programs do
        with mode.active(context.device):
            return program(inputs)

    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.no_grad() if mode.compiled else torch.inference_mode())  # torchair needs no_grad
        if mode.graph or mode.compiled:
            stack.enter_context(constant_rope(model))
            forbid_internal_formats(context.device, stack)
        if mode.compiled:
            stack.callback(torch.compiler.reset)  # else each call checks the guards of all earlier shapes
            program = compiled(context, mode, model, inputs)
        yield captured(forward, inputs, context.device) if mode.graph else forward


def compiled(context: Context, mode: Mode, model: torch.nn.Module, inputs: torch.Tensor) -> Callable:
    """The model, compiled as one graph for this shape, with zeros as input, as captured(). Raises CannotCapture."""
    backend, zeros, output = context.compiler, torch.zeros_like(inputs), None
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    kind = "reduce-overhead" if (context.device.type, backend) == ("cuda", "inductor") else None
    context.report_progress(0.0, f" (compiling {mode.name})")
    torch._dynamo.utils.counters.clear()
    try:
        with mode.active(context.device):
            model(zeros)  # fills the tables of constant_rope()
            program = torch.compile(model, fullgraph=True, dynamic=False, backend=backend, mode=kind)
            for _ in range(4):  # the second call captures graphs
                previous, output = output, program(zeros)
        synchronize(context.device)
    except Exception as error:  # compilers fail in many ways
        cause = getattr(error, "inner_exception", error)
        if is_out_of_memory(cause):
            raise cause
        reason = str(cause).rstrip().split("\n")[-1] if "C++ compile error" in str(cause) else explain(cause)
        raise CannotCapture(f"torch.compile with {backend} failed: {reason}") from error
    finally:
        for number, handler in handlers.items():  # npugraph_ex and torchair replace them
            signal.signal(number, handler)
        context.report_progress()
    # npugraphs runs single operators, without an error, if one is on the CPU. A graph has one memory for its output.
    first, second = (tensors_in(each)[0] for each in (previous, output))
    replayed = backend not in NPU_GRAPHS or first.data_ptr() == second.data_ptr()
    if not replayed or not torch._dynamo.utils.counters["stats"]["unique_graphs"]:
        cause = "is TORCHDYNAMO_DISABLE set?" if replayed else "is an operator on the CPU?"
        raise CannotCapture(f"torch.compile with {backend} ran no graph: {cause}")
    return program


def captured(forward: Callable, inputs: torch.Tensor, device: torch.device) -> Callable:
    """Capture forward(inputs) as a graph. The returned function replays it on its argument. Raises CannotCapture.

    With zeros as input: a correct output proves a replay. torch's make_graphed_callables() costs time for autograd.
    """
    module = torch.get_device_module(device.type)
    static, side, current = torch.zeros_like(inputs), module.Stream(), module.current_stream()
    side.wait_stream(current)
    with module.stream(side):
        for _ in range(3):
            forward(static)
    current.wait_stream(side)
    try:
        graph = (module.NPUGraph if device.type == "npu" else module.CUDAGraph)()
        with module.graph(graph):
            output = forward(static)
    except (RuntimeError, AttributeError) as error:
        module.set_stream(current)  # torch_npu leaves the stream of the capture
        if is_out_of_memory(error):
            raise
        cause = error.__context__ or error  # the cause of an invalid capture is the earlier error
        raise CannotCapture(f"the forward pass cannot be captured: {explain(cause)}") from error

    def replay(inputs):
        static.copy_(inputs)
        graph.replay()
        return output

    return replay


@contextlib.contextmanager
def constant_rope(model: torch.nn.Module) -> Iterator[None]:
    """Inside, RoPE tables are constants: timm's DINOv3 copies coordinates from the host, which no graph can contain."""
    with contextlib.ExitStack() as stack:
        for rope in (module for module in model.modules() if hasattr(module, "get_embed")):
            table = functools.cache(rope.get_embed)
            constant = lambda *shape, of=table, **named: of(*shape, **named)  # noqa: E731
            rope.get_embed = torch.compiler.assume_constant_result(constant)
            stack.callback(delattr, rope, "get_embed")
        yield


def by_mode(timings: list[Timing]) -> list[list[Timing]]:
    """The timings that have timed batches, a list for each mode."""
    timings = [timing for timing in timings if timing.total_ms]
    return [[t for t in timings if t.mode == mode] for mode in dict.fromkeys(t.mode for t in timings)]


def timing_entry(timing: Timing, context: Context, table: str = "throughput") -> Entry:
    """A row of the table of throughput."""
    id = f"{table}.{timing.name}"
    if timing.problem == OUT_OF_MEMORY:  # with --batch-sizes auto the search ends like this
        mark = WARN if context.options.batch_sizes else VARIES
        return THROUGHPUT.note(mark, id, OUT_OF_MEMORY, advice=FREE_MEMORY)
    if timing.problem:
        return THROUGHPUT.note(timing.mark, id, timing.problem)
    return THROUGHPUT.entry(VARIES, id, *(None if math.isnan(figure) else figure for figure in timing.figures.values()))


def copy_entry(inputs: torch.Tensor, output: np.ndarray, device: torch.device) -> Entry:
    """The time to copy a batch to the device and its output back: a program needs it beside the latency."""
    times = []
    for tensor, target in ((inputs, device), (torch.from_numpy(output).to(device), "cpu")):
        synchronize(device)
        start = time.perf_counter()
        tensor.to(target)
        synchronize(device)
        times.append(f"{1000 * (time.perf_counter() - start):.3g} ms")
    text = f"batch size {len(inputs)}: {' to the device, '.join(times)} back, in float32"
    return Entry(VARIES, "throughput.copy", text)


def explain_throughput(timings: list[Timing], device: torch.device) -> Iterator[Entry]:
    """What limits the rows, and which of them are doubtful."""

    def rows(test: Callable[[Timing], bool]) -> str:
        groups = by_mode([timing for timing in timings if test(timing)])
        return ", ".join(f"{group[0].mode.name} {' '.join(str(t.batch) for t in group)}" for group in groups)

    if device.type != "cpu" and (bound := rows(lambda timing: timing.host_bound)):
        advice = "larger batches are nearly free; +graph, +compile or a faster CPU helps, half precision does not"
        yield Entry(VARIES, "throughput.host_bound", f"{bound}: the device waits for the host; {advice}")
    if doubtful := rows(lambda timing: not (timing.steady and timing.figures["iqr"] <= MAX_IQR)):
        reason = f"iqr over {MAX_IQR:.0%}, under {FEWEST_BATCHES} batches, or not steady to {STEADY:.0%}"
        advice = "use an idle host, bind to cores (CPU_AFFINITY_CONF), raise --iters"
        yield Entry(VARIES, "throughput.doubtful", f"{doubtful}: not reliable ({reason}): {advice}")
    eager = {timing.name: timing for timing in timings if timing.total_ms}
    for group in by_mode(timings):
        pairs = zip(group, group[1:])
        if last := next((a for a, b in pairs if b.throughput < SATURATION_GAIN * a.throughput), None):
            text = f"{last.mode.name} at batch size {last.batch}: the next size gains under {SATURATION_GAIN - 1:.0%}"
            yield Entry(VARIES, f"throughput.saturated.{last.mode.name}", text)
        if plain := group[0].mode.compiled:
            texts = [f"batch size {timing.batch} {timing.first_ms / 1000:.1f} s" for timing in group]
            for i, timing in enumerate(group):
                if before := eager.get(f"{plain}.{timing.batch}"):
                    gain = 1000 / before.throughput - 1000 / timing.throughput  # milliseconds an image
                    texts[i] += f" (paid for after {timing.first_ms / gain:.2g} images)" if gain > 0 else " (no faster)"
            yield Entry(VARIES, f"throughput.compile.{group[0].mode.name}", f"with the first calls: {', '.join(texts)}")


def fastest_modes(context: Context, flops: int | None, groups: list, errors: dict[str, float]) -> Iterator[Entry]:
    """The fastest batch size of each mode, and the fastest mode whose error is at most --max-error. errors: by mode."""
    if len(groups) == 1:
        return
    chip = chip_name(context.device)
    peak = next((peak for name, (_, peak) in CHIPS.items() if chip.startswith(name)), None)
    best = [max(group, key=lambda timing: timing.throughput) for group in groups]
    highest = max(timing.throughput for timing in best)
    yield from FASTEST.header()
    for timing in best:
        rate = flops and flops * timing.throughput / 1e12
        share = rate / peak if rate and peak and timing.mode.in_half else None
        speedup, error = timing.throughput / best[0].throughput, errors.get(timing.mode.base)
        bar = "#" * round(BAR_WIDTH * timing.throughput / highest)
        cells = timing.batch, timing.throughput, speedup, error, rate, share, bar
        yield FASTEST.entry(VARIES, f"throughput.best.{timing.mode.name}", *cells)
    yield FASTEST.legend("fastest batch size of each mode. share: of the chip's float16 peak")
    if fastest := fastest_within(context, sum(groups, []), errors):
        speedup = f"{fastest.throughput / best[0].throughput:.2f} x {best[0].mode.name}"
        text = f"{fastest.mode.name} at batch size {fastest.batch}, {speedup}"
        yield Entry(VARIES, "throughput.fastest", f"{text} (error within --max-error {context.options.max_error:g})")


def fastest_within(context: Context, timings: list[Timing], errors: dict[str, float]) -> Timing | None:
    """The fastest row whose error is at most --max-error. Modes that failed in stage 4 have no error."""
    accepted = [t for t in timings if errors.get(t.mode.base, math.inf) <= context.options.max_error]
    return max(accepted, key=lambda timing: timing.throughput, default=None)


def sustained_load(context: Context, outputs: Outputs, best: Timing, checked: Precision | None) -> Iterator[Entry]:
    """Run the fastest mode and batch size for --duration seconds, and compare its last tenth with its first."""
    duration = context.options.duration
    context.report_progress(duration)
    with in_mode(outputs.loaded, best.mode):
        timing = time_size(context, outputs, best.mode, best.batch, seconds=duration)
    tenth = max(FEWEST_BATCHES, len(timing.total_ms) // 10)
    parts = [dataclasses.replace(timing, total_ms=part) for part in (timing.total_ms[:tenth], timing.total_ms[-tenth:])]
    figures = (f"{part.throughput:.2f} images/s, p99 {np.percentile(part.total_ms, 99):.5g} ms" for part in parts)
    text = f"{best.name}: first tenth of {duration} s {', last tenth '.join(figures)}"
    yield Entry(VARIES, "throughput.sustained.tenths", text)
    slower = 1 - parts[1].throughput / parts[0].throughput
    allowed = max(SUSTAINED_SLOWDOWN, sum(part.iqr for part in parts) / 2)
    mark, text = PASS, f"no slower after {duration} s"
    if len(timing.total_ms) < 2 * FEWEST_BATCHES:
        mark, text = SKIP, f"not judged: {len(timing.total_ms)} batches in {duration} s"
    elif slower > allowed:
        mark, text = WARN, f"throughput fell by {slower:.0%} in {duration} s, limit {allowed:.0%}"
    yield Entry(mark, "throughput.sustained", text, advice="watch temperature, power and clock with the vendor's tools")
    yield from judge_timed_outputs([timing], checked, "sustained.")


def judge_timed_outputs(timings: list[Timing], checked: Precision | None, what: str = "") -> Iterator[Entry]:
    """Timed outputs equal those of stage 3 in float32, and those of a graph equal those of its mode without."""
    eager = {timing.name for timing in timings if timing.mode.name == timing.mode.base and timing.total_ms}
    for group in by_mode(timings):
        mode, worst = group[0].mode, max(group, key=lambda timing: timing.found.error)
        id = f"throughput.outputs.{what}{mode.name}"
        tolerance = checked.tolerances.get(mode.base) if checked else None
        reference = f"{mode.base} without graph" if mode.graph and f"{mode.base}.{worst.batch}" in eager else "stage 3"
        if tolerance is None or tolerance.warn > MAX_LIMIT:
            reason = "stage 4 gave no limit for this mode"
            if tolerance:
                overflows = math.isinf(tolerance.warn)
                reason = "it overflows on the CPU as well" if overflows else f"its limit is {tolerance.warn:.1e}"
            yield Entry(SKIP, id, f"not judged: {reason}")
            continue
        where = f"batch size {worst.batch} against {reference}"
        advice = "outputs under load differ from the reference: check the temperature and memory of the device"
        yield comparison(id, worst.found, tolerance, advice, what=where)


# --- Comparing two arrays ---------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Difference:
    """The difference of an array from its reference. A row is an image, or a token of (images, tokens, width)."""

    max_row: float  # ||a - r|| / ||r|| of the worst row; this and the other errors are inf if a value is not finite
    max_elem: float  # |a - r| of the worst element, over |r| or the RMS of its row, and over ELEMENT_FACTOR
    row_index: tuple[int, ...]  # (image,) or (image, token)
    element_index: tuple[int, ...]
    values: tuple[float, float]  # a and r at element_index; the first that is not finite, if any is
    nonfinite: tuple[int, int, int, int]  # NaN and Inf in a, NaN and Inf in r
    max_abs: float
    mean_abs: float
    rel_l2: float  # over all rows
    nmae: float  # sum |a - r| / sum |r|
    cosine: float  # over all rows

    @property
    def error(self) -> float:
        """The figure that is judged."""
        return max(self.max_row, self.max_elem)


def compare(actual: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare an output with its reference, both (B, ...), row by row, in float64.

    The relative L2 error of a row is ||a - r|| / max(||r||, ROW_NORM_FLOOR * rms of all ||r||), and that of an element
    |a - r| / max(|r|, the same norm / sqrt(row length)). NaN and Inf on either side make the errors infinite.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"shapes differ: {actual.shape}, reference {reference.shape}")
    shape, row_axes, tiny = actual.shape, 2 if actual.ndim == 3 else 1, np.finfo(np.float64).tiny
    position = lambda flat, shape: tuple(map(int, np.unravel_index(flat, shape)))  # noqa: E731
    a, r = (np.asarray(x, np.float64).reshape(math.prod(shape[:row_axes]), -1) for x in (actual, reference))
    delta = a - r
    error, norm_a, norm_r = (np.sqrt(np.einsum("ij,ij->i", x, x)) for x in (delta, a, r))
    if not np.isfinite(error).all():
        flat, inf = int(np.argmin(np.isfinite(delta))), math.inf
        counts = tuple(int(np.count_nonzero(test(x))) for x in (a, r) for test in (np.isnan, np.isinf))
        index, values = position(flat, shape), (float(a.flat[flat]), float(r.flat[flat]))
        return Difference(inf, inf, index[:row_axes], index, values, counts, inf, inf, inf, inf, 0.0)
    floored = np.maximum(norm_r, max(ROW_NORM_FLOOR * math.sqrt(np.mean(norm_r**2)), tiny))
    relative, size, scale = error / floored, np.abs(delta, out=delta), np.abs(r)
    np.maximum(scale, floored[:, None] / math.sqrt(r.shape[1]), out=scale)
    element = np.divide(size, scale, out=scale)
    cosine = np.vdot(a, r) / max(np.linalg.norm(norm_a) * np.linalg.norm(norm_r), tiny) if error.any() else 1.0
    flat = int(element.argmax())
    return Difference(
        max_row=float(relative.max()),
        max_elem=float(element.max()) / ELEMENT_FACTOR,
        row_index=position(int(relative.argmax()), shape[:row_axes]),
        element_index=position(flat, shape),
        values=(float(a.flat[flat]), float(r.flat[flat])),
        nonfinite=(0, 0, 0, 0),
        max_abs=float(size.max()),
        mean_abs=float(size.mean()),
        rel_l2=float(np.linalg.norm(error) / max(np.linalg.norm(norm_r), tiny)),
        nmae=float(size.sum() / max(np.abs(r).sum(), tiny)),
        cosine=float(cosine),
    )


def comparison(id: str, found: Difference, tolerance: Tolerance, advice="", what="", row: tuple = ()) -> Entry:
    """A check that two arrays are close: a sentence, or with `row` a row of a table. The details are for a bug report.

    what: which arrays were compared. row: the table, and its other cells by column.
    """
    mark = tolerance.mark(found.error)
    limit = tolerance.limit(mark)
    used, text = used_text(found.error, limit), f"{f'{what}: ' if what else ''}error {found.error:.1e}"
    place = ", token ".join(map(str, found.row_index))
    nan, inf, reference_nan, reference_inf = found.nonfinite
    details = (
        f"WARN above {tolerance.warn:.1e}, FAIL above {tolerance.fail:.1e}; NaN and Inf: device {nan} and {inf},"
        f" reference {reference_nan} and {reference_inf}",
        f"worst row: image {place}; worst element {found.element_index}: device {found.values[0]:.6g},"
        f" reference {found.values[1]:.6g}",
    )
    more = {"problem": f"{text} > limit {limit:.1e}", "details": details, "advice": advice, "numeric": True}
    if not row:
        return Entry(mark, id, f"{text}, limit {limit:.1e}, used {used}", **more)
    table, others = row
    cells = dataclasses.asdict(found) | {"batch_err": found.error, "limit": limit, "used": used} | others
    return table.entry(mark, id, *(cells[name] for name, _ in table.columns), **more)


def used_text(error: float, limit: float) -> str:
    """The error in percent of the limit."""
    if error == 0:
        return "0%"
    used = 100 * error / limit if limit else math.inf
    return f"{used:.0f}%" if used < 99999 else f"{used:.0e}%" if math.isfinite(used) else "inf"


def to_host(output) -> np.ndarray:
    """A copy on the host of a tensor, the first of several; bfloat16, which numpy lacks, becomes float32."""
    tensor = (output if isinstance(output, torch.Tensor) else tensors_in(output)[0]).detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def shape_text(shape: tuple) -> str:
    return "x".join(map(str, shape))


# --- Comparing two logs -----------------------------------------------------------------------------------------------

LINE = re.compile(r"(PASS|SKIP|WARN|FAIL|~   |#   |    ) ([a-z]+\.\S+|id)(?: +(.*))?")
ERROR_COLUMNS = ("err_fp64", "max_row", "max_elem", "batch_err")  # in which a larger figure is worse
SPEED_COLUMNS = ("images/s", "p50", "p90", "iqr")
TOGETHER = "devices.together."  # rows that are not compared: how far the devices overlap in time varies
EXPERIMENT = ("run.command", "device.name", "model.weights_sha256", "model.inputs_sha256")  # facts that identify it


def number(cell: str) -> float:
    """The number in a cell of a table; NaN for "-"."""
    return math.nan if cell == "-" else float(cell.rstrip("%")) / (100 if cell.endswith("%") else 1)


class Log:
    """A log by its lines: everything before the first [failures], [comparison] or [summary]."""

    def __init__(self, name: str, lines: list[str]) -> None:
        self.name, self.title, self.result = name, lines[0], lines[-1]
        self.marks: dict[str, str] = {}  # id -> outcome of the check
        self.texts: dict[str, str] = {}  # id -> the text after the id
        self.rows: dict[str, dict[str, str]] = {}  # id -> cells by column
        columns, last = [], ""
        for line in lines[1:]:
            if line.startswith(("[failures]", "[comparison]", "[summary]")):
                break
            if match := LINE.fullmatch(line):
                mark, last, self.texts[match[2]] = match[1], match[2], match[3] or ""
                columns = match[3].split() if last == "id" else columns
                if mark in OUTCOMES:
                    self.marks[last] = mark
            elif last and line[1:INDENT].isspace():  # the continuation of a line
                self.texts[last] += f" {line[1:].strip()}"
            else:  # a title, or the legend of a table
                columns, last = [], ""
            if columns and last != "id" and not self.texts[last].startswith("("):  # a row
                self.rows.setdefault(last, {}).update(zip(columns, self.texts[last].split()))

    @classmethod
    def read(cls, path: str) -> Log:
        """Raises CannotRun if the file is not a complete log of this version of the script."""
        try:
            with open(path, encoding="utf-8-sig", errors="replace") as file:
                lines = file.read().rstrip().splitlines()
        except OSError as error:
            raise CannotRun(f"the log {path} cannot be read: {error.strerror}") from error
        version = re.match(r"validate_npu ?([\d.]*): ", lines[0]) if lines else None
        if not version or not re.match("RESULT: (PASS|FAIL)", lines[-1]):
            raise CannotRun(f"{path} is not a complete log of validate_npu.py: its first or its last line is missing")
        if version[1] != VERSION:
            problem = f"{path} is a log of version {version[1] or '1'}, this script is version {VERSION}"
            raise CannotRun(f"{problem}: make a new log")
        marks = [line[:4] for line in itertools.takewhile(lambda line: line not in ("[failures]", "[summary]"), lines)]
        if f": {counts_text(marks)}" not in lines[-1] or FAIL in marks and PASS in lines[-1]:
            raise CannotRun(f"{path} was cut or edited: its last line does not count the outcomes above it")
        return cls(os.path.basename(path), lines)

    @property
    def speeds(self) -> dict[str, dict[str, float]]:
        """The rows of the tables of throughput, of all devices: figures by column."""
        return {id: {name: number(cells[name]) for name in SPEED_COLUMNS} for id, cells in self.rows.items()
                if set(SPEED_COLUMNS) <= cells.keys() and not id.startswith(TOGETHER)}  # fmt: skip


def counts_text(marks: list[str]) -> str:
    """How many checks have each outcome, as in the last line of a log."""
    passed, skipped, warned, failed = map(marks.count, OUTCOMES)
    return f"{passed} passed, {warned} warned, {failed} failed, {skipped} skipped"


def compare_logs(old: Log, new: Log, options: argparse.Namespace) -> Stage[None]:
    """Checks whose outcome, errors that, and throughput that became worse."""
    facts = ((id, old.texts.get(id, "-"), new.texts.get(id, "-")) for id in EXPERIMENT)
    changed = [f"{id}: {before} -> {after}" for id, before, after in facts if before != after]
    before, after = old.speeds, new.speeds
    is_searched = "--batch-sizes auto" in new.texts.get("run.command", "")  # which may end at a smaller size
    # What does not pass may have a line of its own, which is gone when it passes.
    earlier = dict.fromkeys(before, PASS) | old.marks
    missing = [id for id, mark in earlier.items() if mark == PASS and id not in new.marks and id not in after
               and not (is_searched and id in before and id not in new.texts)]  # fmt: skip
    worse = [f"{id}: {earlier.get(id, 'new')} -> {mark}" for id, mark in new.marks.items()
             if OUTCOMES.index(mark) > OUTCOMES.index(earlier.get(id, SKIP))]  # fmt: skip
    speeds = {id: compare_speed(before[id], after[id], options.max_slowdown) for id in before if id in after}
    yield from SPEED.header()
    yield from (SPEED.entry(VARIES, f"comparison.{id}", *cells) for id, (cells, _) in speeds.items())
    yield SPEED.legend("allowed: --max-slowdown + half the sum of both iqr")
    rates = {id: f"{id}: {cells[0]:.2f} -> {cells[1]:.2f} images/s" for id, (cells, _) in speeds.items()}
    slower, unsure = ([rates[id] for id in rates if speeds[id][1] == mark] for mark in (FAIL, WARN))
    advice = "see what changed between the runs: versions and settings of stage 1, other work on the host or the device"
    advice = "the experiments differ (comparison.experiment), which may be the cause" if changed else advice
    for name, text, outcome, found in (
        ("experiment", "same command, device, weights and inputs", WARN, changed),
        ("checks", "no check and no batch size is missing", WARN if changed else FAIL, missing),
        ("outcomes", "no outcome is worse", FAIL, worse),
        ("errors", f"no error grew by more than {ERROR_GROWTH:.0%}", FAIL, list(grown_errors(old, new))),
        ("speed", f"throughput fell nowhere by more than {options.max_slowdown:g}% and half the spreads",
         FAIL if slower else WARN, slower or unsure and ["not judged: large spreads or few batches", *unsure]),
    ):  # fmt: skip
        text = "; ".join(dict.fromkeys(found)) or text
        yield Entry(outcome if found else PASS, f"comparison.{name}", text, advice=advice)


def grown_errors(old: Log, new: Log) -> Iterator[str]:
    """The rows in which an error is worse."""
    for id in (id for id in old.rows if id in new.rows):
        for column in ERROR_COLUMNS:
            before, after = (number(log.rows[id].get(column, "-")) for log in (old, new))
            if after > ROUNDING and after > (1 + ERROR_GROWTH) * before:
                yield f"{id}: {column} {before:.1e} -> {after:.1e}"
                break


def compare_speed(old: dict[str, float], new: dict[str, float], max_slowdown: float) -> tuple[tuple, str]:
    """Cells of the table SPEED, and FAIL if the new run is slower, WARN if it seems slower and cannot be judged.

    One batch in a hundred may take thirty times as long, so p50 and p90 must be slower as well. A median that rose by
    more than both spreads is slower, however large they are. Rows of few batches have no p50, p90 and iqr: NaN.
    """
    allowed = max_slowdown / 100 + (old["iqr"] + new["iqr"]) / 2
    ratio, p50 = new["images/s"] / old["images/s"], new["p50"] / old["p50"]
    best = max(ratio, 1 / p50, old["p90"] / new["p90"])
    cells = old["images/s"], new["images/s"], ratio, old["p50"], new["p50"], allowed
    cells = tuple(None if math.isnan(cell) else cell for cell in cells)
    if 1 - best > allowed or p50 > (1 + max_slowdown / 100) * (1 + old["iqr"]) * (1 + new["iqr"]):
        return cells, FAIL
    judged = 100 * allowed <= MAX_TOLERATED_SLOWDOWN
    return cells, PASS if judged or ratio >= 1 - max_slowdown / 100 else WARN


# --- The report for publication ---------------------------------------------------------------------------------------

LANGUAGES = "zh", "en"
# Texts of the report. Other keys (outputs, modes, ids) are printed unchanged, so no key is the name of a stage.
TEXTS = {
    "title": ("昇腾 NPU 验证", "Validation on an Ascend NPU"), "no_npu": ("验证（不是 NPU 的结果）", "Validation (not of an NPU)"),
    "dry_run": ("预演：在 CPU 上运行，不代表 NPU", "dry run on a CPU: no claim about an NPU"), "verdict": ("结论：", "result: "),
    "other_device": ("设备不是 NPU", "the device is not an NPU"), "separator": ("；", "; "),
    "emulated": ("仿真设备，不代表真实 NPU", "emulated device: no claim about a real NPU"),
    "random_weights": ("随机权重：不作精度结论", "random weights: no claim about precision"),
    "skipped": ("有未做的检查（SKIP）", "some checks were not done (SKIP)"),
    "scope": ("在 {} 张图像上验证；这不是完整数据集上的评测（其中 {} 张为固定种子的随机图像）。",
              "validated on {} images; this is not an evaluation on a full dataset ({} of them are seeded random"
              " images)."),
    "item": ("项目", "item"), "value": ("内容", "value"), "output": ("输出", "output"), "notes": ("说明", "Notes"),
    "made": ("由 validate_npu.py {} 根据日志生成：", "Made by validate_npu.py {} from the log: "),
    "environment": ("验证环境", "Environment"), "npu": ("设备", "device"), "cards": ("验证的卡数", "devices validated"),
    "software": ("软件版本", "software"), "host": ("主机", "host"), "settings": ("设置", "settings"), "date": ("日期", "date"),
    "variables": ("环境变量", "environment variables"), "fp32": ("float32 精度", "precision of float32"),
    "subject": ("模型与权重", "Model and weights"), "name": ("模型", "model"), "size": ("规模", "size"),
    "preprocessing": ("输入与预处理", "input and preprocessing"), "weights": ("权重来源", "weights"),
    "weights_sha256": ("权重 SHA-256", "SHA-256 of the weights"), "reproduction": ("复现方法", "How to reproduce"),
    "inputs_sha256": ("输入 SHA-256", "SHA-256 of the inputs"), "inference": ("推理", "Inference"),
    "shape": ("形状", "shape"), "dtype": ("数据类型", "dtype"), "min": ("最小值", "min"), "max": ("最大值", "max"),
    "mean": ("均值", "mean"), "std": ("标准差", "std"), "check": ("检查", "check"), "image": ("图片", "image"),
    "first_values": ("前 5 个值", "first 5 values"), "max_abs": ("最大绝对误差", "max abs"),
    "accuracy": ("精度（与 CPU float32 对比）", "Precision against the CPU in float32"),
    "mean_abs": ("平均绝对误差", "mean abs"), "rel_l2": ("相对 L2 误差", "rel L2"), "cosine": ("余弦相似度", "cosine"),
    "nmae": ("归一化平均误差", "normalized mean error"), "top1": ("top-1 一致", "top-1 agrees"),
    "probabilities": ("softmax 概率最大差", "largest difference of probabilities"),
    "predictions": ("图片预测", "predictions of images"),
    "explanation": ("HF32 与 GELU 造成的误差", "errors due to HF32 and GELU"),
    "accuracy_note": ("误差取最差的图像。strict（关闭 HF32）、float32 等列：与 CPU float64 对比的判定，括号内为误差占限值的百分比。",
                      "Errors are those of the worst image. Columns strict (without HF32), float32, ...: the check"
                      " against CPU float64, with the error in percent of its limit."),
    "performance": ("性能", "Performance"), "mode": ("方式", "mode"), "batch": ("批大小", "batch size"),
    "images/s": ("吞吐量（图像/秒）", "images/s"), "mean_ms": ("平均（毫秒/批）", "mean (ms)"), "p50": ("P50（毫秒）", "p50 (ms)"),
    "p99": ("P99（毫秒）", "p99 (ms)"), "ms_per_image": ("毫秒/图像", "ms per image"), "threads": ("CPU 线程数", "CPU threads"),
    "speedup": ("对 CPU 加速比", "speed-up over the CPU"), "peak": ("显存峰值（MiB）", "peak memory (MiB)"),
    "p50_ms": ("CPU float32 延迟（毫秒，批大小 1）", "CPU float32 latency (ms, batch size 1)"),
    "batches": ("计时批数", "timed batches"), "warmup": ("预热批数（最少）", "warm-up batches (at least)"),
    "performance_note": ("每批后同步计时，不含预处理和数据拷贝。", "Each batch is synchronized; no preprocessing, no copies."),
}  # fmt: skip
FRONT_MATTER = "---", "hardware: NPU", "tags:", "- NPU", "- Ascend", "---", ""
NO_NPU = {"dry_run", "other_device", "emulated"}
NO_ACCURACY = {"dry_run", "random_weights"}  # a CPU is its own reference
# Columns of the tables, by section. After those of accuracy each mode has one.
COLUMNS = {"inference": ("shape", "dtype", "min", "max", "mean", "std", "check"),
           "accuracy": ("max_abs", "mean_abs", "rel_l2", "nmae", "cosine"),
           "performance": ("mode", "batch", "images/s", "mean_ms", "p50", "p99", "ms_per_image", "speedup", "peak",
                           "batches")}  # fmt: skip
# Facts, by section: label -> id.
FACTS = {"environment": {"npu": "device.name", "date": "run.date", "software": "device.software", "host": "device.host",
                         "settings": "device.settings", "variables": "device.environment", "fp32": "device.fp32"},
         "subject": {"size": "model.size", "preprocessing": "model.preprocessing", "weights": "model.weights",
                     "weights_sha256": "model.weights_sha256", "inputs_sha256": "model.inputs_sha256"}}  # fmt: skip
# Beginnings of the ids of facts that are notes.
NOTES = ("model.fallback", "precision.fewer_bits", "precision.switches", "throughput.host_bound", "throughput.doubtful",
         "throughput.saturated.", "throughput.copy", "throughput.fastest", "throughput.sustained.tenths")


def rows_of(log: Log, start: str, column: str) -> dict[str, tuple[str, dict[str, str]]]:
    """The rows of one table: what follows `start` in the id -> mark and cells."""
    rows = {id: cells for id, cells in log.rows.items() if id.startswith(start) and column in cells}
    return {id.removeprefix(start): (log.marks.get(id, ""), cells) for id, cells in rows.items()}


def report_rows(log: Log) -> dict[str, dict[str, dict[str, str]]]:
    """Section -> row -> cells by column."""
    rows, cpu = {section: {} for section in COLUMNS}, log.rows.get("model.cpu_latency", {})
    for name, (mark, cells) in rows_of(log, "outputs.", "shape").items():
        rows["inference"][name] = cells | {"check": mark} | ({"dtype": "float32"} if mark != FAIL else {})
    for name, (_, cells) in rows_of(log, "precision.published.", "nmae").items():
        rows["accuracy"][name] = cells | {"nmae": f"{100 * float(cells['nmae']):.3g}%"}
    for name, (_, cells) in rows_of(log, "throughput.", "p99").items():
        mode, _, batch = name.rpartition(".")
        found = {"mode": mode, "batch": batch, "mean_ms": cells.get("mean")}
        rate, mean = float(cells["images/s"]), float(cells.get("mean", 0))  # the rate has two decimals
        found["ms_per_image"] = f"{mean / int(batch) or 1000 / rate:.4g}" if mean or rate else ""
        if batch == cpu.get("batch") and log.texts["device.name"] != "cpu" and cells["p50"] != "-":
            found["speedup"] = f"{float(cpu['p50_ms']) / float(cells['p50']):.2f}"
        rows["performance"][name] = cells | found
    for section, columns in COLUMNS.items():
        for name, cells in rows[section].items():
            rows[section][name] = {key: cells[key] for key in columns if cells.get(key)}
    for name, cells in rows["accuracy"].items():
        judged = rows_of(log, f"precision.{name}.", "err_fp64")
        cells |= {mode: f"{mark} ({figures['used']})" for mode, (mark, figures) in judged.items()}
    return rows


def content(log: Log) -> dict:
    """All that the report holds: section -> label -> text, or cells by column. Raises CannotRun for a damaged log."""
    texts, cpu = log.texts, log.rows.get("model.cpu_latency", {})
    try:
        options = parse_arguments(shlex.split(texts["run.command"])[1:])
    except (KeyError, ValueError, CannotRun, SystemExit) as error:
        raise CannotRun(f"the command in the log {log.name} cannot be read: make a new log") from error
    kind, random = options.device.partition(":")[0], options.weights == "random"
    emulated, skipped = "emulated" in texts.get("device.software", ""), SKIP in log.marks.values()
    limits = {"dry_run": kind == "cpu", "other_device": kind not in ("cpu", "npu"), "random_weights": random,
              "emulated": emulated, "skipped": skipped}  # fmt: skip
    limits = [key for key, holds in limits.items() if holds]
    seeds = PRECISION_SEEDS if rows_of(log, "precision.", "err_fp64") else 0
    found = {section: {label: texts.get(id, "") for label, id in ids.items()} for section, ids in FACTS.items()}
    nodes = [cells["node"] for _, cells in rows_of(log, "devices.", "chip").values()]
    found["environment"]["cards"], found["subject"] = str(len(nodes) or 1), {"name": options.model} | found["subject"]
    path, _, older = SET_ENV.partition(" (")
    hub = "export HF_ENDPOINT=https://hf-mirror.com" if options.weights == "pretrained" else ""
    launcher = f"torchrun --nnodes {len(set(nodes))} --nproc-per-node {nodes.count(nodes[0])}" if nodes else "python"
    found["reproduction"] = {"environment": f"{path}\n# {older.rstrip(')')}" if kind == "npu" else "",
                             "hub": hub, "command": f"{launcher} {texts['run.command']}"}  # fmt: skip
    found |= report_rows(log)
    starts = ("precision.first_values.",) if random else ("precision.first_values.", "precision.image.")
    found["inference"] |= {id.removeprefix("precision."): text for id, text in texts.items() if id.startswith(starts)}
    cells = log.rows.get("precision.probabilities", {})
    found["accuracy"] |= {"probabilities": cells.get("max_abs"), "top1": cells and f"{cells['top1']}/{cells['inputs']}"}
    found["accuracy"]["predictions"] = texts.get("precision.top1") or texts.get("precision.nearest")
    found["accuracy"]["explanation"] = "; ".join(text for id, text in texts.items() if id.startswith("precision.cost."))
    if NO_ACCURACY & set(limits):
        found["accuracy"] = {}
    found["performance"] |= {"p50_ms": cpu.get("p50_ms"), "threads": cpu.get("threads"), "warmup": str(options.warmup)}
    listed = [id for outcome in (FAIL, WARN, SKIP) for id, mark in log.marks.items() if mark == outcome]
    rows = {id: ", ".join(f"{key} {value}" for key, value in log.rows.get(id, {}).items()) for id in listed}
    found["notes"] = {id: f"{log.marks[id]} {rows[id] or texts[id]}" for id in listed}
    found["notes"] |= {id: text for id, text in texts.items() if id.startswith(NOTES) and id not in listed}
    head = {"version": VERSION, "log": log.name, "result": log.result, "statements": [log.result.split()[1], *limits],
            "images": seeds + int(texts.get("model.images", 0)), "random_images": seeds}  # fmt: skip
    return head | {section: {label: row for label, row in rows.items() if row} for section, rows in found.items()}


def escape(text: str) -> str:
    """Text of a log in Markdown. Underscores within words mean nothing there."""
    return re.sub(r"[\\`*\[\]<>|~&]|(?<![^\W_])_|_(?![^\W_])", r"\\\g<0>", text)


def section_lines(section: str, found: list[dict], logs: list[str], text: Callable[[str], str]) -> Iterator[str]:
    """Tables of one section. Of several logs each has a column, and each cell of their tables a row."""

    def table(header: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
        for cells in (header, ["---"] * len(header), *rows):
            yield f"| {' | '.join(map(escape, cells))} |"
        yield ""

    grid = {label: row for label, row in found[0].items() if isinstance(row, dict)} if len(found) == 1 else {}
    if grid:
        columns = [*dict.fromkeys(itertools.chain(COLUMNS[section], *grid.values()))]
        columns = [column for column in columns if any(column in row for row in grid.values())]
        key = [] if section == "performance" else ["output"]  # its key is in two columns, mode and batch
        cells = ([*[label] * len(key), *(row.get(column, "-") for column in columns)] for label, row in grid.items())
        yield from table([text(column) for column in key + columns], cells)
    flat = [{text(label): row for label, row in rows.items() if isinstance(row, str)} for rows in found]
    for column, rows in zip(flat, found if len(found) > 1 else ()):
        column |= {f"{label}: {text(key)}": cell for label, row in rows.items() if isinstance(row, dict)
                   for key, cell in row.items() if key not in ("mode", "batch")}  # fmt: skip
    if labels := dict.fromkeys(itertools.chain(*flat)):
        header = [text("item"), *(logs if len(logs) > 1 else [text("value")])]
        yield from table(header, ([label, *(column.get(label, "-") for column in flat)] for label in labels))


def markdown(contents: list[dict], language: str) -> Iterator[str]:
    """The lines of the report: first what must be stated, then the sections."""

    def text(key: str) -> str:
        name, dot, rest = key.partition(".")
        return f"{TEXTS[name][LANGUAGES.index(language)]}{dot and ' '}{rest}" if name in TEXTS else key

    logs, limits = [each["log"] for each in contents], {limit for each in contents for limit in each["statements"]}
    yield from () if NO_NPU & limits else FRONT_MATTER
    yield from (f"## {text('no_npu' if NO_NPU & limits else 'title')}", "")
    for each in contents:
        verdict, *claims = each["statements"]
        claims = [f"**{claim}**" for claim in (f"{text('verdict')}{verdict}", *map(text, claims))]
        start = f"- {escape(each['log'])}: " if len(contents) > 1 else "> "
        yield start + text("separator").join([*claims, text("scope").format(each["images"], each["random_images"])])
    yield ""
    for section in ("environment", "subject", "reproduction", "inference", "accuracy", "performance", "notes"):
        found = [each[section] for each in contents]
        yield from (f"### {text(section)}", "")
        if section == "reproduction":
            for lines in dict.fromkeys(tuple(rows.values()) for rows in found):
                yield from ("~~~bash", *lines, "~~~", "")
        elif any(found):
            yield from section_lines(section, found, logs, text)
            yield from (text(f"{section}_note"), "") if f"{section}_note" in TEXTS else ()
        else:
            why = text("separator").join(text(limit) for limit in sorted(NO_ACCURACY & limits))
            yield from (why if why and section == "accuracy" else "-", "")
    yield text("made").format(VERSION) + escape("; ".join(f"{each['log']}: {each['result']}" for each in contents))
    yield from () if NO_NPU & limits else ("", "#+NPU")


def publication(options: argparse.Namespace) -> int:
    """Print the report for --report. Returns the exit status. stdout may be a model card: an error leaves it empty."""
    try:
        contents = [content(Log.read(path)) for path in options.report]
    except CannotRun as problem:
        warn_user(f"error: {problem}")
        return 2
    as_json = [json.dumps(contents, ensure_ascii=False, indent=1)]
    for line in as_json if options.json else markdown(contents, options.language):
        print_line(line)
    return 0


# --- Several devices, under torchrun ----------------------------------------------------------------------------------

class RanksLost(Exception):
    """Processes of torchrun that do not answer. The argument is the list of their ranks."""


class Ranks:
    """The processes that torchrun started, one for each device. They communicate through its store. Without it: one."""

    def __init__(self) -> None:
        torchrun = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # a cluster may set WORLD_SIZE without it
        numbers = (int(torchrun.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"))
        self.rank, self.local_rank, self.host = numbers
        self.size, self.local_size = (int(torchrun.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        self.store = None

    def connect(self, report: Report, seconds: float) -> None:
        """seconds: how long one rank waits for another. Raises CannotRun if the store does not answer."""
        self.report, self.seconds = report, seconds
        if self.size == 1:
            return
        report.quiet = self.rank > 0  # until here each process prints its own errors
        try:
            self.store, _, _ = next(torch.distributed.rendezvous("env://"))
        except RuntimeError as error:
            raise CannotRun(f"torchrun's processes cannot connect to each other: {first_line(error)}") from error

    def device_name(self, name: str) -> str:
        if self.size > 1 and ":" in name:
            raise CannotRun("under torchrun each process uses the device of its LOCAL_RANK: --device takes no index")
        return name if self.size == 1 or name == "cpu" else f"{name}:{self.local_rank}"

    def gather(self, step: str, value=None) -> list:
        """The value of each rank at this step. Raises RanksLost with the ranks that did not reach it in time."""
        if self.size == 1:
            return [value]
        names = [f"{step}/{rank}" for rank in range(self.size)]
        self.report.restart_timeout(self.report.stage, self.seconds)  # waiting for other ranks is not a hang
        try:
            self.store.set(names[self.rank], pickle.dumps(value))
            end = time.monotonic() + self.seconds
            while not self.store.check(names) and time.monotonic() < end:  # wait() would lock out check_alive()
                time.sleep(0.05)
            if lost := [rank for rank, name in enumerate(names) if not self.store.check([name])]:
                raise RanksLost(lost)
            return [pickle.loads(self.store.get(name)) for name in names]
        except RuntimeError as error:  # the store is gone, and torchrun with it
            raise RanksLost([]) from error

    def check_alive(self) -> list[int]:
        """Ranks that no longer answer, when torchrun ends all processes because one has failed."""
        self.seconds = ROLL_CALL_SECONDS
        try:
            self.gather("alive")
        except RanksLost as lost:
            return lost.args[0]
        return []

    def all_or_none(self, step: str, function: Callable):
        """function(). If it raises an exception on one rank, CannotRun is raised on all."""
        result, problem = None, None
        try:
            result = function()
        except Exception as error:
            problem = str(error) if isinstance(error, CannotRun) else describe(error)
            problem = problem if self.size == 1 else f"rank {self.rank}: {problem}"
        if problems := list(filter(None, self.gather(step, problem))):
            raise CannotRun(problems[0])
        return result

    def turns(self) -> Iterator[None]:
        """Yields once in each process, in one process after the other."""
        for turn in range(self.size):
            self.gather(f"turn {turn}")
            if turn == self.rank:
                yield


class RankResult(NamedTuple):
    """What each rank sends to all others at the end."""

    rank: int
    place: tuple[int, str, str, str]  # host, device, chip, UUID: (0, "npu:1", "Ascend910B4", "")
    eager: np.ndarray  # model(x) of the seeded inputs in float32
    error: float | None  # of model(x) in float32 against float64
    checks: list[tuple[str, str]]  # mark and id
    alone: list[Timing]  # while the other devices were idle
    together: list[Timing]  # while all devices were busy


def devices_stage(
    context: Context, report: Report, outputs: Outputs | None, checked: Precision | None, timings: list[Timing] | None
) -> Stage[None]:
    """All devices busy at once; then a row for each device, whether their outputs agree, and their contention."""
    ranks, busy, timings = context.ranks, [], timings or []
    largest = max((timing.batch for timing in timings if timing.total_ms), default=1)
    ranks.gather("ready")
    try:
        for timing in time_all(context, outputs, [largest]) if outputs and not report.lost else ():
            busy.append(timing)
    except Exception as error:  # the other ranks wait for the figures of this one
        yield Entry(FAIL, "devices.together", explain(error))
    yield from (timing_entry(timing, context) for timing in busy if timing.problem == OUT_OF_MEMORY)
    yield from judge_timed_outputs(busy, checked, "together.")
    alone, together = ([dataclasses.replace(timing, output=None, found=None) for timing in rows if timing.total_ms]
                       for rows in (timings, busy))  # fmt: skip
    place = ranks.host, str(context.device), chip_name(context.device), device_uuid(context.device)
    checks = [(entry.mark, entry.id) for entry in report.checks]
    error = checked and checked.errors.get(FLOAT32.name)
    result = RankResult(ranks.rank, place, outputs and outputs.eager, error, checks, alone, together)
    results = ranks.gather("results", result)
    yield from judge_ranks(results, outputs.loaded.references.tolerance() if outputs else None)
    yield from judge_speeds(results, context)


def judge_ranks(results: list[RankResult], tolerance: Tolerance | None) -> Iterator[Entry]:
    """A row for each device, and whether their outputs agree."""
    yield from DEVICES.header()
    for result in results:
        failed, warned = ([id for mark, id in result.checks if mark == wanted] for wanted in (FAIL, WARN))
        node, device, chip, _ = result.place
        problem = f"not passed: {', '.join(dict.fromkeys(failed + warned))}"
        advice = f"run it by itself for its whole log, on node {node}: --device {device}"
        mark = FAIL if failed else WARN if warned else PASS
        cells = node, device, len(result.checks), len(failed), len(warned), result.error, chip
        yield DEVICES.entry(mark, f"devices.{result.rank}", *cells, problem=problem, advice=advice)
    yield DEVICES.legend("err_fp64: of model(x) in float32")
    if uuids := [f"rank {result.rank} {result.place[-1]}" for result in results if result.place[-1]]:
        yield Entry(FACT, "devices.uuids", ", ".join(uuids))
    if tolerance and all(result.eager is not None for result in results):
        yield judge_agreement(results, tolerance)


def judge_speeds(results: list[RankResult], context: Context) -> Iterator[Entry]:
    """The rows of each device, alone and together with the others, and which devices are slower than the median."""
    rows, slow = [(result.rank, timing) for result in results for timing in result.alone], []
    yield from THROUGHPUT.header()
    yield from (timing_entry(timing, context, f"devices.{rank}") for rank, timing in rows if rank)
    yield from (timing_entry(timing, context, f"{TOGETHER}{each.rank}") for each in results for timing in each.together)
    yield THROUGHPUT.legend("together: all devices at once, else one after the other; those of rank 0 are in stage 5")
    for rank, timing in rows:
        same = sorted((other for _, other in rows if other.name == timing.name), key=lambda other: other.throughput)
        median = same[len(same) // 2]  # of two devices the faster one
        if compare_speed(median.figures, timing.figures, context.options.max_slowdown)[1] == FAIL:
            slow.append(f"rank {rank}: {timing.name} {timing.throughput:.2f} images/s, median {median.throughput:.2f}")
    limit = f"the median of the devices by more than {context.options.max_slowdown:g}% and half the spreads"
    text = "; ".join(slow) or f"no row of at least {FEWEST_BATCHES} batches is below {limit}"
    advice = "run it by itself; check its temperature, power, clock and PCIe link, and the load of its host"
    yield Entry(WARN if slow else PASS, "devices.speed", text, advice=advice)


def judge_agreement(results: list[RankResult], tolerance: Tolerance) -> Entry:
    """Same inputs and weights must give the same outputs on all devices: the devices that differ from most others."""
    rows = min(len(result.eager) for result in results)  # the largest batch may not fit on each device
    bits = [result.eager[:rows].tobytes() for result in results]
    usual = max(bits, key=bits.count)
    expected = results[bits.index(usual)].eager[:rows]
    found = {str(r.rank): compare(r.eager[:rows], expected) for r, own in zip(results, bits) if own != usual}
    if not found:
        return Entry(PASS, "devices.agreement", "outputs of all devices are bit-identical")
    worst = max(found.values(), key=lambda difference: difference.error)
    what = f"rank {', '.join(found)} of {len(results)} differs from the others"
    if 2 * len(found) >= len(results):
        what += " (no majority: see the precision of each)"
    advice = "a device that differs corrupts data: take it out of use, and run it by itself"
    return comparison("devices.agreement", worst, tolerance._replace(warn=0.0), advice, what=what)


# --- Ascend: everything that belongs to one vendor --------------------------------------------------------------------

# The product family, in the words of the hubs, and TFLOP/s of the matrix unit in float16 (cores x MHz x 8192 of CANN's
# platform_config), by the beginning of a chip's name. A 910C is two of these devices.
CHIPS = {
    "Ascend910B1": ("Atlas A2", 363.7), "Ascend910_939": ("Atlas A3", 363.7), "Ascend310P1": ("Atlas 300I", 86.8),
    "Ascend910B2": ("Atlas A2", 353.9), "Ascend910_938": ("Atlas A3", 353.9), "Ascend310P3": ("Atlas 300I", 69.5),
    "Ascend910B3": ("Atlas A2", 294.9), "Ascend910_937": ("Atlas A3", 294.9), "Ascend310P5": ("Atlas 300I", 52.4),
    "Ascend910B4": ("Atlas A2", 245.8), "Ascend910_936": ("Atlas A3", 245.8), "Ascend310P7": ("Atlas 300I", 36.0),
    "Ascend950": ("Atlas 350", None),
}  # fmt: skip
# Environment variables that change numbers or speed (torch_npu's list): printed if they are set.
ENVIRONMENT = """
    TASK_QUEUE_ENABLE PER_STREAM_QUEUE STREAMS_PER_DEVICE COMBINED_ENABLE ASCEND_LAUNCH_BLOCKING CPU_AFFINITY_CONF
    OMP_NUM_THREADS INF_NAN_MODE_ENABLE INF_NAN_MODE_FORCE_DISABLE TORCH_NPU_USE_COMPATIBLE_IMPL TORCH_NPU_LAZY_FUSION
    TORCH_NPU_LEGACY_IMPL_LIST TORCH_NPU_COMPACT_ERROR_OUTPUT TORCHINDUCTOR_NPU_BACKEND
    ACL_OP_INIT_MODE ACL_OP_COMPILER_CACHE_MODE ACL_DEVICE_SYNC_TIMEOUT TORCH_ACL_INIT_CONFIG_PATH PYTORCH_ALLOC_CONF
    PYTORCH_NPU_ALLOC_CONF PYTORCH_NO_NPU_MEMORY_CACHING MULTI_STREAM_MEMORY_REUSE HCCL_DETERMINISTIC
    ASCEND_GLOBAL_LOG_LEVEL ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_RT_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES TIMM_FUSED_ATTN
    MSMONITOR_USE_DAEMON KINETO_USE_DAEMON
""".split()
# Where CANN writes its log, the first that is set.
LOG_FOLDER = os.environ.get("ASCEND_PROCESS_LOG_PATH") or f"{os.environ.get('ASCEND_WORK_PATH') or '~/ascend'}/log"
RESET = "check npu-smi info, then reset the device"
FREE_MEMORY = "use smaller --batch-sizes, or free the device"
# Error codes that torch_npu reports, with what to do: of ACL (CANN, rt_error_codes.h), and 161xxx and 561xxx of aclnn.
ERROR_CODES = {
    107030: "it copies between host and device, or waits for the device",
    107041: "a call that waits for the device cannot be captured",
    **dict.fromkeys((207001, 207018), f"{OUT_OF_MEMORY}: {FREE_MEMORY}"),
    **dict.fromkeys((500001, 500002), "CANN's compiler failed: its Python packages (decorator, attrs, psutil, scipy,"
                    " cloudpickle, numpy below 2) must be installed here"),
    **dict.fromkeys((507010, 507901), f"the device no longer answers: {RESET}"),
    **dict.fromkeys((507014, 507034), "an AI Core timed out"),
    **dict.fromkeys((507015, 507035), "an AI Core failed"),
    **dict.fromkeys((507017, 507018), "an AI CPU timed out or failed"),
    507033: f"the device does not start: {RESET}",
    **dict.fromkeys((507053, 507054, 507055), "the device memory is broken: take it out of use"),
    507008: "the SoC could not be read: is the device used by another container? check npu-smi info",
    507899: "the driver failed: check the driver with npu-smi info, and dmesg",
    **dict.fromkeys((161001, 161002), "the operator does not take these arguments: a type that this chip lacks?"),
    **dict.fromkeys((561003, 561107, 561112), "CANN's kernel package for this chip is not installed"),
}  # fmt: skip
ASCEND = "/usr/local/Ascend"
SET_ENV = "source /usr/local/Ascend/cann/set_env.sh (before CANN 8.5: /usr/local/Ascend/ascend-toolkit/set_env.sh)"
# Patterns of the error of `import torch_npu`, and what they mean. {0[1]} is the group of the pattern.
IMPORT_ERRORS = {
    "No module named 'torch_npu'": "torch_npu is not installed: {install}",
    r"No module named 'torch_npu\.": "this torch_npu is broken, or made for another Python: pip install"
    " --force-reinstall --no-deps torch-npu=={npu}",
    r"No module named '(tbe|te|acl)\b": "{0[1]} is a part of CANN: {env}",
    "No module named 'yaml'": "torch_npu needs yaml: pip install pyyaml",
    r"No module named '([\w.]+)'": "torch_npu needs {0[1]}: pip install {0[1]}",
    r"libascend_hal\.so": "the Ascend driver is missing (libascend_hal.so): install it, or mount it into the container",
    r"(lib\w+\.so)\S* cannot open": "CANN is not installed, or its environment is not set ({0[1]} not found): {env}",
    r"(/\S+)[^/]*cannot allocate memory in static TLS": "its libgomp must be loaded first: export LD_PRELOAD={0[1]}",
    r"ASCEND_\w+_PATH|CANN|set_env": "CANN's environment is not set, or of another place ({error}): {env}",
    "Two accelerators|compiled with CUDA": "this torch is built for another accelerator, and torch_npu needs the CPU"
    " build: {install}",
    "": "torch_npu {npu} does not import next to torch {version}; they must be the same version, and match CANN"
    " ({error}): {install}",
}  # fmt: skip
# CANN -> the newest version of torch and torch_npu for it (COMPATIBILITY.md of Ascend/pytorch).
TORCH_VERSIONS = {"8.5": "2.9.0", "9.0": "2.10.0", "9.1": "2.12.0"}
CANN_FILES = "share/info/runtime/version.info", "*-linux/ascend_toolkit_install.info", "ascend_toolkit_install.info"
# Backends of torch.compile, the preferred first; those that capture graphs; the folders of torch_npu that they need.
NPU_COMPILERS, NPU_GRAPHS = ("npugraph_ex", "inductor", "npugraphs"), ("npugraph_ex", "npugraphs")
COMPILER_FOLDERS = {"npugraph_ex": "dynamo/npugraph_ex", "npu": "dynamo/torchair", "mlir": "_inductor/ascend_npu_ir",
                    "dvm": "_inductor/dvm", "ascendc": "_inductor/ascendc"}  # fmt: skip
# Operators whose NPU kernels compute on the CPU inside, whatever TORCH_NPU_FALLBACK_CPU_DISABLE says (op-plugin).
HOST_STAGED = {"_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d",
               "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "logit", "sinc", "polar", "complex",
               "_masked_softmax", "adaptive_max_pool3d", "scatter_reduce"}  # fmt: skip
# What avoids each part of the expected cost.
AVOIDED = {
    "HF32": " (avoided by torch.npu.conv.allow_hf32 = False)",
    "TF32": " (avoided by torch.backends.cudnn.allow_tf32 = False)",
    "float16": " (the matrix unit of this chip has no float32)",
    "GELU": " (avoided by TORCH_NPU_USE_COMPATIBLE_IMPL=1, not in 2.9.0)",
}
# Parts of names that torch's wrappers put before or between the model's own.
WRAPPED = re.compile(r"\b(_orig_mod|_checkpoint_wrapped_module|_fsdp_wrapped_module|module)\.")
# What a file of weights is: by its first bytes, in an archive by the names after PK, and by the names of its tensors.
FOREIGN_FILES = {
    rb"$": "it is empty",
    rb"version https://git-lfs": "it is a Git LFS pointer: run git lfs pull in its folder",
    rb"\s*<": "it is a web page: download the file itself",
    rb"GGUF": "it is GGUF, of llama.cpp: use the model's safetensors file",
    rb"\x08[\x01-\x20][\x12:]": "it is ONNX: use the checkpoint that it was exported from",
    rb"PK .*\.npy( |$)": "it is of NumPy or JAX: load it with load_pretrained() of timm, and save the state_dict()",
    rb"PK .*/constants\.pkl": "it is TorchScript: save the model's state_dict() instead",
    rb"PK (?!.*data\.pkl)": "it is a zip archive: unpack it first",
    rb"(?!\s*\{|PK|\x80)": "it is no checkpoint of torch.save",
}
FOREIGN_KEYS = {
    r"lora_": "its LoRA weights are not merged: save the state_dict() after merge_and_unload()",
    r"embeddings\.": "these names are those of transformers",
    r"zero_point|_packed_params": "it is quantised: use the checkpoint that it was made from",
}
IMAGE_SIZES = 224, 256, 384, 448, 512, 518, 336, 192, 160, 128, 96, 64, 32, 196, 240, 288, 320, 416, 480, 560, 640, 768
IMAGE_MODES = {1: "L", 3: "RGB"}  # Pillow's, by the channels that the model takes
IMAGE_FILES = ".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"
WEIGHT_FILES = ".safetensors", ".bin", ".pth", ".pt"
# Patterns of errors of the hub's client, and what to do.
STORAGE = "the hub answers, but the file's storage does not, or breaks off: run again, or let your proxy pass it"
HUB_ERRORS = {
    "No space left": "free space, or set HF_HOME to another disk",
    "CERTIFICATE_VERIFY": "set SSL_CERT_FILE to the file with your network's certificates",
    "Permission denied|Read-only|Not a directory|No such file": "set HF_HOME to a folder that can be written to",
    "Gated|awaiting a review": "ask for access on the model's page and set HF_TOKEN",
    "SafetensorError|UnpicklingError": "the file in the hub's cache is cut, or a pointer: delete it, and run again",
    "404 Client|RepositoryNotFound|RemoteEntryNotFound": "the hub has no such model, or it is private (set HF_TOKEN)",
    r"\b401\b": "the token in HF_TOKEN or ~/.cache/huggingface/token is not valid: renew or unset it",
    r"\b(403|451)\b": "your network or proxy blocks it, or your token does not allow it",
    r"\b429\b": "the hub limits the number of requests: wait some minutes, or set HF_TOKEN",
    "headers of a hub": "the mirror or a proxy drops them: use another HF_ENDPOINT, or none",
    "LocalEntryNotFound|OfflineMode": "unset HF_HUB_OFFLINE if it is set, or run again",
    "KeyError: 'architecture'": "its config.json names no architecture of timm: use --model NAME --weights FOLDER",
    "Server [Ee]rror": "the hub has a failure of its own: run again later",
    "Timeout|Connect|Protocol|ReadError|ProxyError|ChunkedEncoding|URLError|Consistency check": STORAGE,
}
# What a device module of torch must have: that of MPS lacks most of it.
DEVICE_FUNCTIONS = "mem_get_info", "get_device_name", "get_device_properties", "current_stream", "max_memory_allocated"
DRY_RUN = " (for a dry run without an NPU: --device cpu)"


def find_device(name: str) -> torch.device:
    """The torch.device of --device, with an index, which runs an operator. Raises CannotRun with the cause."""
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "npu":
        find_npu()
    try:
        module = torch.get_device_module(kind)
        count = module.device_count()
    except RuntimeError as error:
        raise CannotRun(f"torch {torch.__version__} has no device of the kind {kind!r}: npu, cuda, cpu?") from error
    if lacks := [name for name in DEVICE_FUNCTIONS if not hasattr(module, name)]:
        raise CannotRun(f"{kind} cannot be validated: torch.{kind} has no {', '.join(lacks)}")
    number = int(index or 0)
    if number >= count:
        advice = ": check npu-smi info, the container's devices and ASCEND_RT_VISIBLE_DEVICES" if kind == "npu" else ""
        visible = f"{count} {kind} device(s) visible to torch {torch.__version__}"
        raise CannotRun(f"there is no {kind}:{number}: {visible}{advice}{DRY_RUN}")
    device = torch.device(kind, number)
    try:
        torch.accelerator.set_device_index(device.index)
        torch.ones(1, device=device).add_(1)
        synchronize(device)
    except RuntimeError as error:
        raise CannotRun(f"{device} is visible, but does not work: {explain(error)}") from error
    return device


def find_npu() -> None:
    """Import torch_npu, which registers "npu" with torch. Raises CannotRun with the cause of a failure."""
    from importlib.metadata import distributions

    version = torch.__version__.split("+")[0]
    npu = next((found.version for found in distributions(name="torch-npu")), "")
    try:
        # Next to a CUDA build torch_npu raises this itself up to 2.13. From 2.14 on it aborts the process instead.
        if npu and torch.version.cuda and tuple(map(int, version.split(".")[:2])) >= (2, 14):
            raise RuntimeError("Two accelerators")
        import torch_npu  # noqa: F401
    except Exception as error:  # its check of CANN's environment raises a plain one, a broken file a SyntaxError
        for pattern, cause in IMPORT_ERRORS.items():  # the last one matches any error
            if match := re.search(pattern, str(error)):
                break
        more = {"error": describe(error), "install": install_command(), "env": SET_ENV}
        cause = cause.format(match, version=version, npu=npu, **more)
        raise CannotRun(cause + DRY_RUN) from error


def install_command() -> str:
    """The command that installs torch's CPU build and the torch_npu for the CANN of this host."""
    cann = version_in(*CANN_FILES)
    version = TORCH_VERSIONS.get(".".join(cann.split(".")[:2]), "")
    pair = f"torch=={version} torch-npu=={version} " if version else ""
    note = f"(README lists torch and torch_npu for CANN {cann}) " if cann and not version else ""
    return f"{note}pip install {pair}-r requirements.txt --extra-index-url https://download.pytorch.org/whl/cpu"


def version_in(*patterns: str) -> str:
    """The version in the first file that matches the patterns, relative to CANN's folder; "" if there is none."""
    homes = os.environ.get("ASCEND_HOME_PATH"), f"{ASCEND}/cann", f"{ASCEND}/ascend-toolkit/latest"
    paths = (os.path.join(home, pattern) for home in homes if home for pattern in patterns)
    for path in (found for path in paths for found in sorted(glob.glob(path))):
        with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
            if match := re.search(r"^version\s*=\s*\[?([\w.+-]+)", file.read(), re.MULTILINE | re.IGNORECASE):
                return match[1]
    return ""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was launched. Nothing to wait for on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def still_works(device: torch.device) -> bool:
    """True if a matmul gives the expected result. After an error torch_npu may drop all operators, or wait forever."""
    if device.type == "cpu":
        return True
    operands, works = torch.randn(2, 64, 64), []  # new ones: the memory may still hold an earlier product

    def multiply() -> None:
        with contextlib.suppress(RuntimeError):
            torch.accelerator.set_device_index(device.index)  # of this thread
            result = torch.full((64, 64), math.nan, device=device)
            torch.matmul(*operands.to(device), out=result)
            synchronize(device)
            expected = to_host(torch.matmul(*operands.double()))
            works.append(compare(to_host(result), expected).max_row < UNIT["float16"])

    thread = threading.Thread(target=multiply, daemon=True)
    thread.start()
    thread.join(ALIVE_SECONDS)
    return works == [True]


def require_working(device: torch.device, event: str) -> None:
    """Continue after an error that is no verdict. Raises DeviceLost if the device no longer works."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):
            torch.get_device_module(device.type).empty_cache()
        if not still_works(device):
            raise DeviceLost(f"the device no longer executes operators after this: {event}")


def is_out_of_memory(error: Exception) -> bool:
    """Of the device. torch_npu 2.9.0 has no exception type for it, and its queue raises a plain RuntimeError."""
    pattern = "out of memory|EL0004|207001|207018"  # torch.OutOfMemoryError is a RuntimeError
    is_named = isinstance(error, torch.OutOfMemoryError) or re.search(pattern, str(error))
    return isinstance(error, RuntimeError) and bool(is_named)


def chip_name(device: torch.device) -> str:
    """The name of the device, "Ascend910B4"; "cpu" for a CPU."""
    return torch.get_device_module(device.type).get_device_name(device) if device.type != "cpu" else "cpu"


def device_uuid(device: torch.device) -> str:
    """What identifies the device whatever its index is; "" if torch or the driver does not have it."""
    properties = torch.get_device_module(device.type).get_device_properties(device) if device.type != "cpu" else None
    uuid = str(getattr(properties, "uuid", ""))
    return uuid if uuid.strip("0-") else ""


def accelerator_versions(device: torch.device) -> dict[str, str]:
    """Versions of torch_npu, CANN and the driver, "unknown" if no source has them; or of CUDA."""
    if device.type == "cuda":
        return {"CUDA": str(torch.version.cuda)}
    if device.type != "npu":
        return {}
    # Since CANN 8.5 the operators are packages of their own, with their own version: they decide GELU and HF32.
    versions = {"torch_npu": sys.modules["torch_npu"].__version__}
    for name, part, *files in (
        ("CANN", "CANN", *CANN_FILES),
        ("operators", "ops_nn", "share/info/ops_nn/version.info", "*-linux/ascend_ops_install.info"),
        ("driver", "DRIVER", f"{ASCEND}/driver/version.info"), ("firmware", "", f"{ASCEND}/firmware/version.info"),
    ):  # fmt: skip
        version = version_in(*files)
        with contextlib.suppress(Exception):  # without the driver's file torch_npu before 2.13 returns any bytes
            version = version or part and torch.npu.utils.get_cann_version(part)
        versions[name] = version if re.match(r"\d+\.\d+", version) else "unknown"
    return versions


def settings(device: torch.device) -> Iterator[str]:
    """Settings of the backend that change numbers or speed."""
    for kind, switch in reduced_fp32_switches(device).items():
        name = {"npu": "HF32", "cuda": "TF32"}[device.type]
        yield f"{name} for {kind} {'on' if getattr(*switch) else 'off'}"
    if device.type == "npu":
        # On: a kernel is compiled for each new shape. Off, the default since the 910B: precompiled kernels are used.
        yield "jit_compile off" if torch.npu.is_jit_compile_false() else "jit_compile on (first calls take minutes)"
        if (allowed := internal_formats()) is not None:
            yield f"internal formats {'on' if allowed else 'off'}"
        if not torch.npu.utils.is_support_inf_nan():
            yield "overflow saturates (the largest finite value instead of Inf)"


def internal_formats() -> bool | None:
    """Internal formats, which are other kernels for convolutions, are allowed. None if torch_npu has no such option."""
    with contextlib.suppress(Exception):  # there is no public function
        return sys.modules["torch_npu"]._C._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"enable"
    return None


def find_compiler(device: torch.device, backend: str) -> tuple[str, str]:
    """The backend of torch.compile, and what it lacks, "" if it can be tried. backend: "" for the first that can."""
    names = [backend] if backend else NPU_COMPILERS if device.type == "npu" else ["inductor"]
    lacks = {name: compiler_lack(device, name) for name in names}
    found = next((name for name, lack in lacks.items() if not lack), "")
    return found, "" if found else "; ".join(f"{name}: {lack}" for name, lack in lacks.items())


def compiler_lack(device: torch.device, backend: str) -> str:
    """What this backend of torch.compile lacks, and how to get it; "" if nothing is known to be missing."""
    kind = backend
    if backend == "inductor":
        kind = os.environ.get("TORCHINDUCTOR_NPU_BACKEND", "default").replace("default", "triton")
    if device.type == "npu":
        folder = os.path.join(os.path.dirname(sys.modules["torch_npu"].__file__), COMPILER_FOLDERS.get(kind, ""))
        if not chip_name(device).startswith(("Ascend910B", "Ascend910_93", "Ascend950")):
            return f"torch_npu compiles for Atlas A2, A3 and 350, not for {chip_name(device)}"
        if not os.path.isdir(folder):
            return f"this torch_npu has no {kind}: {install_command()}"
        if backend in NPU_GRAPHS and os.environ.get("TASK_QUEUE_ENABLE") == "2":
            return "it captures no graph with TASK_QUEUE_ENABLE=2: export TASK_QUEUE_ENABLE=1"
    if backend == "inductor" and not shutil.which(os.environ.get("CXX", "g++")):
        return "no C++ compiler: apt install g++, or set CXX"
    if device.type == "npu" and kind == "triton" and not (find_spec("triton") and find_spec("triton.backends.ascend")):
        return "no triton for Ascend: pip install triton-ascend, after torch; or export TORCHINDUCTOR_NPU_BACKEND=dvm"
    return ""


def forbid_internal_formats(device: torch.device, stack: contextlib.ExitStack) -> None:
    """Until the stack is closed, internal formats are not allowed: no NPU graph can contain the conversions to them."""
    if device.type == "npu" and internal_formats():
        torch.npu.config.allow_internal_format = False
        stack.callback(setattr, torch.npu.config, "allow_internal_format", True)


def reduced_fp32_switches(device: torch.device) -> dict[str, tuple[object, str]]:
    """The switches of reduced-precision float32 by kind of product: HF32 on Ascend, TF32 on CUDA. Object, attribute."""
    if device.type == "npu":
        return {"convolution": (torch.npu.conv, "allow_hf32"), "matmul": (torch.npu.matmul, "allow_hf32")}
    if device.type == "cuda":
        backends = torch.backends
        return {"convolution": (backends.cudnn, "allow_tf32"), "matmul": (backends.cuda.matmul, "allow_tf32")}
    return {}


@contextlib.contextmanager
def set_reduced_fp32(device: torch.device, values: dict[str, bool]) -> Iterator[None]:
    """Inside, the switches of these kinds of products have these values. Afterwards they are unchanged."""
    with contextlib.ExitStack() as stack:
        for kind, value in values.items():
            switch = reduced_fp32_switches(device)[kind]
            stack.callback(setattr, *switch, getattr(*switch))
            setattr(*switch, value)
        yield


def fp32_precision(device: torch.device) -> dict[str, str]:
    """The documented precision of products of float32 tensors by kind, with the present switches: keys of UNIT."""
    precision = {"convolution": "float32", "matmul": "float32"}
    # Before the 910B, the first with bfloat16, the matrix unit has no float32 (ACL_PRECISION_MODE allow_fp32_to_fp16).
    if device.type == "npu" and not supports_dtype(device, "bfloat16"):
        return dict.fromkeys(precision, "float16")
    reduced = "HF32" if device.type == "npu" else "TF32"
    return precision | {kind: reduced for kind, switch in reduced_fp32_switches(device).items() if getattr(*switch)}


def supports_dtype(device: torch.device, dtype: str) -> bool:
    """The device supports this dtype for autocast: bfloat16 not before the Ascend 910B (910A, 310P)."""
    if dtype != "bfloat16" or device.type == "cpu":
        return True
    return getattr(torch.get_device_module(device.type), "is_bf16_supported", lambda: True)()


def judge_fallback(device: torch.device, names: set[str], printed: str) -> Entry:
    """No operator of the first forward pass, with these names in aten, ran on the CPU. printed: on stderr.

    torch_npu refuses to fall back if it knows the variable, and it is 1; else it warns on stderr, in the first process.
    """
    id, disabled = "model.fallback", os.environ.get("TORCH_NPU_FALLBACK_CPU_DISABLE") == "1"
    warning = r"operator '([\w:.]+)' is not currently supported on the NPU backend and will fall back"
    warned = re.findall(warning, printed)
    inside = [f"{name} (its NPU kernel copies to the CPU and back)" for name in sorted(names & HOST_STAGED)]
    if warned or inside:
        advice = "it costs time: can the model avoid it?"
        return Entry(WARN, id, f"on the CPU: {', '.join(warned + inside)}", advice=advice)
    try:
        torch.special.bessel_j0(torch.ones(1, device=device))  # has no NPU kernel
    except (RuntimeError, NotImplementedError):
        return Entry(PASS, id, "every operator has an NPU kernel, and none is known to copy to the CPU inside")
    if disabled and os.environ.get("RANK", "0") == "0":
        return Entry(PASS, id, "torch_npu printed no warning of an operator that falls back to the CPU")
    if disabled:
        return Entry(SKIP, id, "this torch_npu names operators that fall back to the CPU only in its first process")
    problem = "TORCH_NPU_FALLBACK_CPU_DISABLE is set to 0, so an operator may run on the CPU without notice"
    return Entry(WARN, id, problem, advice="unset it, so that such an operator is named")


@contextlib.contextmanager
def stderr_copied(device: torch.device) -> Iterator[list[str]]:
    """Inside, what C++ writes on stderr is copied: the list has it at the end. tee passes on what an abort prints."""
    printed: list[str] = []
    if device.type != "npu":
        yield printed
        return
    with tempfile.NamedTemporaryFile("r", errors="replace") as copied, os.fdopen(os.dup(2), "w", buffering=1) as stderr:
        tee = subprocess.Popen(["tee", copied.name], stdin=subprocess.PIPE, stdout=stderr, stderr=subprocess.DEVNULL)
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()
        try:
            with contextlib.redirect_stderr(stderr):  # what Python prints, such as progress bars, is not copied
                yield printed
        finally:
            os.dup2(stderr.fileno(), 2)
            with contextlib.suppress(subprocess.TimeoutExpired):  # CANN's compilers, which may have it open, live on
                tee.wait(COPY_SECONDS)
            printed.append(copied.read())


def explain(error: BaseException, printed: str = "") -> str:
    """One line: operator, error code, what to do, and CANN's reason. printed: on stderr, where the code may be, too."""
    text = str(error)
    if isinstance(error, DeviceLost):
        return text
    if fallback := re.search(r"The operator '([\w:.]+)' would execute its main computation on CPU", text):
        return f"{fallback[1]} has no NPU kernel and would run on the CPU"
    code = re.search(r"error code(?: is|:)\s*(\d+)", text) or re.search(r"error code is (\d+)", printed)
    operator = re.search(r"working operator name is (\w+)", text) or re.search(r"\b(aclnn\w+)", text)
    if not operator and not code:
        return describe(error)
    # CANN's own reason. "EZ9999: Inner Error!" has no content, the line below it has.
    reason = re.search(r"HBM MULTI BIT ECC ERROR|\bE[A-Z]\d{4}: (?!Inner Error).+", text)
    what = f"error code {code[1]}" if code else "failed on the device"
    what = f"{operator[1]}: {what}" if operator else what
    cause = ERROR_CODES.get(int(code[1]), "") if code else ""
    what = f"{', '.join(filter(None, [what, cause]))}; see {LOG_FOLDER}"
    varying = r"\[PID: ?\d+\] *|\d{4}-\d\d-\d\d[-\d:. ]*"
    return what + (f" ({re.sub(varying, '', reason[0])[:300]})" if reason else "")


def import_packages() -> None:
    """Import numpy, torch and timm, which takes seconds. Raises CannotRun if one of them is missing or broken."""
    global np, safetensors, timm, torch
    import logging

    # torch would import torch_npu itself, and fail without CANN; find_npu() imports it and names the cause.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # torch_npu would run an operator without an NPU kernel on the CPU without notice; with this it is an error.
    os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA needs it for bit-identical runs
    os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] = "STRICT"  # the references are in full float32 on any processor
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # its client waits without end for storage that cannot be reached
    try:
        import numpy as np
        import torch

        import_torchvision()
        import safetensors.torch
        import timm
    except Exception as error:  # a numpy that is too new is an AttributeError, a broken file a SyntaxError
        raise CannotRun(f"numpy, torch and timm cannot be imported ({describe(error)}): {install_command()}") from error
    warnings.filterwarnings("ignore")  # of the packages; deterministic_algorithms() records those that matter
    logging.getLogger("timm").setLevel(logging.ERROR)


def import_torchvision() -> None:
    """Let timm, which needs only its transforms, import a torchvision that was built for another torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return  # timm names the missing package
    except RuntimeError:  # operator torchvision::nms does not exist
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.torchvision_schemas = library  # they exist as long as this object


# --- The report -------------------------------------------------------------------------------------------------------

WIDTH, INDENT = 99, 10  # columns of a line, and of the indent of its continuation
COLORS = {PASS: 32, WARN: 33, FAIL: 31}  # of marks on a terminal


class Entry(NamedTuple):
    """One line of the log."""

    mark: str  # PASS, WARN, FAIL, SKIP; FACT; VARIES between runs; HEADER of a table
    id: str  # stage.check[.item][.mode]; "" in a legend
    text: str
    problem: str = ""  # what is wrong, for the list at the end; "" if it is the text
    details: tuple[str, ...] = ()  # more lines for that list
    advice: str = ""  # the next step
    numeric: bool = False  # one incorrect value makes many of these fail, so only the first is listed in full
    unjudged: bool = False  # the outcome is no claim about the device
    width: int = 20  # columns of the id

    def lines(self) -> list[str]:
        """The line, wrapped. Each line of a text that varies begins with ~, of a legend with #."""
        head = f"{self.mark:<5}{self.id:<{self.width}} " if self.width else f"{self.mark:<5}"
        more = self.mark if self.mark in (VARIES, HEADER) else ""
        return wrap(self.text, head, f"{more:<{INDENT if self.id else 5}}") or [head.rstrip()]


class Table:
    """Columns of fixed width. No cell is empty or contains a space, so a row splits into cells."""

    def __init__(self, width: int, *columns: str, units: tuple[str, ...] = ()) -> None:
        self.width = width  # of the ids
        self.columns = [column.rsplit(":", 1) for column in columns]  # name, format
        self.units = units

    def header(self) -> Iterator[Entry]:
        """The names of the columns, and below them their units, if there are any."""
        yield Entry(HEADER, "id", self.row(*(name for name, _ in self.columns)), width=self.width)
        if self.units:
            units = self.row(*(unit or "\u00a0" for unit in self.units)).replace("\u00a0", " ")
            yield Entry(HEADER, "", units, width=self.width)

    def legend(self, text: str) -> Entry:
        """The end of the table: a definition of its columns."""
        return Entry(HEADER, "", text, width=0)

    def row(self, *cells) -> str:
        """Numbers in the format of their column; text, and "-" for None, in its width."""
        texts = []
        for cell, (_, form) in zip(cells, self.columns, strict=True):
            is_text = cell is None or isinstance(cell, str)
            texts.append(format((cell or "-").replace(" ", "_"), form.split(".")[0]) if is_text else format(cell, form))
        return " ".join(texts).rstrip()

    def note(self, mark: str, id: str, text: str, **more) -> Entry:
        """What is printed in the place of a row. Only such a text begins with a parenthesis."""
        return Entry(mark, id, f"({text})", problem=text, width=self.width, **more)

    def entry(self, mark: str, id: str, *cells, **more) -> Entry:
        """A row. A name in the last cell that is too long loses its beginning."""
        text, width = self.row(*cells), max(self.width, len(id)) + 6
        if len(text) + width > WIDTH:
            last = str(cells[-1])
            is_name = self.columns[-1][1].startswith("<")  # else a number is wider than its column
            shorter = f"{text[: -len(last)]}..{last[len(text) + width + 2 - WIDTH:]}"
            text = shorter if is_name else " ".join(text.split())
        return Entry(mark, id, text, width=self.width, **more)


ERRORS = "max_row:>7.1e", "max_elem:>8.1e", "limit:>7.1e", "used:>6"
PRODUCTS = Table(22, *ERRORS, "precision:<1")
OUTPUTS = Table(22, "shape:<13", "min:>7.4g", "max:>7.4g", "mean:>8.1e", "std:>6.3g", "batch_err:>9.1e", "limit:>7.1e",
                "used:>6")  # fmt: skip
PRECISION = Table(36, "err_fp64:>8.1e", "expected:>8.1e", "cpu_err:>7.1e", *ERRORS)
MODULES = Table(36, "count:>5", *ERRORS, "worst:<1")
THROUGHPUT = Table(34, "images/s:>9.2f", "p50:>7.5g", "p90:>7.5g", "p95:>7.5g", "p99:>7.5g", "iqr:>6.1%",
                   units=("1/s", "ms", "ms", "ms", "ms", ""))  # fmt: skip
LATENCY = Table(34, "min:>6.4g", "mean:>6.4g", "max:>6.4g", "launch:>6.4g", "bound:>6", "first_call:>10.0f",
                "peak:>5.0f", "batches:>7", units=("ms", "ms", "ms", "ms", "", "ms", "MiB", ""))  # fmt: skip
BAR_WIDTH = 12
OF_COST, OF_ERROR, OF_HALF = (TOLERANCES[name] for name in ("expected cost", "cpu error", "half"))
LIMITS_TEXT = (f"max_row: worst row against CPU float64 with the device's GELU (err_fp64: exact GELU). max_elem: worst"
               f" element / {ELEMENT_FACTOR}. C: expected, e: cpu_err. WARN above {OF_COST.warn} C + {OF_ERROR.warn} e"
               f" (half precision: {OF_HALF.warn} e), FAIL above {OF_COST.fail} C + {OF_ERROR.fail} e"
               f" ({OF_HALF.fail} e), not below {UNEXPLAINED:.0e} while all modules pass")  # fmt: skip
PUBLISHED = Table(34, "max_abs:>8.1e", "mean_abs:>8.1e", "rel_l2:>8.1e", "nmae:>8.1e", "cosine:>10.7f")
PROBABILITIES = Table(34, "max_abs:>8.1e", "top1:>5", "inputs:>6")
CPU_LATENCY = Table(22, "p50_ms:>8.5g", "batch:>5", "threads:>7")
FASTEST = Table(34, "batch:>5", "images/s:>9.2f", "speedup:>7.2f", "err_fp64:>8.1e", "TFLOP/s:>7.3f", "share:>5.0%",
                "bar:<1")  # fmt: skip
DEVICES = Table(12, "node:>4", "device:<8", "checks:>6", "failed:>6", "warned:>6", "err_fp64:>8.1e", "chip:<1")
SPEED = Table(45, "old:>8.2f", "new:>8.2f", "ratio:>5.2f", "old_p50:>7.4g", "new_p50:>7.4g", "allowed:>7.0%")


class Report:
    """Prints entries as they come, keeps the lines for the log, and judges the result."""

    def __init__(self, quiet: bool = False) -> None:
        self.lines: list[str] = []
        self.checks: list[Entry] = []
        self.quiet = quiet  # of several ranks only one prints
        self.note, self.strict, self.output, self.timeout = "", False, "", 0.0  # known when the arguments are parsed
        self.device = None  # known when it was found
        self.lost = False  # the device no longer works
        self.caches = contextlib.ExitStack()  # removes what compilers have written
        self.lock = threading.RLock()  # needed to add a line or to write the log
        self.stage, self.timer, self.started = "start", threading.Timer(0, print), time.perf_counter()

    def restart_timeout(self, stage: str, seconds: float = 0.0, what: str = "") -> None:
        """After --timeout and `seconds` more the device hangs, in `what`: a thread ends the process, wherever it is."""
        self.stage = stage
        self.timer.cancel()
        message = f"error: stage {stage}{what} takes longer than --timeout {self.timeout} s: the device may hang"
        if self.device and self.device.type == "npu":
            message += " (see npu-smi info); a 310P or 910A compiles kernels for minutes at first: raise --timeout"
        self.timer = threading.Timer(self.timeout + seconds, self.abort, (message, 2))
        self.timer.daemon = True
        self.timer.start()

    def abort(self, message: str, status: int) -> None:
        """From a thread: end the process at once, and print what failed so far. No partial log is written."""
        self.lock.acquire()  # not while the log is being written; from here on the main thread prints nothing
        if sys.stderr.isatty():  # the cursor may be behind a progress bar
            print(file=sys.stderr)
        self.failures(None)
        self.caches.close()
        os._exit(self.not_run(message, status))

    def line(self, *texts: str) -> None:
        for line in (printable(text).rstrip() for text in texts):
            with self.lock:
                self.lines.append(line)
                if not self.quiet:
                    is_colored = line[:4] in COLORS and sys.stdout is not None and sys.stdout.isatty()
                    print_line(f"\x1b[{COLORS[line[:4]]}m{line[:4]}\x1b[0m{line[4:]}" if is_colored else line)

    def head(self, context: Context) -> None:
        """The experiment."""
        options, self.device = context.options, context.device
        kind, count = context.device.type, context.ranks.size - 1
        emulated = " (emulated, not an NPU)" if "emulated" in version_in(*CANN_FILES) else ""
        self.note = {"npu": emulated, "cpu": " (dry run, not an NPU)"}.get(kind, " (not an NPU)")
        more = f" and {count} more device{'s' * (count > 1)}" if count else ""
        self.line(f"validate_npu {VERSION}: {options.model} on {context.device}{more}{self.note}")
        self.line("Lines that start with ~ vary between runs. Compare logs: diff -I '^~' OLD NEW")
        self.add([Entry(FACT, "run.command", command_line(options)),
                  Entry(VARIES, "run.date", time.strftime("%Y-%m-%d %H:%M:%S %z"))])  # fmt: skip

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            self.line(*entry.lines())
            if entry.mark in OUTCOMES:
                self.checks.append(entry)

    def run(self, name: str, stage: Stage[T] | None, why: str = "", detail: str = "") -> T | None:
        """Print the entries of a stage as they come. Returns its result; None if it failed or was skipped.

        why: the reason to skip it if there is no stage. An exception is a failed check: other stages can still run.
        """
        self.restart_timeout(name)
        number = f"{STAGES.index(name) + 1}/{len(STAGES)}] {name}" if name in STAGES else f"{name}]"
        self.line("", f"[{number} {detail}")
        if self.lost or not stage:
            why = "the device no longer works after the error above" if self.lost else why
            self.add([Entry(SKIP, f"{name}.stage", why)])
            return None
        printed = []
        try:
            with stderr_copied(self.device) as printed:
                while True:
                    self.add([next(stage)])
        except StopIteration as done:
            return done.value
        except (CannotRun, RanksLost):
            raise
        except Exception as error:
            if is_out_of_memory(error) and not self.quiet:  # no fault of the device
                raise CannotRun(f"{self.device}: {OUT_OF_MEMORY} in stage {name}: {FREE_MEMORY}") from error
            self.add([Entry(FAIL, f"{name}.stage", explain(error, "".join(printed)))])
            self.lost = not still_works(self.device)
            return None

    def failures(self, checked: Precision | None) -> None:
        """List what failed or warned. Of numeric checks the first is the cause: the others follow from it."""
        listed = [entry for outcome in (FAIL, WARN) for entry in self.checks if entry.mark == outcome]
        cause = next((entry for entry in listed if entry.numeric), None)
        if listed:
            self.line("", "[failures]")
        for entry in listed:
            if entry.numeric and entry is not cause:
                continue
            lines = [f"{entry.mark} {entry.id}: {entry.problem or entry.text}", *entry.details]
            if entry is cause:
                lines += self.numeric_block(entry, checked)
            elif entry.advice:
                lines.append(f"next: {entry.advice}")
            for i, text in enumerate(lines):
                self.line(*wrap(text, " " * 5 * (i > 0), " " * (7 if i else 5)))

    def numeric_block(self, cause: Entry, checked: Precision | None) -> Iterator[str]:
        """Where the error begins, the checks that follow from it, and the next step."""
        bad = checked.bad_modules if checked else []
        if bad:
            more = f", {len(bad) - 3} more" if len(bad) > 3 else ""
            yield f"modules out of tolerance, in execution order: {', '.join(bad[:3])}{more}"
        for outcome, verb in ((FAIL, "failed"), (WARN, "warned")):
            found = (entry for entry in self.checks if entry.numeric and entry.mark == outcome)
            if others := [entry.id for entry in found if entry is not cause]:
                text = f"{len(others)} more check{'s' * (len(others) > 1)} {verb} after it: {', '.join(others)}"
                yield textwrap.shorten(text, WIDTH - 5, placeholder=" ...")
        apart = any(entry.numeric and entry.mark != PASS and entry.id.startswith("precision.") for entry in self.checks)
        if bad and not cause.id.startswith("device."):
            yield f"next: run {bad[0].split(' ')[0]} by itself on the device and on the CPU"
        elif checked and cause.id.startswith("outputs.") and (not apart or cause.id == "outputs.determinism"):
            yield "next: stage 4 found no cause, the error did not come back: it is transient; run with --duration 600"
        elif checked and apart and not cause.id.startswith("device."):
            yield "next: no module is out of tolerance: an operator outside modules is, or the model amplifies errors"
        elif cause.advice:
            yield f"next: {cause.advice}"

    def summary(self, checked: Precision | None, timings: list[Timing] | None) -> None:
        """At most six lines: precision, speed, and what to look at."""
        self.line("", "[summary]")
        if checked and FLOAT32.name in checked.errors:
            text = f"{checked.main} in float32: error {checked.errors[FLOAT32.name]:.1e} against CPU float64"
            more = ", ".join(f"{name} {cost:.1e}" for name, cost in checked.costs.items())
            self.add([Entry(FACT, "summary.precision", text + (f" (expected of {more})" if more else ""))])
        best = [max(group, key=lambda timing: timing.throughput) for group in by_mode(timings or [])]
        fastest = sorted(best[1:], key=lambda timing: timing.throughput)[-1:]
        speed = "".join(f"{timing.throughput:.2f} images/s in {timing.mode.name} at batch size {timing.batch}; "
                        for timing in [*best[:1], *fastest])  # fmt: skip
        self.add([Entry(VARIES, "summary.speed", f"{speed}the run took {time.perf_counter() - self.started:.0f} s")])

    def result(self) -> int:
        """The last line of the log. Returns the exit status."""
        marks = [entry.mark for entry in self.checks]
        is_failure, counts = FAIL in marks or self.strict and WARN in marks, counts_text(marks)
        unjudged = sum(entry.unjudged for entry in self.checks)
        counts += f"; {unjudged} outputs not judged" if unjudged else ""
        self.line("", f"RESULT: {FAIL if is_failure else PASS}  {len(marks)} checks: {counts}{self.note}")
        return 1 if is_failure else 0

    def close(self, checked: Precision | None = None, timings: list[Timing] | None = None) -> int:
        """The end of the log, which the rank that prints writes. Returns the exit status."""
        self.failures(checked)
        self.summary(checked, timings)
        status = self.result()
        if not self.quiet:
            self.write()
        return status

    def write(self) -> None:
        """Replace the log in one step, so that it is the old one or the new one, complete. Raises CannotRun."""
        folder, name = os.path.split(os.path.realpath(self.output))
        temporary = os.path.join(folder, f".{name}.{os.getpid()}")
        with self.lock:
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    file.writelines(line + "\n" for line in self.lines)
                os.replace(temporary, os.path.join(folder, name))
            except OSError as error:
                problem = f"the log cannot be written to {self.output}: {error.strerror}; it is on stdout"
                raise CannotRun(problem) from error
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def close_without(self, lost: list[int]) -> int:
        """Write the log so far, and name the ranks that no longer answer. Returns the exit status."""
        self.line("")
        problem = f"does not answer since stage {self.stage}: its process ended or hangs"
        advice = f"see the messages of that process above, its log in {LOG_FOLDER}, and npu-smi info"
        names = lost or ["unknown"]  # a rank can fail after it has answered
        self.add(Entry(FAIL, f"devices.{name}", problem, advice=advice) for name in names)
        return self.close()

    def not_run(self, message: str, status: int) -> int:
        """Print the reason on stderr, and the result line on stdout. Returns the exit status."""
        if not self.quiet:
            warn_user(message)
            print_line(f"RESULT: NOT RUN  (exit status {status}; an earlier log is unchanged)")
        return status


def end_on_signals(report: Report, ranks: Ranks) -> None:
    """End the run at once on Ctrl-C and SIGTERM. A thread does it: the main thread may be inside torch without end."""
    receiver, sender = os.pipe()

    def wait() -> None:
        while not select.select([receiver], [], [], HEARTBEAT_SECONDS)[0]:
            if not report.quiet and not sys.stderr.isatty():  # a terminal has progress bars
                seconds = time.perf_counter() - report.started
                print(f"[{report.stage}] running, {seconds:.0f} s since the start", file=sys.stderr, flush=True)
        number = os.read(receiver, 1)[0]
        if number == signal.SIGTERM and (lost := ranks.check_alive()):  # torchrun ends all ranks because one failed
            report.lock.acquire()
            os._exit(report.close_without(lost))
        report.abort(f"interrupted by {signal.Signals(number).name} in stage {report.stage}", 128 + number)

    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the thread reads the number
    threading.Thread(target=wait, daemon=True).start()


def wrap(text: str, first: str, more: str) -> list[str]:
    """Lines of at most WIDTH columns. first, more: indents of the first line and of the others."""
    return textwrap.wrap(printable(text), WIDTH, initial_indent=first, subsequent_indent=more, break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip


def print_line(text: str) -> None:
    """Print a line on stdout. A closed stdout (| head) does not end the run: the log is still written."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warn_user(message: str) -> None:
    print(f"validate_npu.py: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """Text from outside (names, messages) cannot break a line: control characters are escaped, in any locale."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def describe(error: BaseException) -> str:
    """The type and the first line of an exception: "AttributeError: ..."."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that is not blank, at most 300 characters."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]


# --- The command line -------------------------------------------------------------------------------------------------

def make_parser() -> argparse.ArgumentParser:
    def usage_error(message: str) -> None:
        raise CannotRun(message)

    examples, statuses = __doc__.partition("\n\nMethod.")[0], __doc__.rpartition("\n\n")[2]
    parser = argparse.ArgumentParser(usage="%(prog)s [options]", description=examples, epilog=statuses,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.error = usage_error
    parser.add_argument("--version", action="version", version=f"validate_npu.py {VERSION}")
    what, how, result = (parser.add_argument_group(name).add_argument
                         for name in ("model and inputs", "measurement", "output"))  # fmt: skip
    default = "(default: %(default)s)"
    what("--model", default=DEFAULT_MODEL, metavar="NAME", help=f"timm model {default}")
    what("--device", default="npu", help="npu[:i], cpu (a dry run), cuda[:i], ... (default: npu:0)")
    what("--weights", default="pretrained", metavar="WHICH", help=f"pretrained, random, a file or a folder {default}")
    what("--img-size", default=[], nargs="+", metavar="N", help="one number, or height and width (the model's)")
    what("--image", default=[], nargs="+", metavar="FILE", help="images to validate with: files, folders or patterns")
    what("--rope-bf16", action="store_true", help="round the RoPE periods to bfloat16, as in the original DINOv3")
    what("--seed", default=0, type=int, metavar="N", help=f"seed of the random images and weights {default}")
    sizes = [*map(str, DEFAULT_BATCH_SIZES)]
    how("--batch-sizes", default=sizes, nargs="+", metavar="N", help=f"to time, or auto (default: {' '.join(sizes)})")
    modes = f"to validate and time beside float32: {BASE_NAMES} (amp-: autocast), each also with +graph, +compile"
    how("--modes", default=[], nargs="+", metavar="MODE", help=modes)
    how("--compile-backend", default="", metavar="NAME", help="for +compile (default: the first that is installed)")
    how("--warmup", default=10, type=int, metavar="N", help=f"minimum number of warm-up batches, 0: none {default}")
    how("--iters", default=100, type=int, metavar="N", help=f"number of timed batches of each size {default}")
    how("--duration", default=0, type=int, metavar="SECONDS", help="afterwards run the fastest mode for this time")
    how("--max-error", default=1e-2, type=float, metavar="X", help=f"largest error of a fastest mode {default}")
    how("--timeout", default=1800, type=int, metavar="SECONDS", help=f"limit for a stage, or for a timed row {default}")
    result("--output", default="validation_output.txt", metavar="FILE", help=f"the log {default}")
    result("--strict", action="store_true", help="a WARN also ends with exit status 1")
    result("--baseline", metavar="OLD.txt", help="compare with an earlier log; exit status 1 if something became worse")
    result("--compare", nargs=2, metavar=("OLD.txt", "NEW.txt"), help="only compare two logs, without a run")
    result("--max-slowdown", default=10.0, type=float, metavar="PERCENT", help=f"slowdown that is tolerated {default}")
    result("--report", default=[], nargs="+", metavar="LOG", help="only print a section for a model card, in Markdown")
    result("--language", default="zh", choices=LANGUAGES, help=f"of that section {default}")
    result("--json", action="store_true", help="print its content as JSON")
    return parser


def whole_numbers(option: str, words: list[str]) -> list[int]:
    """Of "1 4", "1,4" and "256x192". Raises CannotRun if a number is not from 1 on."""
    parts = [part for word in words for part in re.split("[x,]", word)]
    if wrong := [part for part in parts if not re.fullmatch(r"0*[1-9]\d{0,8}", part, re.ASCII)]:
        raise CannotRun(f"{option}: {wrong[0]!r} is not a whole number from 1 on")
    return [*map(int, parts)]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Raises CannotRun for a usage error."""
    options = make_parser().parse_args(argv)
    for name in ("iters", "timeout", "seed", "warmup", "duration", "max_error", "max_slowdown"):
        least = int(name in ("iters", "timeout"))
        if not least <= getattr(options, name) < 1e9:
            raise CannotRun(f"--{name.replace('_', '-')} takes a number from {least} on, below 1e9")
    if not re.fullmatch(r"[a-z]+(:[0-9]{1,4})?", options.device):
        raise CannotRun(f"--device: {options.device!r} is not a device; examples: npu, npu:1, cpu, cuda:0")
    options.img_size = whole_numbers("--img-size", options.img_size)
    if len(options.img_size) > 2:
        raise CannotRun("--img-size takes one number, or height and width")
    is_auto = options.batch_sizes == ["auto"]
    options.batch_sizes = [] if is_auto else sorted(set(whole_numbers("--batch-sizes", options.batch_sizes)))
    for name in (name for name in options.modes if name not in MODES):
        near = difflib.get_close_matches(re.sub(r"fp|f(?=\d)", "float", name), BASE_NAMES.split(", "), cutoff=0)
        near = f"near: {', '.join(near)}; modes are {BASE_NAMES} (amp-: autocast), each also with +graph or +compile"
        raise CannotRun(f"--modes: {name!r} is not a mode; {near}")
    if options.json and not options.report:
        raise CannotRun("--json is for --report: a run writes its log")
    return options


def command_line(options: argparse.Namespace) -> str:
    """The command with all options that change the experiment and are not the default."""
    words, defaults = ["validate_npu.py"], vars(parse_arguments([]))
    others = "output", "baseline", "timeout", "strict", "max_slowdown", "language"
    for name, value in vars(options).items():
        if value != defaults[name] and name not in others:
            values = (value or ["auto"]) if isinstance(value, list) else [] if value is True else [value]
            values = map(os.path.basename if name in ("weights", "image") else str, values)
            words += [f"--{name.replace('_', '-')}", *values]
    return shlex.join(words)


def check_paths(options: argparse.Namespace) -> None:
    """Find problems that would otherwise appear after minutes of work. Raises CannotRun."""
    try:
        os.getcwd()
    except OSError as error:
        raise CannotRun("the working directory was deleted: change to another one") from error
    target = os.path.realpath(options.output)
    if os.path.exists(target) and not os.path.isfile(target):
        raise CannotRun(f"the log cannot be written: {options.output} is not a regular file")
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(target)).close()  # access() is always true for root
    except OSError as error:
        raise CannotRun(f"the log cannot be written to the folder of {options.output}: {error.strerror}") from error
    image_files(options.image)
    if options.weights not in ("pretrained", "random"):
        find_weights_file(options.weights)


def main(argv: list[str] | None = None) -> int:
    ranks, report = Ranks(), Report()
    try:
        if sys.stderr is None:  # closed: tqdm and torch write to it
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            sys.stderr = open(2, "w", closefd=False)
        if sys.stdout is not None:
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        options = parse_arguments(argv)
        report.strict, report.output, report.timeout = options.strict, options.output, options.timeout
        if options.report:  # needs only the standard library, like --compare
            return publication(options)
        if options.compare:
            old, new = map(Log.read, options.compare)
            report.line(f"validate_npu {VERSION}: comparison of {old.name} (old) and {new.name} (new)")
            report.add(compare_logs(old, new, options))
            report.failures(None)
            return report.result()
        return run(options, ranks, report)
    except CannotRun as problem:
        report.lock.acquire()  # this is the last message: torchrun ends rank 0 as soon as another rank has ended
        return report.not_run(f"error: {problem}", 2)
    except Exception as error:  # not 1, which is a result
        traceback.print_exc()
        return report.not_run(f"error: {describe(error)}: a fault of this script, please report it", 2)
    finally:
        report.caches.close()


def run(options: argparse.Namespace, ranks: Ranks, report: Report) -> int:
    """Everything before stage 1, and the stages. Returns the exit status. Raises CannotRun."""
    end_on_signals(report, ranks)
    report.restart_timeout("start")
    if ranks.size == 1:  # at once; under torchrun all processes end with the same reason
        check_paths(options)
    import_packages()
    # A rank may have to wait until each rank before it has timed each row.
    ranks.connect(report, (options.timeout + options.duration) * (1 + ranks.size))
    try:
        ranks.all_or_none("paths", lambda: ranks.rank or check_paths(options))
        read = options.baseline and not ranks.rank  # only rank 0 reads and writes logs
        baseline = ranks.all_or_none("baseline", lambda: Log.read(options.baseline) if read else None)
        ranks.all_or_none("name", lambda: check_name(options.model))
        device = ranks.all_or_none("device", lambda: find_device(ranks.device_name(options.device)))
        context = ranks.all_or_none("modes", lambda: make_context(options, device, ranks, report))
        # If one process ends with an error, torchrun ends rank 0, which writes the log. Its result is that of all.
        status = ranks.gather("end", validate(context, report, baseline))[0]
    except RanksLost as lost:
        return report.close_without(lost.args[0])
    if report.lost:
        os._exit(status)  # torch_npu waits for the device when Python ends, and it may never answer
    return status


if __name__ == "__main__":
    exit_status = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(exit_status)  # otherwise a library that crashes at exit would be a failed rank for torchrun
    sys.exit(exit_status)
