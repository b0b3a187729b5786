"""Any weights: from the hub, a real HTTP server on loopback with the genuine client, and from files."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time

import pytest
from conftest import OLD_LOG, REHEARSAL, SCRIPT, start
from hub_server import HubServer
from safetensors.torch import save, save_file

import validate_npu as v

torch, timm = v.torch, v.timm
ONE = (*REHEARSAL, "--batch-sizes", "1", "--iters", "1")
PRETRAINED = (*ONE, "--weights", "pretrained")
REPOSITORY = "timm/test_vit.r160_in1k"  # where timm looks for the weights of test_vit


def drawn(name, seed=1):
    model = timm.create_model(name).eval()
    v.draw_weights(model, seed)
    return model


@pytest.fixture(scope="session")
def files():
    return {"model.safetensors": save(drawn("test_vit").state_dict())}


def weights_of(run):
    return run.log.facts["weights SHA-256"]


def from_hub(folder, url, **env):
    """A run whose hub and whose cache are its own. The short timeouts are those of huggingface_hub."""
    (folder / "validation_output.txt").write_text(OLD_LOG)
    timeouts = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    return start(PRETRAINED, folder, {"HF_ENDPOINT": url, "HF_HOME": str(folder / "cache")} | timeouts | env)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_download_and_then_its_cache_with_the_server_gone(tmp_path, files):
    with HubServer(REPOSITORY, files) as hub:
        first = from_hub(tmp_path, hub.url)
    assert first.clean, first.stderr
    assert first.log.facts["weights"] == f"pretrained, {REPOSITORY}"
    assert weights_of(first) == v.sha256(drawn("test_vit").state_dict())
    assert sum("GET" in request and "model.safetensors" in request for request in hub.requests) == 1
    for env in ({"HF_HUB_OFFLINE": "1"}, {}):
        again = from_hub(tmp_path, hub.url, **env)
        assert again.clean and weights_of(again) == weights_of(first), again.stderr


def test_a_terminal_shows_the_progress_of_the_download(tmp_path, files):
    with HubServer(REPOSITORY, files, "slow") as hub:
        terminal, stderr = pty.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path)}
        done = subprocess.Popen(
            [sys.executable, SCRIPT, *PRETRAINED], cwd=tmp_path, env=env, stdout=subprocess.DEVNULL, stderr=stderr
        )
        os.close(stderr)
        shown = b""
        while chunk := read(terminal):
            shown += chunk
    assert done.wait() == 0
    assert re.search(rb"model\.safetensors: +\d+%", shown), shown
    assert b"batch 1" in shown, "and that of the benchmark"


def read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side of a terminal is closed
        return b""


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("missing", "(RepositoryNotFoundError: 404 Client Error.): set HF_ENDPOINT=https://hf-mirror.com"),
        ("gated", "(GatedRepoError: 401 Client Error.): ask for access on the model's page and set HF_TOKEN"),
        ("truncated", "expected 1491816)): set HF_ENDPOINT=https://hf-mirror.com"),
        ("stall half-way", "(ReadTimeout: timed out): set HF_ENDPOINT=https://hf-mirror.com"),
        (
            "stall",
            "set HF_ENDPOINT=https://hf-mirror.com where huggingface.co is out of reach, or use --weights FILE or random",
        ),
    ],
)
def test_a_hub_that_does_not_give_the_weights_ends_the_run_in_a_minute(tmp_path, files, behaviour, message):
    start = time.monotonic()
    with HubServer(REPOSITORY, files, behaviour) as hub:
        done = from_hub(tmp_path, hub.url)
    assert time.monotonic() - start < 60
    assert done.status == 2, done.stdout
    *notes, error = done.errors
    assert "error: " in error and message in error, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("RESULT: NOT RUN")
    assert done.text == OLD_LOG
    assert [f"{hub.url} does not answer" in note for note in notes] == [True] * (behaviour == "stall")


def test_a_hub_that_fails_at_first_is_asked_again(tmp_path, files):
    with HubServer(REPOSITORY, files, "flaky") as hub:
        done = from_hub(tmp_path, hub.url)
    assert done.clean, done.stderr
    assert weights_of(done) == v.sha256(drawn("test_vit").state_dict())


# --- files ------------------------------------------------------------------------------------------------------------


def original_keys(state):
    """The names that Meta's DINOv3 gives the tensors of timm's, with what timm leaves out: mask token, zero biases, periods."""
    names = {"reg_token": "storage_tokens", "gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
    original = {re.sub("|".join(names), lambda found: names[found[0]], key): value for key, value in state.items()}
    for key in [key for key in original if key.endswith("attn.qkv.weight")]:
        original[key.replace("weight", "bias")] = torch.zeros(len(original[key]))
        original[key.replace("weight", "bias_mask")] = torch.zeros(len(original[key]))
    return original | {"mask_token": torch.zeros(1, 384), "rope_embed.periods": torch.ones(16, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("test_vit", lambda state, path: save_file(state, f"{path}.safetensors")),
        ("test_vit", lambda state, path: torch.save(state, f"{path}.pth")),
        ("test_vit", lambda state, path: torch.save({"state_dict": state, "epoch": 3}, f"{path}.pth")),
        ("test_vit", lambda state, path: torch.save({"model": state}, f"{path}.pth")),
        (
            "test_vit",
            lambda state, path: torch.save({f"module.{key}": value for key, value in state.items()}, f"{path}.pth"),
        ),
        ("vit_small_patch16_dinov3", lambda state, path: torch.save(original_keys(state), f"{path}.pth")),
    ],
    ids=["safetensors", "state dict", "in state_dict", "in model", "of DataParallel", "original DINOv3 keys"],
)
def test_a_checkpoint_is_loaded(run, tmp_path, name, write):
    state = drawn(name).state_dict()
    write(state, tmp_path / "weights")
    path = next(tmp_path.glob("weights.*"))
    done = run(*ONE, "--model", name, "--weights", path)
    assert done.clean, done.stdout + done.stderr
    assert done.log.facts["weights"] == f"file {path.name}"
    assert weights_of(done) == v.sha256(state)


def test_another_models_checkpoint_is_reported_by_its_keys(run, tmp_path):
    state = drawn("test_vit").state_dict()
    state["norm.weight"] = torch.ones(7)
    state["norm.extra"] = torch.ones(1)
    for key in [key for key in state if key.startswith("blocks.0.")]:
        del state[key]
    torch.save(state, tmp_path / "other.pth")
    done = run(*ONE, "--weights", "other.pth")
    assert done.status == 2
    assert (
        "keys 12 missing (blocks.0.norm1.weight, blocks.0.norm1.bias, blocks.0.attn.qkv.weight, ...);"
        " 1 unexpected (norm.extra); 1 of another shape (norm.weight)"
    ) in done.errors[0]


# --- a variant --------------------------------------------------------------------------------------------------------


def test_rope_periods_in_bfloat16_are_the_originals_and_change_the_outputs_a_little(run):
    """All of them, the feature maps, too; the weights are the same."""
    model = (*ONE, "--model", "test_dinov3")
    plain, rounded = run(*model), run(*model, "--rope-bf16")
    assert plain.clean and rounded.clean, rounded.stdout
    assert "RoPE periods in float32" in plain.log.facts["options"]
    assert "RoPE periods in bfloat16" in rounded.log.facts["options"]
    assert weights_of(plain) == weights_of(rounded)
    before, after = plain.rows("outputs"), rounded.rows("outputs")
    for name in ("embedding", "tokens", "feature map 1", "feature map 2", "feature map 3"):
        assert before[name, "1"] != after[name, "1"], name
        assert float(after[name, "1"]["std"]) == pytest.approx(float(before[name, "1"]["std"]), rel=0.05)
