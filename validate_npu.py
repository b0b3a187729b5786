#!/usr/bin/env python3
"""Validate a timm model on a Huawei Ascend NPU, and write a log that shows it.

    python validate_npu.py                                   # npu:0, pretrained weights
    python validate_npu.py --device cpu --weights random     # rehearsal without an NPU
    torchrun --nproc-per-node 8 validate_npu.py              # every card of a host

Where things are, from top to bottom:

    Limits              what passes, and where each number comes from. A Mode is a way to run the model, all are in
                        MODES: to add a type for autocast, or another way, add it to BASES
    The run             validate() calls the stages. A stage measures, and yields entries: lines of the log
    Stages 1 to 5       device_stage(), model_stage(), outputs_stage(), precision_stage(), throughput_stage().
                        residual_limit() is the precision limit, time_batch() times one batch
    The arithmetic      behind stage 4: Probe asks what the device computes in, imitation() lets the CPU do the same
    Comparing arrays    compare() measures how far two arrays are from each other, judged() makes a line of it
    Comparing logs      Log reads a log, compare_logs() says what became worse
    Several cards       what the processes of torchrun tell each other, and cards_stage()
    Ascend              find_device(), versions, switches, error codes, installation: all that is known of one vendor
    The report          Entry is a line, Table its columns, Report prints and writes them
    The command line    the options, and main()

Lines that begin with ~ change from run to run, all others do not:    diff -I '^~' OLD.txt validation_output.txt

Exit status: 0 no check failed, 1 a check failed, 2 the run could not be done, 130 or 143 a signal ended it.
"""

from __future__ import annotations

# What takes milliseconds, and only a run needs, is imported where it is used: --help takes a tenth of a second.
import argparse
import contextlib
import copy
import dataclasses
import difflib
import functools
import glob
import itertools
import math
import os
import pickle
import platform
import re
import resource
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

VERSION = "2.3"  # of the log: logs of one version have the same lines
DEFAULT_MODEL = "vit_small_patch16_dinov3.lvd1689m"
STAGES = ("device", "model", "outputs", "precision", "throughput")
PASS, SKIP, WARN, FAIL = OUTCOMES = "PASS", "SKIP", "WARN", "FAIL"  # from the best to the worst
FACT, VARIES, HEADER = "", "~", "#"  # marks of lines that judge nothing

# --- Limits: what passes, and where each number comes from ------------------------------------------------------------

class Limit(NamedTuple):
    """Relative L2 errors of a row. Above `warn` a healthy device should not be; above `fail` none is."""

    warn: float
    fail: float

    def judge(self, found: Difference) -> str:
        """The outcome for the worst row and the worst element. An infinite or NaN error fails."""
        for outcome, limit in ((FAIL, self.fail), (WARN, self.warn)):
            if not (found.row <= limit and found.element <= ELEMENT_FACTOR * limit and math.isfinite(found.row)):
                return outcome
        return PASS


# One element may be off by this many times the limit of its row: the largest of a million normally distributed errors
# is 5 times their RMS, and real errors have heavier tails.
ELEMENT_FACTOR = 32
# What Huawei's operator precision standard allows one operator, by the precision that it computes float32 in. The
# standard is element by element. Here the norm of the row divides, because features cross zero. TF32 has the mantissa
# of float16.
OPERATOR = {"float32": 2**-13, "HF32": 2**-11, "TF32": 2**-10, "float16": 2**-10}
# One module of the device on the CPU's inputs, reduced-precision float32 off: WARN above the standard for float32, FAIL
# above eight times the standard for HF32; an error of 1 % is above that. None of 11 models warned on an H200.
MODULE = Limit(2**-13, 2**-8)
# The same with operands rounded to HF32, TF32 or float16: single products of healthy devices reach 4e-4.
MODULE_REDUCED = Limit(2**-9, 2**-8)
# Two outputs of the model in float32: WARN above 2 C + 64 e, FAIL above 4 C + 256 e. e is the CPU's own float32 error of
# that output, C its expected cost: how far float64 moves when the operands of all products of the documented kinds are
# rounded to the documented precision. Measured: healthy up to 7.9 e and 1.25 C, 24 blocks with each output perturbed by
# 1e-6 41 e; the smallest fault that must fail 385 e (tests/README.md).
COST_FACTORS, ERROR_FACTORS = (2, 4), (64, 256)
# Against the CPU nothing below this fails while no module does: published figures of healthy NPUs reach 1.9e-2, and not
# all of them are explained. Such an excess is a WARN.
UNEXPLAINED = 1e-2
# The published check of this model on an Ascend910B4 (2026-05-09): largest absolute error of the embedding against the
# CPU, for features of order 1; it measured 2.4e-3. And "error below 1 %", which reviewers of adapted models ask for.
CARD_MAX_ABS, REVIEW_REL_L2 = 1e-2, 1e-2
# What a probe finds is recognised if it is this close to a known arithmetic (relative L2), or form of GELU (largest
# absolute error). Kernels of fp32 differ from each other by 1e-6, 11 bits from 10 by 1e-4, and tanh from erf by 4.7e-4.
RECOGNISED, GELU_RECOGNISED = 2**-16, 1e-4
# In half precision the CPU in the same mode, with the device's GELU, is the yardstick: a healthy device is as far off
# (0.99 to 1.04 times). torch._dynamo.utils.same allows 3 times in half precision.
OWN_WARN, OWN_FAIL = 3, 6
# The device may choose another class, or neighbour, of a picture where the CPU's margin is below this many times the
# arithmetic's error on stage 4's images: two values enter a margin, and other pictures may be four times as far off.
ANSWER_FACTOR = 8
# Where the CPU's own float32 error is above the first, or the expected cost above the second, outputs judge no device.
CANNOT_JUDGE, COST_CANNOT_JUDGE = 1e-3, 0.1
CONTROL_SCALE = 1.01  # the control that must be noticed: one weight matrix is off by 1 %
# Outputs of two different images that are closer than this are the same output. Rounding moves them by 1e-7 to 1e-6. A
# CNN with random weights, which averages over the image, may set them only 2e-3 apart (lcnet_050).
DISTINCT_REL_L2 = 1e-5
# Rows with a tiny norm count as having a tenth of the usual norm: one cannot divide by zero.
ROW_NORM_FLOOR = 0.1
# Between two logs an error is worse if it grew by more than this, and is above 64 units of rounding in fp32. In half
# precision the largest of many errors moves by so much when sums are reordered.
ERROR_GROWTH, ROUNDING = 0.25, 2**-17
MOST_ALLOWED = 50  # percent: where two runs' spreads allow throughput to fall by more, nothing is judged


@dataclasses.dataclass(frozen=True)
class Mode:
    """One way to run the model. All that differs between modes stands here; nothing looks into a name."""

    name: str  # in the log, and for --modes
    base: str  # the name of the mode without graph, which gives the same outputs
    amp: str = ""  # autocast to this type
    half: str = ""  # weights and inputs are in this type
    hf32: bool = False  # HF32 (TF32 on CUDA) in matrix products, too
    graph: bool = False  # captured, and replayed

    @property
    def in_half(self) -> bool:
        return bool(self.amp or self.half)

    @property
    def dtype(self) -> torch.dtype:
        """Of weights and inputs."""
        return getattr(torch, self.half or "float32")

    @contextlib.contextmanager
    def active(self, device: torch.device) -> Iterator[None]:
        """Inside, a forward pass runs in this mode. For half, model and inputs are to be in its dtype."""
        allowed = dict.fromkeys(reduced_fp32_switches(device), True) if self.hf32 else {}
        autocast = torch.autocast(device.type, getattr(torch, self.amp)) if self.amp else contextlib.nullcontext()
        with allow_reduced_fp32(device, allowed), autocast:
            yield

    def lacking(self, device: torch.device) -> str:
        """Why the device cannot run in this mode, "" where it can."""
        if not computes_in(device, self.amp or self.half):
            return f"{device} does not compute in {self.amp or self.half}"
        if self.hf32 and not (reduced_fp32_switches(device) and computes_in(device, "bfloat16")):
            return f"{device} has no fp32 with fewer bits"
        if self.graph and device.type == "cpu":
            return "a CPU has no graphs to capture"
        return ""


FLOAT32 = Mode("float32", "float32")
BASES = [FLOAT32, Mode("hf32", "hf32", hf32=True)]
BASES += [Mode(f"amp-{dtype}", f"amp-{dtype}", amp=dtype) for dtype in ("float16", "bfloat16")]
BASES += [Mode(f"half-{dtype}", f"half-{dtype}", half=dtype) for dtype in ("float16", "bfloat16")]
MODES = {mode.name: mode for base in BASES for mode in
         (base, dataclasses.replace(base, name=f"{base.name}+graph", graph=True))}  # fmt: skip

# The products of stage 1, large enough for the kernels that models get: (rows, columns) twice, and images and a kernel.
PROBES = {"matmul": ((1024, 1024), (1024, 1024)), "convolution": ((4, 64, 56, 56), (64, 64, 3, 3))}
PRECISION_IMAGES, MODULE_IMAGES = 4, 2  # seeded images of stage 4; each costs a forward pass in fp64 on the CPU
PICTURES, PICTURE_BATCH = 4, 8  # pictures that stages 3 and 4 treat as the seeded images; and how all are streamed
DEFAULT_BATCH_SIZES, MAX_AUTO_BATCH = [1, 4, 8, 16], 1024
SATURATED_GAIN = 1.05  # --batch-sizes auto ends where twice the batch gives less than 5 % more throughput
# (least, most) seconds of warm-up for each batch size, and most seconds of timing. A second, because a card idles at a
# low clock, where it is steady, too. A CPU rehearsal is to end in half a minute.
WARMUP_SECONDS = {"cpu": (0.2, 0.5), "accelerator": (1.0, 30.0)}
TIMED_SECONDS = {"cpu": 1.0, "accelerator": 30.0}
STEADY, STEADY_BATCHES = 0.02, 10  # steady: the median of 10 batches is within 2 % of the 10 before
SLOWER = 0.05  # how much throughput may fall under sustained load, beside the spreads
UNDER_LOAD = "the device computes something else under load: check the card's temperature and memory"
HOST_BOUND = 0.8  # the host is the limit if launching takes this share of the time (as in trtexec)
DOUBTFUL_SPREAD = 0.1  # interquartile range over median, as in torch.utils.benchmark
HUB_SECONDS = 10  # for the hub's first answer
ROLL_CALL_SECONDS = 5  # for each card to answer when torchrun ends a run
MIB, GIB = 2**20, 2**30

OVERFLOWS = "not judged: on the CPU it overflows as well"
OUT_OF_MEMORY = "out of device memory"
FREE_MEMORY = "use smaller --batch-sizes, or free the card (npu-smi info shows who uses it)"
# Where CANN writes its log, the first that is set.
LOG_FOLDER = os.environ.get("ASCEND_PROCESS_LOG_PATH") or os.path.join(
    os.environ.get("ASCEND_WORK_PATH") or os.path.join("~", "ascend"), "log"
)
DEVICE_LOG = f"the device's own log is in {LOG_FOLDER}"

# --- The run ----------------------------------------------------------------------------------------------------------

class CannotRun(Exception):
    """The run cannot be done. The message is one line that says what is wrong and what to do. Exit status 2."""


class DeviceLost(Exception):
    """The device does not compute any more; the message says since when."""


class Twin(NamedTuple):
    """The model on the CPU in fp32, and its copy on the device."""

    cpu: torch.nn.Module
    device: torch.nn.Module


