"""Several devices under torchrun, on an emulated host: one log, a device that differs or drops out is named."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ascend_emulator import environment
from conftest import OLD_LOG, SCRIPT, SMALL, start
from hub_server import HubServer
from safetensors.torch import save

import validate_npu as v


def torchrun(devices):
    return ["-m", "torch.distributed.run", "--nproc-per-node", devices]


@pytest.fixture
def validate(tmp_path):
    """validate(2, "--timeout", "30", FAULT=...): the script on so many emulated devices."""
    (tmp_path / "validation_output.txt").write_text(OLD_LOG)

    def validate(devices, *arguments, **knobs):
        env = environment(DEVICES=devices, **knobs) | {"OMP_NUM_THREADS": "1"}
        each = f'{sys.executable} "$@"; status=$?; echo "rank $RANK ends with $status" >&2; sleep 1; exit $status'
        launcher = [*torchrun(devices), "--no-python", "bash", "-c", each, "bash"] if "--baseline" in arguments else torchrun(devices)
        return start([*SMALL, *arguments], tmp_path, env, launcher)

    return validate


def test_two_healthy_devices_pass_and_agree(validate):
    done = validate(2)
    assert done.clean, done.stdout + done.stderr
    assert done.text.startswith(f"validate_npu {v.VERSION}: test_vit on npu:0 and 1 more device (emulated, not an NPU)\n")
    assert {done.mark(f"devices.{name}") for name in ("0", "1", "agreement")} == {"PASS"}
    second = done.rows["devices.1"]
    assert (second["device"], second["failed"], second["warned"], second["chip"]) == ("npu:1", "0", "0", "Ascend910B4")
    assert {id for id, cells in done.rows.items() if "images/s" in cells} == {
        *(f"{device}.float32.{batch}" for device in ("throughput", "devices.1") for batch in (1, 3)),
        *(f"devices.together.{rank}.float32.3" for rank in (0, 1)),
    }  # fmt: skip
    uuids = [f"rank {rank} eeeeeeee-eeee-eeee-eeee-eeeeeeeeee0{rank}" for rank in (0, 1)]
    if "devices.uuids" in done.texts:  # torch_npu has them since 2.10
        assert done.texts["devices.uuids"] == ", ".join(uuids) and done.texts["device.uuid"] == uuids[0][7:]
    assert done.stdout.count("RESULT: ") == done.stdout.count("[1/5] device") == 1, "one process prints"


@pytest.mark.timing
def test_each_device_alone_is_faster_where_the_host_is_shared(validate):
    """Kernels of 60 ms that need no CPU: side by side they take no longer, and one after the other they would."""
    done = validate(2, KERNEL_TIME="Convolution=60")
    for alone, rank in (("throughput", 0), ("devices.1", 1)):
        rates = [float(done.rows[f"{id}.float32.3"]["images/s"]) for id in (f"devices.together.{rank}", alone)]
        assert 0.75 < rates[0] / rates[1] < 1.25


TIMED = "--batch-sizes", "2", "--iters", "6", "--baseline", "yesterday.txt"
BOTH = {"comparison.speed": "FAIL", "comparison.outcomes": "FAIL", "devices.speed": "WARN"}
SLOW_1, SLOW_ALL = "Convolution=200,device=1;Convolution=100", "Convolution=200"


@pytest.mark.timing
@pytest.mark.parametrize(
    ("devices", "yesterday", "today", "failures"),
    [
        (2, "Convolution=100", "Convolution=100", {}),
        (2, "Convolution=100", SLOW_1, BOTH),
        pytest.param(3, "Convolution=100", SLOW_1, BOTH, marks=pytest.mark.full),
        pytest.param(2, "Convolution=100", SLOW_ALL, {"comparison.speed": "FAIL"}, marks=pytest.mark.full),
        pytest.param(2, SLOW_1, SLOW_1, {"devices.speed": "WARN"}, marks=pytest.mark.full),
    ],
)
def test_a_slow_device_is_named_and_every_process_ends_alike(validate, tmp_path, devices, yesterday, today, failures):
    """Device 1 or all are slower than yesterday, or slower than the others, or both."""
    first = validate(devices, *TIMED[:4], "--output", "yesterday.txt", KERNEL_TIME=yesterday)
    assert first.status == 0, first.stdout
    done = validate(devices, *TIMED, KERNEL_TIME=today)
    listed = {block.split(":")[0].split()[1]: block for block in done.failures}
    assert {id: block[:4] for id, block in listed.items()} == failures, done.stdout
    failed = "FAIL" in failures.values()
    assert done.result.startswith("RESULT: FAIL" if failed else "RESULT: PASS")
    statuses = dict(re.findall(r"^rank (\d) ends with (\d)$", done.stderr, re.MULTILINE))
    assert done.status == failed and statuses == {str(rank): str(int(failed)) for rank in range(devices)}, done.stderr
    assert "devices.speed" not in failures or "WARN devices.speed: rank 1: float32.2 " in listed["devices.speed"]
    assert "comparison.speed" not in failures or "devices.1.float32.2: " in listed["comparison.speed"]
    compared = start(["--compare", "yesterday.txt", "validation_output.txt"], tmp_path)
    assert compared.status == failed, "a comparison of the two logs has the same outcome"


@pytest.mark.timing
def test_a_warning_of_strict_ends_every_process_alike(validate):
    done = validate(2, *TIMED[:4], "--strict", KERNEL_TIME=SLOW_1)
    assert done.status == 1 and done.result.startswith("RESULT: FAIL"), done.stdout
    assert exit_codes(done.stderr) == {0: 1, 1: 1}


def test_only_rank_0_reads_the_baseline(validate):
    """It may be on the first host only. One process names it."""
    done = validate(2, "--baseline", "nowhere.txt")
    assert done.status == 1 and "rank 0 ends with 2\n" in done.stderr, done.stderr  # torchrun may report rank 1 only
    assert done.text == OLD_LOG and done.errors == ["validate_npu.py: error: rank 0: the log nowhere.txt cannot be read: No such file or directory"]


def test_the_device_that_corrupts_data_is_named(validate):
    done = validate(3, FAULT="Addmm:scale=1.01,device=1")
    assert done.status == 1, done.stdout
    assert [done.mark(f"devices.{rank}") for rank in range(3)] == ["PASS", "FAIL", "PASS"]
    assert done.mark("devices.agreement") == "FAIL"
    listed = "\n".join(done.failures)
    assert re.search(r"FAIL devices\.agreement: rank 1 of 3 differs from the others: error \d\.\de-0\d ", listed)
    assert re.search(r"FAIL devices\.1: not passed: .*(outputs|precision)\.", listed), "what it failed is printed"
    assert exit_codes(done.stderr) and set(exit_codes(done.stderr).values()) == {1}


def test_a_device_that_does_not_start_ends_the_run_on_all(validate):
    """And one process prints it, before torchrun ends it because another has ended."""
    done = validate(2, SET_DEVICE_ERROR="507033,device=1")
    assert done.status == 1 and 2 in exit_codes(done.stderr).values(), done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("validate_npu.py: ")]
    assert len(errors) == 1 and "error: rank 1: npu:1 is visible, but does not work: error code 507033" in errors[0]
    assert done.text == OLD_LOG


@pytest.mark.parametrize(
    ("operator", "problem"), [("Gelu", "stage 1 was not finished on it"), ("LayerNorm", "the model does not run on it")]
)
def test_a_device_that_cannot_run_the_model_is_named(validate, operator, problem):
    """And the others do not wait for it in a later stage."""
    done = validate(2, FAULT=f"{operator}:error=507015,device=1")
    assert done.status == 1
    named = [line for line in done.failures if line.startswith("FAIL devices.")]
    assert named == [f"FAIL devices.1: {problem} next: run it by itself for its whole log"], done.stdout


@pytest.mark.timing
def test_a_device_that_hangs_is_named_in_the_log(validate):
    start = time.monotonic()
    done = validate(2, "--timeout", "30", FAULT="Addmm:hang,from=60,device=1")
    assert time.monotonic() - start < 120
    assert done.status == 1 and exit_codes(done.stderr)[1] == 2, done.stderr
    assert any(re.match(r"FAIL devices\.1: does not answer since stage \w+: its process ended or hangs ", x) for x in done.failures)
    assert done.result.startswith("RESULT: FAIL")


def process_of(rank, parent):
    """The process that torchrun started for this rank."""
    for status in Path("/proc").glob("[0-9]*/environ"):
        try:
            if (
                f"\0RANK={rank}\0".encode() in status.read_bytes()
                and f"PPid:\t{parent}\n" in (status.parent / "status").read_text()
            ):
                return int(status.parent.name)
        except OSError:
            continue
    raise AssertionError(f"rank {rank} is not there")


def under_way(folder, text, *arguments, **knobs):
    """torchrun with two ranks, as a shell starts it: in a process group of its own. Rank 0 has printed the text."""
    (folder / "validation_output.txt").write_text(OLD_LOG)
    command = [sys.executable, *map(str, torchrun(2)), SCRIPT, *SMALL, *arguments]
    env = os.environ | environment(DEVICES=2, **knobs) | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=folder, env=env, start_new_session=True, **pipes)
    while text not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    return process


def exit_codes(stderr):
    """Rank -> exit status, of the ranks that failed before torchrun ended the others."""
    found = re.findall(r"rank +: (\d+) .*\n +exitcode +: (-?\d+)", stderr)
    return {int(rank): int(status) for rank, status in found}


def is_named_as_lost(folder, rank):
    log = (folder / "validation_output.txt").read_text()
    pattern = rf"^FAIL devices\.{rank}: does not answer since stage \w+: its process ended or hangs$"
    return re.search(pattern, log, re.MULTILINE) and log.splitlines()[-1].startswith("RESULT: FAIL")


def test_a_killed_rank_ends_the_run_and_is_named_in_the_log(tmp_path):
    process = under_way(tmp_path, "[3/5]", "--iters", "100", KERNEL_TIME="Convolution=30")
    killed = time.monotonic()
    os.kill(process_of(1, process.pid), signal.SIGKILL)
    _, stderr = process.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert process.returncode == 1 and exit_codes(stderr)[1] == -signal.SIGKILL, stderr
    assert is_named_as_lost(tmp_path, 1), stderr


@pytest.mark.full
@pytest.mark.timing
def test_a_rank_that_no_longer_runs_and_did_not_end_is_named_in_the_log(tmp_path):
    """A stopped process: nothing but the other rank's waiting time can end this run. torchrun kills it after 30 s."""
    process = under_way(tmp_path, "[3/5]", "--timeout", "30")
    os.kill(process_of(1, process.pid), signal.SIGSTOP)
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 1 and exit_codes(stderr)[0] == 1, stderr
    assert is_named_as_lost(tmp_path, 1), stderr


