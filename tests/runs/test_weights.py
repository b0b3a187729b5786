"""Any weights: from the hub, a real HTTP server on loopback with the genuine client, and from files."""

import argparse
import fcntl
import io
import json
import math
import os
import pty
import re
import ssl
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
import trained
from conftest import OLD_LOG, REHEARSAL, SCRIPT, start
from hub_server import REFUSALS, HubServer
from huggingface_hub import hf_hub_download
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
    return run.texts["model.weights_sha256"]


def from_hub(folder, url, *arguments, **env):
    """A run whose hub and whose cache are its own. The short timeouts are those of huggingface_hub."""
    (folder / "validation_output.txt").write_text(OLD_LOG)
    timeouts = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
    return start([*PRETRAINED, *arguments], folder, {"HF_ENDPOINT": url, "HF_HOME": str(folder / "cache")} | timeouts | env)


# --- the hub ----------------------------------------------------------------------------------------------------------


def test_a_download_and_then_its_cache_with_the_server_gone(tmp_path, files):
    with HubServer(REPOSITORY, files) as hub:
        first = from_hub(tmp_path, hub.url)
    assert first.clean, first.stderr
    assert first.texts["model.weights"] == f"pretrained, {REPOSITORY}"
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
    assert b"float32, 1:" in shown, "and that of the benchmark"


def read(terminal):
    try:
        return os.read(terminal, 4096)
    except OSError:  # the other side of a terminal is closed
        return b""


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("missing", "(RepositoryNotFoundError: 404 Client Error.): the hub has no such model, or it is private (set HF_TOKEN)"),
        ("gated", "(GatedRepoError: 401 Client Error.): ask for access on the model's page and set HF_TOKEN"),
        pytest.param("truncated", "expected 1491816)): the hub answers, but the file's storage does not, or breaks off",
                     marks=pytest.mark.full),
        ("stall half-way", "(ReadTimeout: timed out): the hub answers, but the file's storage does not, or breaks off"),
        ("storage out of reach", "Connection refused): the hub answers, but the file's storage does not, or breaks off"),
        ("stall", "(ReadTimeout: timed out): HF_ENDPOINT=URL does not answer: correct or unset it, or use --weights FILE or random"),
        ("no commit", "URL does not send X-Repo-Commit and ETag, the headers of a hub): the mirror or a proxy drops them"),
        ("moved", "URL does not send X-Repo-Commit and ETag, the headers of a hub): the mirror or a proxy drops them"),
        ("forbidden", "403 Forbidden: None.): your network or proxy blocks it, or your token does not allow it"),
        ("blocked", "your network or proxy blocks it, or your token does not allow it"),
        ("limited", "the hub limits the number of requests: wait some minutes, or set HF_TOKEN"),
        ("broken", "the hub has a failure of its own: run again later"),
    ],
)
def test_a_hub_that_does_not_give_the_weights_ends_the_run_in_a_minute(tmp_path, files, behaviour, message):
    start = time.monotonic()
    with HubServer(REPOSITORY, files, behaviour) as hub:
        done = from_hub(tmp_path, hub.url)
    assert time.monotonic() - start < 60
    assert done.status == 2, done.stdout
    (error,) = done.errors
    assert "error: " in error and message.replace("URL", hub.url) in error, done.stderr
    assert not any(" /" == request[-2:] for request in hub.requests), "the home page is not requested"
    assert behaviour not in REFUSALS or sum("/resolve/" in request for request in hub.requests) == 1, "then only the cache is used"
    assert "Traceback" not in done.stderr
    assert done.stdout.splitlines()[-1].startswith("RESULT: NOT RUN")
    assert done.text == OLD_LOG


def test_a_token_that_has_expired_is_named_although_the_model_is_public(tmp_path, files):
    with HubServer(REPOSITORY, files, "token") as hub:
        done = from_hub(tmp_path, hub.url, HF_TOKEN="hf_expired")
    assert done.status == 2 and "the token in HF_TOKEN or ~/.cache/huggingface/token is not valid" in done.errors[0], done.stderr