@dataclasses.dataclass
class Run:
    """What the stages share. A field that is empty at first is filled by one stage for the next ones."""

    options: argparse.Namespace
    report: Report
    cards: Cards
    device: torch.device
    documented: dict[str, str]  # what fp32 should be computed in: "convolution" and "matmul" -> a key of OPERATOR
    probe: Probe | None = None  # what large products of the device are computed in
    model: Twin | None = None
    maps: FeatureMaps | None = None  # where timm has feature maps for this model
    images: torch.Tensor | None = None  # the seeded images, as many as the largest batch has
    pictures: torch.Tensor | None = None  # the first PICTURES of picture_count
    picture_count: int = 0
    references: References | None = None  # the CPU's outputs for stage 4's images, which limits are made of
    first: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)  # of the first forward pass, of one image
    outputs: np.ndarray | None = None  # model(images) on the device, in fp32, of the largest batch that fits into it
    errors: dict[str, float] = dataclasses.field(default_factory=dict)  # by base: of logits or embedding against fp64
    limits: dict[str, Limit] = dataclasses.field(default_factory=dict)  # by base: how far timed outputs may be off
    timings: list[Timing] = dataclasses.field(default_factory=list)
    lost: bool = False  # the device does not compute any more

    def __post_init__(self) -> None:
        self.auto = self.options.batch_sizes == ["auto"]
        self.sizes = DEFAULT_BATCH_SIZES if self.auto else self.options.batch_sizes
        asked = dict.fromkeys([FLOAT32, *(MODES[name] for name in self.options.modes)])
        self.lacking = {mode: reason for mode in asked if (reason := mode.lacking(self.device))}
        self.modes = [mode for mode in asked if mode not in self.lacking]

    @functools.cached_property
    def skeleton(self) -> torch.nn.Module | None:
        """The model on the meta device, where weights take no memory; None where timm cannot make it there."""
        with contextlib.suppress(Exception), torch.device("meta"):
            return create_model(self.options).eval()

    def batches(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The inputs of stage 3 by name, (B, C, H, W): the first of the seeded images, then the pictures."""
        for size in dict.fromkeys([1, *self.sizes]):
            yield str(size), self.images[:size]
        if self.pictures is not None:
            yield "pictures", self.pictures

    @contextlib.contextmanager
    def in_mode(self, mode: Mode) -> Iterator[torch.nn.Module]:
        """The device's model in this mode. Where its weights are in half, those in fp32 leave the device meanwhile."""
        try:
            yield without_caches(self.model.device.to(mode.dtype)) if mode.half else self.model.device
        finally:
            if mode.half:
                without_caches(self.model.device.float())
                for here, there in zip(tensors_of(self.model.device), tensors_of(self.model.cpu)):
                    here.data.copy_(there)

    def stage(self, title: str, entries: Iterable[Entry], shown: bool = True) -> bool:
        """Do a stage. Nothing is judged on a device that an error has made unusable: a SKIP says so in its place.

        shown: on a terminal the modules that have computed are counted. Not where times are measured.
        """
        if self.lost:
            entries = [Entry(SKIP, stage_name(title), "", "the device cannot be used any more after the error above")]
        with self.report.counted_modules() if shown else contextlib.nullcontext():
            done = self.report.stage(title, entries)
        self.lost = self.lost or not done and not still_computes(self.device)
        return done


def validate(run: Run, baseline: Log | None) -> int:
    """The five stages in sequence, then the log. Returns the exit status. Raises CannotRun and CardsLost."""
    report, cards = run.report, run.cards
    head(run)
    torch.use_deterministic_algorithms(True, warn_only=True)  # stages 1 to 4 judge numbers, which are to repeat
    torch.utils.deterministic.fill_uninitialized_memory = False
    run.stage("[1/5] device", device_stage(run))
    works = cards.gather("model runs", run.stage("[2/5] model", model_stage(run)) and not run.lost)
    if broken := [f"card {rank}" for rank, runs in enumerate(works) if not runs]:
        where = ", ".join(broken) if cards.size > 1 else run.device
        report.add(Entry(SKIP, stage, "", f"the model does not run on {where}") for stage in STAGES[2:])
        advice = "run it alone for its whole log"
        report.add(Entry(FAIL, name, "", "the model does not run on it", advice) for name in broken if cards.size > 1)
        return report.finish()
    run.stage("[3/5] outputs", outputs_stage(run))
    run.stage("[4/5] precision", precision_stage(run))
    torch.use_deterministic_algorithms(False)  # stage 5 times what users run
    for _ in cards.turns():
        run.stage("[5/5] throughput", throughput_stage(run), shown=False)
    if cards.size > 1:
        report.stage("[all cards]", cards_stage(run))
    if baseline:
        entries = compare_logs(baseline, Log("this run", report.lines), run.options)
        report.stage(f"[comparison] with {baseline.name}", entries)
    return report.finish()


def head(run: Run) -> None:
    """Which experiment this is."""
    options, report = run.options, run.report
    report.note = {"npu": "", "cpu": " (rehearsal: no NPU is validated)"}.get(run.device.type, " (no NPU is validated)")
    more = f" and {run.cards.size - 1} more cards" if run.cards.size > 1 else ""
    report.line(f"validate_npu {VERSION}: {options.model} on {run.device}{more}{report.note}")
    report.line("Lines that begin with ~ vary from run to run. Compare two logs with: diff -I '^~' OLD NEW")
    text = (
        f"weights {os.path.basename(options.weights)}, batch sizes {' '.join(map(str, options.batch_sizes))},"
        f" warm-up {options.warmup}, iterations {options.iters}, seed {options.seed}, pictures {len(options.image)},"
        f" duration {options.duration} s,"
        f" input size {' x '.join(map(str, options.input_size)) or 'default'},"
        f" modes {' '.join(mode.name for mode in [*run.modes, *run.lacking])},"
        f" RoPE periods in {'bfloat16' if options.rope_bf16 else 'float32'}"
    )
    report.add([Entry(FACT, "options", text), Entry(VARIES, "date", time.strftime("%Y-%m-%d %H:%M:%S %z"))])


# --- Stage 1: device --------------------------------------------------------------------------------------------------

def device_stage(run: Run) -> Iterator[Entry]:
    """Versions, switches and memory; and a real matrix product, because one that does not start is visible, too."""
    device, free = run.device, None
    if device.type == "npu" and any(mode.graph for mode in run.modes):
        torch.npu.config.allow_internal_format = False  # no graph can hold the convolutions for internal formats
    text = str(device)
    if device.type != "cpu":
        module = torch.get_device_module(device.type)
        free, total = module.mem_get_info(device)
        text += f" {chip_name(device)}, {module.device_count()} visible, {total / GIB:.1f} GiB"
    facts = {"device": text, "python": platform.python_version(), "host": host_name(), "torch": torch.__version__}
    facts |= {**accelerator_versions(device), "timm": timm.__version__, "numpy": np.__version__}
    threads, cores = torch.get_num_threads(), os.cpu_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else cores  # macOS does not tell
    facts["CPU threads"] = f"{threads} on {allowed} of {cores} cores"
    if threads < cores // 2:
        facts["CPU threads"] += " (OMP_NUM_THREADS or CPU_AFFINITY_CONF: the CPU's reference takes longer)"
    run.probe = probe_device(run)
    facts["fp32 is computed in"] = str(run.probe)
    facts["fp16 peak"] = f"{peak} TFLOP/s" if (peak := fp16_peak(device)) else ""
    facts["environment"] = " ".join(f"{name}={os.environ[name]}" for name in ENVIRONMENT if name in os.environ)
    yield from (Entry(FACT, name, fact) for name, fact in facts.items() if fact)
    if free is not None:
        yield Entry(VARIES, "free memory", f"{free / GIB:.1f} GiB")

    yield ERRORS.header("in that arithmetic")
    yield from judge_probe(run.probe, run.documented, device)


def host_name() -> str:
    """Processor, memory and system of the host, which is the limit of many a card's figures."""
    processor, system = platform.machine(), platform.system()
    with contextlib.suppress(OSError, AttributeError):
        known = subprocess.run(["lscpu"], capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"}).stdout
        processor = " ".join([re.search(r"Model name: *(.*)", known)[1], processor])
        system = platform.freedesktop_os_release()["PRETTY_NAME"]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB
    return f"{processor}, {memory:.0f} GiB, {system}"


def judge_probe(probe: Probe, documented: dict[str, str], device: torch.device) -> Iterator[Entry]:
    """Large products and GELU are as accurate as documented, and keep as many bits."""
    for kind, (arithmetic, found) in probe.products.items():
        limit, advice = OPERATOR[documented[kind]], f"a plain {kind} is wrong: check the device with the vendor's tools"
        # One that is recognised is compared with that arithmetic, any other with float64.
        yield judged("computes", kind, found, Limit(limit, MODULE.fail), advice, where=str(arithmetic or "not recognised"))
    fewer = [kind for kind, (arithmetic, _) in probe.products.items()
             if arithmetic and arithmetic.bits < BITS[documented[kind]]]  # fmt: skip
    if fewer:
        problem = f"fewer bits than documented in {', '.join(fewer)}, which nobody asked for"
        yield Entry(WARN, "fewer bits", "", problem, f"look for what sets it: {REDUCED_FP32.get(device.type, '')}")
    error = float(np.max(list(probe.gelu_errors.values())))  # NaN if one is
    outcome = FAIL if not math.isfinite(error) else WARN if error > GELU_RECOGNISED else PASS
    text = f"largest absolute error {error:.1e}, limit {GELU_RECOGNISED:.1e}"
    yield Entry(outcome, "GELU", text, f"neither the erf nor the tanh form: {text}", "see stage 4 for what it costs")


# --- Stage 2: model ---------------------------------------------------------------------------------------------------

def model_stage(run: Run) -> Iterator[Entry]:
    """Which weights and inputs these are, and the first forward pass, where every operator must have a kernel."""
    options, device = run.options, run.device
    run.cards.all_or_none("memory", lambda: check_memory(run))
    started = time.perf_counter()
    model, source = run.cards.all_or_none("model", lambda: load_model(options))  # the hub's client locks a download
    load_seconds = time.perf_counter() - started
    config = timm.data.resolve_model_data_config(model)
    run.images = draw_images(max(run.sizes), config["input_size"], options.seed)
    if options.image:  # each is read here, before minutes of work, and again in stage 4: only the first are kept
        pictures = load_pictures(options.image, config)
        run.pictures = torch.stack([picture for _, picture in itertools.islice(pictures, PICTURES)])
        run.picture_count = len(run.pictures) + sum(1 for _ in pictures)
    run.model = Twin(model, copy.deepcopy(model).to(device))

    size = " x ".join(map(str, config["input_size"]))
    mean, std = (" ".join(f"{value:g}" for value in config[name]) for name in ("mean", "std"))
    sent, received = sha256(model.state_dict()), sha256(run.model.device.state_dict())
    yield Entry(FACT, "parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}")
    yield Entry(FACT, "input", f"{size}, {config['interpolation']}, crop {config['crop_pct']:g}")
    yield Entry(FACT, "normalisation", f"mean {mean}, std {std}")
    yield Entry(FACT, "weights", source)
    yield Entry(FACT, "weights SHA-256", sent)
    yield Entry(FACT, "inputs SHA-256", sha256(dict(run.batches())))
    advice = "the device's memory, or the transfer to it and back, corrupts data: check the card"
    problem, outcome = f"they differ, SHA-256 {received}", PASS if sent == received else FAIL
    text = "read back, equal the host's bit for bit" if outcome == PASS else ""
    yield Entry(outcome, f"weights on {device.type}", text, problem, advice)

    started = time.perf_counter()
    with emulated_precision() as seen, stderr_copied(device) as said:
        run.first = forward_outputs(run.model.device, run.images[:1].to(device))
    run.outputs = run.first.get("logits", run.first["embedding"])  # until stage 3 has those of a larger batch
    first_seconds = time.perf_counter() - started
    yield cpu_fallback(device, seen.names, "".join(said))
    yield Entry(VARIES, "loaded in", f"{load_seconds:.1f} s")
    yield Entry(VARIES, "first call", f"{first_seconds:.2f} s, kernel compilation included")
    run.maps = find_feature_maps(run)
    run.references = reference_outputs(run, precision_images(run))


def check_memory(run: Run) -> None:
    """Raises CannotRun where the host has less memory than the weights take: the system would kill the process.

    They are there in fp64 for the reference, which takes the place of fp32, and once more in a rehearsal.
    """
    each, processes = 12 if run.device.type == "cpu" else 8, run.cards.local_size
    parameters = sum(parameter.numel() for parameter in run.skeleton.parameters()) if run.skeleton else 0
    if (needed := processes * each * parameters) > (left := memory_left()):
        problem = f"{run.options.model} takes {needed / GIB:.1f} GiB of host memory ({each} bytes a parameter"
        problem += f", {processes} processes)" if processes > 1 else ")"
        raise CannotRun(f"{problem}, and {left / GIB:.1f} GiB are left here, in this host or its container's limit")


def memory_left(root: str = "/") -> float:
    """Bytes of memory that a process can still have: what the system has, or what the container's limit leaves.

    The limit is in the files of the container's cgroup, version 2 or 1. Memory that holds files will be given back.
    """

    def read(*path: str) -> str:
        with open(os.path.join(root, *path), encoding="utf-8") as file:
            return file.read()

    left = math.inf
    with contextlib.suppress(OSError):
        system = dict(re.findall(r"(\w+): *(\d+) kB", read("proc", "meminfo")))
        left = 1024 * (int(system["MemAvailable"]) + int(system["SwapFree"]))
    v2, v1 = ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")
    for folder, (limit, usage) in (("sys/fs/cgroup", v2), ("sys/fs/cgroup/memory", v1)):
        with contextlib.suppress(OSError, ValueError):  # "max" is no number
            files = re.search(r"^(?:file|total_cache) (\d+)", read(folder, "memory.stat"), re.MULTILINE)
            left = min(left, int(read(folder, limit)) - int(read(folder, usage)) + int(files[1]))
    return left


def load_model(options: argparse.Namespace) -> tuple[torch.nn.Module, str]:
    """The timm model in eval mode on the CPU, in fp32, and where its weights are from.

    Raises CannotRun where there is no such model, no weights, or a size of inputs that the model does not take.
    """
    name, pretrained = options.model, options.weights == "pretrained"
    if name.startswith("hf-hub:") or pretrained and not name.startswith("local-dir:"):
        check_hub()
    try:
        model = create_model(options, pretrained=pretrained).eval()
    except Exception as error:  # huggingface_hub, its HTTP client, safetensors and timm each have their own
        raise CannotRun(hub_failure(name, error)) from error
    source = f"random, seed {options.seed}"
    if pretrained:
        origin = getattr(model, "pretrained_cfg", {})
        source = f"pretrained, {origin.get('hf_hub_id') or origin.get('url') or name}"
    elif options.weights != "random":
        source = load_weights_file(model, options.weights)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    try:
        if options.weights == "random":
            draw_weights(model, options.seed)
        else:
            with torch.no_grad():
                model(torch.zeros(1, *size))
    except Exception as error:
        images = " x ".join(map(str, size))
        raise CannotRun(f"{name} does not take images of {images} on the CPU: {first_line(error)}") from error
    if options.rope_bf16:
        round_rope_periods(model)
    return model, source


def create_model(options: argparse.Namespace, **more) -> torch.nn.Module:
    """timm's, for images of --input-size: set when the model is made, where it has to be; else it takes any size."""
    name = options.model.removeprefix("timm/")
    if not options.input_size:
        return timm.create_model(name, **more)
    height, width = options.input_size[0], options.input_size[-1]
    try:
        model = timm.create_model(name, img_size=(height, width), **more)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        model = timm.create_model(name, **more)
    channels = model.pretrained_cfg.get("input_size", (3,))[0]
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (channels, height, width)}  # for the transforms
    return model


def check_name(name: str) -> None:
    """Raises CannotRun where timm has no model of this name, with the nearest, or what the name is instead."""
    name = name.removeprefix("timm/")
    known = name.startswith(("hf-hub:", "local-dir:")) or timm.is_model(name.split(".")[0])
    if known and not name.endswith(WEIGHT_FILES):
        return
    names = timm.list_models() + timm.list_pretrained()
    near = ", ".join(difflib.get_close_matches(name, names, n=3, cutoff=0.5))
    advice = f"near: {near}" if near else "timm.list_models() has their names"
    if name.endswith(WEIGHT_FILES) or os.path.exists(name):
        advice = f"it is a path: use --model {'local-dir:FOLDER' if os.path.isdir(name) else 'NAME --weights FILE'}"
    elif found := re.fullmatch(r"dinov([23])_vit([sblg])(\d+)(_reg|_lc)?\w*", name):  # torch.hub's
        size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[found[2]]
        registers = "_reg4" if found[4] == "_reg" else ""
        advice = f"it is torch.hub's name: timm's is vit_{size}_patch{found[3]}{registers}_dinov{found[1]}"
    raise CannotRun(f"timm {timm.__version__} has no model {name!r}; {advice}")


def hub_failure(name: str, error: Exception) -> str:
    """Why the model or its weights could not be had, and what to do about this cause."""
    text = f"{type(error).__name__}: {error}"
    if re.search("No pretrained weights|Invalid pretrained tag", text):
        near = ", ".join(timm.list_pretrained(name.split(".")[0] + "*")[:5]) or "none"
        return f"{first_line(error)}; pretrained variants: {near}; or --weights random or FILE"
    advice = next((advice for pattern, advice in HUB_ERRORS.items() if re.search(pattern, text)), "")
    if not advice:
        return f"timm cannot make {name} ({told(error)})"
    return f"the weights of {name} could not be loaded ({told(error)}): {advice}, or use --weights FILE or random"


def check_hub() -> None:
    """Use only the hub's cache where the hub does not answer in HUB_SECONDS: its client would try for minutes."""
    from huggingface_hub import constants, get_session, utils

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of requests, or of httpx from huggingface_hub 1.0 on
        tell(f"{constants.ENDPOINT} does not answer ({first_line(error)}): looking for the weights in its cache only")
        constants.HF_HUB_OFFLINE = True
        getattr(utils, "reset_sessions", lambda: None)()  # before 1.0 a session keeps what it began with


def load_weights_file(model: torch.nn.Module, path: str) -> str:
    """Load a checkpoint from a file or folder into the model. Returns what was taken from where, for the log.

    Original key names are converted where timm has a filter for the model, and the classes are the file's. Raises
    CannotRun where the file is missing, damaged, not of this model, or no weights to validate a device with.
    """
    file = find_weights_file(path)
    state, taken = unwrap(read_checkpoint(file), model.state_dict())
    taken = [f"file {os.path.basename(file)}", *taken, *check_tensors(file, state)]
    try:
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        state = convert(state, model) if convert else state
    except Exception as error:
        raise CannotRun(f"timm cannot convert the weights file {file}: {first_line(error)}") from error
    classifier = model.pretrained_cfg.get("classifier")
    if isinstance(classifier, str) and getattr(model, "num_classes", 0):
        weight = state.get(f"{classifier}.weight")
        if (classes := 0 if weight is None else len(weight)) != model.num_classes:
            model.reset_classifier(classes)
            taken.append(f"{classes} classes, as in the file")
    wanted = model.state_dict()
    problems = {
        "missing": [key for key in wanted if key not in state],
        "unexpected": [key for key in state if key not in wanted],
        "of another shape": [key for key in state if key in wanted and state[key].shape != wanted[key].shape],
    }
    listed = [f"{len(keys)} {kind} ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"
              for kind, keys in problems.items() if keys]  # fmt: skip
    if listed:
        names = " (these names are those of transformers)" if any("embeddings." in key for key in state) else ""
        raise CannotRun(f"the weights file {file} is of another model than --model: keys {'; '.join(listed)}{names}")
    model.load_state_dict(state)
    return ", ".join(taken)


def find_weights_file(path: str) -> str:
    """The file that path is; of a folder, as git or the hub leaves it, the weights in it, safetensors before others."""
    first = "model.safetensors", "*.safetensors.index.json", "*.safetensors", "pytorch_model.bin", "*.bin.index.json"
    if os.path.isdir(path):
        patterns = [os.path.join(glob.escape(path), name) for name in (*first, *(f"*{end}" for end in WEIGHT_FILES))]
        found = [file for pattern in patterns for file in sorted(glob.glob(pattern))]
        if not found:
            raise CannotRun(f"the folder {path} has no weights: {', '.join(WEIGHT_FILES)} are looked for")
        return found[0]
    if not os.path.isfile(path):
        raise CannotRun(f"{path} does not exist (--weights takes pretrained, random, a file or a folder)")
    return path


def read_checkpoint(path: str) -> dict:
    """What is in a checkpoint, all shards of an index. No code in it runs. Raises CannotRun, with what the file is."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    for begins, kind in (
        (not start, "it is empty"),
        (start.startswith(b"version https://git-lfs"), "it is a Git LFS pointer: run git lfs pull in its folder"),
        (start.startswith(b"<"), "it is a web page: download the file itself"),
        (not path.endswith((".safetensors", ".json")) and not start.startswith((b"PK", b"\x80")),
         "it is no checkpoint of torch.save"),
    ):  # fmt: skip
        if begins:
            raise CannotRun(f"the weights file {path} cannot be read: {kind}")
    try:
        if path.endswith(".json"):
            import json

            with open(path, encoding="utf-8") as file:
                shards = sorted(set(json.load(file)["weight_map"].values()))
            parts = [read_checkpoint(os.path.join(os.path.dirname(path), shard)) for shard in shards]
            return {key: value for part in parts for key, value in part.items()}
        if path.endswith(".safetensors"):
            return safetensors.torch.load_file(path)
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
        reason = f"{told(error)}; it may be cut: copy it again"
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            reason = f"it holds a {found[1]}, not only tensors: save the model's state_dict() instead"
        elif "weights_only" in str(error):
            reason = "it is not plain tensors: save the model's state_dict() instead"
        raise CannotRun(f"the weights file {path} cannot be read: {reason}") from error


def unwrap(checkpoint: dict, wanted: dict) -> tuple[dict, list[str]]:
    """The tensors of a checkpoint by the model's names, and what was taken off, for the log."""
    taken, state = [], checkpoint
    while isinstance(state, dict) and (key := next((key for key in WRAPPERS if isinstance(state.get(key), dict)), "")):
        state = state[key]
        taken.append(f"its {key}")
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    while prefix := next((p for p in PREFIXES if sum(key.startswith(p) for key in state) > len(state) / 2), ""):
        if any(key.startswith(prefix) for key in wanted):
            break
        kept = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        left = f" ({len(state) - len(kept)} others left out)" if len(kept) < len(state) else ""
        state = kept
        taken.append(f"without {prefix}{left}")
    return state, taken


def check_tensors(path: str, state: dict[str, torch.Tensor]) -> list[str]:
    """What the log says of their type. Raises CannotRun where they are quantised, not finite, or all zero."""
    bytes_of_weights = torch.int8, torch.uint8  # not the masks and indices that are saved beside the weights
    matrices = {key: value for key, value in state.items()
                if value.ndim > 1 and (value.is_floating_point() or value.dtype in bytes_of_weights)}  # fmt: skip
    if small := [key for key, value in matrices.items() if value.dtype.itemsize == 1]:
        kind = str(state[small[0]].dtype).removeprefix("torch.")
        raise CannotRun(f"the weights file {path} is quantised ({small[0]} is {kind}), and that is not fp32")
    for key, value in state.items():
        if count := int((~value.isfinite()).sum()):
            total = f"{count} of {value.numel()} values of {key} are NaN or infinite"
            raise CannotRun(f"the weights file {path} is broken, whatever the device: {total}")
    if matrices and not any(value.any() for value in matrices.values()):
        raise CannotRun(f"the weights file {path} is all zeros")
    kinds = {str(value.dtype).removeprefix("torch.") for value in matrices.values()} - {"float32"}
    return [f"from {', '.join(sorted(kinds))}"] if kinds else []


def draw_weights(model: torch.nn.Module, seed: int) -> None:
    """Draw weights with which every block matters to the output, and activations are of order 1, in place.

    timm's own initialisation hides the blocks: LayerScale of 1e-5, zeroed BatchNorms, and matrices so small that
    attention is uniform. Here scales are about 1, biases small, tokens and positions of order 1. Matrices and BatchNorm
    statistics get a power of two each, in a pass over two images: layer-sequential unit variance (arXiv:1511.06422).
    Powers of two do not depend on the order of sums, so the weights are the same on every host.
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

    def scale(module, args, output):  # at the first call: what comes behind sees the scaled output
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
        model(draw_images(2, timm.data.resolve_model_data_config(model)["input_size"], seed))
    for handle in handles.values():
        handle.remove()


def round_rope_periods(model: torch.nn.Module) -> None:
    """Round the RoPE periods to bfloat16, in place: so the original DINOv3 stores them. timm computes them in fp32."""
    modules = [module for module in model.modules() if isinstance(getattr(module, "periods", None), torch.Tensor)]
    if not modules:
        raise CannotRun("--rope-bf16: this model has no RoPE periods")
    for module in modules:
        module.periods = module.periods.to(torch.bfloat16).to(torch.float32)


def draw_images(count: int, size: tuple[int, int, int], seed: int) -> torch.Tensor:
    """Seeded images, (count, *size), fp32: the same on every device, and the first ones of any longer draw.

    Fine noise over coarse patches, of variance 1: pooled over the image, plain noise looks the same in every image.
    """
    generator = torch.Generator().manual_seed(seed)
    images = []
    for _ in range(count):
        coarse = torch.randn(1, size[0], 8, 8, generator=generator)
        fine = torch.randn(1, *size, generator=generator)
        images.append((torch.nn.functional.interpolate(coarse, size[1:]) + fine) / math.sqrt(2))
    return torch.cat(images)


def picture_files(given: list[str]) -> list[str]:
    """The files that --image names: files, folders and patterns. Raises CannotRun where there is none."""
    files = []
    for name in given:
        if os.path.isdir(name):
            found = [file for file in sorted(os.listdir(name)) if file.lower().endswith(PICTURE_FILES)]
            found, problem = [os.path.join(name, file) for file in found], f"the folder {name} has no pictures"
        else:
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            problem = f"the picture {name} does not exist"
        if not found:
            raise CannotRun(problem)
        files += found
    return list(dict.fromkeys(files))


def load_picture(path: str, transform: Callable, mode: str) -> torch.Tensor:
    """A picture through the model's own timm transforms, (C, H, W), fp32, read as timm's reader does. mode: Pillow's.

    Raises CannotRun where it cannot be read, or where nothing is left of it: 16 bits or floats in 8 are black or white.
    """
    from PIL import Image

    try:
        picture = Image.open(path)
        low, high = picture.getextrema() if picture.mode[0] in "IF" else (0, 255)  # of wide integers, or floats
        picture = transform(picture.convert(mode))
    except Exception as error:  # each of Pillow's readers has its own
        raise CannotRun(f"the picture {path} cannot be read: {told(error)}") from error
    if low < 0 or high > 255 or high <= 1:
        raise CannotRun(f"the picture {path} has values from {low:g} to {high:g}; in 8 bits it is black or white")
    return picture


def load_pictures(given: list[str], config: dict) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and pictures one by one, with a progress bar where there are many. One that is given twice counts once."""
    from tqdm import tqdm

    channels = config["input_size"][0]
    if channels not in PICTURE_MODES:
        raise CannotRun(f"the model takes images of {channels} channels, which pictures do not have")
    paths = picture_files(given)
    transform, seen = timm.data.create_transform(**config, is_training=False), set()
    for path in tqdm(paths, desc="pictures", leave=False, disable=True if len(paths) < 16 else None):
        picture = load_picture(path, transform, PICTURE_MODES[channels])
        if (digest := sha256({"picture": picture})) not in seen:
            seen.add(digest)
            yield os.path.basename(path), picture


def sha256(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in order."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


# --- Stage 3: outputs -------------------------------------------------------------------------------------------------

def outputs_stage(run: Run) -> Iterator[Entry]:
    """Every output of every batch has the right shape and range, and a row of a batch equals that image alone."""
    alone = {id(images): one_by_one(run, images) for images in (run.images, run.pictures) if images is not None}
    repeats, rows = [], {}  # repeats: the same computation a second time; rows: by output, against alone
    yield OUTPUTS.header("output")
    for batch, images in run.batches():
        singles, again = alone[id(run.pictures if images is run.pictures else run.images)], None
        try:
            inputs = images.to(run.device)
            outputs = forward_outputs(run.model.device, inputs, run.maps)
            with torch.inference_mode():
                again = to_host(run.model.device(inputs))
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
            yield Entry(WARN, f"batch {batch}", "", OUT_OF_MEMORY, FREE_MEMORY)
        if again is None:
            require_working(run.device, f"it ran out of memory with batch {batch}")
            continue
        for name, output in outputs.items():
            yield judge_output(name, batch, output, run.references.exact[name].shape[1:])
            if len(images) > 1:
                rows.setdefault(name, []).append((compare(output, singles[name][: len(images)]), f"batch {batch}"))
        repeats.append((compare(again, outputs.get("logits", outputs["embedding"])), f"model(x), batch {batch}"))
        if batch == "1":
            repeats += [(compare(run.first[name], outputs[name]), f"first call, {name}") for name in run.first]
        elif images is not run.pictures and len(images) > len(run.outputs):
            run.outputs = again

    yield ERRORS.header("the same twice")
    advice = f"stage 4 says where it begins; {DEVICE_LOG}"
    for name, found in rows.items():
        worst, batch = max(found, key=lambda pair: pair[0].size)
        yield judged(name, "row alone", worst, run.references.limit(name), advice, where=batch)
    # Deterministic algorithms were asked for, so the same computation twice is to be equal bit for bit.
    worst, what = max(repeats, key=lambda pair: pair[0].size)
    advice = "the device does not repeat itself, although deterministic algorithms were asked for: is the card healthy?"
    yield judged("repeat", "bit for bit", worst, run.references.limit()._replace(warn=0.0), advice, where=what)


def one_by_one(run: Run, images: torch.Tensor) -> dict[str, np.ndarray]:
    """The outputs of each image in a batch of its own, one below the other."""
    singles = [forward_outputs(run.model.device, image[None].to(run.device), run.maps) for image in images]
    return {name: np.concatenate([single[name] for single in singles]) for name in singles[0]}


def forward_outputs(model, images: torch.Tensor, maps: FeatureMaps | None = None) -> dict[str, np.ndarray]:
    """The outputs of one forward pass, on the host. The images are on the model's device and in its dtype.

    "embedding", (B, C); "logits" where there is a classifier; "tokens", (B, N, C), or "unpooled" where a model has no
    tokens, numbered where it has several; and "feature map 1" and so on, (B, C, H, W), or (B, H, W, C) where timm's
    features_only has it so.
    """
    with torch.inference_mode():
        if maps and maps.in_one_pass:
            unpooled, found = model.forward_intermediates(images, indices=maps.indices)
        else:
            unpooled = model.forward_features(images)
            found = model.forward_intermediates(images, indices=maps.indices, intermediates_only=True) if maps else []
        try:
            outputs = {"embedding": model.forward_head(unpooled, pre_logits=True)}
        except NotImplementedError:  # an encoder that has no head: model(x) is what it gives
            outputs = {"embedding": model(images)}
        if getattr(model, "num_classes", 0):
            outputs["logits"] = model.forward_head(unpooled)
        if isinstance(unpooled, torch.Tensor):
            outputs["tokens" if unpooled.ndim == 3 else "unpooled"] = unpooled
        else:
            outputs |= {f"unpooled {i}": output for i, output in enumerate(unpooled, 1)}
        order = (0, 2, 3, 1) if maps and maps.channels_last else (0, 1, 2, 3)
        outputs |= {f"feature map {i}": output.permute(order) for i, output in enumerate(found, 1)}
        return {name: to_host(output) for name, output in outputs.items()}


class FeatureMaps(NamedTuple):
    """Which of the model's intermediate features features_only=True gives."""

    indices: list[int]  # of forward_intermediates
    channels_last: bool
    in_one_pass: bool  # forward_intermediates gives what forward_features does, too


def find_feature_maps(run: Run) -> FeatureMaps | None:
    """Ask timm which feature maps features_only=True gives, on the meta device, where weights take no memory.

    The maps themselves come from the model's own forward_intermediates. None where timm has none for this model.
    """
    model, image = run.model.cpu, run.images[:1]
    try:
        with torch.device("meta"):
            maps = create_model(run.options, features_only=True)
        info, last = maps.feature_info, str(getattr(maps, "output_fmt", "NCHW")).endswith("NHWC")
        with torch.no_grad():
            unpooled = model.forward_features(image)
            final, _ = model.forward_intermediates(image, indices=info.out_indices)
        same = isinstance(unpooled, torch.Tensor) and torch.equal(unpooled, final)
        return FeatureMaps(list(info.out_indices), last, same)
    except (RuntimeError, AttributeError, AssertionError, NotImplementedError, TypeError, ValueError):
        return None


def judge_output(name: str, batch: str, output: np.ndarray, expected: tuple[int, ...]) -> Entry:
    """A line of the table: the shape is the CPU's, all is finite, nothing is collapsed, images differ.

    expected: the shape of one image's output on the CPU.
    """
    rows, problems = np.asarray(output, np.float64).reshape(len(output), -1), []
    if output.shape[1:] != expected:
        problems.append(f"the shape should be {shape_text((len(output), *expected))}")
    if nonfinite := np.count_nonzero(~np.isfinite(rows)):
        problems.append(f"{nonfinite} of {rows.size} values are NaN or infinite")
    elif rows.shape[1] > 1 and rows.std(axis=1).min() == 0:
        problems.append("collapsed: all values of an image are equal")
    elif len(rows) > 1:
        distance = float(torch.pdist(torch.from_numpy(rows)).min()) / np.linalg.norm(rows, axis=1).max()
        if distance < DISTINCT_REL_L2:
            problems.append(f"different images give the same output (relative distance {distance:.1e})")
    figures = rows.min(), rows.max(), rows.mean(), rows.std()
    text = OUTPUTS.row(batch, shape_text(output.shape), str(output.dtype), *figures)
    advice = f"stage 4 compares with the CPU and says where it begins; {DEVICE_LOG}"
    return Entry(FAIL if problems else PASS, name, text, f"batch {batch}: {'; '.join(problems)}", advice)


# --- Stage 4: precision -----------------------------------------------------------------------------------------------

def precision_images(run: Run) -> torch.Tensor:
    """The images that the device is compared with the CPU on, (B, C, H, W): seeded ones, then the first pictures."""
    images = draw_images(PRECISION_IMAGES, run.images.shape[1:], run.options.seed)
    return images if run.pictures is None else torch.cat([images, run.pictures])


def precision_stage(run: Run) -> Iterator[Entry]:
    """The same weights and images on the device and on the CPU: each output in each mode, then module by module.

    Two questions about float32. Is it right? Reduced-precision float32 (HF32, TF32) is switched off, and the CPU's
    float32 error is the unit: rows "float32 strict". Does it cost what it should, as users run it? The expected cost is
    the unit: rows "float32".
    """
    yield from (Entry(SKIP, mode.name, "", reason) for mode, reason in run.lacking.items())
    started, images, cpu = time.perf_counter(), precision_images(run), run.references
    as_run = forward_outputs(run.model.device, images.to(run.device), run.maps)
    strict = run_strict(run, images, as_run)
    modules = compare_modules(run, images[:MODULE_IMAGES], strict)
    control = list(compare_control(run, images[:1], modules, strict))
    yield ERRORS.header("error")
    if run.device.type == "cpu":
        yield Entry(FACT, "note", "a rehearsal compares the CPU with itself")
    yield from judge_strict(run, strict, as_run, modules)
    yield from compare_modes(run, images, as_run, modules)
    yield from published_figures(run, as_run["embedding"], cpu)
    if run.picture_count:
        yield from compare_answers(run, cpu)
    yield from judge_modules(modules)
    yield from control
    seconds = time.perf_counter() - started + cpu.seconds
    passes = f"{seconds:.1f} s, {seconds / cpu.plain_seconds:.1f} forward passes on the CPU, its references included"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / GIB
    yield Entry(VARIES, "this stage", f"{passes}; peak of host memory until here {peak:.1f} GiB")


class References(NamedTuple):
    """The CPU's outputs for stage 4's images, as forward_outputs gives them, and what they say about errors."""

    exact: dict[str, np.ndarray]  # fp64
    expected: dict[str, np.ndarray]  # fp64, with the device's form of GELU: what is compared with
    reduced: dict[str, np.ndarray]  # fp64, with operands rounded to the documented precision as well
    plain: dict[str, np.ndarray]  # fp32
    errors: dict[str, float]  # e: the CPU's own fp32 error (worst row)
    costs: dict[str, float]  # C: the expected cost, how far `reduced` is from `expected` (worst row)
    seconds: float = 0.0  # that all of them took
    plain_seconds: float = 0.0

    @property
    def main(self) -> str:
        """The output of model(x)."""
        return "logits" if "logits" in self.exact else "embedding"

    def limit(self, name: str = "", cost: float | None = None) -> Limit:
        """Of the distance between two outputs in fp32, of which each may cost C. name: of the output, else model(x)'s."""
        name = name or self.main
        return fp32_limit(self.errors[name], self.costs[name] if cost is None else cost)


def fp32_limit(error: float, cost: float) -> Limit:
    """See ERROR_FACTORS. error, cost: relative L2 errors, e and C."""
    error = max(error, 2**-24)
    return Limit(*(share * cost + times * error for share, times in zip(COST_FACTORS, ERROR_FACTORS)))


def worst_rows(outputs: dict[str, np.ndarray], references: dict[str, np.ndarray]) -> dict[str, float]:
    """The relative L2 error of the worst row, by output."""
    return {name: 0.0 if output is references[name] else compare(output, references[name]).row
            for name, output in outputs.items()}  # fmt: skip


def reference_outputs(run: Run, images: torch.Tensor) -> References:
    """At most three passes in fp64, and one in fp32. Raises RuntimeError where products are hidden from them."""
    started = time.perf_counter()
    plain = forward_outputs(run.model.cpu, images, run.maps)
    plain_seconds = time.perf_counter() - started
    with emulated_precision(gelu=run.probe.gelu) as seen:
        expected = exact = fp64_outputs(run, images)
    if not seen.products:
        raise RuntimeError("no convolution or matrix product of this model was seen, so none can be rounded")
    if seen.gelus:
        exact = fp64_outputs(run, images)
    reduced = reduced_outputs(run, images, run.probe, run.documented, seen.products.keys()) or expected
    errors, costs = worst_rows(plain, exact), worst_rows(reduced, expected)
    return References(exact, expected, reduced, plain, errors, costs, time.perf_counter() - started, plain_seconds)


def reduced_outputs(run: Run, images: torch.Tensor, probe: Probe, documented: dict, kinds: Iterable[str]) -> dict | None:
    """fp64 with operands rounded to the documented precision; None where no product of these kinds is rounded."""
    rounding = {kind: how for kind, how in probe.rounding(documented).items() if kind in kinds}
    if not rounding:
        return None
    with emulated_precision(rounding, run.probe.gelu):
        return fp64_outputs(run, images)


def fp64_outputs(run: Run, images: torch.Tensor) -> dict[str, np.ndarray]:
    with widened(run.model.cpu) as double:
        return forward_outputs(double, images.double(), run.maps)


@contextlib.contextmanager
def widened(model: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Inside, the model computes in fp64, without a second copy of its weights. After it they are what they were."""
    dtypes = [tensor.dtype for tensor in tensors_of(model)]
    try:
        yield without_caches(model.double())
    finally:
        for tensor, dtype in zip(tensors_of(model), dtypes):
            tensor.data = tensor.data.to(dtype)
        without_caches(model)


def without_caches(model: torch.nn.Module) -> torch.nn.Module:
    """The same model. Some of timm's keep attention biases in the type that the weights had, until they are trained."""
    model.train()
    model.eval()
    return model


def tensors_of(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


class Strict(NamedTuple):
    """The device with reduced-precision float32 switched off, and how modules are compared then."""

    outputs: dict[str, np.ndarray] | None = None  # None too where nothing is reduced, so that float32 is strict
    reason: str = ""  # why the device cannot do that
    rounding: dict[str, Arithmetic] = {}  # what the CPU rounds modules to then
    again: dict[str, dict[str, bool]] = {}  # mode -> switches with which modules of the kinds that are on run again

    @property
    def limit(self) -> Limit:
        return MODULE_REDUCED if self.reason else MODULE


def run_strict(run: Run, images: torch.Tensor, as_run: dict[str, np.ndarray]) -> Strict:
    """as_run: the device's outputs with its default switches."""
    cpu, switches = run.references, reduced_fp32_switches(run.device)
    reduced = " ".join(sorted(set(run.documented.values()) - {"float32"}))
    if "float16" in reduced:
        return Strict(reason=f"{run.device} has no float32 products", rounding=run.probe.rounding(run.documented))
    again = {mode.name: dict.fromkeys(switches, True) for mode in run.modes if mode == MODES["hf32"]}
    if not reduced:
        return Strict(again=again)
    try:
        with strict_fp32(run.device):
            outputs = forward_outputs(run.model.device, images.to(run.device), run.maps)
    except RuntimeError as error:
        if not still_computes(run.device):
            raise
        return Strict(reason=f"{reduced} cannot be switched off: {explain(error)}")
    if all(np.array_equal(outputs[name], as_run[name]) for name in as_run):
        errors = worst_rows(as_run, cpu.expected)
        explained = all(error <= cpu.limit(name).warn for name, error in errors.items())
        if explained and any(error > cpu.limit(name, 0.0).warn for name, error in errors.items()):
            return Strict(reason=f"the switches change nothing: float32 is {reduced} with each setting")
    return Strict(outputs, again={"float32": {kind: getattr(*switch) for kind, switch in switches.items()}} | again)


def judge_strict(run: Run, strict: Strict, as_run: dict[str, np.ndarray], modules: list[Module]) -> Iterator[Entry]:
    """Is the device's float32 right? The limit is a multiple of the CPU's own error."""
    if strict.reason:
        yield Entry(SKIP, "float32 strict", "", strict.reason)
    if strict.outputs is None:
        return
    cpu, marks = run.references, set()
    for name, output in strict.outputs.items():
        entry = judge_error(run, "float32 strict", name, output, (0.0, cpu.errors[name], cpu.limit(name, 0.0)), modules)
        marks.add(entry.mark)
        yield entry
    if all(np.array_equal(strict.outputs[name], as_run[name]) for name in as_run):
        yield Entry(FACT, "switches", "outputs are equal bit for bit with each setting: float32 in full")
    if marks - {PASS}:
        every = dict.fromkeys(PROBES, DOCUMENTED["TF32"])
        with emulated_precision(every, run.probe.gelu):
            costs = worst_rows(fp64_outputs(run, precision_images(run)), cpu.expected)
        text = f"rounding the operands of all products to 10 bits would move {cpu.main} by {costs[cpu.main]:.1e}"
        yield Entry(FACT, "fewer bits", text)


def compare_modes(
    run: Run, images: torch.Tensor, as_run: dict[str, np.ndarray], modules: list[Module]
) -> Iterator[Entry]:
    """The table of errors by mode. as_run: the device's outputs in float32."""
    cpu, main = run.references, run.references.main
    single = {name: (cpu.costs[name], cpu.errors[name], cpu.limit(name)) for name in run.first}
    for name, output in run.first.items():  # which no batch of stage 3 may be compared with
        yield judge_error(run, "float32 alone", name, output, single[name], modules)
    for mode in dict.fromkeys(MODES[mode.base] for mode in run.modes):
        try:
            outputs, units = as_run, mode_units(run, mode, images)
            if mode != FLOAT32:
                with run.in_mode(mode) as model, mode.active(run.device):
                    outputs = forward_outputs(model, images.to(run.device, mode.dtype), run.maps)
        except RuntimeError as error:
            if not still_computes(run.device):
                raise
            yield Entry(FAIL, mode.name, "", explain(error), DEVICE_LOG)  # one mode that fails does not end the others
            continue
        marks = []
        for name, output in outputs.items():
            entry = judge_error(run, mode.name, name, output, units[name], modules, mode.amp or mode.half)
            marks.append(entry.mark)
            yield entry
        if FAIL not in marks:
            run.errors[mode.base] = compare(outputs[main], cpu.exact[main]).row
        # Timed outputs are compared with stage 3's in float32, which may cost C as well.
        run.limits[mode.base] = Limit(*map(max, units[main][2], cpu.limit()))


def mode_units(run: Run, mode: Mode, images: torch.Tensor) -> dict[str, tuple[float, float, Limit]]:
    """By output: the expected cost, the error of the CPU, and the limit that follows from them.

    In half precision the error is that of the CPU in the same mode, with the device's form of GELU, and the limit a
    multiple of it.
    """
    cpu = run.references
    if not mode.in_half:
        costs = cpu.costs
        if mode.hf32:
            with mode.active(run.device):
                documented, probe = fp32_arithmetic(run.device), probe_device(run)
            costs = worst_rows(reduced_outputs(run, images, probe, documented, PROBES) or cpu.expected, cpu.expected)
        return {name: (costs[name], cpu.errors[name], cpu.limit(name, costs[name])) for name in costs}
    model = without_caches(copy.deepcopy(run.model.cpu).to(mode.dtype)) if mode.half else run.model.cpu
    with emulated_precision(gelu=run.probe.gelu), mode.active(torch.device("cpu")):
        half = forward_outputs(model, images.to(mode.dtype), run.maps)
    errors = worst_rows(half, cpu.expected)
    return {name: (0.0, error, Limit(OWN_WARN * error, OWN_FAIL * error)) for name, error in errors.items()}


def judge_error(
    run: Run, mode: str, name: str, output: np.ndarray, units: tuple[float, float, Limit], modules: list[Module],
    half: str = "",
) -> Entry:  # fmt: skip
    """A line of the table: an output of the device, of as many images as the references have, or fewer."""
    cpu, (cost, error, limit) = run.references, units
    found = compare(output, cpu.expected[name][: len(output)])
    first = next((module.name for module in modules if module.outcome != PASS), "")
    if not any(module.outcome == FAIL for module in modules):
        limit = limit._replace(fail=max(limit.fail, UNEXPLAINED))
    against = compare(output, cpu.exact[name][: len(output)]).row, cost, error
    begins = f"it begins in {first}" if first else "amplified by the model, or outside the modules, which are all right"
    entry = judged(name, mode, found, limit, f"{begins}; {DEVICE_LOG}", against=against)
    floor = cpu.errors[name]
    if not math.isfinite(limit.fail):
        problem = f"not judged: it overflows in {half or 'float16'} on the CPU as well"
        advice = "the model's range is too large for float16: use bfloat16"
    elif math.isfinite(found.row) and (floor > CANNOT_JUDGE or cost > COST_CANNOT_JUDGE):
        what = f"the CPU's own fp32 is as far off ({floor:.1e})" if floor > CANNOT_JUDGE else f"rounding costs {cost:.1e}"
        problem, advice = f"not judged: {what}", "use weights for which fp32 is enough"
    else:
        return entry
    run.report.unjudged += 1
    return entry._replace(mark=WARN, problem=problem, advice=advice)


def compare_answers(run: Run, cpu: References) -> Iterator[Entry]:
    """What users ask of all the pictures: classes, or nearest neighbours where there is no classifier.

    The device and the CPU may disagree where the CPU's own margin is smaller than what the device's arithmetic, or
    fp32, explains: ANSWER_FACTOR times the error that they make on the images of this stage.
    """
    name = "logits" if "logits" in cpu.exact else "embedding"
    pictures = load_pictures(run.options.image, timm.data.resolve_model_data_config(run.model.cpu))
    names, outputs = [], ([], [])
    while batch := list(itertools.islice(pictures, PICTURE_BATCH)):
        names += [name for name, _ in batch]
        inputs = torch.stack([picture for _, picture in batch])
        with torch.inference_mode():
            for part, output in zip(outputs, (run.model.cpu(inputs), run.model.device(inputs.to(run.device)))):
                part.append(to_host(output).reshape(len(batch), -1))
    right, found = (np.concatenate(part).astype(np.float64) for part in outputs)
    alone, plain = (compare(getattr(cpu, which)[name], cpu.exact[name]) for which in ("reduced", "plain"))
    if right.shape[1] == 1:
        yield Entry(SKIP, "top-1", "", "the model has one class")
    elif name == "logits":
        yield judge_answers("top-1", names, right, found, ANSWER_FACTOR * (alone.max_abs + plain.max_abs))
        yield from label_pictures(run, names[:PICTURES], right, found)
    elif len(right) > 2:
        rows = [outputs / np.linalg.norm(outputs, axis=1, keepdims=True) for outputs in (right, found)]
        cosines = [row @ row.T - 3 * np.eye(len(row)) for row in rows]  # no picture is its own neighbour
        yield judge_answers("nearest", names, *cosines, ANSWER_FACTOR * (alone.row + plain.row))


def judge_answers(what: str, names: list[str], right: np.ndarray, found: np.ndarray, explained: float) -> Entry:
    """Whether the largest of each row is the same. explained: a margin below which the device may choose another."""
    if not math.isfinite(explained):
        return Entry(SKIP, what, "", OVERFLOWS)
    order = np.argsort(-right, axis=1)
    chosen, rows = np.argmax(found, axis=1), np.arange(len(right))
    margins = right[rows, order[:, 0]] - right[rows, order[:, 1]]
    lost = right[rows, order[:, 0]] - right[rows, chosen]
    lost[~np.isfinite(found).all(axis=1)] = np.inf
    wrong = np.flatnonzero(~(lost <= explained))
    agree = int(np.sum(chosen == order[:, 0]))
    text = f"{agree} of {len(right)} pictures agree with the CPU; smallest margin {margins.min():.2e}"
    text += f", and below {explained:.1e} either may be chosen"
    problem = f"{len(wrong)} of {len(right)} pictures differ from the CPU by margins up to {lost.max():.1e}"
    problem += f", and the arithmetic explains {explained:.1e}: {', '.join(names[i] for i in wrong[:5])}"
    return Entry(FAIL if len(wrong) else PASS, what, text, problem, DEVICE_LOG)


def label_pictures(run: Run, pictures: list[str], right: np.ndarray, found: np.ndarray) -> Iterator[Entry]:
    """The first pictures' classes with their probabilities, by timm's names of ImageNet's classes."""
    subset = timm.data.infer_imagenet_subset(run.model.cpu)
    names = timm.data.ImageNetInfo(subset).index_to_description if subset else "class {}".format
    for picture, *logits in zip(pictures, right, found):
        texts = []
        for place, row in zip(("CPU", run.device.type), logits):
            probabilities = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            best = int(np.argmax(row))
            texts.append(f"{names(best).split(',')[0]} {probabilities[best]:.3f} on {place}")
        yield Entry(FACT, "picture", f"{picture}: {', '.join(texts)}")


def published_figures(run: Run, embedding: np.ndarray, cpu: References) -> Iterator[Entry]:
    """What the documented precision costs, and the checks of published adaptations: facts, which judge nothing."""
    reduced = next((kind for kind in run.documented.values() if kind != "float32"), "")
    gelu = compare(cpu.expected["embedding"], cpu.exact["embedding"]).row
    costs = {"GELU": gelu, reduced: cpu.costs["embedding"]}
    texts = [f"{what} moves it by {cost:.1e}{AVOIDED[what]}" for what, cost in costs.items() if cost]
    if texts:
        yield Entry(FACT, "cost", f"embedding, worst row: {'; then '.join(texts)}")
    found, alone = (compare(output, cpu.plain["embedding"]) for output in (embedding, cpu.reduced["embedding"]))
    what = f"embedding, {run.device.type} float32 against cpu float32"
    limit = CARD_MAX_ABS * max(1.0, found.reference_rms)
    text = f"{what}: mean abs {found.mean_abs:.2e}, cosine {found.cosine:.7f}, max abs {found.max_abs:.2e}"
    yield Entry(FACT, "card's check", text + met(found.max_abs, limit, alone.max_abs))
    text = f"{what}: rel L2 {found.rel_l2:.2e}"
    yield Entry(FACT, "error below 1 %", text + met(found.rel_l2, REVIEW_REL_L2, alone.rel_l2))


def met(error: float, limit: float, alone: float) -> str:
    """alone: the error that the device's arithmetic alone gives."""
    outcome = "met" if error <= limit else "not met"
    return f" (limit {limit:.1e}: {outcome}; the device's arithmetic alone gives {alone:.2e})"


@dataclasses.dataclass(frozen=True)
class Module:
    """One module of the device's model on the CPU's own inputs, against the CPU's output."""

    name: str  # "blocks.3.attn"
    kind: str  # "EvaAttention"
    single: bool  # it has no parts
    limit: Limit
    difference: Difference
    mode: str = ""  # "float32" or "hf32" where it ran with reduced-precision float32, beside strict

    @property
    def outcome(self) -> str:
        return self.limit.judge(self.difference)


def compare_modules(run: Run, images: torch.Tensor, strict: Strict, only: str = "") -> list[Module]:
    """Run each module also on the device, on the CPU's own inputs, so that an error shows where it arises.

    One forward pass on the CPU with hooks. Nothing is kept but figures. Composite modules (attention, MLP, blocks) are
    run as a whole, too: what they compute between their parts is in no other module.
    """
    passive = (torch.nn.Identity, torch.nn.Dropout, torch.nn.ModuleList, torch.nn.Sequential, torch.nn.Flatten)
    names = {m: name for name, m in run.model.cpu.named_modules()
             if name and only in ("", name) and not isinstance(m, passive)}  # fmt: skip
    found, calls = [], []  # calls: a stack, because modules contain modules

    def record(module, actual, expected, mode: str = "") -> None:
        if isinstance(actual, torch.Tensor) and isinstance(expected, torch.Tensor):
            difference = compare(np.atleast_2d(to_host(actual)), np.atleast_2d(to_host(expected)))
            limit = MODULE_REDUCED if mode else strict.limit
            single = not any(module.children())
            found.append(Module(names[module], type(module).__name__, single, limit, difference, mode))

    def before(module, args, kwargs) -> None:  # before the CPU's turn, because a module may overwrite its input
        # On the CPU a copy. torch_npu takes no channels_last tensor from the host.
        move = torch.clone if run.device.type == "cpu" else lambda x: x.contiguous().to(run.device)
        on_device = run.model.device.get_submodule(names[module])
        inputs = [torch.utils._pytree.tree_map_only(torch.Tensor, move, (args, kwargs)) for _ in range(2)]
        calls.append((on_device(*inputs[0][0], **inputs[0][1]), inputs[1], dict(seen.products)))

    def after(module, args, kwargs, output) -> None:
        actual, (args, kwargs), products = calls.pop()
        record(module, actual, output)
        kinds = {kind for kind, count in seen.products.items() if count > products.get(kind, 0)}
        for mode, allowed in strict.again.items() if not any(module.children()) else ():
            if any(allowed[kind] for kind in kinds):
                with allow_reduced_fp32(run.device, allowed):
                    again = run.model.device.get_submodule(names[module])(*args, **kwargs)
                record(module, again, output, mode)

    with emulated_precision(strict.rounding, run.probe.gelu) as seen, torch.inference_mode():
        with contextlib.nullcontext() if strict.reason else strict_fp32(run.device):
            # RoPE has no forward pass of its own: the model asks for its table, and every attention uses it.
            grid = getattr(getattr(run.model.cpu, "patch_embed", None), "grid_size", None)
            for module in (m for m in names if hasattr(m, "get_embed") and grid):
                on_device = run.model.device.get_submodule(names[module])
                record(module, on_device.get_embed(shape=grid), module.get_embed(shape=grid))
            handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in names]
            handles += [m.register_forward_hook(after, with_kwargs=True) for m in names]
            try:
                outputs = forward_outputs(run.model.cpu, images)
            finally:
                for handle in handles:
                    handle.remove()
            unpooled = outputs.get("tokens", outputs.get("unpooled"))
            if not only and unpooled is not None:  # the pooling is in no module
                names[run.model.cpu] = "forward_head"
                on_device = torch.from_numpy(np.ascontiguousarray(unpooled)).to(run.device)
                with contextlib.suppress(NotImplementedError):
                    pooled = run.model.device.forward_head(on_device, pre_logits=True)
                    record(run.model.cpu, pooled, torch.from_numpy(outputs["embedding"]))
    return found


def compare_control(run: Run, images: torch.Tensor, modules: list[Module], strict: Strict) -> Iterator[Entry]:
    """The control that must be noticed: a weight of the device is scaled for one comparison, and put back."""
    plain = (torch.nn.Linear, torch.nn.Conv2d)  # a subclass may normalise its weight
    name = next((m.name for m in modules if type(run.model.cpu.get_submodule(m.name)) in plain), None)
    if name is None:
        yield Entry(SKIP, "control", "", "the model calls no plain linear or convolution to alter")
        return
    weight = run.model.device.get_submodule(name).weight.data
    saved = weight.clone()
    try:
        weight.mul_(CONTROL_SCALE)
        control = compare_modules(run, images, strict._replace(again={}), only=name)[0]
    finally:
        weight.copy_(saved)
    outcome, said = (FAIL, "not noticed") if control.outcome == PASS else (PASS, "noticed, as it must be")
    text = f"weight of {name} scaled by {CONTROL_SCALE}: off by {control.difference.row:.1e}, {said}"
    advice = "do not trust this validation: its module check cannot tell"
    yield Entry(outcome, "control", text, "an error of 1 % in a weight matrix was not noticed", advice)


def judge_modules(modules: list[Module]) -> Iterator[Entry]:
    """A line for each kind of module, with the worst of its kind."""
    yield ERRORS.header("module, cpu's inputs")
    first = next((module.name for module in modules if module.outcome != PASS), "")
    wrong = {module.kind for module in modules if module.single and module.outcome != PASS}
    for kind, mode in dict.fromkeys((module.kind, module.mode) for module in modules):
        group = [module for module in modules if (module.kind, module.mode) == (kind, mode)]
        worst = max(group, key=lambda module: module.difference.size)
        operator = f"an operator of {kind} is wrong: run {worst.name} alone on both"
        advice = f"{operator if wrong == {kind} else f'first out of limits: {first}'}; {DEVICE_LOG}"
        what = f"{mode or 'worst'} of {len(group)}"
        yield judged(kind, what, worst.difference, worst.limit, advice, where=worst.name)


# --- The device's arithmetic: measured, and emulated on the CPU -------------------------------------------------------


class Arithmetic(NamedTuple):
    """How the operands of a product in fp32 are rounded: to so many explicit bits of mantissa. 23: not at all."""

    bits: int = 23
    rounding: str = ""  # "half away", "half even" or "truncated"
    name: str = ""

    def __str__(self) -> str:
        return f"{self.bits} bits{f' ({self.name}, {self.rounding})' if self.name else ''}"

    def round(self, x: torch.Tensor) -> torch.Tensor:
        """x, rounded; float32 and float64 only, because the half types have no more bits than this."""
        if self.bits == 23 or x.dtype not in (torch.float32, torch.float64):
            return x
        if self.name == "float16":
            return x.to(torch.float16).to(x.dtype)
        integer, mantissa = (torch.int32, 23) if x.dtype == torch.float32 else (torch.int64, 52)
        bits, dropped = x.contiguous().view(integer), mantissa - self.bits
        if self.rounding == "half away":  # from zero: the sign is a bit of its own
            bits = bits + (1 << (dropped - 1))
        elif self.rounding == "half even":
            bits = bits + (1 << (dropped - 1)) - 1 + ((bits >> dropped) & 1)
        return (bits & -(1 << dropped)).view(x.dtype)


EXACT = Arithmetic()
# What is recognised. HF32 keeps 11 bits on the 910B, and 10 on the other chips that have it (Huawei's own golden).
ARITHMETICS = [EXACT, *(Arithmetic(bits, rounding, "HF32" if bits == 11 else "HF32 or TF32")
                        for bits in (11, 10) for rounding in ("half away", "half even", "truncated"))]  # fmt: skip
FLOAT16 = Arithmetic(10, "half even", "float16")
# What counts where a probe of the device does not tell it. HF32 has 11 bits or 10: fewer cost more.
DOCUMENTED = {name: Arithmetic(10, "half even", name) for name in ("HF32", "TF32", "float16")}


@dataclasses.dataclass(frozen=True)
class Probe:
    """What the device computes large products of fp32 operands, and GELU, in.

    No probe tells what a layer of the model is computed in, because a library chooses its kernels by shape, batch and
    layout. This one tells how operands are rounded where they are.
    """

    products: dict[str, tuple[Arithmetic | None, Difference]]  # see recognise(), by kind: a key of PROBES
    gelu: dict[str, str]  # the form of GELU by the form that is asked for: CANN's is tanh for both
    gelu_errors: dict[str, float]  # how far it is from that form, the largest absolute error

    def rounding(self, documented: dict[str, str]) -> dict[str, Arithmetic]:
        """How operands are rounded, of the kinds of products that are documented to be rounded."""
        rounding = {}
        for kind, name in documented.items():
            found = self.products.get(kind, (None,))[0]
            if name != "float32":
                known = found and found.bits < 23 and (found.name == "float16") == (name == "float16")
                rounding[kind] = found if known else DOCUMENTED[name]
        return rounding

    def __str__(self) -> str:
        texts = [f"{kind} {arithmetic or f'not recognised (off by {found.rel_l2:.1e})'}"
                 for kind, (arithmetic, found) in self.products.items()]  # fmt: skip
        forms = {"none": "erf", "tanh": "tanh"}
        form = " ".join(dict.fromkeys(forms[form] for form in self.gelu.values()))
        if max(self.gelu_errors.values()) > GELU_RECOGNISED:
            form = f"not recognised (off by {max(self.gelu_errors.values()):.1e})"
        elif all(form == asked for asked, form in self.gelu.items()):
            form = "as asked"
        return ", ".join([*texts, f"GELU {form}"])


def probe_device(run: Run) -> Probe:
    """Run the products of PROBES, and GELU, on the device: the kinds of products that the model has, if it is known."""
    generator = torch.Generator().manual_seed(run.options.seed)
    functions = {"matmul": torch.matmul, "convolution": functools.partial(torch.nn.functional.conv2d, padding=1)}
    with contextlib.suppress(Exception), emulated_precision() as seen, torch.inference_mode():
        run.skeleton(torch.empty(1, *timm.data.resolve_model_data_config(run.skeleton)["input_size"], device="meta"))
        functions = {kind: function for kind, function in functions.items() if kind in seen.products}
    # 13 bits of mantissa, so that ties are frequent: roundings differ in where a half goes.
    draw = lambda shape: Arithmetic(13, "truncated").round(torch.randn(shape, generator=generator))  # noqa: E731
    products = {kind: recognise(function, list(map(draw, PROBES[kind])), run.device)
                for kind, function in functions.items()}  # fmt: skip
    x, gelu, forms, errors = torch.linspace(-6, 6, 4097), torch.nn.functional.gelu, {}, {}
    expected = {form: gelu(x.double(), approximate=form) for form in ("none", "tanh")}
    for asked in expected:
        actual = gelu(x.to(run.device), approximate=asked).cpu().double()
        apart = {form: float((right - actual).abs().max()) for form, right in expected.items()}
        form = min(apart, key=apart.get)
        forms[asked], errors[asked] = form if apart[form] <= GELU_RECOGNISED else asked, apart[form]
    return Probe(products, forms, errors)


def recognise(
    function: Callable, operands: list[torch.Tensor], device: torch.device
) -> tuple[Arithmetic | None, Difference]:
    """The arithmetic in which the device computes function(*operands), and how far it is from that.

    Where none is recognised: None, and how far it is from fp64. The operands are float32 tensors on the CPU.
    """
    on_device = [operand.to(device) for operand in operands]
    actual = to_host(function(*on_device)).reshape(1, -1)
    for arithmetic in ARITHMETICS:
        right = function(*(arithmetic.round(operand.double()) for operand in operands))
        found = compare(actual, to_host(right).reshape(1, -1))
        if arithmetic == EXACT:
            exact = found
        if found.rel_l2 < RECOGNISED:
            if arithmetic[:2] == FLOAT16[:2]:  # as many bits as TF32, but it ends at 65504
                large = to_host(function(on_device[0] * 2.0**17, *on_device[1:])).reshape(1, -1) / 2.0**17
                arithmetic = arithmetic if compare(large, actual).rel_l2 < 0.01 else FLOAT16
            return arithmetic, found
    return None, exact


def emulated_precision(
    rounding: dict[str, Arithmetic] | None = None, gelu: dict[str, str] | None = None
) -> contextlib.AbstractContextManager:
    """A context in which the CPU rounds the operands of products, and takes the form of GELU, as a device does.

    rounding: by kind of product, "convolution" or "matmul", which attention belongs to; a kind that is not there is not
    rounded. gelu: the form by the form that is asked for. Under inference_mode a dispatch mode sees layers whole, and
    opens them (as torch.utils.flop_counter does), so that no product is hidden. The context records the names of all
    operators, and counts the products by kind and the GELUs that it changed. Tensors of devices are left alone.
    """
    aten, rounding, gelu = torch.ops.aten, rounding or {}, gelu or {}
    attention = aten.scaled_dot_product_attention.default
    first_operand = {aten.mm.default: 0, aten.bmm.default: 0, aten.addmm.default: 1, aten.baddbmm.default: 1}

    class EmulatedPrecision(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names, self.products, self.gelus = set(), {}, 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            kwargs = dict(kwargs or {})
            self.names.add(function.overloadpacket.__name__)
            tensors = (x for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor))
            on_host = all(x.device.type in ("cpu", "meta") for x in tensors)
            kind = "convolution" if function is aten.convolution.default else "matmul"
            if kind == "convolution" or function in first_operand:
                self.products[kind] = self.products.get(kind, 0) + 1
                first = first_operand.get(function, 0)
                if on_host and kind in rounding:
                    args = tuple(rounding[kind].round(x) if i in (first, first + 1) else x for i, x in enumerate(args))
            elif function is attention and "matmul" not in rounding:
                self.products[kind] = self.products.get(kind, 0) + 1  # the fused kernel
            elif function in (aten.gelu.default, aten.gelu_.default):
                asked = kwargs.get("approximate", "none")
                if on_host and gelu.get(asked, asked) != asked:
                    kwargs["approximate"], self.gelus = gelu[asked], self.gelus + 1
            elif on_host:
                parts = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # whose products are seen
                with self, parts if function is attention else contextlib.nullcontext():
                    result = function.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            return function(*args, **kwargs)

    return EmulatedPrecision()


# --- Stage 5: throughput ----------------------------------------------------------------------------------------------

def throughput_stage(run: Run) -> Iterator[Entry]:
    """The time of a batch for each mode and batch size, what it means, and that the timed outputs are right."""
    yield THROUGHPUT.header("mode")
    for timing in time_all(run, None if run.auto else run.sizes):
        run.timings.append(timing)
        yield judge_timing(timing, run)
    groups = by_mode(run.timings)
    timed = sum(groups, [])
    yield from explain_throughput(timed, run.device)
    if groups:
        yield from fastest_mode(run, groups)
        yield from judge_timed_outputs(run, run.timings)
        if run.options.duration:
            yield from sustained_load(run, fastest_within(run, groups) or groups[0][-1])


@dataclasses.dataclass(frozen=True)
class Timing:
    """The timed batches of one mode and batch size. Without any, `problem` says why."""

    mode: Mode
    batch: int
    first_ms: float = 0.0  # the first call, with what is compiled or captured then
    steady: bool = True  # whether the warm-up got there before its time limit
    host_ms: tuple[float, ...] = ()  # of each batch, until everything was launched
    total_ms: tuple[float, ...] = ()  # of each batch, until the device had finished
    peak_bytes: int | None = None
    output: np.ndarray | None = None  # of the last batch
    difference: Difference | None = None  # of the timed output that is furthest from its reference
    problem: str = ""
    outcome: str = WARN  # of the problem

    @property
    def throughput(self) -> float:
        """Images per second, from the time of all timed batches."""
        return 1000 * self.batch * len(self.total_ms) / sum(self.total_ms)

    def saturates(self, smaller: Timing) -> bool:
        """Whether the larger batch gained less than SATURATED_GAIN."""
        return self.throughput < SATURATED_GAIN * smaller.throughput

    @property
    def host_bound(self) -> bool:
        return bool(np.median(self.host_ms) >= HOST_BOUND * np.median(self.total_ms))

    @property
    def spread(self) -> float:
        """Interquartile range over median."""
        low, middle, high = np.percentile(self.total_ms, (25, 50, 75))
        return float((high - low) / middle)


def time_batch(forward: Callable, inputs: torch.Tensor, device: torch.device) -> tuple[float, float, torch.Tensor]:
    """One forward pass: milliseconds until everything was launched, until the device had finished, and the output."""
    start = time.perf_counter()
    output = forward(inputs)
    if device.type != "cpu":
        # torch_npu launches from a second thread: this waits for it. (torch.accelerator's stream cannot, in 2.9.0.)
        torch.get_device_module(device.type).current_stream(device).query()
    launched = time.perf_counter()
    synchronize(device)
    return 1000 * (launched - start), 1000 * (time.perf_counter() - start), output


def time_batches(
    run: Run, mode: Mode, forward: Callable, inputs: torch.Tensor, reference: np.ndarray, seconds: float
) -> Timing:
    """Warm up, and time batches, each synchronized. Each timed output is compared while no clock runs.

    forward: the model in this mode. inputs: (B, 3, H, W) on the device. reference: the outputs that are right. seconds:
    of timing, without a warm-up; 0: as the options say.
    """
    from tqdm import tqdm

    device, options = run.device, run.options
    kind = "cpu" if device.type == "cpu" else "accelerator"
    first_ms = time_batch(forward, inputs, device)[1]
    steady, (least, most) = True, WARMUP_SECONDS[kind]
    if options.warmup and not seconds:  # 0 means none
        most -= first_ms / 1000 if kind == "cpu" else 0  # where nothing is compiled in the first call
        steady = warm_up(lambda: time_batch(forward, inputs, device)[1], options.warmup, least, most)
    host_ms, total_ms, worst = [], [], compare(reference, reference)
    end = time.perf_counter() + (seconds or TIMED_SECONDS[kind])
    batches = itertools.count() if seconds else range(options.iters)
    for _ in tqdm(batches, desc=f"{mode.name}, batch {len(inputs)}", leave=False, disable=None):
        host, total, output = time_batch(forward, inputs, device)
        host_ms.append(host)
        total_ms.append(total)
        output = to_host(output)
        if not np.array_equal(output, reference):
            worst = max(worst, compare(output, reference), key=lambda found: found.size)
        if time.perf_counter() > end:
            break
    peak = torch.get_device_module(device.type).max_memory_allocated(device) if kind != "cpu" else None
    return Timing(mode, len(inputs), first_ms, steady, tuple(host_ms), tuple(total_ms), peak, output, worst)


def warm_up(run_batch: Callable[[], float], count: int, least: float, most: float) -> bool:
    """Run batches, at least `count` and `least` seconds, until the latency is steady or `most` seconds are over."""
    times, steady, start = [], False, time.perf_counter()
    while (seconds := time.perf_counter() - start) < most and (seconds < least or len(times) < count or not steady):
        times.append(run_batch())
        recent, earlier = times[-STEADY_BATCHES:], times[-2 * STEADY_BATCHES : -STEADY_BATCHES]
        if len(earlier) == STEADY_BATCHES:
            steady = bool(abs(np.median(recent) / np.median(earlier) - 1) < STEADY)
    return steady


def time_all(run: Run, sizes: list[int] | None) -> Iterator[Timing]:
    """Every mode with every batch size. sizes None: doubled until throughput gains nothing or memory ends."""
    eager = {}  # (base, batch) -> output of the mode without graph, which that of the graph must equal
    for mode in run.modes:
        previous = None
        for size in sizes or (2**i for i in range(MAX_AUTO_BATCH.bit_length())):
            run.cards.goes_on()
            with run.in_mode(mode):
                timing = try_to_time(run, mode, size, eager.get((mode.base, size)))
            eager.setdefault((mode.base, size), timing.output)
            yield timing
            if timing.problem:
                require_working(run.device, f"{mode.name}, batch {size}: {timing.problem}")
            cannot = timing.problem not in ("", OUT_OF_MEMORY)
            if cannot or not sizes and (timing.problem or previous and timing.saturates(previous)):
                break
            previous = timing
    synchronize(run.device)  # a fault that is first seen when python exits would come after the verdict


def try_to_time(run: Run, mode: Mode, size: int, expected: np.ndarray | None) -> Timing:
    """Time one batch size, or say why not: one mode that fails does not end the others."""
    try:
        return time_size(run, mode, size, expected)
    except CannotCapture as problem:
        return Timing(mode, size, problem=str(problem), outcome=SKIP)
    except RuntimeError as error:
        if out_of_memory(error):
            return Timing(mode, size, problem=OUT_OF_MEMORY)
        if mode == FLOAT32 or not still_computes(run.device):
            raise
        return Timing(mode, size, problem=explain(error), outcome=FAIL)


def time_size(run: Run, mode: Mode, size: int, expected: np.ndarray | None, seconds: float = 0.0) -> Timing:
    """Time one batch size in a mode that the model is in. Its images are stage 3's, again and again where it is larger.

    expected: the outputs that are right; None: those of stage 3. seconds: how long, in place of --iters and a warm-up.
    """
    rows = [i % len(run.outputs) for i in range(size)]
    inputs = run.images[rows].to(run.device, mode.dtype)
    reference = run.outputs[rows] if expected is None else expected

    def forward(images):  # the context is entered for each call, as a program does
        with mode.active(run.device):
            return run.model.device(images)

    if run.device.type != "cpu":  # torch.accelerator's memory functions need torch_npu 2.13
        module = torch.get_device_module(run.device.type)
        with contextlib.suppress(RuntimeError):  # torch_npu 2.9.0 refuses for ever after a capture that failed
            module.empty_cache()
        module.reset_peak_memory_stats(run.device)
    with torch.inference_mode(), constant_rope(run.model.device) if mode.graph else contextlib.nullcontext():
        started = time.perf_counter()
        forward = captured(forward, inputs, run.device) if mode.graph else forward
        capture_ms = 1000 * (time.perf_counter() - started)
        timing = time_batches(run, mode, forward, inputs, reference, seconds)
    return dataclasses.replace(timing, first_ms=timing.first_ms + capture_ms)


class CannotCapture(Exception):
    """The forward pass cannot be captured as a graph; the message says why."""


def captured(forward: Callable, images: torch.Tensor, device: torch.device) -> Callable:
    """Capture forward(images) as a graph (NPU or CUDA); the function that is returned replays it on its argument.

    The graph is captured with zeros as input. So a right output proves that the replay ran. Raises CannotCapture.
    """
    module = torch.get_device_module(device.type)
    static, side, current = torch.zeros_like(images), module.Stream(), module.current_stream()
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
        module.set_stream(current)  # torch_npu leaves the one of the capture
        if out_of_memory(error):
            raise
        cause = error.__context__ or error  # that the capture is invalid says less than what made it so
        raise CannotCapture(f"the forward pass cannot be captured: {explain(cause)}") from error

    def replay(images):
        static.copy_(images)
        graph.replay()
        return output

    return replay


@contextlib.contextmanager
def constant_rope(model: torch.nn.Module):
    """Inside, a RoPE table is computed once for each shape.

    timm's DINOv3 copies the coordinates from the host in each forward pass, and no graph can hold such a copy.
    """
    ropes = [module for module in model.modules() if hasattr(module, "get_embed")]
    for rope in ropes:
        rope.get_embed = functools.cache(rope.get_embed)
    try:
        yield
    finally:
        for rope in ropes:
            del rope.get_embed


def count_flops(run: Run) -> int | None:
    """Floating point operations of one image's forward pass; None where the model does not run without data.

    On meta tensors, where attention is counted as its matrix products: the CPU's fused kernel is not counted at all.
    """
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            run.skeleton(torch.empty(1, *run.images.shape[1:], device="meta"))
        return counter.get_total_flops()
    except Exception:  # a model may do anything with a tensor that has no data
        return None


def by_mode(timings: list[Timing]) -> list[list[Timing]]:
    """The timings that have timed batches, a list for each mode."""
    timings = [timing for timing in timings if timing.total_ms]
    return [[t for t in timings if t.mode == mode] for mode in dict.fromkeys(t.mode for t in timings)]


def judge_timing(timing: Timing, run: Run) -> Entry:
    """A line of the table."""
    name = timing.mode.name
    if timing.problem == OUT_OF_MEMORY:  # where the batch size is searched for, that is how the search ends
        return Entry(VARIES if run.auto else WARN, name, "", f"batch {timing.batch}: {OUT_OF_MEMORY}", FREE_MEMORY)
    if timing.problem:
        return Entry(timing.outcome, name, "", timing.problem, DEVICE_LOG)
    latencies = *np.percentile(timing.total_ms, (50, 90, 99)), max(timing.total_ms)
    limit = "-" if run.device.type == "cpu" else "host" if timing.host_bound else "device"
    host, peak = np.median(timing.host_ms), timing.peak_bytes and timing.peak_bytes / MIB
    figures = timing.throughput, *latencies, timing.spread, host, limit, timing.first_ms, peak
    return Entry(VARIES, name, THROUGHPUT.row(timing.batch, *figures, len(timing.total_ms)))


def explain_throughput(timings: list[Timing], device: torch.device) -> Iterator[Entry]:
    """What the rows mean: what limits them, and can they be trusted."""

    def rows(test: Callable[[Timing], bool]) -> str:
        groups = by_mode(list(filter(test, timings)))
        return "; ".join(f"{group[0].mode.name} batch {', '.join(str(t.batch) for t in group)}" for group in groups)

    if device.type != "cpu" and (bound := rows(lambda timing: timing.host_bound)):
        meaning = f"launching takes over {HOST_BOUND:.0%} of the time, so the device waits"
        advice = "larger batches are nearly free, +graph or a faster CPU help"
        yield Entry(VARIES, "host-bound", f"{bound}: {meaning}; {advice}")
    if doubtful := rows(lambda timing: timing.spread > DOUBTFUL_SPREAD):
        advice = "is the host or the card shared? bind to cores (CPU_AFFINITY_CONF), raise --iters"
        yield Entry(VARIES, "doubtful", f"{doubtful}: spread over {DOUBTFUL_SPREAD:.0%}; {advice}")
    if unsteady := rows(lambda timing: not timing.steady):
        meaning = f"the warm-up ended before the latency had settled to {STEADY:.0%}"
        yield Entry(VARIES, "not steady", f"{unsteady}: {meaning}")


def fastest_mode(run: Run, groups: list[list[Timing]]) -> Iterator[Entry]:
    """For each mode its fastest batch size, beside its error; and which mode is the fastest within --max-error."""
    flops, peak = count_flops(run), fp16_peak(run.device)
    best = [max(group, key=lambda timing: timing.throughput) for group in groups]
    yield ANSWER.header("each mode's fastest")
    for timing, group in zip(best, groups):
        gain, error = timing.throughput / best[0].throughput, run.errors.get(timing.mode.base)
        rate = flops and flops * timing.throughput / 1e12
        share = rate / peak if rate and peak and timing.mode.in_half else None
        cells = timing.throughput, gain, error, rate, share, saturation(group)
        yield Entry(VARIES, timing.mode.name, ANSWER.row("fastest", timing.batch, *cells))
    limit = f"within --max-error {run.options.max_error:g} (relative L2 against fp64)"
    fastest = fastest_within(run, groups)
    if fastest is None:
        yield Entry(VARIES, "fastest", f"no mode is {limit}")
        return
    gain = f"{fastest.throughput / best[0].throughput:.2f} times {best[0].mode.name}"
    group = next(group for group in groups if group[0].mode == fastest.mode)
    grows = len(group) > 1 and fastest is group[-1] and not saturation(group)
    more = "; throughput still grows there: see --batch-sizes auto" if grows else ""
    yield Entry(VARIES, "fastest", f"{fastest.mode.name} with batch {fastest.batch} {limit}: {gain}{more}")


def saturation(timings: list[Timing]) -> str | None:
    """The batch size of a mode beyond which a larger one gains too little; None where none that was tried is."""
    return next((str(a.batch) for a, b in zip(timings, timings[1:]) if b.saturates(a)), None)


def fastest_within(run: Run, groups: list[list[Timing]]) -> Timing | None:
    """The fastest mode and batch size whose error is at most --max-error. A mode that failed in stage 4 has none."""
    accepted = [t for t in sum(groups, []) if run.errors.get(t.mode.base, math.inf) <= run.options.max_error]
    return max(accepted, key=lambda timing: timing.throughput, default=None)


def sustained_load(run: Run, best: Timing) -> Iterator[Entry]:
    """The fastest mode and batch size for --duration seconds: is it slower at the end, and are its outputs right?"""
    run.cards.goes_on(run.options.duration)
    with run.in_mode(best.mode):
        timing = time_size(run, best.mode, best.batch, None, run.options.duration)
    tenth = max(1, len(timing.total_ms) // 10)
    parts = [dataclasses.replace(timing, total_ms=part) for part in (timing.total_ms[:tenth], timing.total_ms[-tenth:])]
    for name, part in zip(("first", "last"), parts):
        p99 = np.percentile(part.total_ms, 99)
        text = f"{name} tenth of {run.options.duration} s: {part.throughput:.2f} images/s, p99 {p99:.5g} ms"
        yield Entry(VARIES, "sustained", f"{best.mode.name}, batch {best.batch}: {text}")
    slower = 1 - parts[1].throughput / parts[0].throughput
    outcome = WARN if slower > max(SLOWER, sum(part.spread for part in parts) / 2) else PASS
    problem = f"slower under sustained load: by {slower:.0%} after {run.options.duration} s"
    yield Entry(outcome, "sustained load", "" if outcome == WARN else "no slower at its end", problem,
                "watch temperature, power and clock with npu-smi info")  # fmt: skip
    yield from judge_timed_outputs(run, [timing], "sustained")


def judge_timed_outputs(run: Run, timings: list[Timing], what: str = "") -> Iterator[Entry]:
    """Whether the timed outputs are those of stage 3 in fp32, and those of a graph the ones of its mode without."""
    yield ERRORS.header("timed outputs")
    eager = {(timing.mode.base, timing.batch) for timing in timings if timing.mode.name == timing.mode.base}
    for group in by_mode(timings):
        mode, worst = group[0].mode, max(group, key=lambda timing: timing.difference.size)
        reference = "eager" if mode.name != mode.base and (mode.base, worst.batch) in eager else "stage 3"
        limit = run.limits.get(mode.base)
        if limit is None:
            yield Entry(SKIP, mode.name, "", "stage 4 gives no limit for it")
            continue
        if not math.isfinite(limit.fail):
            yield Entry(SKIP, mode.name, "", OVERFLOWS)
            continue
        where = f"batch {worst.batch}" if worst.difference.max_abs else None
        yield judged(mode.name, what or f"against {reference}", worst.difference, limit, UNDER_LOAD, where=where)


# --- Comparing two arrays ---------------------------------------------------------------------------------------------

@dataclasses.dataclass(frozen=True)
class Difference:
    """How far an array is from its reference. A row is an image, or a token of (images, tokens, width)."""

    max_abs: float  # this and the other errors are infinite where a value on either side is not finite
    mean_abs: float
    rel_l2: float  # ||a - r|| / ||r|| over everything
    row: float  # the same for the worst row
    row_index: tuple[int, ...]  # (image,) or (image, token)
    cosine: float  # of the row where it is smallest
    element: float  # the largest |a - r|, divided by |r| or the RMS of its row, whichever is larger
    element_index: tuple[int, ...]
    reference_rms: float

    @property
    def size(self) -> float:
        """The error of the worst row, or of the worst element on the same scale."""
        return max(self.row, self.element / ELEMENT_FACTOR)

    @property
    def where(self) -> str:
        row = ", token ".join(map(str, self.row_index))
        return f"off by {self.row:.1e} at image {row}, by {self.element:.1e} at index {self.element_index}"


def compare(actual: np.ndarray, reference: np.ndarray) -> Difference:
    """Compare an output with its reference, row by row, in float64.

    Both are (images, ...). Rows are the tokens of a (B, N, C) array, else the images. The relative L2 error of a row is
    ||a - r|| / max(||r||, ROW_NORM_FLOOR * rms of all ||r||), and that of an element |a - r| / max(|r|, the same norm /
    sqrt(row length)). Where a value is not finite on either side the errors are infinite, so that NaN equals nothing,
    not even NaN. Raises ValueError where the shapes differ.
    """
    if actual.shape != reference.shape:
        raise ValueError(f"the shapes differ: {actual.shape} on the device, {reference.shape} on the CPU")
    shape, row_axes, tiny = actual.shape, 2 if actual.ndim == 3 else 1, np.finfo(np.float64).tiny
    a, r = (np.asarray(x, np.float64).reshape(math.prod(shape[:row_axes]), -1) for x in (actual, reference))
    delta = a - r
    error, norm_a, norm_r = (np.sqrt(np.einsum("ij,ij->i", x, x)) for x in (delta, a, r))
    if not np.isfinite(error).all():
        index, inf = position(int(np.argmin(np.isfinite(delta))), shape), math.inf
        return Difference(inf, inf, inf, inf, index[:row_axes], 0.0, inf, index, 0.0)
    floored = np.maximum(norm_r, max(ROW_NORM_FLOOR * math.sqrt(np.mean(norm_r**2)), tiny))
    relative, size, scale = error / floored, np.abs(delta, out=delta), np.abs(r)
    np.maximum(scale, floored[:, None] / math.sqrt(r.shape[1]), out=scale)
    element = np.divide(size, scale, out=scale)
    cosine = np.where(error == 0, 1.0, np.einsum("ij,ij->i", a, r) / np.maximum(norm_a * norm_r, tiny))
    return Difference(
        max_abs=float(size.max()),
        mean_abs=float(size.mean()),
        rel_l2=float(np.linalg.norm(error) / max(np.linalg.norm(norm_r), tiny)),
        row=float(relative.max()),
        row_index=position(int(relative.argmax()), shape[:row_axes]),
        cosine=float(cosine.min()),
        element=float(element.max()),
        element_index=position(int(element.argmax()), shape),
        reference_rms=float(np.linalg.norm(norm_r) / math.sqrt(r.size)),
    )


def judged(name: str, what: str, found: Difference, limit: Limit, advice: str, **more) -> Entry:
    """A line of the table ERRORS: two arrays that are to be the same.

    what: which two. more: `where` the worst arrays are; for a whole model's output `against`, its errors (worst row):
    the device's against plain fp64, what the device's arithmetic costs, and the CPU's own in that arithmetic.
    """
    where, against = more.get("where"), more.get("against", (None, None, None))
    text = ERRORS.row(what, *against, found.row, found.element, *limit, where)
    problem = f"{what}{f', {where}' if where else ''}: {found.where}"
    return Entry(limit.judge(found), name, text, problem, advice)


def position(flat: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(flat, shape)))


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """A host copy as a numpy array; bfloat16, which numpy lacks, becomes float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def shape_text(shape: tuple) -> str:
    return "x".join(map(str, shape))


# --- Comparing two logs -----------------------------------------------------------------------------------------------

ERROR_COLUMNS = ("fp64", "row", "element")  # that may not grow
SPEED_COLUMNS = ("images/s", "p50_ms", "p90_ms", "spread")
EXPERIMENT = ("validate_npu", "options", "device", "weights SHA-256", "inputs SHA-256")  # facts that name it
Key = tuple[str, str, str]  # stage, name, first cell of a table's row (else "")


class Log:
    """A log by its lines: the head and the stages, not an earlier comparison or the list of failures."""

    def __init__(self, name: str, lines: list[str]) -> None:
        head, *blocks = "\n".join(lines).split("\n\n")
        self.name, self.version = name, re.match(r"validate_npu ?([\d.]*):", head)[1] or "1"
        title, *rest = head.splitlines()
        blocks = ["\n".join(["", *rest[1:]]), *(block for block in blocks if re.match(r"\[(\d/\d|all cards)\]", block))]
        self.stable = [line for block in blocks for line in block.splitlines() if not line.startswith(VARIES)]
        self.facts = {"validate_npu": title.partition(": ")[2]}
        self.marks: dict[Key, str] = {}  # PASS, WARN, ... of each check
        self.rows: dict[Key, dict[str, str]] = {}  # cells by column
        for block in blocks:
            stage, *lines = block.split("\n")
            columns: list[str] = []
            for mark, name, text in Entry.read(lines):
                cells = Table.split(text)
                if mark == HEADER:
                    columns = cells
                    continue
                numbers = [cell for cell in cells if re.fullmatch(r"[-+\d.e%]+|inf|nan", cell)]
                is_row = cells and len(cells) == len(columns) and 2 * len(numbers) >= len(cells)  # a sentence is none
                key = stage, name, cells[0] if is_row else ""
                if key[2]:
                    self.rows[key] = dict(zip(columns, cells))
                if mark in OUTCOMES:
                    self.marks[key] = mark
                elif mark == FACT:
                    self.facts[name] = text

    @classmethod
    def read(cls, path: str) -> Log:
        """Raises CannotRun where the file is not a whole log of this script."""
        try:
            with open(path, encoding="utf-8-sig") as file:
                lines = file.read().rstrip().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise CannotRun(f"the log {path} cannot be read: {getattr(error, 'strerror', error)}") from error
        if not lines or not re.match(r"validate_npu ?[\d.]*: ", lines[0]) or not lines[-1].startswith("RESULT: "):
            reason = "its first line, or its last, the RESULT line, is not there"
            raise CannotRun(f"{path} is not a whole log of validate_npu.py: {reason}")
        return cls(os.path.basename(path), lines)

    @property
    def timings(self) -> dict[Key, dict[str, float]]:
        """The rows of the table of times: key -> figures by column."""
        rows = {key: cells for key, cells in self.rows.items() if set(SPEED_COLUMNS) <= cells.keys()}
        return {key: {name: float(cells[name].rstrip("%")) for name in SPEED_COLUMNS} for key, cells in rows.items()}


def compare_logs(old: Log, new: Log, options: argparse.Namespace) -> Iterator[Entry]:
    """Whether a check's outcome, an error or the speed became worse; and the stable lines that changed, as a diff.

    Logs of two versions of the script differ in what they hold: what both have is compared.
    """
    rank, same_version = OUTCOMES.index, old.version == new.version
    known = [name for name in EXPERIMENT if name in old.facts and name in new.facts]
    other = [f"{name}: {new.facts[name]}" for name in known if new.facts[name] != old.facts[name]]
    lost = [said(key) for key in [*old.marks, *old.timings] if key not in {**new.marks, **new.timings}]
    added = [f"{said(key)}: new, {mark}" for key, mark in new.marks.items() if key not in old.marks]
    worse = [f"{said(key)}: {old.marks[key]} -> {mark}" for key, mark in new.marks.items()
             if rank(mark) > rank(old.marks.get(key, FAIL))]  # fmt: skip
    worse += [text for text in added if same_version and text.endswith((WARN, FAIL))]
    slower: dict[str, list[str]] = {FAIL: [], WARN: [], PASS: []}
    yield SPEED.header("mode")
    for key in (key for key in old.timings if key in new.timings):
        cells, speed = compare_speed(old.timings[key], new.timings[key], options.max_slowdown)
        yield Entry(VARIES, key[1], SPEED.row(key[2], *cells))
        doubt = ", the spreads are too large to judge" if speed == WARN else ""
        slower[speed].append(f"{said(key)}: {cells[0]:.2f} -> {cells[1]:.2f} images/s{doubt}")

    only = [f"script {old.version} and {new.version}", f"{len(added)} checks are only in the new log"]
    only += [f"only in the old: {', '.join(lost)}"] if lost else []
    changed = "see what changed between the two runs: stage 1's versions, the lines below"
    for name, text, outcome, found, advice in (
        ("experiment", "model, device, options, weights, inputs are the same", WARN, other,
         "two different experiments: what is worse below may be due to that"),
        ("versions", "logs of one version of the script", WARN, [] if same_version else only,
         "what both logs have is compared; make both with one version for the rest"),
        ("checks", "each is still there", WARN if other else FAIL, lost if same_version else [],
         "the new run did not do all of the old one"),
        ("outcomes", "none is worse", FAIL, worse, changed),
        ("errors", f"none is larger by more than {ERROR_GROWTH:.0%}", FAIL, list(grown_errors(old, new)), changed),
        ("speed", f"throughput fell nowhere by more than {options.max_slowdown:g}% and half the spreads",
         FAIL if slower[FAIL] else WARN, slower[FAIL] or slower[WARN],
         f"is the host or the card shared with other work? else {changed}"),
    ):  # fmt: skip
        yield Entry(outcome if found else PASS, name, "" if found else text, "; ".join(dict.fromkeys(found)), advice)
    diff = difflib.unified_diff(old.stable, new.stable, lineterm="", n=0) if same_version else []
    diff = [line for line in diff if not line.startswith(("---", "+++", "@@"))]
    yield Entry(FACT, "changed lines", f"{len(diff)}: - old, + new" if diff else "none")
    yield from (Entry(FACT, line[0], line[1:]) for line in diff)


def grown_errors(old: Log, new: Log) -> Iterator[str]:
    """The rows in which an error is worse."""
    for key in (key for key in old.rows if key in new.rows):
        for column in ERROR_COLUMNS:
            before, after = (log.rows[key].get(column, "-") for log in (old, new))
            before, after = (math.nan if cell == "-" else float(cell) for cell in (before, after))
            if after > max(ROUNDING, (1 + ERROR_GROWTH) * before):
                yield f"{said(key)}: {column} {before:.1e} -> {after:.1e}"
                break


def compare_speed(old: dict[str, float], new: dict[str, float], max_slowdown: float) -> tuple[tuple, str]:
    """Cells of the table SPEED, and FAIL where the new run is slower, WARN where the spreads leave nothing to judge.

    max_slowdown: percent that throughput may fall, beyond half the sum of the two runs' spreads. One batch in a hundred
    may be thirty times slower: only where p50 and p90 show the fall as well is the device slower. A median that rose by
    more than both spreads is slower, however large they are.
    """
    allowed = max_slowdown + (old["spread"] + new["spread"]) / 2
    ratio, p50 = new["images/s"] / old["images/s"], new["p50_ms"] / old["p50_ms"]
    best = max(ratio, 1 / p50, old["p90_ms"] / new["p90_ms"])
    cells = old["images/s"], new["images/s"], ratio, old["p50_ms"], new["p50_ms"], allowed / 100
    explained = math.prod(1 + percent / 100 for percent in (max_slowdown, old["spread"], new["spread"]))
    if 100 * (1 - best) > allowed or p50 > explained:
        return cells, FAIL
    return cells, WARN if allowed > MOST_ALLOWED else PASS


def said(key: Key) -> str:
    """("[4/5] precision", "embedding", "float32") -> "embedding float32 of precision"."""
    stage, name, cell = key
    return f"{name} {cell}".strip() + f" of {stage_name(stage)}"


# --- Several cards, under torchrun ------------------------------------------------------------------------------------

class CardsLost(Exception):
    """Cards of a run under torchrun that do not answer; the argument is the list of their ranks."""


class Cards:
    """The processes that torchrun started, one for each card, as one of them sees them; without torchrun, one.

    All that they tell each other goes through torchrun's store, which also knows who has not come to a step.
    """

    def __init__(self) -> None:
        torchrun = os.environ if "TORCHELASTIC_RUN_ID" in os.environ else {}  # a cluster may set WORLD_SIZE without it
        numbers = (int(torchrun.get(name, 0)) for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"))
        self.rank, self.local_rank, self.host = numbers
        self.size, self.local_size = (int(torchrun.get(name, 1)) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        self.store = None

    def connect(self, report: Report, seconds: float) -> None:
        """seconds: how long one card waits for another. Raises CannotRun where the store does not answer."""
        self.report, self.seconds = report, seconds
        if self.size == 1:
            return
        report.quiet = self.rank > 0  # until here each process speaks for itself
        own = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        try:
            address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            store = torch.distributed.TCPStore(*address, self.size, own)
        except RuntimeError as error:
            raise CannotRun(f"torchrun's processes do not find each other: {first_line(error)}") from error
        self.store = torch.distributed.PrefixStore("validate_npu", store)

    def device_name(self, name: str) -> str:
        if self.size > 1 and ":" in name:
            use = f"--device {name.split(':')[0]}, without an index"
            raise CannotRun(f"under torchrun each process takes the card of its LOCAL_RANK: {use}")
        return name if self.size == 1 or name == "cpu" else f"{name}:{self.local_rank}"

    def goes_on(self, seconds: float = 0.0) -> None:
        """This card has done a part of a stage, and may now take --timeout and so many seconds more."""
        self.report.begin(self.report.doing, seconds)
        if self.store is not None:
            with contextlib.suppress(RuntimeError):  # the store is gone, which the next step tells
                self.store.add("goes on", 1)

    def absent(self, step: str, seconds: float) -> list[int]:
        """Which ranks have not reached this step, so many seconds after another card went on with its own work."""
        done, end = -1, 0.0
        while True:
            if (so_far := self.store.add("goes on", 0)) != done:
                done, end = so_far, time.monotonic() + seconds
                self.report.begin(self.report.doing, seconds)  # to wait for others is not to hang
            absent = [rank for rank in range(self.size) if not self.store.check([f"{step}/{rank}"])]
            if not absent or time.monotonic() > end:
                return absent
            time.sleep(0.05)

    def gather(self, step: str, value=None) -> list:
        """The value of each card at this step, by rank. Raises CardsLost with those that have not come in time."""
        if self.size == 1:
            return [value]
        try:
            self.store.set(f"{step}/{self.rank}", pickle.dumps(value))
            if lost := self.absent(step, self.seconds):
                raise CardsLost(lost)
            return [pickle.loads(self.store.get(f"{step}/{rank}")) for rank in range(self.size)]
        except RuntimeError as error:  # the store is gone, and torchrun with it
            raise CardsLost([]) from error

    def roll_call(self) -> list[int]:
        """Ranks that do not answer any more, when torchrun ends all processes because one has failed."""
        if self.store is None:
            return []
        try:
            self.store.set(f"roll call/{self.rank}", b"here")
            return self.absent("roll call", ROLL_CALL_SECONDS)
        except RuntimeError:
            return []

    def all_or_none(self, step: str, function: Callable):
        """function(); where it cannot be done on one card, no card goes on."""
        result, problem = None, None
        try:
            result = function()
        except CannotRun as error:
            problem = str(error) if self.size == 1 else f"card {self.rank}: {error}"
        if problems := list(filter(None, self.gather(step, problem))):
            raise CannotRun(problems[0])
        return result

    def turns(self) -> Iterator[None]:
        """Yields once in each process, in one after the other."""
        for turn in range(self.size):
            self.gather(f"turn {turn}")
            if turn == self.rank:
                yield


class Card(NamedTuple):
    """What one of several cards tells the others in the end."""

    name: str  # "card 1"
    place: tuple[int, str, str]  # host, device, chip: (0, "npu:1", "Ascend910B4")
    outputs: np.ndarray  # model(x) of the seeded images of stage 3
    embedding_error: float | None
    checks: list[tuple[str, str]]  # mark and name
    alone: dict[tuple[str, int], float]  # mode and batch -> images/s
    together: dict[tuple[str, int], float]  # while all cards were at work


def cards_stage(run: Run) -> Iterator[Entry]:
    """All cards at work at once; then a line for each card, whether they agree, and what they cost each other."""
    most = max((timing.batch for timing in run.timings if timing.total_ms), default=1)
    run.cards.gather("ready")
    together = []
    try:
        together += () if run.lost else time_all(run, [most])
    except Exception as error:  # the other cards wait for this one's figures
        yield Entry(FAIL, "all at once", "", explain(error), DEVICE_LOG)
    yield from (judge_timing(timing, run) for timing in together if timing.problem == OUT_OF_MEMORY)
    yield from judge_timed_outputs(run, together)
    alone, together = (
        {(t.mode.name, t.batch): t.throughput for t in timings if t.total_ms} for timings in (run.timings, together)
    )
    place = run.cards.host, str(run.device), chip_name(run.device)
    checks = [(entry.mark, entry.name) for entry in run.report.checks]
    card = Card(f"card {run.cards.rank}", place, run.outputs, run.errors.get(FLOAT32.base), checks, alone, together)
    yield from judge_cards(run.cards.gather("cards", card), run.references.limit())


def judge_cards(cards: list[Card], limit: Limit) -> Iterator[Entry]:
    """A line for each card, whether their outputs agree, and what they do to each other's throughput."""
    yield CARDS.header("card")
    for card in cards:
        failed, warned = ([name for mark, name in card.checks if mark == wanted] for wanted in (FAIL, WARN))
        node, device, chip = card.place
        text = CARDS.row(node, device, len(card.checks), len(failed), len(warned), card.embedding_error, chip)
        problem = f"not passed: {', '.join(dict.fromkeys(failed + warned))}"
        advice = f"run it alone for its whole log, on node {node} {device}"
        yield Entry(FAIL if failed else WARN if warned else PASS, card.name, text, problem, advice)
    yield judge_agreement(cards, limit)
    yield CONTENTION.header("card")
    for mode, batch in cards[0].together:
        rates = [(c.name, c.alone.get((mode, batch)), c.together.get((mode, batch))) for c in cards]
        rates = [row for row in rates if None not in row]
        total = ("total", sum(row[1] for row in rates), sum(row[2] for row in rates))
        for name, alone, together in [*rates, total] if rates else []:
            yield Entry(VARIES, name, CONTENTION.row(mode, batch, alone, together, together / alone))


def judge_agreement(cards: list[Card], limit: Limit) -> Entry:
    """Same inputs, same weights, so equal outputs: which cards differ from the most."""
    rows = min(len(card.outputs) for card in cards)  # the largest batch may not fit into each card's memory
    bits = [card.outputs[:rows].tobytes() for card in cards]
    usual = max(bits, key=bits.count)
    right = cards[bits.index(usual)].outputs[:rows]
    found = {card.name: compare(card.outputs[:rows], right) for card, own in zip(cards, bits) if own != usual}
    if not found:
        return Entry(PASS, "agreement", "same weights, same inputs: outputs equal bit for bit")
    worst = max(found.values(), key=lambda difference: difference.size)
    problem = f"{', '.join(found)} of {len(cards)} differ from the others by {worst.row:.1e}"
    if 2 * len(found) >= len(cards):
        problem += ", and it is not known which are right: see each card's precision"
    outcome = FAIL if limit.judge(worst) == FAIL else WARN  # they are to be equal bit for bit
    advice = "a card that differs corrupts data: take it out of use and run it alone"
    return Entry(outcome, "agreement", "", problem, advice)


# --- What is known of Ascend ------------------------------------------------------------------------------------------

# TFLOP/s of the matrix unit in float16, by what a chip's name begins with: cores x MHz x 8192 of CANN's platform_config.
# A 910C is two of these. Only modes in half precision have a share of it: there is no official figure for float32.
FP16_PEAK = {"Ascend910B1": 363.7, "Ascend910B2": 353.9, "Ascend910B3": 294.9, "Ascend910B4": 245.8,
             "Ascend910_939": 363.7, "Ascend910_938": 353.9, "Ascend910_937": 294.9, "Ascend910_936": 245.8,
             "Ascend310P1": 86.8, "Ascend310P3": 69.5, "Ascend310P5": 52.4, "Ascend310P7": 36.0}  # fmt: skip
# Environment variables that change numbers or speed, and are worth a line in the log when set (torch_npu's list).
ENVIRONMENT = """
    TASK_QUEUE_ENABLE PER_STREAM_QUEUE STREAMS_PER_DEVICE COMBINED_ENABLE ASCEND_LAUNCH_BLOCKING CPU_AFFINITY_CONF
    OMP_NUM_THREADS INF_NAN_MODE_ENABLE INF_NAN_MODE_FORCE_DISABLE TORCH_NPU_USE_COMPATIBLE_IMPL TORCH_NPU_LAZY_FUSION
    TORCH_NPU_LEGACY_IMPL_LIST TORCH_NPU_COMPACT_ERROR_OUTPUT TORCHINDUCTOR_NPU_BACKEND
    ACL_OP_INIT_MODE ACL_OP_COMPILER_CACHE_MODE ACL_DEVICE_SYNC_TIMEOUT TORCH_ACL_INIT_CONFIG_PATH PYTORCH_ALLOC_CONF
    PYTORCH_NPU_ALLOC_CONF PYTORCH_NO_NPU_MEMORY_CACHING MULTI_STREAM_MEMORY_REUSE HCCL_DETERMINISTIC
    ASCEND_GLOBAL_LOG_LEVEL ASCEND_SLOG_PRINT_TO_STDOUT ASCEND_RT_VISIBLE_DEVICES CUDA_VISIBLE_DEVICES TIMM_FUSED_ATTN
""".split()
# Error codes that torch_npu reports, with what to do: of ACL (CANN, rt_error_codes.h), and 161xxx and 561xxx of aclnn.
MEMORY_BROKEN = "the card's memory is broken: take it out of use"
SEE_LOG = f"see {LOG_FOLDER} for the operator"
RESET = "check npu-smi info, then reset the card"
KERNELS_MISSING = "CANN's kernel package for this chip is not installed, or ASCEND_OPP_PATH is not set"
ERROR_CODES = {
    107001: "the device id is not valid: check --device and ASCEND_RT_VISIBLE_DEVICES",
    107002: "no device was set in this thread, which is the program's fault",
    107030: "it copies between host and device, or waits for the device",
    107041: "a call that waits for the device cannot be captured",
    **dict.fromkeys((207001, 207018), f"{OUT_OF_MEMORY}: {FREE_MEMORY}"),
    **dict.fromkeys((500001, 500002), "CANN's compiler failed: its Python packages (decorator, attrs, psutil, scipy,"
                    " cloudpickle, numpy below 2) must be installed here"),
    507008: "the SoC could not be read: is the card taken by another container? check npu-smi info",
    507010: f"the card does not answer any more: {RESET}",
    507014: f"an AI Core timed out: {SEE_LOG}",
    507015: f"an AI Core failed: {SEE_LOG}",
    **dict.fromkeys((507017, 507018), f"an AI CPU timed out or failed: {SEE_LOG}"),
    507033: f"the device does not start: {RESET}",
    507034: f"a vector core timed out: {SEE_LOG}",
    507035: f"a vector core failed: {SEE_LOG}",
    **dict.fromkeys((507053, 507054, 507055), f"uncorrectable memory error: {MEMORY_BROKEN}"),
    **dict.fromkeys((507056, 507057), "the link to another card's memory failed: check the cards with npu-smi info"),
    507899: "the driver failed: check the driver with npu-smi info, and dmesg",
    507901: f"the connection to the card broke: {RESET}",
    **dict.fromkeys((161001, 161002), "the operator does not take these arguments: a type that this chip lacks?"),
    **dict.fromkeys((561003, 561107, 561112), KERNELS_MISSING),
}  # fmt: skip
# CANN's own reason in torch_npu's message. "EZ9999: Inner Error!" says nothing, the line below it does.
CANN_SAYS = r"HBM MULTI BIT ECC ERROR|\bE[A-Z]\d{4}: (?!Inner Error).+"
SET_ENV = "source /usr/local/Ascend/cann/set_env.sh (before CANN 8.5: /usr/local/Ascend/ascend-toolkit/set_env.sh)"
# What the error of `import torch_npu` says, as a pattern, and what it means. {0[1]} is the pattern's group.
IMPORT_ERRORS = {
    "No module named 'torch_npu'": "torch_npu is not installed: {install}",
    r"No module named 'torch_npu\.": "this torch_npu is broken, or made for another Python: pip install"
    " --force-reinstall --no-deps torch-npu=={npu}",
    r"No module named '(tbe|te|acl)\b": "{0[1]} is a part of CANN: " + SET_ENV,
    "No module named 'yaml'": "torch_npu needs yaml: pip install pyyaml",
    r"No module named '([\w.]+)'": "torch_npu needs {0[1]}: pip install {0[1]}",
    r"libascend_hal\.so": "the Ascend driver is missing (libascend_hal.so): install it, or mount"
    " /usr/local/Ascend/driver into the container",
    r"(lib\w+\.so)[\w.]*: cannot open shared object": "CANN is not installed, or its environment is not set ({0[1]} not"
    " found): " + SET_ENV,
    r"(/\S+)[^/]*cannot allocate memory in static TLS": "its libgomp must be loaded first: export LD_PRELOAD={0[1]}",
    "ASCEND_HOME_PATH|ASCEND_OPP_PATH|CANN|set_env": "CANN's environment is not set, or of another place ({error}): "
    + SET_ENV,
    "Two accelerators|compiled with CUDA": "this torch is built for another accelerator, and torch_npu needs the CPU"
    " build: {install}",
    "": "torch_npu {npu} does not import next to torch {version}; they must be the same version, and match CANN"
    " ({error}): {install}",
}  # fmt: skip
# CANN -> the newest pair of torch and torch_npu for it (COMPATIBILITY.md of Ascend/pytorch).
PAIRS = {"8.5": ("2.9.0", "2.9.0"), "9.0": ("2.10.0", "2.10.0"), "9.1": ("2.12.0", "2.12.0")}
CPU_BUILDS = "https://download.pytorch.org/whl/cpu"
ASCEND = "/usr/local/Ascend"
# Operators whose NPU kernels compute on the CPU inside, whatever TORCH_NPU_FALLBACK_CPU_DISABLE says (op-plugin).
HOST_STAGED = {"_upsample_bicubic2d_aa", "_upsample_bilinear2d_aa", "_upsample_nearest_exact1d",
               "_upsample_nearest_exact2d", "_upsample_nearest_exact3d", "logit", "sinc", "polar", "complex",
               "_masked_softmax", "adaptive_max_pool3d", "scatter_reduce"}  # fmt: skip
# Bits of mantissa that fp32 should keep, by what it is documented to be computed in.
BITS = {"float32": 23, "HF32": 10, "TF32": 10, "float16": 10}
# What sets fewer bits, and what avoids each part of the arithmetic's cost.
REDUCED_FP32 = {
    "npu": "torch.npu.matmul.allow_hf32, torch.npu.conv.allow_hf32, torch.npu.matmul.cube_math_type",
    "cuda": "torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32",
}
AVOIDED = {
    "HF32": ", which torch.npu.conv.allow_hf32 = False avoids",
    "TF32": ", which torch.backends.cudnn.allow_tf32 = False avoids",
    "float16": ", which this chip's matrix unit cannot avoid",
    "GELU": ", which TORCH_NPU_USE_COMPATIBLE_IMPL=1 before the start avoids (not in torch_npu 2.9.0)",
}
# Where a checkpoint keeps the weights, the first that is there, and what wrappers put before their names.
WRAPPERS = "state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model", "teacher"
PREFIXES = "module.", "_orig_mod.", "model.", "backbone."
PICTURE_MODES = {1: "L", 3: "RGB"}  # Pillow's, by the channels that the model takes
PICTURE_FILES = ".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff", ".gif"
WEIGHT_FILES = ".safetensors", ".bin", ".pth", ".pt"
# What an error of the hub's client says, as a pattern, and what to do.
HUB_ERRORS = {
    "No space left": "free space, or set HF_HOME to another disk",
    "Permission denied|Read-only|Not a directory|No such file": "set HF_HOME to a folder that can be written to",
    "Gated|awaiting a review": "ask for access on the model's page and set HF_TOKEN",
    "SafetensorError|UnpicklingError": "the file in the hub's cache is cut, or a pointer: delete it, and run again",
    "404 Client|RepositoryNotFound|RemoteEntryNotFound": "the hub has no such model, or it is private (set HF_TOKEN)",
    "LocalEntryNotFound": "unset HF_HUB_OFFLINE where it is set; set HF_ENDPOINT=https://hf-mirror.com where"
    " huggingface.co is out of reach",
    "Timeout|Connect|ProtocolError|ReadError|ChunkedEncoding|URLError|Server Error|Consistency check": "the hub"
    " answers, but the file's storage does not, or breaks off: run again, or let your proxy pass it",
}
REHEARSE = " (for a rehearsal without an NPU: --device cpu)"


def find_device(name: str) -> torch.device:
    """Turn --device into a torch.device with an index, ready for use. Raises CannotRun, with the cause.

    That a device is visible proves little: torch.npu.is_available() stays True when the device does not start. So the
    first operators run here.
    """
    kind, _, index = name.partition(":")
    if kind == "cpu":
        return torch.device("cpu")
    if kind == "npu":
        find_npu()
    try:
        count = torch.get_device_module(kind).device_count()
    except RuntimeError as error:
        raise CannotRun(f"torch {torch.__version__} has no device of the kind {kind!r}: npu, cuda, cpu?") from error
    if not count:
        advice = ": check npu-smi info, the container's devices and ASCEND_RT_VISIBLE_DEVICES" if kind == "npu" else ""
        raise CannotRun(f"no {kind} device is visible to torch {torch.__version__}{advice}{REHEARSE}")
    if int(index or 0) >= count:
        raise CannotRun(f"there is no {name}: {count} {kind} device(s) visible, {kind}:0 to {kind}:{count - 1}")
    device = torch.device(kind, int(index or 0))
    try:
        torch.accelerator.set_device_index(device.index)
        torch.ones(1, device=device).add_(1)
        synchronize(device)
    except RuntimeError as error:
        raise CannotRun(f"{device} is visible, but does not work: {explain(error)}") from error
    return device


def find_npu() -> None:
    """Import torch_npu, which registers "npu" with torch. Raises CannotRun with the cause of a failure."""
    version = torch.__version__.split("+")[0]
    from importlib.metadata import distributions

    npu = next((found.version for found in distributions(name="torch-npu")), "")
    try:
        # Next to a CUDA build torch_npu raises this itself up to 2.13. From 2.14 on it aborts the process instead.
        if npu and torch.version.cuda and tuple(map(int, version.split(".")[:2])) >= (2, 14):
            raise RuntimeError("Two accelerators")
        import torch_npu  # noqa: F401
    except Exception as error:  # its check of CANN's environment raises a plain one, a broken file a SyntaxError
        found = ((re.search(pattern, str(error)), cause) for pattern, cause in IMPORT_ERRORS.items())
        match, cause = next((match, cause) for match, cause in found if match)
        cause = cause.format(match, version=version, npu=npu, error=told(error), install=install_command())
        raise CannotRun(cause + REHEARSE) from error


def install_command() -> str:
    """The line that installs torch's CPU build and what belongs to the CANN of this host."""
    cann = cann_version()
    torch_version, npu = PAIRS.get(".".join(cann.split(".")[:2]), ("", ""))
    pair = f"torch=={torch_version} torch-npu=={npu} " if npu else ""
    note = f"(README says which torch and torch_npu belong to CANN {cann}) " if cann and not npu else ""
    return f"{note}pip install {pair}-r requirements.txt --extra-index-url {CPU_BUILDS}"


def cann_version() -> str:
    """CANN's version by its files, "" where there is none."""
    homes = os.environ.get("ASCEND_HOME_PATH"), f"{ASCEND}/cann", f"{ASCEND}/ascend-toolkit/latest"
    places = "share/info/runtime/version.info", "*-linux/ascend_toolkit_install.info", "ascend_toolkit_install.info"
    return version_in(*(f"{home}/{place}" for home in homes if home for place in places))


def version_in(*patterns: str) -> str:
    """The version that the first of the files says that match the patterns, "" where there is none."""
    for path in (path for pattern in patterns for path in sorted(glob.glob(pattern))):
        with contextlib.suppress(OSError, UnicodeDecodeError), open(path, encoding="utf-8") as file:
            if match := re.search(r"^version\s*=\s*\[?([\w.+-]+)", file.read(), re.MULTILINE | re.IGNORECASE):
                return match[1]
    return ""


def synchronize(device: torch.device) -> None:
    """Wait until the device has done everything that was launched. Nothing to wait for on the CPU."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def still_computes(device: torch.device) -> bool:
    """Whether the device computes. After a failed launch torch_npu drops every later operator without a word.

    The operands are new each time, because the result of an earlier product may lie in the memory that comes back.
    """
    if device.type == "cpu":
        return True
    operands = torch.randn(2, 64, 64)
    try:
        result = torch.full((64, 64), math.nan, device=device)
        torch.matmul(*operands.to(device), out=result)
        synchronize(device)
        return compare(to_host(result), to_host(torch.matmul(*operands.double()))).row < OPERATOR["float16"]
    except RuntimeError:
        return False


def require_working(device: torch.device, event: str) -> None:
    """Go on after an error that is no verdict. Raises DeviceLost where the device does not compute any more."""
    if device.type != "cpu":
        with contextlib.suppress(RuntimeError):
            torch.get_device_module(device.type).empty_cache()
        if not still_computes(device):
            raise DeviceLost(f"the device does not compute any more after this: {event}")


def out_of_memory(error: RuntimeError) -> bool:
    """Of the device; torch_npu 2.9.0 has no exception of its own for it, and an error of its queue is a plain one."""
    codes = "out of memory|EL0004|207001|207018"
    return isinstance(error, torch.OutOfMemoryError) or bool(re.search(codes, str(error)))


def chip_name(device: torch.device) -> str:
    """The name that the device gives itself, "Ascend910B4"; "cpu" for a CPU."""
    return torch.get_device_module(device.type).get_device_name(device) if device.type != "cpu" else "cpu"


def accelerator_versions(device: torch.device) -> dict[str, str]:
    """Versions of torch_npu, CANN and the driver, "not known" where nothing tells, and settings; or of CUDA.

    Files first: before 2.13 torch_npu answers with memory that nobody initialised where the driver's file is missing.
    """
    if device.type == "cuda":
        return {"CUDA": str(torch.version.cuda)}
    if device.type != "npu":
        return {}
    opp = os.environ.get("ASCEND_OPP_PATH", "")
    versions = {"torch_npu": sys.modules["torch_npu"].__version__, "CANN": cann_version(),
                "CANN kernels": version_in(f"{opp}/version.info", f"{opp}/../share/info/opp*kernel*/version.info"),
                "driver": version_in(f"{ASCEND}/driver/version.info"),
                "firmware": version_in(f"{ASCEND}/firmware/version.info")}  # fmt: skip
    for name, part in (("CANN", "CANN"), ("driver", "DRIVER")):
        with contextlib.suppress(Exception):  # a question never stops the run
            version = versions[name] or torch.npu.utils.get_cann_version(part)
            versions[name] = version if re.match(r"\d+\.\d+", version) else ""
        versions[name] = versions[name] or "not known"
    # On: a kernel is compiled for each new shape. Off, the default since the 910B: CANN's precompiled kernels are used.
    versions["jit_compile"] = "off" if torch.npu.is_jit_compile_false() else "on, so first calls take minutes"
    # Where internal formats are allowed a convolution is another kernel, and no graph can hold it.
    with contextlib.suppress(Exception):  # there is no public function that tells it
        allowed = sys.modules["torch_npu"]._C._npu_getOption("ALLOW_INTERNAL_FORMAT") == b"enable"
        versions["internal format"] = "allowed" if allowed else "not allowed"
    if not torch.npu.utils.is_support_inf_nan():
        versions["overflow"] = "ends at the largest number, so that no output is infinite: see stage 4"
    return versions


def fp16_peak(device: torch.device) -> float | None:
    return next((peak for name, peak in FP16_PEAK.items() if chip_name(device).startswith(name)), None)


def reduced_fp32_switches(device: torch.device) -> dict[str, tuple[object, str]]:
    """The switches that let fp32 be computed with fewer bits: HF32 on Ascend (on for convolutions), TF32 on CUDA."""
    if device.type == "npu":
        return {"convolution": (torch.npu.conv, "allow_hf32"), "matmul": (torch.npu.matmul, "allow_hf32")}
    if device.type == "cuda":
        backends = torch.backends
        return {"convolution": (backends.cudnn, "allow_tf32"), "matmul": (backends.cuda.matmul, "allow_tf32")}
    return {}


@contextlib.contextmanager
def allow_reduced_fp32(device: torch.device, allowed: dict[str, bool]) -> Iterator[None]:
    """Inside, the switches of these kinds of products are set to these values; after it they are what they were."""
    switches = {kind: switch for kind, switch in reduced_fp32_switches(device).items() if kind in allowed}
    before = {kind: getattr(*switch) for kind, switch in switches.items()}
    try:
        for kind, switch in switches.items():
            setattr(*switch, allowed[kind])
        yield
    finally:
        for kind, switch in switches.items():
            setattr(*switch, before[kind])


def strict_fp32(device: torch.device) -> contextlib.AbstractContextManager:
    """Inside, no fp32 is computed with fewer bits, as far as there are switches for that."""
    return allow_reduced_fp32(device, dict.fromkeys(reduced_fp32_switches(device), False))


def fp32_arithmetic(device: torch.device) -> dict[str, str]:
    """What the device computes convolutions and matrix products of fp32 tensors in: keys of OPERATOR.

    Before the 910B, which brought bfloat16, an Ascend's matrix unit has no fp32, and torch_npu gives it float16 (its
    option ACL_PRECISION_MODE is allow_fp32_to_fp16 there).
    """
    arithmetic = {"convolution": "float32", "matmul": "float32"}
    if device.type == "npu" and not computes_in(device, "bfloat16"):
        return dict.fromkeys(arithmetic, "float16")
    reduced = "HF32" if device.type == "npu" else "TF32"
    return arithmetic | {name: reduced for name, switch in reduced_fp32_switches(device).items() if getattr(*switch)}


def computes_in(device: torch.device, dtype: str) -> bool:
    """Whether the device has this type for autocast: bfloat16 begins with the Ascend 910B; not on a 910A or 310P."""
    if dtype != "bfloat16" or device.type == "cpu":
        return True
    return getattr(torch.get_device_module(device.type), "is_bf16_supported", lambda: True)()


def cpu_fallback(device: torch.device, names: set[str], said: str) -> Entry:
    """Whether an operator of the first forward pass may have run on the CPU, unseen from Python.

    names: of the operators that aten dispatched. said: what stood on stderr. torch_npu refuses to fall back where
    TORCH_NPU_FALLBACK_CPU_DISABLE is 1 and it knows the variable; else it warns on stderr, in the first process only.
    """
    if device.type != "npu":
        return Entry(SKIP, "operators", "", "only torch_npu falls back to the CPU unseen")
    warned = re.findall(r"operator '([\w:.]+)' is not currently supported on the NPU backend and will fall back", said)
    inside = [f"{name} (its NPU kernel copies to the CPU and back)" for name in sorted(names & HOST_STAGED)]
    if warned or inside:
        advice = "it costs time: see whether the model can do without"
        return Entry(WARN, "operators", "", f"on the CPU: {', '.join(warned + inside)}", advice)
    try:
        torch.special.bessel_j0(torch.ones(1, device=device))  # has no NPU kernel
    except (RuntimeError, NotImplementedError):
        return Entry(PASS, "operators", "each has an NPU kernel, and none is known to copy to the CPU inside")
    if os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1" and os.environ.get("RANK", "0") == "0":
        return Entry(PASS, "operators", "torch_npu warned of none that fell back to the CPU")
    problem = "this torch_npu tells only its first process which operators fall back to the CPU"
    if os.environ["TORCH_NPU_FALLBACK_CPU_DISABLE"] == "1":
        return Entry(SKIP, "operators", "", problem)
    problem = "TORCH_NPU_FALLBACK_CPU_DISABLE is set to 0, so an operator may run on the CPU unseen"
    return Entry(WARN, "operators", "", problem, "unset it, so that such an operator is named")


@contextlib.contextmanager
def stderr_copied(device: torch.device) -> Iterator[list[str]]:
    """Inside, stderr is read as well, what C++ writes too. The list holds the text at the end.

    tee passes it on: a process of its own, so that the last words of one that aborts are not lost.
    """
    import tempfile

    said: list[str] = []
    if device.type != "npu" or sys.stderr is None:
        yield said
        return
    with tempfile.NamedTemporaryFile("r", errors="replace") as copied:
        stderr = os.dup(2)
        tee = subprocess.Popen(["tee", copied.name], stdin=subprocess.PIPE, stdout=stderr, stderr=subprocess.DEVNULL)
        os.dup2(tee.stdin.fileno(), 2)
        tee.stdin.close()
        try:
            yield said
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            tee.wait()
            said.append(copied.read())


def explain(error: BaseException) -> str:
    """One line for an exception: its operator, error code, what to do and CANN's reason where it has them."""
    text = str(error)
    if isinstance(error, DeviceLost):
        return text
    if fallback := re.search(r"The operator '([\w:.]+)' would execute its main computation on CPU", text):
        return f"{fallback[1]} has no NPU kernel and would run on the CPU"
    code = re.search(r"error code(?: is|:)\s*(\d+)", text)
    operator = re.search(r"working operator name is (\w+)", text) or re.search(r"\b(aclnn\w+)", text)
    reason = re.search(CANN_SAYS, text)
    if not operator and not code:
        return told(error)
    if code:
        what = f"{f'{operator[1]}: ' if operator else ''}error code {code[1]}, "
        what += ERROR_CODES.get(int(code[1]), f"see {LOG_FOLDER}")
    else:
        what = f"{operator[1]} failed on the device" + ("" if reason else f", see {LOG_FOLDER}")
    varying = r"\[PID: ?\d+\] *|\d{4}-\d\d-\d\d[-\d:. ]*"
    return what + (f" ({re.sub(varying, '', reason[0])[:300]})" if reason else "")


def import_packages() -> None:
    """Import numpy, torch and timm into this module: after the arguments, because they take seconds.

    Raises CannotRun when one is missing or broken.
    """
    global np, safetensors, timm, torch
    import logging

    # torch would import torch_npu itself and die where CANN is missing; find_npu does it and tells the causes apart.
    os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
    # torch_npu would run an operator that has no NPU kernel on the CPU, unseen from Python; so it is an error by name.
    os.environ.setdefault("TORCH_NPU_FALLBACK_CPU_DISABLE", "1")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to repeat bit for bit
    os.environ["ONEDNN_DEFAULT_FPMATH_MODE"] = "STRICT"  # the references are in full float32 on any processor
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # whose storage, out of reach, is waited for without end
    try:
        import numpy as np
        import torch

        mend_torchvision()
        import safetensors.torch
        import timm
    except ModuleNotFoundError as error:
        raise CannotRun(f"{error.name} is not installed: {install_command()}") from error
    except Exception as error:  # a numpy that is too new is an AttributeError, a broken file a SyntaxError
        raise CannotRun(f"numpy, torch and timm cannot be imported ({told(error)}): {install_command()}") from error
    warnings.filterwarnings("ignore")  # what matters is a check; warnings of the packages would only clutter stderr
    logging.getLogger("timm").setLevel(logging.ERROR)


def mend_torchvision() -> None:
    """Let timm import a torchvision that was built for another torch: it only needs the pure-Python transforms.

    The registry's torchvision is a CUDA build. Next to a CPU torch its compiled part does not load, and its import ends
    with `operator torchvision::nms does not exist`, unless the schemas of these two operators are declared.
    """
    try:
        import torchvision  # noqa: F401
    except ImportError:
        return  # timm names what is missing
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch.torchvision_schemas = library  # they last as long as this object does


# --- The report -------------------------------------------------------------------------------------------------------

WIDTH, INDENT = 120, 29  # columns of a line, and of what stands before its text


class Entry(NamedTuple):
    """One line of the log."""

    mark: str  # PASS, WARN, FAIL, SKIP; FACT; VARIES from run to run; HEADER of a table
    name: str
    text: str  # where it is empty, the problem stands in its place
    problem: str = ""  # what is wrong, shown again at the end of the log where the mark is WARN or FAIL
    advice: str = ""  # what to do then

    def lines(self) -> list[str]:
        """The line, wrapped where it is too long for a terminal. Each line of what varies begins with ~."""
        text = printable(self.text or ("" if self.mark == PASS else self.problem))  # before what wraps loses a newline
        head, more = f"{self.mark:<6}{self.name:<21}", VARIES if self.mark == VARIES else ""
        return wrap(text, f"{head}  ", f"{more:<{INDENT}}") or [head]

    @staticmethod
    def read(lines: list[str]) -> list[tuple[str, str, str]]:
        """Mark, name and text of each entry: the other direction. A line without a name goes on with the one before."""
        entries: list[tuple[str, str, str]] = []
        for line in lines:
            mark, (name, _, text) = line[:6].strip(), line[6:].partition("  ")
            if name or mark == HEADER or not entries:
                entries.append((mark, name, text.strip()))
            else:
                entries[-1] = *entries[-1][:2], f"{entries[-1][2]} {text.strip()}"
        return entries


class Table:
    """Columns of fixed width, so that logs line up. No cell is empty or has a space in it: a row splits into cells."""

    def __init__(self, *columns: str) -> None:
        self.columns = [column.rsplit(":", 1) for column in columns]  # name, format

    def header(self, title: str) -> Entry:
        """title: what the names of the rows are."""
        return Entry(HEADER, title, self.row(*(name for name, _ in self.columns)))

    def row(self, *cells) -> str:
        """Numbers in the format of their column; text, and "-" for None, in its width."""
        texts = []
        for cell, (_, form) in zip(cells, self.columns, strict=True):
            is_text = cell is None or isinstance(cell, str)
            cell = str(cell or "-").replace(" ", "_") if is_text else cell
            texts.append(format(cell, form.split(".")[0] if is_text else form))
        return " ".join(texts).rstrip()

    @staticmethod
    def split(text: str) -> list[str]:
        return text.split()


OUTPUTS = Table("batch:>8", "shape:<17", "dtype:<8", "min:>10.4f", "max:>10.4f", "mean:>10.4f", "std:>10.4f")
ERRORS = Table("what:<15", "fp64:>7.1e", "cost:>7.1e", "cpu:>7.1e", "row:>7.1e", "element:>7.1e", "warn:>7.1e",
               "fail:>7.1e", "where:<1")  # fmt: skip
THROUGHPUT = Table("batch:>5", "images/s:>9.2f", "p50_ms:>6.5g", "p90_ms:>6.5g", "p99_ms:>6.5g", "max_ms:>6.5g",
                   "spread:>6.1%", "host_ms:>7.5g", "limit:>6", "first_ms:>8.0f", "peak_MiB:>8.0f",
                   "iters:>5")  # fmt: skip
ANSWER = Table("what:<8", "batch:>5", "images/s:>9.2f", "speed-up:>8.2f", "rel_L2_fp64:>11.1e", "TFLOP/s:>8.3f",
               "of_peak:>7.2%", "saturates:>9")  # fmt: skip
CARDS = Table("node:>4", "device:<7", "checks:>6", "failed:>6", "warned:>6", "embedding_row:>13.1e", "chip:<1")
CONTENTION = Table("mode:<18", "batch:>5", "alone_img/s:>11.2f", "all_img/s:>11.2f", "ratio:>6.2f")
SPEED = Table("batch:>5", "old_img/s:>9.2f", "new_img/s:>9.2f", "ratio:>6.2f", "old_p50:>9.2f", "new_p50:>9.2f",
              "allowed:>8.1%")  # fmt: skip


class Report:
    """Prints entries as they come, keeps the lines for the log, and says the result."""

    def __init__(self, quiet: bool = False) -> None:
        self.lines: list[str] = []
        self.checks: list[Entry] = []
        self.quiet = quiet  # of several cards only one prints
        self.note, self.strict, self.output, self.timeout = "", False, "", 0.0  # known when the arguments are
        self.unjudged = 0  # outputs of which nothing can be said
        self.bar = None  # tqdm's, on a terminal
        self.lock = threading.RLock()  # needed to add a line or to write the log
        self.doing, self.timer = "start", threading.Timer(0, print)

    def begin(self, name: str, more: float = 0.0) -> None:
        """Start a stage's clock. When it runs out the device hangs: a thread ends the process, wherever it is.

        more: seconds beside --timeout, for what takes long and is no hanging.
        """
        self.doing = name
        self.timer.cancel()
        message = f"error: stage {name} takes longer than --timeout {self.timeout} s: does the device hang? see npu-smi"
        message += " info; a 310P or 910A compiles kernels for minutes at its first run: raise --timeout there"
        self.timer = threading.Timer(self.timeout + more, self.end, (message, 2))
        self.timer.daemon = True
        self.timer.start()

    def end(self, message: str, status: int) -> None:
        """From a thread: end the process at once, with what has failed so far. A log is whole, so none is written."""
        self.lock.acquire()  # not while the log is being written; from here on the main thread says nothing
        self.say_again()
        os._exit(self.not_run(message, status))

    def line(self, text: str = "") -> None:
        with self.lock:
            self.lines.append(printable(text).rstrip())
            if self.bar is not None:
                self.bar.clear()
            if not self.quiet:
                say(self.lines[-1])

    @contextlib.contextmanager
    def counted_modules(self) -> Iterator[None]:
        """Inside, a terminal shows how many modules have computed: a large model takes minutes in fp64."""
        from tqdm import tqdm

        if self.quiet or sys.stderr is None or not sys.stderr.isatty():
            yield
            return
        with tqdm(desc="modules computed", unit="", leave=False) as self.bar:
            handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: self.bar.update() and None)
            try:
                yield
            finally:
                handle.remove()
        self.bar = None

    def add(self, entries: Iterable[Entry]) -> None:
        for entry in entries:
            for line in entry.lines():
                self.line(line)
            if entry.mark in OUTCOMES:
                self.checks.append(entry)

    def stage(self, title: str, entries: Iterable[Entry]) -> bool:
        """Do a stage. What it raises is a failed check and the answer False, so that other stages can still run."""
        name = stage_name(title)
        self.begin(name)
        self.line()
        self.line(title)
        try:
            self.add(entries)
            return True
        except (CannotRun, CardsLost):
            raise
        except Exception as error:
            self.add([Entry(FAIL, name, "", explain(error), f"this stage could not be finished; {DEVICE_LOG}")])
            return False

    def say_again(self) -> None:
        """List again what failed or warned, with what to do."""
        for entry in (entry for outcome in (FAIL, WARN) for entry in self.checks if entry.mark == outcome):
            problem = wrap(printable(f"{entry.name}: {entry.problem}"), f"{entry.mark}  ", " " * 6)
            for line in ("", *problem, *wrap(entry.advice, "      -> ", " " * 9)):
                self.line(line)

    def result(self) -> int:
        """The end of the log: what failed, then the result. Returns the exit status."""
        self.say_again()
        marks = [entry.mark for entry in self.checks]
        passed, skipped, warned, failed = map(marks.count, OUTCOMES)
        is_failure = failed or self.strict and warned
        counts = f"{passed} passed, {warned} warned, {failed} failed, {skipped} skipped"
        counts += f"; {self.unjudged} outputs not judged" if self.unjudged else ""
        self.line()
        self.line(f"RESULT: {FAIL if is_failure else PASS}  {len(marks)} checks: {counts}{self.note}")
        return 1 if is_failure else 0

    def finish(self) -> int:
        """The result and, from the one card that prints, the log. Returns the exit status."""
        status = self.result()
        if not self.quiet:
            self.write()
        return status

    def write(self) -> None:
        """Replace the log in one step, so that it is the old one or the new one, whole. Raises CannotRun."""
        folder, name = os.path.split(os.path.realpath(self.output))
        temporary = os.path.join(folder, f".{name}.{os.getpid()}")
        with self.lock:
            try:
                with open(temporary, "w", encoding="utf-8") as file:
                    file.writelines(line + "\n" for line in self.lines)
                os.replace(temporary, os.path.join(folder, name))
            except OSError as error:
                reason = f"{error.strerror}; its lines are on stdout"
                raise CannotRun(f"the log cannot be written to {self.output}: {reason}") from error
            finally:
                with contextlib.suppress(OSError):
                    os.unlink(temporary)

    def finish_without(self, lost: list[int]) -> int:
        """Write the log so far, and say which cards are lost. Returns the exit status."""
        self.line()
        problem = f"does not answer since stage {self.doing}: it died or hangs"
        advice = f"see that process's own messages above, the card's log in {LOG_FOLDER}, and npu-smi info"
        names = [f"card {rank}" for rank in lost] or ["a card"]  # which may drop out after it has answered
        self.add(Entry(FAIL, name, "", problem, advice) for name in names)
        return self.finish()

    def not_run(self, message: str, status: int) -> int:
        """Say why the run was not done, on stderr, and the result line on stdout. Returns the exit status."""
        if not self.quiet:
            tell(message)
            say(f"RESULT: NOT RUN  (exit status {status}; an earlier log is left as it was)")
        return status


def watch(report: Report, cards: Cards) -> None:
    """End the run at once on Ctrl-C and SIGTERM, also while the device hangs.

    A thread does it: an exception in the main thread would come only when that is back from torch, and is lost where it
    comes in a callback.
    """
    receiver, sender = os.pipe()

    def wait() -> None:
        number = os.read(receiver, 1)[0]
        if number == signal.SIGTERM and (lost := cards.roll_call()):  # torchrun ends all because one has failed
            report.lock.acquire()
            os._exit(report.finish_without(lost))
        report.end(f"interrupted by {signal.Signals(number).name} in stage {report.doing}", 128 + number)

    os.set_blocking(sender, False)
    signal.set_wakeup_fd(sender, warn_on_full_buffer=False)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # the thread reads the number
    threading.Thread(target=wait, daemon=True).start()


def stage_name(title: str) -> str:
    """"[4/5] precision" -> "precision"."""
    return title.split("] ")[-1].strip("[]")


def wrap(text: str, first: str, more: str) -> list[str]:
    """Lines of at most WIDTH columns. first, more: what stands before the first line, and before the others."""
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=more, break_long_words=False,
                         break_on_hyphens=False)  # fmt: skip