@pytest.mark.parametrize("fault", ["LayerNorm:hang,device=1", "LayerNorm:hang,from=40"], ids=["one", "both"])
@pytest.mark.parametrize(("number", "end"), [(signal.SIGINT, os.killpg), (signal.SIGTERM, os.kill)], ids=["Ctrl-C", "kill"])
def test_a_signal_ends_ranks_that_hang_at_once_and_leaves_the_log(tmp_path, number, end, fault):
    """Ctrl-C reaches all processes of a terminal, kill only torchrun. A rank that hangs is not taken for one that is lost."""
    process = under_way(tmp_path, "[2/5]", FAULT=fault)
    time.sleep(5)
    begin = time.monotonic()
    end(process.pid, number)
    _, stderr = process.communicate(timeout=120)
    assert time.monotonic() - begin < 15, "torchrun kills what has not ended after 30 s"
    assert process.returncode not in (0, 2)
    assert stderr.count(f"validate_npu.py: interrupted by {number.name} in stage ") == 1, stderr
    assert stderr.count("validate_npu.py: ") == 1 and "does not answer" not in stderr
    assert (tmp_path / "validation_output.txt").read_text() == OLD_LOG


@pytest.mark.timing
@pytest.mark.full
def test_a_rank_that_waits_for_a_late_one_is_not_ended_by_its_own_timeout(validate, tmp_path):
    late = ["bash", "-c", '[ $RANK = 0 ] || sleep 40; exec "$@"', "bash", sys.executable]
    env = environment(DEVICES=2) | {"OMP_NUM_THREADS": "1"}
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", 2, "--no-python", *late]
    done = start([*SMALL, "--timeout", "30"], tmp_path, env, launcher)
    assert done.clean, done.stdout + done.stderr