@pytest.mark.parametrize(
    ("model", "env", "message"),
    [
        ("timm/test_vit.r160_in1k", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "HF_ENDPOINT=http://127.0.0.1:9 does not answer: correct or unset it"),
        ("test_vit", {"HF_ENDPOINT": "http://hub.invalid", "HTTP_PROXY": "http://me:secret@127.0.0.1:9"},
         "the proxy http://127.0.0.1:9 does not answer: correct or unset HTTP_PROXY"),
    ],
    ids=["no hub", "no proxy"],
)  # fmt: skip
def test_what_does_not_answer_is_named(tmp_path, model, env, message):
    """A closed port of this machine stands for a hub, or a proxy, that is gone. What a proxy's URL hides stays hidden."""
    done = start([*PRETRAINED, "--model", model], tmp_path, env | {"HF_HOME": str(tmp_path)})
    assert done.status == 2 and message in done.errors[0] and "secret" not in done.errors[0], done.stderr


def test_a_certificate_of_the_users_own_network_is_named(tmp_path, files):
    """A hub with a self-signed certificate: with SSL_CERT_FILE it is trusted."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    subprocess.run([*command.split(), "-keyout", key, "-out", certificate], check=True, capture_output=True)
    with HubServer(REPOSITORY, files) as hub:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        hub.socket = context.wrap_socket(hub.socket, server_side=True)
        url = f"https://localhost:{hub.server_port}"
        refused, trusted = from_hub(tmp_path, url), from_hub(tmp_path, url, SSL_CERT_FILE=str(certificate))
    assert refused.status == 2 and "set SSL_CERT_FILE to the file with your network's certificates" in refused.errors[0]
    assert trusted.clean, trusted.stderr


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
    assert done.texts["model.weights"].startswith(f"file {path.name}")
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


# --- files as people have them ----------------------------------------------------------------------------------------


def sharded(state, folder):
    """As transformers and accelerate leave it: two shards and their index."""
    halves = dict(list(state.items())[::2]), dict(list(state.items())[1::2])
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for half, name in zip(halves, names):
        save_file(half, folder / name)
    index = {"weight_map": {key: name for half, name in zip(halves, names) for key in half}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def cloned(state, folder):
    """As git clone leaves it: both files, of which one is a pointer that was not pulled."""
    (folder / "config.json").write_text("{}")
    (folder / "pytorch_model.bin").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    save_file(state, folder / "model.safetensors")


def prefixed(prefix):
    return lambda state, folder: torch.save({prefix + key: value for key, value in state.items()}, folder / "f.pth")


def wrapped(**wrapper):
    def write(state, folder):
        torch.save({key: state if value is dict else value for key, value in wrapper.items()}, folder / "f.pth")

    return write


def as_type(dtype):
    return lambda state, folder: save_file({key: value.to(dtype) for key, value in state.items()}, folder / "f.safetensors")


@pytest.mark.parametrize(
    ("write", "path", "message"),
    [
        (cloned, "", "file weights/model.safetensors"),
        (sharded, "", "file weights/model.safetensors.index.json"),
        (sharded, "model.safetensors.index.json", "file model.safetensors.index.json"),
        (wrapped(model_state_dict=dict), "f.pth", "file f.pth, its model_state_dict"),
        (wrapped(teacher=dict, student=dict), "f.pth", "file f.pth, its teacher"),
        (wrapped(model=dict, model_ema=dict), "f.pth", "file f.pth, its model_ema"),
        (wrapped(model=dict, args=argparse.Namespace(lr=0.1), best=v.np.float64(0.8)), "f.pth", "file f.pth, its model"),
        (prefixed("_orig_mod."), "f.pth", "file f.pth"),
        (prefixed("model."), "f.pth", "file f.pth, prefix model. stripped"),
        (prefixed("module.backbone."), "f.pth", "file f.pth, prefix backbone. stripped"),
        (as_type(torch.float64), "f.safetensors", "file f.safetensors, from float64"),
    ],
    ids=["clone", "shards", "index", "model_state_dict", "teacher", "EMA", "training checkpoint", "compiled", "Lightning",
         "DDP of a backbone", "float64"],
)  # fmt: skip
def test_weights_are_loaded_as_people_have_them(run, tmp_path, write, path, message):
    """Whatever was taken or left out is printed, and the weights are those of the state dict."""
    folder = tmp_path / "weights"
    folder.mkdir()
    state = drawn("test_vit").state_dict()
    write(state, folder)
    done = run(*ONE, "--weights", folder / path)
    assert done.clean, done.stdout + done.stderr
    assert done.texts["model.weights"] == message and weights_of(done) == v.sha256(state)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (as_type(torch.float16), "file f.safetensors, from float16"),
        (as_type(torch.bfloat16), "file f.safetensors, from bfloat16"),
        (lambda state, folder: torch.save({k: t[:10] if k.startswith("head.") else t for k, t in state.items()},
                                          folder / "f.pth"), "file f.pth, 10 classes, as in the file"),
        (lambda state, folder: torch.save({k: t for k, t in state.items() if not k.startswith("head.")},
                                          folder / "f.pth"), "file f.pth, 0 classes, as in the file"),
    ],
    ids=["float16", "bfloat16", "10 classes", "no classifier"],
)  # fmt: skip
def test_weights_of_a_variant_of_the_model_are_named(run, tmp_path, write, message):
    write(drawn("test_vit").state_dict(), tmp_path)
    done = run(*ONE, "--weights", next(tmp_path.glob("f.*")))
    assert done.clean, done.stdout + done.stderr
    assert done.texts["model.weights"] == message
    assert ("outputs.logits" in done.rows) == (", 0 classes" not in message)


def changed(change):
    """A state dict in which one matrix is what `change` makes of it."""

    def write(state, path):
        torch.save({**state, "blocks.0.mlp.fc1.weight": change(state["blocks.0.mlp.fc1.weight"].clone())}, path)

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda state, path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "is a Git LFS pointer: run git lfs pull"),
        (lambda state, path: path.write_text("<!doctype html><html>"), "it is a web page: download the file itself"),
        (lambda state, path: path.write_bytes(b""), "f.pth cannot be read: it is empty"),
        (changed(lambda x: x.flatten().index_fill(0, torch.tensor([3, 5]), math.nan).view_as(x)),
         "has NaN or Inf in blocks.0.mlp.fc1.weight, so that it cannot validate a device"),
        (changed(lambda x: x.to(torch.int8)), "is quantised (blocks.0.mlp.fc1.weight is int8)"),
        (changed(lambda x: x.to(torch.float8_e4m3fn)), "is quantised (blocks.0.mlp.fc1.weight is float8_e4m3fn)"),
        (lambda state, path: torch.save({k: t * 0 for k, t in state.items()}, path), "f.pth is all zeros"),
        (lambda state, path: torch.save(timm.create_model("test_vit"), path),
         "it holds more than tensors: save the model's state_dict()"),
        (lambda state, path: torch.save([torch.ones(2)], path), "f.pth holds a list, not a state dict"),
        (lambda state, path: torch.save({"embeddings.cls_token": torch.ones(1, 2)}, path), "these names are those of transformers"),
    ],
    ids=["LFS pointer", "web page", "empty", "NaN", "int8", "fp8", "zeros", "pickled model", "list", "transformers"],
)  # fmt: skip
def test_a_file_that_is_no_weights_is_named_for_what_it_is(run, tmp_path, write, message):
    (tmp_path / "validation_output.txt").write_text(OLD_LOG)
    write(drawn("test_vit").state_dict(), tmp_path / "f.pth")
    done = run(*ONE, "--weights", "f.pth")
    assert done.status == 2 and len(done.errors) == 1 and message in done.errors[0], done.stderr
    assert done.text == OLD_LOG and "Traceback" not in done.stderr


@pytest.mark.parametrize("size", [["192"], ["160", "224"]])
@pytest.mark.parametrize("model", ["test_vit", "resnet18"])
def test_images_of_another_size(run, tmp_path, model, size):
    """Of a ViT the positions of the file are resampled; a CNN takes any size."""
    save_file(drawn(model).state_dict(), tmp_path / "f.safetensors")
    done = run(*ONE, "--model", model, "--weights", "f.safetensors", "--img-size", *size)
    assert done.clean, done.stdout + done.stderr
    assert done.texts["model.preprocessing"].startswith(f"3x{size[0]}x{size[-1]} ")


CONFIG = {
    "architecture": "test_vit",
    "num_classes": 1000,
    "model_args": {"img_size": 160},
    "pretrained_cfg": {"input_size": [3, 160, 160], "classifier": "head"},
}


def test_a_model_with_one_class_and_one_channel(run, tmp_path):
    """Its one logit is no collapsed output, and no top-1; pictures become gray, in the size of --img-size."""
    config = CONFIG | {"num_classes": 1, "model_args": {"img_size": 160, "in_chans": 1}}
    config["pretrained_cfg"] = config["pretrained_cfg"] | {"input_size": [1, 160, 160], "mean": [0.5], "std": [0.5]}
    (tmp_path / "gray").mkdir()
    (tmp_path / "gray" / "config.json").write_text(json.dumps(config))
    pictures = [trained.photographs()[name] for name in ("chelsea", "coffee")]
    done = run(*ONE, "--model", "local-dir:gray", "--img-size", "96", "--image", *pictures)
    assert done.clean, done.stdout + done.stderr
    assert done.texts["model.preprocessing"].startswith("1x96x96 ") and done.mark("precision.top1") == "SKIP"
    assert done.rows["outputs.logits"]["shape"] == "Bx1"


def test_original_names_and_the_classes_of_a_convnext(run, tmp_path):
    """timm's filter knows them; only after it the classifier has a name to count its classes by."""
    model = timm.create_model("convnext_atto", num_classes=7).eval()
    v.draw_weights(model, 1)
    names = (("stem.", "downsample_layers.0."), ("head.norm.", "norm."), ("head.fc.", "head."), ("conv_dw", "dwconv"),
             (".blocks.", "."), ("mlp.fc1", "pwconv1"), ("mlp.fc2", "pwconv2"))  # fmt: skip
    original = {}
    for key, value in model.state_dict().items():
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        original[re.sub(r"stages\.(\d+)\.downsample", r"downsample_layers.\1", key)] = value
    assert "head.weight" in original and "stages.0.0.dwconv.weight" in original
    torch.save({"model": original}, tmp_path / "original.pth")
    done = run(*ONE, "--model", "convnext_atto", "--weights", "original.pth")
    assert done.clean, done.stdout + done.stderr
    assert done.texts["model.weights"] == "file original.pth, its model, 7 classes, as in the file"
    assert weights_of(done) == v.sha256(model.state_dict())