def say(text: str) -> None:
    """Print a line on stdout. One that was closed early (| head) does not end the run: its log is still wanted."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def tell(message: str) -> None:
    print(f"validate_npu.py: {printable(message)}", file=sys.stderr, flush=True)


def printable(text: str) -> str:
    """What comes from outside (names, messages) cannot break a line: control characters are escaped, in any locale."""
    text = text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def told(error: BaseException) -> str:
    """"AttributeError: what it says"."""
    return f"{type(error).__name__}: {first_line(error)}"


def first_line(error: BaseException) -> str:
    """The first line of an exception's message that says something, at most 300 characters."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[0][:300]


# --- The command line -------------------------------------------------------------------------------------------------

def checked(pattern: str, what: str, convert: Callable = str) -> Callable[[str], object]:
    """A type for argparse: a text that matches the pattern, converted."""

    def parse(text: str):
        if not re.fullmatch(pattern, text, re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return convert(text)

    return parse


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    natural, from_1 = checked(r"\d{1,18}", "a whole number from 0 on", int), "a whole number from 1 on"
    positive = checked(r"0*[1-9]\d{0,8}", from_1, int)
    size = checked(r"auto|0*[1-9]\d{0,8}", from_1, lambda text: text if text == "auto" else int(text))
    device = checked(r"[a-z]+(:[0-9]{1,4})?", "a device; examples: npu, npu:1, cpu, cuda:0")
    percent = checked(r"\d+(\.\d+)?", "a percentage from 0 on", float)
    number = checked(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", "a number from 0 on", float)
    known = f"{', '.join(mode.name for mode in BASES)}, each also with +graph (an NPU or CUDA graph)"
    mode = checked("|".join(map(re.escape, MODES)), f"a mode; there are {known}")
    parser = argparse.ArgumentParser(
        description="Validate a timm model on a Huawei Ascend NPU, and write a log that shows it.",
        epilog="exit status: 0 no check failed, 1 one did (or warned, with --strict), 2 the run could not be done",
    )
    add = parser.add_argument
    add("--model", default=DEFAULT_MODEL, metavar="NAME", help="a timm model (default: %(default)s)")
    add("--device", default="npu", type=device, help="npu[:i], cpu (a rehearsal), cuda[:i], ... (default: %(default)s)")
    weights_help = "pretrained, random, a file or a folder (default: %(default)s)"
    add("--weights", default="pretrained", metavar="WHICH", help=weights_help)
    input_help = "of the images, height and width, where the model takes it (default: the model's own)"
    add("--input-size", default=[], type=positive, nargs="+", metavar="N", help=input_help)
    sizes_help = "or auto: doubled until it gains nothing (default: 1 4 8 16)"
    add("--batch-sizes", default=DEFAULT_BATCH_SIZES, type=size, nargs="+", metavar="N", help=sizes_help)
    warmup_help = "least batches before the timed ones, 0: none (default: 10)"
    add("--warmup", default=10, type=natural, metavar="N", help=warmup_help)
    add("--iters", default=100, type=positive, metavar="N", help="timed batches of each size (default: %(default)s)")
    add("--image", default=[], nargs="+", metavar="FILE", help="pictures to validate, folders or patterns")
    modes_help = f"to validate and time beside float32; of {known}"
    add("--modes", default=[], type=mode, nargs="+", metavar="MODE", help=modes_help)
    error_help = "relative L2 error that you accept, for the fastest mode (default: %(default)s)"
    add("--max-error", default=1e-2, type=number, metavar="X", help=error_help)
    add("--duration", default=0, type=positive, metavar="SECONDS", help="then run the fastest mode so long")
    add("--rope-bf16", action="store_true", help="round the RoPE periods to bfloat16, as the original DINOv3")
    add("--strict", action="store_true", help="a WARN also ends with exit status 1")
    add("--seed", default=0, type=natural, metavar="N", help="of random images and weights (default: %(default)s)")
    add("--baseline", metavar="OLD.txt", help="compare with an earlier log; exit status 1 where something became worse")
    add("--compare", nargs=2, metavar=("OLD.txt", "NEW.txt"), help="only compare two logs, without a run")
    add("--max-slowdown", default=10.0, type=percent, metavar="PERCENT", help="that a comparison allows (default: 10)")
    add("--timeout", default=1800, type=positive, metavar="SECONDS", help="for a stage, or a timed row (default: 1800)")
    add("--output", default="validation_output.txt", metavar="FILE", help="the log (default: %(default)s)")
    options = parser.parse_args(argv)
    if len(options.input_size) > 2:
        parser.error("--input-size takes one number, or height and width")
    if "auto" in options.batch_sizes and len(options.batch_sizes) > 1:
        parser.error("--batch-sizes auto stands alone")
    if options.batch_sizes != ["auto"]:
        options.batch_sizes = sorted(set(options.batch_sizes))
    return options


def check_paths(options: argparse.Namespace) -> None:
    """Find what would only fail after minutes of work. Raises CannotRun."""
    import tempfile

    target = os.path.realpath(options.output)
    if os.path.exists(target) and not os.path.isfile(target):
        raise CannotRun(f"the log cannot be written: {options.output} is not a regular file")
    try:
        tempfile.TemporaryFile(dir=os.path.dirname(target)).close()  # access() says yes to root, whatever is mounted
    except OSError as error:
        raise CannotRun(f"the log cannot be written to the folder of {options.output}: {error.strerror}") from error
    picture_files(options.image)
    if options.weights not in ("pretrained", "random"):
        find_weights_file(options.weights)


def main(argv: list[str] | None = None) -> int:
    cards = Cards()
    report = Report()
    try:
        if sys.stdout is not None:
            sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace")
        options = parse_arguments(argv)
        report.strict, report.output, report.timeout = options.strict, options.output, options.timeout
        if options.compare:  # needs nothing but the standard library
            old, new = map(Log.read, options.compare)
            report.line(f"validate_npu {VERSION}: comparison of {old.name} (old) and {new.name} (new)")
            report.add(compare_logs(old, new, options))
            return report.result()
        watch(report, cards)
        report.begin("start")
        if cards.rank == 0:  # which alone writes
            check_paths(options)
        baseline = Log.read(options.baseline) if options.baseline else None  # before it may be replaced
        import_packages()
        cards.connect(report, 0.9 * options.timeout + options.duration)  # a lost card is named before the time is over
        cards.all_or_none("name", lambda: check_name(options.model))
        device = cards.all_or_none("device", lambda: find_device(cards.device_name(options.device)))
        status = validate(Run(options, report, cards, device, fp32_arithmetic(device)), baseline)
        cards.gather("end")  # wait for all: when one process ends with an error, torchrun kills card 0, which writes
        return status
    except CannotRun as problem:
        report.lock.acquire()  # that is the last word: torchrun ends card 0 as soon as another has ended
        return report.not_run(f"error: {problem}", 2)
    except CardsLost as lost:
        return report.finish_without(lost.args[0])
    except SystemExit as end:  # argparse has told what is wrong with the arguments, or printed the help
        if end.code:
            say("RESULT: NOT RUN  (exit status 2; an earlier log is left as it was)")
        raise


if __name__ == "__main__":
    exit_status = main()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        os._exit(exit_status)  # for torchrun a library that crashes while python ends would be a card that died
    sys.exit(exit_status)