def on_two_hosts(tmp_path, *arguments):
    """Two torchruns on one machine stand for two hosts, each with an npu:0. What each printed, and its exit status."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    master = ["--nnodes", "2", "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", str(port)]
    env = os.environ | environment() | {"OMP_NUM_THREADS": "1"}
    hosts = []
    for node in ("0", "1"):
        (tmp_path / node).mkdir(exist_ok=True)
        command = [sys.executable, "-m", "torch.distributed.run", *master, "--node-rank", node, SCRIPT, *SMALL, *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        hosts.append(subprocess.Popen(command, cwd=tmp_path / node, env=env, **streams))
    return [(host.communicate(timeout=200)[0], host.returncode) for host in hosts]


def test_devices_of_two_hosts_are_distinguished(tmp_path):
    assert [status for _, status in on_two_hosts(tmp_path)] == [0, 0]
    log = (tmp_path / "0" / "validation_output.txt").read_text()
    assert re.search(r"^PASS devices\.0 +0 npu:0 .*\nPASS devices\.1 +1 npu:0 ", log, re.MULTILINE), log
    assert not (tmp_path / "1" / "validation_output.txt").exists(), "one log, written by rank 0"


def test_hosts_with_different_weights_are_no_failure_of_a_device(tmp_path):
    for seed in (0, 1):
        model = v.timm.create_model("test_vit")
        v.draw_weights(model, seed)
        (tmp_path / str(seed)).mkdir()
        v.torch.save(model.state_dict(), tmp_path / str(seed) / "my.pth")
    (printed, status), _ = on_two_hosts(tmp_path, "--weights", "my.pth")
    assert status == 1 and "error: the processes have different weights" in printed, printed
    assert "RESULT: NOT RUN" in printed and not list(tmp_path.glob("*/validation_output.txt"))


def test_weights_are_downloaded_once_per_host(tmp_path):
    model = v.timm.create_model("test_vit")
    v.draw_weights(model, 1)
    with HubServer("timm/test_vit.r160_in1k", {"model.safetensors": save(model.state_dict())}, "slow") as hub:
        env = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        done = start([*SMALL, "--device", "cpu", "--weights", "pretrained"], tmp_path, env, torchrun(2))
    assert done.status == 0, done.stderr
    assert sum(request.startswith("GET") and request.endswith("model.safetensors") for request in hub.requests) == 1
    assert done.texts["model.weights_sha256"] == v.sha256(model.state_dict())