@pytest.mark.parametrize("name", ["local-dir:model", "timm/test_vit.r160_in1k"])
def test_models_are_named_as_timm_and_the_hub_name_them(run, tmp_path, name):
    state = drawn("test_vit").state_dict()
    (tmp_path / "model").mkdir()
    save_file(state, tmp_path / "model" / "model.safetensors")
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    weights = "pretrained" if name.startswith("local-dir") else tmp_path / "model"
    done = run(*ONE, "--model", name, "--weights", weights)
    assert done.clean, done.stdout + done.stderr
    assert done.texts["model.weights"] == "file model/model.safetensors", "not the hf_hub_id of config.json"
    assert weights_of(done) == v.sha256(state)
    assert not done.errors, "what lies on the disk needs no hub"


def test_a_repository_of_the_hub_that_is_not_timms_own(tmp_path, files):
    """Its config.json has the architecture."""
    with HubServer("somebody/some-model", files | {"config.json": json.dumps(CONFIG).encode()}) as hub:
        done = from_hub(tmp_path, hub.url, "--model", "hf-hub:somebody/some-model")
    assert done.clean, done.stderr
    assert weights_of(done) == v.sha256(drawn("test_vit").state_dict())


def test_a_repository_of_the_hub_without_safetensors(tmp_path):
    torch.save(drawn("test_vit").state_dict(), file := io.BytesIO())
    with HubServer(REPOSITORY, {"pytorch_model.bin": file.getvalue()}) as hub:
        done = from_hub(tmp_path, hub.url)
    assert done.clean, done.stderr
    assert weights_of(done) == v.sha256(drawn("test_vit").state_dict())


