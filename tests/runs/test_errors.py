"""Every run that cannot be done: one line with what is wrong and what to do, exit status 2, the old log kept."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import OLD_LOG, REHEARSAL, ROOT, SCRIPT, WITH_TEST_MODELS, start

import validate_npu


class Touch:
    """A pickle that creates a file when it is loaded without weights_only."""

    def __reduce__(self):
        return (os.system, ("touch pickle-was-run",))


def make_files(folder):
    """The damaged and foreign files that the tables below name."""
    torch, timm = validate_npu.torch, validate_npu.timm
    from safetensors.torch import save_file

    model = timm.create_model("test_vit")
    save_file(model.state_dict(), folder / "whole.safetensors")
    torch.save(model.state_dict(), folder / "whole.pth")
    for name in ("whole.safetensors", "whole.pth"):
        data = (folder / name).read_bytes()
        (folder / name.replace("whole", "truncated")).write_bytes(data[: len(data) // 2])
    save_file(timm.create_model("test_vit2").state_dict(), folder / "test_vit2.safetensors")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Touch()))
    torch.save({"state_dict": Touch()}, folder / "zipped-pickle.pth")
    (folder / "text.png").write_text("this is no image")
    (folder / "folder").mkdir()


@pytest.fixture
def folder(tmp_path):
    make_files(tmp_path)
    (tmp_path / "validation_output.txt").write_text(OLD_LOG)
    return tmp_path


def is_refused(done, message):
    assert done.status == 2, done.stdout
    assert len(done.errors) == 1 and message in done.errors[0], done.stderr
    assert not any(word in done.stderr + done.stdout for word in ("Traceback", "usage:"))
    assert done.stdout.splitlines()[-1] == "RESULT: NOT RUN  (exit status 2; an earlier log is unchanged)"
    assert done.text == OLD_LOG
    assert not (done.path.parent / "pickle-was-run").exists()
    assert not list(done.path.parent.glob(".validation_output*")), "a half-written log is left"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "cuda"], "there is no cuda:0: 0 cuda device(s) visible to torch"),
        (["--device", "quantum"], "has no device of the kind 'quantum'"),
        (["--device", "mps"], "mps cannot be validated: torch.mps has no mem_get_info, get_device_name, "),
        (["--device", "npu:x"], "'npu:x' is not a device; examples: npu, npu:1, cpu, cuda:0"),
        (["--model", "vit_smal_patch16_dinov3"], "near: vit_small_patch16_dinov3"),
        (["--weights", "nowhere.pth"], "nowhere.pth does not exist (--weights takes pretrained, random, a file or a folder)"),
        (["--weights", "truncated.pth"], "truncated.pth cannot be read"),
        (["--weights", "truncated.safetensors"], "; it may be cut: copy it again"),
        (["--weights", "test_vit2.safetensors"], "is of another model than --model: keys "),
        (["--weights", "pickle.pth"], "pickle.pth cannot be read: it holds more than tensors"),
        (["--weights", "zipped-pickle.pth"], "cannot be read: it holds more than tensors"),
        (["--weights", "text.png"], "text.png cannot be read: it is no checkpoint of torch.save"),
        (["--weights", "folder"], "the folder folder has no weights"),
        (["--image", "nowhere.png"], "the image nowhere.png does not exist"),
        (["--image", "text.png"], "the image text.png cannot be read"),
        (["--image", "folder"], "the folder folder has no images"),
        (["--image", "*.jpeg"], "the image *.jpeg does not exist"),
        (["--img-size", "1", "2", "3"], "--img-size takes one number, or height and width"),
        (["--img-size", "97"], "test_vit does not take inputs of 3x97x97 on the CPU: "),
        (["--model", "test_vit.safetensors"], "it is a path: use --model NAME --weights FILE"),
        (["--model", "model.safetensors"], "it is a path: use --model NAME --weights FILE"),
        (["--model", "folder"], "it is a path: use --model local-dir:FOLDER"),
        (["--batch-sizes", "0"], "'0' is not a whole number from 1 on"),
        (["--batch-sizes", "1", "-4"], "'-4' is not a whole number from 1 on"),
        (["--batch-sizes", "many"], "'many' is not a whole number from 1 on"),
        (["--batch-sizes", "1,,4"], "'' is not a whole number from 1 on"),
        (["--img-size", "96x-96"], "--img-size: '-96' is not a whole number from 1 on"),
        (["--iters", "0"], "--iters takes a number from 1 on"),
        (["--warmup", "1.5"], "argument --warmup: invalid int value: '1.5'"),
        (["--seed", "-1"], "--seed takes a number from 0 on"),
        (["--seed", str(2**63)], "--seed takes a number from 0 on, below 1e9"),
        (["--output", "nowhere/log.txt"], "the log cannot be written to the folder of nowhere/log.txt: No such file"),
        (["--output", "/proc/log.txt"], "the log cannot be written to the folder of /proc/log.txt"),
        (["--output", "/dev/full"], "the log cannot be written: /dev/full is not a regular file"),
        (["--output", "folder"], "the log cannot be written: folder is not a regular file"),
        (["--batch-sizes", "auto", "4"], "--batch-sizes: 'auto' is not a whole number from 1 on"),
        (["--max-slowdown", "nan"], "--max-slowdown takes a number from 0 on"),
        (["--timeout", "0"], "--timeout takes a number from 1 on"),
        (["--timeout", "99999999999"], "--timeout takes a number from 1 on, below 1e9"),
        (["--max-error", "few"], "argument --max-error: invalid float value: 'few'"),
        (["--nonsense"], "unrecognized arguments: --nonsense"),
        (["--modes", "fp16"], "'fp16' is not a mode; near: float16, bfloat16, amp-float16; modes are float32, "),
        (["--modes", "amp-bf16"], "'amp-bf16' is not a mode; near: amp-bfloat16, amp-float16, bfloat16; "),
        (["--modes", "float32+graph"], "--modes float32+graph: a CPU has no graphs to capture"),
        (["--modes", "float16", "hf32"], "--modes hf32: cpu has no reduced-precision float32"),
        (["--modes", "amp-float64"], "'amp-float64' is not a mode; near: amp-float16, amp-bfloat16, float16; modes are float32, hf32, "),
        (["--rope-bf16"], "--rope-bf16: this model has no RoPE periods"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_message_says_what_to_do(run, folder, arguments, message):
    is_refused(run(*REHEARSAL, *arguments), message)


@pytest.mark.parametrize(
    ("option", "texts"),
    [
        ("--version", [f"validate_npu.py {validate_npu.VERSION}"]),
        ("--help", ["torchrun --nproc-per-node 8 validate_npu.py ", "\nmodel and inputs:\n", "\nmeasurement:\n", "\noutput:\n",
                    f"(default: {' '.join(map(str, validate_npu.DEFAULT_BATCH_SIZES))})", "Exit status: 0 no check failed, "]),
    ],
)  # fmt: skip
def test_help_and_version_are_printed(tmp_path, option, texts):
    done = start([option], tmp_path)
    assert done.status == 0 and not done.stderr and all(text in done.stdout for text in texts), done.stdout


@pytest.mark.parametrize("arguments", [("--model", "no_such_vit"), ("--weights", "nowhere"), ("--image", "nowhere"),
                                       ("--modes", "float32+graph")])  # fmt: skip
def test_what_can_be_known_at_once_is_refused_before_the_device_is_asked(run, arguments):
    done = run(*REHEARSAL, *arguments)
    assert done.status == 2 and "[1/5]" not in done.stdout, done.stdout


def test_numbers_are_taken_as_people_write_them():
    options = validate_npu.parse_arguments("--batch-sizes 8 4 8 1 --max-error 1.".split())
    assert options.batch_sizes == [1, 4, 8] and options.max_error == 1.0
    assert options.batch_sizes == validate_npu.parse_arguments(["--batch-sizes", "8,4", "1,4"]).batch_sizes
    sizes = ["256", "192"], ["256x192"], ["256,192"]
    assert [validate_npu.parse_arguments(["--img-size", *size]).img_size for size in sizes] == [[256, 192]] * 3
    assert validate_npu.parse_arguments(["--batch-sizes", "auto"]).batch_sizes == []
    assert [validate_npu.parse_arguments(["--max-error", text]).max_error for text in (".5", "1e+1")] == [0.5, 10.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--device", "npu"], "CANN is not installed, or its environment is not set (libhccl.so not found): source"
                              " /usr/local/Ascend/cann/set_env.sh (before CANN 8.5: /usr/local/Ascend/ascend-toolkit/"),
        (["--model", "timm/vit_small_patch16_dinov3.nonsense", "--weights", "pretrained"],
         "pretrained variants: vit_small_patch16_dinov3.lvd1689m"),
        (["--model", "test_vit", "--weights", "pretrained"], "HF_ENDPOINT=http://127.0.0.1:9 does not answer: correct or unset it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_the_message_says_what_to_do_without_cann_and_without_a_hub(folder, arguments, message):
    """In a fresh process without CANN. A closed port of this machine stands for a hub that is out of reach."""
    done = start([*REHEARSAL, *arguments], folder, {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder)})
    is_refused(done, message)


@pytest.mark.parametrize(
    ("before", "arguments", "status", "last"),
    [
        ("exec 2>&-;", ["--model", "test_tiny_vit"], 0, "RESULT: PASS"),
        ("mkdir gone; cd gone; rmdir ../gone;", ["--output", "/tmp/log.txt"], 2, "RESULT: NOT RUN"),
    ],
    ids=["a closed stderr", "a deleted working directory"],
)
def test_a_broken_shell_is_no_broken_device(tmp_path, before, arguments, status, last):
    command = [sys.executable, WITH_TEST_MODELS, SCRIPT, *REHEARSAL, *arguments]
    if status:
        command = [sys.executable, SCRIPT, *REHEARSAL, *arguments]
    done = subprocess.run(["sh", "-c", f'{before} exec "$@"', "sh", *map(str, command)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == status and done.stdout.splitlines()[-1].startswith(last), done.stdout + done.stderr
    assert ("the working directory was deleted: change to another one" in done.stderr) == (status == 2)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--compare", ROOT / "validation_output.txt", ROOT / "validation_output.txt"],
                                       ["--report", ROOT / "validation_output.txt"]], ids=lambda value: value[0])  # fmt: skip
def test_what_needs_no_npu_works_without_the_module_resource(tmp_path, arguments):
    """As on Windows, where two logs are compared on a laptop."""
    code = "import runpy, sys; sys.modules['resource'] = None; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", code, SCRIPT, *arguments]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr


def test_weights_that_may_not_be_read_are_named(tmp_path):
    """As safetensors saves them, for root only. Their owner, root, gives up its permission to read all."""
    make_files(tmp_path)
    (tmp_path / "whole.safetensors").chmod(0)
    rights = "-dac_override,-dac_read_search"
    as_a_user = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    command = [*as_a_user, sys.executable, SCRIPT, *REHEARSAL, "--weights", "whole.safetensors"]
    done = subprocess.run(list(map(str, command)), cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and "the weights file whole.safetensors cannot be read: Permission denied" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--output", "nowhere/log.txt"], "the log cannot be written to the folder of nowhere/log.txt"),
        (["--baseline", "nowhere.txt"], "nowhere.txt"),
        (["--image", "text.png"], "the image text.png cannot be read"),
        (["--weights", "test_vit2.safetensors"], "is of another model than --model"),
    ],
    ids=["no folder", "no baseline", "no image", "another model"],
)  # fmt: skip
def test_under_torchrun_every_process_ends_with_the_same_reason(tmp_path, arguments, reason):
    """At once, whichever of them finds it: none waits for another until torchrun ends it."""
    make_files(tmp_path)
    launch = ["torch.distributed.run", "--nproc-per-node", "2", "--redirects", "3", "--log-dir", "logs", str(SCRIPT)]
    command = [sys.executable, "-m", *launch, *REHEARSAL, *map(str, arguments)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode, done.stdout
    first, *others = [path.read_text() for path in sorted((tmp_path / "logs").rglob("stderr.log"))]
    assert reason in first and len(others) == 1
    assert not any(word in text for text in (first, *others) for word in ("SIGTERM", "interrupted", "Traceback")), others


def test_without_torch_npu_it_says_which_version_to_install(tmp_path):
    """All of this environment's packages but torch_npu, so that it really is not installed."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for entry in Path(validate_npu.torch.__file__).parent.parent.iterdir():
        if not entry.name.lower().startswith(("torch_npu", "torch-npu")):
            (packages / entry.name).symlink_to(entry)
    done = start(["--device", "npu"], tmp_path, {"PYTHONPATH": str(packages)}, launcher=["-S", "-s"])
    assert done.status == 2
    assert "torch_npu is not installed: pip install -r requirements.txt --extra-index-url https://" in done.stderr
    assert "Traceback" not in done.stderr