def test_an_encoder_without_a_head_is_validated(run):
    done = run(*ONE, "--model", "test_encoder", "--weights", "random")
    assert done.clean, done.stdout + done.stderr
    assert "logits" not in done.text


@pytest.mark.parametrize(
    ("cache", "advice"),
    [("cut", "the file in the hub's cache is cut, or a pointer: delete it"), ("read-only", "set HF_HOME to a folder")],
)
def test_the_hubs_cache_that_fails_has_its_own_advice(tmp_path, files, cache, advice):
    with HubServer(REPOSITORY, files) as hub:
        if cache == "cut":
            folder = tmp_path / "cache" / "hub"
            path = Path(hf_hub_download(REPOSITORY, "model.safetensors", cache_dir=folder, endpoint=hub.url))
            path.resolve().write_bytes(files["model.safetensors"][:1000])
            done = from_hub(tmp_path, hub.url)
        else:
            done = from_hub(tmp_path, hub.url, HF_HOME="/proc/cache")
    assert done.status == 2 and advice in done.errors[-1], done.stderr
    assert "HF_ENDPOINT" not in done.errors[-1]


def test_a_disk_that_is_full_has_its_own_advice(tmp_path, files):
    """The cache is on a disk of its own, of 100 KiB, that only this run sees."""
    (tmp_path / "cache").mkdir()
    own_disk = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    mount = "mount -t tmpfs -o size=100k none cache"
    if subprocess.run([*own_disk, mount], cwd=tmp_path, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("this user may not mount a disk")
    with HubServer(REPOSITORY, files) as hub:
        env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "cache")}
        command = [*own_disk, f'{mount} && exec "$@"', "sh", sys.executable, SCRIPT, *PRETRAINED]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 2 and "No space left" in error and "free space, or set HF_HOME to another disk" in error
    assert "HF_ENDPOINT" not in error


# --- a variant --------------------------------------------------------------------------------------------------------


def test_rope_periods_in_bfloat16_are_the_originals_and_change_the_outputs_a_little(run):
    """All of them, the feature maps, too; the weights are the same."""
    model = (*ONE, "--model", "test_dinov3")
    plain, rounded = run(*model), run(*model, "--rope-bf16")
    assert plain.clean and rounded.clean, rounded.stdout
    assert "RoPE" not in plain.texts["model.weights"]
    assert rounded.texts["model.weights"].endswith(", RoPE periods rounded to bfloat16")
    assert weights_of(plain) == weights_of(rounded)
    before, after = plain.rows, rounded.rows
    assert before["outputs.tokens"] != after["outputs.tokens"]
    for name in ("embedding", "tokens", "feature_map.1", "feature_map.2", "feature_map.3"):
        assert before[f"precision.{name}.float32"].keys() == after[f"precision.{name}.float32"].keys(), name
        std = float(before[f"outputs.{name}"]["std"])
        assert float(after[f"outputs.{name}"]["std"]) == pytest.approx(std, rel=0.05)
