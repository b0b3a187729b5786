"""The model under test: its weights and inputs are those of the seed, and its feature maps those of timm."""

import copy
import dataclasses
import json
import math
import re
import types
import zipfile

import pytest
import safetensors.torch
from small_run import CPU, after_model_stage, drain, marks, new_context

import validate_npu as v

np, torch, timm = v.np, v.torch, v.timm


# --- memory -----------------------------------------------------------------------------------------------------------

MEMINFO, CGROUP = "MemTotal: 9000 kB\nMemAvailable:    8000 kB\nSwapFree:     192 kB\n", "sys/fs/cgroup/memory"
GROUP = {"proc/meminfo": MEMINFO, f"{CGROUP}.current": "5000000\n", f"{CGROUP}.stat": "anon 3000000\nfile 2000000\n"}


@pytest.mark.parametrize(
    ("files", "left"),
    [
        ({"proc/meminfo": MEMINFO}, 8000 * 1024),
        ({}, None),
        (GROUP | {f"{CGROUP}.max": "max\n"}, 8000 * 1024),
        (GROUP | {f"{CGROUP}.max": "7000000\n"}, 4000000),
        (GROUP | {f"{CGROUP}.max": "90000000\n"}, 8000 * 1024),
    ],
    ids=["no container", "no Linux", "a container without a limit", "a limit", "a limit above what the host has"],
)
def test_the_memory_that_is_left_is_that_of_the_system_or_of_the_limit_of_the_container(tmp_path, files, left):
    """12 bytes a parameter in a dry run: it is refused if one parameter more than fits is needed."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    fits = 10**9 if left is None else left // 12
    v.check_memory(new_context(meta_model=torch.nn.Linear(fits, 1, bias=False, device="meta")), tmp_path)
    if left is not None:
        with pytest.raises(
            v.CannotRun, match=" of host memory .12 bytes a parameter., and 0.0 GiB are available in this"
        ):
            v.check_memory(new_context(meta_model=torch.nn.Linear(fits + 1, 1, bias=False, device="meta")), tmp_path)


def test_a_model_that_needs_more_memory_than_the_host_has_ends_the_run_before_it_is_loaded(monkeypatch):
    context = new_context(meta_model=torch.nn.Linear(2**20, 2**20, device="meta"))
    monkeypatch.setattr(v, "load_model", lambda options: pytest.fail("it is loaded"))
    with pytest.raises(v.CannotRun, match=r"^test_vit needs 12288.0 GiB of host memory \(12 bytes a parameter\), and"):
        next(v.model_stage(context, None))


@pytest.mark.parametrize(("device", "processes", "text"), [
    ("npu", 1, "8192.0 GiB of host memory (8 bytes a parameter)"),
    ("npu", 8, "65536.0 GiB of host memory (8 bytes a parameter, 8 processes)"),
])  # fmt: skip
def test_the_processes_of_a_host_share_its_memory(device, processes, text):
    context = new_context(meta_model=torch.nn.Linear(2**20, 2**20, bias=False, device="meta"))
    context.ranks.local_size = processes
    with pytest.raises(v.CannotRun, match=re.escape(text)):
        v.check_memory(dataclasses.replace(context, device=types.SimpleNamespace(type=device)))


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit_small_patch16_dinov3", "test_vit", "resnet18", "convnext_atto"])
def test_random_weights_let_every_block_matter(name):
    """With timm's own initialisation, LayerScale (1e-5) or a zeroed BatchNorm hides whatever a block computes.

    5 % of any matrix move the embedding by more than a hundred times what rounding does (2e-7).
    """
    model = timm.create_model(name).eval()
    v.draw_weights(model, seed=0)
    inputs = v.draw_inputs(1, timm.data.resolve_model_data_config(model)["input_size"], seed=0)
    before = v.forward_outputs(model, inputs)["embedding"]
    matrices = [(key, p) for key, p in model.named_parameters() if p.ndim > 1 and not key.startswith(("head", "fc"))]
    for key, parameter in matrices[:: 1 + len(matrices) // 12]:
        parameter.data *= 1.05
        moved = v.compare(v.forward_outputs(model, inputs)["embedding"], before).rel_l2
        parameter.data /= 1.05
        assert moved > 3e-5, f"{key}: 5 % move the embedding by {moved:.1e}"


def test_weights_are_those_of_the_seed():
    a, b = timm.create_model("test_vit"), timm.create_model("test_vit")
    v.draw_weights(a, seed=3)
    v.draw_weights(b, seed=3)
    assert v.sha256(a.state_dict()) == v.sha256(b.state_dict())
    v.draw_weights(b, seed=4)
    assert v.sha256(a.state_dict()) != v.sha256(b.state_dict())


def test_a_checksum_sees_the_last_bit_the_name_the_shape_and_the_type():
    weights = {"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.bfloat16), "c": torch.tensor(5)}
    sums = {v.sha256(weights)}
    last_bit = torch.ones(2, 3)
    last_bit[1, 2] += 2**-23
    for change in (
        {"a": last_bit},
        {"a": torch.ones(3, 2)},
        {"b": torch.zeros(4, dtype=torch.float16)},
        {"b": torch.zeros(4, dtype=torch.bfloat16).neg()},
        {"c": torch.tensor(6)},
        {"d": torch.tensor(5)},
    ):
        sums.add(v.sha256({**weights, **change}))
    sums.add(v.sha256({name: weights[name] for name in "bac"}))
    assert len(sums) == 8
    assert v.sha256({**weights, "a": torch.ones(3, 2).t()}) in sums, "the layout in memory does not count"


def test_masks_and_indices_are_no_quantised_weights():
    """As Swin's relative_position_index, or a mask that is saved as a buffer."""
    tensor = torch.eye(2)
    state = {"weight": tensor, "index": tensor.long(), "mask": tensor.bool()}
    assert v.check_tensors("f.pth", state) == []
    assert v.check_tensors("f.pth", state | {"weight": tensor.half()}) == ["from float16"]
    with pytest.raises(v.CannotRun, match="is quantised .weight is uint8."):
        v.check_tensors("f.pth", state | {"weight": tensor.byte()})


def test_rope_periods_are_rounded_to_bfloat16_and_kept_in_float32():
    plain, rounded = (
        v.load_model(new_context("--model", "test_dinov3", *more).options)[0] for more in ((), ("--rope-bf16",))
    )
    before, after = plain.rope.periods, rounded.rope.periods
    assert after.dtype == torch.float32 and torch.equal(after, before.bfloat16().float())
    assert not torch.equal(after, before)
    assert v.sha256(plain.state_dict()) == v.sha256(rounded.state_dict()), "all weights are equal"


def test_the_qkvb_variant_with_zero_biases_gives_the_outputs_of_the_plain_one():
    plain = timm.create_model("vit_small_patch16_dinov3").eval()
    v.draw_weights(plain, seed=1)
    biased = timm.create_model("vit_small_patch16_dinov3_qkvb").eval()
    missing, unexpected = biased.load_state_dict(plain.state_dict(), strict=False)
    assert not unexpected and missing and all("bias" in key for key in missing)
    for name, parameter in biased.named_parameters():
        if name in missing:
            parameter.data.zero_()
    inputs = v.draw_inputs(1, (3, 256, 256), 0)
    outputs = [v.forward_outputs(model, inputs)["tokens"] for model in (plain, biased)]
    assert v.compare(outputs[1], outputs[0]).max_row < 1e-6


# --- weights as people have them --------------------------------------------------------------------------------------


def load(path, model="test_vit", *more):
    """The model with the weights of this file, and the line `weights` of the log."""
    return v.load_model(new_context("--model", model, "--weights", path, *more).options)


def drawn(name, **changes):
    """The state dict of random weights with which every block matters."""
    model = timm.create_model(name, **changes).eval()
    v.draw_weights(model, 1)
    return model.state_dict()


def behind(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def inside(wrapper, state):
    return {key.replace("blocks.0.", f"blocks.0.{wrapper}."): value for key, value in state.items()}


def other(state):
    return {key: value + 1 for key, value in state.items()}


SCALARS = {"epoch": torch.tensor(3), "best_acc": torch.tensor(0.8), "best_loss": torch.tensor(math.inf)}
NUMPY = "float16", "float32", "float64", "int32", "int64", "bool"
WRAPPED = {
    "DeepSpeed": (lambda s: {"module": s}, ", its module"),
    "SparK": (lambda s: {"arch": "vit", "module": s, "is_pretrain": False}, ", its module"),
    "net": (lambda s: {"net": s}, ", its net"),
    "any name": (lambda s: {"weights of 2026": s}, ", its weights of 2026"),
    "two deep": (lambda s: {"model": {"state_dict": s}}, ", its model.state_dict"),
    "RT-DETR": (lambda s: {"model": other(s), "ema": {"module": s}}, ", its ema.module"),
    "params_ema": (lambda s: {"params": other(s), "params_ema": s}, ", its params_ema"),
    "DINO": (lambda s: {"student": behind("module.backbone.", other(s)), "teacher": behind("backbone.", s), "epoch": 3},
             ", its teacher, prefix backbone. stripped"),
    "DINOv2": (lambda s: {"model": behind("student.backbone.", other(s)) | behind("teacher.backbone.", s)},
               ", its model, prefix teacher.backbone. stripped (80 other tensors dropped)"),
    "optimizer": (lambda s: {"model": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(9)}}}}, ", its model"),
    "TimmWrapper": (lambda s: behind("timm_model.", s), ", prefix timm_model. stripped"),
    "terratorch": (lambda s: behind("encoder._timm_module.", s), ", prefix encoder._timm_module. stripped"),
    "Sequential": (lambda s: behind("0.", s), ", prefix 0. stripped"),
    "Lightning": (lambda s: {"state_dict": behind("model.", s) | {"criterion.weight": torch.ones(7)}},
                  ", its state_dict, prefix model. stripped (1 other tensors dropped)"),
    "FSDP": (lambda s: behind("_fsdp_wrapped_module.", s), ""),
    "AveragedModel": (lambda s: behind("module.", s) | {"n_averaged": torch.tensor(5)}, ""),
    "activation checkpointing": (lambda s: inside("_checkpoint_wrapped_module", s), ""),
    "regional compilation": (lambda s: inside("_orig_mod", s), ""),
    "flat, with figures": (lambda s: s | SCALARS, ""),
    "figures of NumPy": (lambda s: {"model": s, "figures": [np.ones(1, name)[0] for name in NUMPY]}, ", its model"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRAPPED)
def test_weights_are_found_where_most_of_the_names_of_the_model_are(tmp_path, name):
    """Whatever wrapped them. Of several that fit, the average is taken."""
    wrap, message = WRAPPED[name]
    state = drawn("test_vit")
    torch.save(wrap(state), tmp_path / "f.pth")
    model, source = load(tmp_path / "f.pth")
    assert source == f"file f.pth{message}" and v.sha256(model.state_dict()) == v.sha256(state)


def test_of_names_that_timm_converts_all_tensors_are_taken_although_a_few_fit_the_model():
    """encoder.0.norm.weight ends in norm.weight, a name of the model."""
    names = [f"encoder.{i}.{name}" for i in (0, 1) for name in ("norm.weight", "query.weight", "key.weight")]
    expected = dict.fromkeys(["norm.weight", "head.weight", "blocks.0.qkv.weight", "blocks.1.qkv.weight"])
    state, notes = v.unwrap({"model": {name: torch.ones(2) for name in names}}, expected)
    assert behind("encoder.", state).keys() == set(names) and notes == ["its model", "prefix encoder. stripped"]


def without_counters(state):
    return {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}


@pytest.mark.parametrize(("model", "changes", "change", "message"), [
    ("test_dinov3", {"num_classes": 10}, lambda s: s, ", 10 classes, as in the file"),
    ("test_vit", {"num_classes": 10}, lambda s: s, ", 10 classes, as in the file"),
    ("test_vit", {"num_classes": 0}, lambda s: s, ", 0 classes, as in the file"),
    ("test_resnet", {}, without_counters, ""),
    ("iformer_t", {}, lambda s: s, ""),
    ("test_vit", {"img_size": 224}, lambda s: s,
     ", pos_embed resampled from 1x197x64 to 1x101x64; the file fits --img-size 224"),
    ("test_swin", {"window_size": 2}, lambda s: s, ", layers.0.blocks.0.attn.relative_position_bias_table and 3 more resampled"
     " from 9x2 to 49x2"),
], ids=["a classifier for DINOv3", "other classes", "no classifier", "no num_batches_tracked", "a model whose own names have module.", "positions", "relative positions"])  # fmt: skip
def test_what_was_changed_while_loading_is_printed(tmp_path, model, changes, change, message):
    if model == "test_swin":  # its size and windows are fixed, so the same in a file of another window
        state = {key: torch.randn(9, value.shape[1]) if "bias_table" in key else value for key, value in drawn(model).items()}
    else:
        state = drawn(model, **changes)
    torch.save(change(state), tmp_path / "f.pth")
    loaded, source = load(tmp_path / "f.pth", model)
    assert source == f"file f.pth{message}"
    changed = {key for key, value in loaded.state_dict().items() if not key.endswith("tracked") and
               (value.shape != state[key].shape or not torch.equal(value, state[key]))}  # fmt: skip
    assert changed == {key for key in state if "resampled" in message and re.search("pos_embed|bias_table", key)}


def quantised(state):
    return torch.ao.quantization.quantize_dynamic(timm.create_model("test_vit")).state_dict()


def with_lora(state):
    wrapped = {key.replace("qkv.weight", "qkv.base_layer.weight"): value for key, value in state.items()}
    return behind("base_model.model.", wrapped | {"blocks.0.attn.qkv.lora_A.default.weight": torch.ones(4, 64)})


@pytest.mark.parametrize(("model", "make", "message"), [
    ("test_vit", with_lora, "its LoRA weights are not merged: save the state_dict() after merge_and_unload()"),
    ("test_vit", lambda s: {f"base_model.model.blocks.{i}.lora_A.weight": torch.ones(4, 2) for i in (0, 1)}, "its LoRA weights are not merged"),
    ("test_vit", quantised, "it is quantised: use the checkpoint that it was made from"),
    ("test_vit", lambda s: {"arch": 1, "net": {"conv.weight": torch.ones(2, 2)}, "epoch": 2}, "the file has arch, net, epoch"),
    ("test_vit", lambda s: {"head.0.weight" if k == "head.weight" else "head.0.bias" if k == "head.bias" else k: t
                            for k, t in s.items()}, "its head is a Sequential: save its Linear as head.weight and .bias"),
    ("cait_xxs24_224", lambda s: timm.create_model("cait_xxs24_224", img_size=256).state_dict(),
     "keys 1 of another shape (pos_embed); the file fits --img-size 256"),
], ids=["LoRA", "an adapter", "dynamic int8", "another model", "a Sequential", "another image size"])  # fmt: skip
def test_a_checkpoint_that_does_not_fit_is_named_for_what_it_is(tmp_path, model, make, message):
    torch.save(make(drawn("test_vit")), tmp_path / "f.pth")
    with pytest.raises(v.CannotRun, match=re.escape(message)):
        load(tmp_path / "f.pth", model)


@pytest.mark.parametrize("name", ["model.safetensors.1", "M.SAFETENSORS", "a" * 64, "model (1).safetensors.download", "vit.pth.tar"])
def test_the_first_bytes_say_what_a_file_is_and_not_its_name(tmp_path, name):
    state = drawn("test_vit")
    write = torch.save if name.endswith("tar") else safetensors.torch.save_file
    write(state, tmp_path / name)
    model, source = load(tmp_path / name)
    assert source == f"file {name}" and v.sha256(model.state_dict()) == v.sha256(state)


def zipped(path):
    torch.save({"a": torch.ones(2)}, path.with_suffix(".pth"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(path.with_suffix(".pth"), "vit.pth")


def savez(path):
    with open(path, "wb") as file:
        np.savez(file, cls=np.zeros(4))


@pytest.mark.parametrize(("write", "message"), [
    (savez, "it is of NumPy or JAX: load it with load_pretrained() of timm, and save the state_dict()"),
    (zipped, "it is a zip archive: unpack it first"),
    (lambda path: torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path), "it is TorchScript: save the model's state_dict()"),
    (lambda path: path.write_bytes(b"\x08\x08\x12\x07pytorch\x1a\x06"), "it is ONNX: use the checkpoint that it was exported from"),
    (lambda path: path.write_bytes(b"GGUF\3\0\0\0"), "it is GGUF, of llama.cpp: use the model's safetensors file"),
    (lambda path: path.write_bytes(b"\x89HDF\r\n"), "it is no checkpoint of torch.save"),
], ids=["npz", "zip", "TorchScript", "ONNX", "GGUF", "HDF5"])  # fmt: skip
def test_a_file_of_another_format_is_named_with_the_way_out(tmp_path, write, message):
    write(tmp_path / "f.pth")
    with pytest.raises(v.CannotRun, match=re.escape(f"f.pth cannot be read: {message}")):
        load(tmp_path / "f.pth")


def test_the_cache_of_the_hub_is_a_folder_of_weights(tmp_path):
    state = drawn("test_vit")
    folder = tmp_path / "models--timm--test_vit" / "snapshots" / "0123"
    folder.mkdir(parents=True)
    safetensors.torch.save_file(state, folder / "model.safetensors")
    model, source = load(tmp_path / "models--timm--test_vit")
    assert source == "file models--timm--test_vit/snapshots/0123/model.safetensors"
    assert v.sha256(model.state_dict()) == v.sha256(state)


def folder_of_transformers(folder, prefix="", **config):
    safetensors.torch.save_file(behind(prefix, drawn("test_vit")), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))


def test_a_folder_of_transformers_loads_if_it_names_a_model_of_timm(tmp_path):
    config = {"architecture": "test_vit", "architectures": ["TimmWrapperModel"], "model_args": None, "pretrained_cfg": {}}
    folder_of_transformers(tmp_path, "timm_model.", **config)
    options = new_context("--model", f"local-dir:{tmp_path}", "--weights", "pretrained").options
    model, source = v.load_model(options)
    assert source == f"file {tmp_path.name}/model.safetensors, prefix timm_model. stripped"
    assert v.sha256(model.state_dict()) == v.sha256(drawn("test_vit"))


def test_a_folder_of_transformers_that_names_none_is_named(tmp_path):
    folder_of_transformers(tmp_path, architectures=["DINOv3ViTModel"], model_type="dinov3_vit")
    with pytest.raises(v.CannotRun, match="could not be loaded .* no architecture of timm: use --model NAME --weights FOLDER$"):
        v.load_model(new_context("--model", f"local-dir:{tmp_path}", "--weights", "pretrained").options)


def test_a_folder_that_cannot_be_read_is_not_the_cache_of_the_hub():
    error = PermissionError(13, "Permission denied", "d/config.json")
    assert v.hub_failure("local-dir:d", error, None).endswith("(PermissionError: [Errno 13] Permission denied: 'd/config.json')")


def test_tensors_that_the_model_does_not_get_are_not_judged(tmp_path):
    """As DINOv3's bias_mask, which timm drops."""
    state = drawn("vit_small_patch16_dinov3")
    original = {key.replace("reg_token", "storage_tokens").replace("gamma_1", "ls1.gamma").replace("gamma_2", "ls2.gamma"): value
                for key, value in state.items()}  # fmt: skip
    nan = {f"blocks.{i}.attn.qkv.bias_mask": torch.full((1152,), float("nan")) for i in range(12)}
    torch.save(original | nan | {"rope_embed.periods": torch.ones(16)}, tmp_path / "f.pth")
    assert v.sha256(load(tmp_path / "f.pth", "vit_small_patch16_dinov3")[0].state_dict()) == v.sha256(state)


# --- a model that the CPU itself does not run -------------------------------------------------------------------------


def negative_variance(state):
    state["bn1.running_var"].fill_(-1)


def overflow(state):
    state["blocks.1.mlp.fc1.weight"].mul_(1e30)
    state["blocks.1.mlp.fc2.weight"].mul_(1e30)


@pytest.mark.parametrize(("model", "spoil", "module"), [("test_resnet", negative_variance, "bn1"),
                                                         ("test_vit", overflow, "blocks.1.mlp.fc2")])  # fmt: skip
def test_a_model_that_gives_nan_on_the_cpu_judges_no_device(tmp_path, model, spoil, module):
    """Finite weights. The first module that gives it is named."""
    state = drawn(model)
    spoil(state)
    torch.save(state, tmp_path / "f.pth")
    with pytest.raises(v.CannotRun, match=f"gives NaN or Inf on the CPU, too, so that it .* it begins in {re.escape(module)}$"):
        load(tmp_path / "f.pth", model)


class Plain(torch.nn.Module):
    """A plug-in that is nothing but a forward pass."""

    pretrained_cfg, num_classes = {"input_size": (3, 32, 32)}, 5

    def __init__(self):
        super().__init__()
        self.stem, self.head = torch.nn.Conv2d(3, 16, 8, 8), torch.nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))


class Timms(Plain):
    def forward_features(self, x):
        return self.stem(x)

    def forward_head(self, x, pre_logits=False):
        return x.mean((2, 3)) if pre_logits else self.head(x.mean((2, 3)))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class GivesTuple(Timms):
    def forward(self, x):
        features = self.forward_features(x)
        return self.forward_head(features), features


class GivesDict(GivesTuple):
    def forward(self, x):
        return dict(zip(("logits", "features"), super().forward(x)))


class FeaturesInADict(Timms):
    def forward_features(self, x):
        return {"map": self.stem(x), "kind": "map"}

    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x["map"], pre_logits)


class TwoHeads(Timms):
    def forward_head(self, x, pre_logits=False):
        return super().forward_head(x, True) if pre_logits else (super().forward_head(x), super().forward_head(x) * 2)


class IntermediatesWithoutTheLastStep(Timms):
    """forward_intermediates does not end with what forward_features gives."""

    feature_info = types.SimpleNamespace(out_indices=[0])

    def forward_features(self, x):
        return 2 * self.stem(x)

    def forward_intermediates(self, x, indices):
        return self.stem(x), [self.stem(x)]


class HeadWithoutPreLogits(Timms):
    def forward_head(self, x):
        return self.head(x.mean((2, 3)))


class NoClassifier(HeadWithoutPreLogits):
    """As mobilenetv5_300m_enc."""

    num_classes = 0

    def forward(self, x):
        return self.forward_features(x)


class GivesText(Plain):
    def forward(self, x):
        return "a cat"


class AnotherHead(Timms):
    def forward(self, x):
        return 2 * super().forward(x)


class NearlyTheSame(Timms):
    def forward(self, x):
        return 1.003 * super().forward(x)


class Random(Plain):
    def forward(self, x):
        return torch.nn.functional.dropout(super().forward(x))


class NormalisedOverTheBatch(Plain):
    """As a BatchNorm without running statistics."""

    def forward(self, x):
        return super().forward(x) + self.head(self.stem(x).mean((0, 2, 3)))


class BatchLast(Plain):
    def forward(self, x):
        return super().forward(x).T


UNJUDGED = (
    r"model\(x\) is not forward_head\(forward_features\(x\)\), is random, or depends on other images,"
    " so that its outputs cannot be judged"
)
PLUG_INS = {
    Plain: {"logits"},
    GivesTuple: {"embedding", "logits", "unpooled"},
    GivesDict: {"embedding", "logits", "unpooled"},
    FeaturesInADict: {"embedding", "logits", "unpooled.1"},
    TwoHeads: {"embedding", "logits.1", "logits.2", "unpooled"},
    IntermediatesWithoutTheLastStep: {"embedding", "logits", "unpooled"},
    HeadWithoutPreLogits: {"logits", "unpooled"},
    NoClassifier: {"embedding", "unpooled"},
    GivesText: "the forward pass of the model gives no tensor of floats with a batch dimension",
    **dict.fromkeys((AnotherHead, NearlyTheSame, Random, NormalisedOverTheBatch, BatchLast), UNJUDGED),
}


@pytest.mark.parametrize("kind", PLUG_INS, ids=lambda kind: kind.__name__)
def test_a_plug_in_of_another_form_is_judged_or_named(monkeypatch, kind):
    """Through all stages: its tensors are judged, in tuples and dicts, too, and a healthy device passes."""
    expected = PLUG_INS[kind]
    monkeypatch.setattr(v, "create_model", lambda options, **more: kind())
    context = new_context("--batch-sizes", "1", "2")
    _, probe = drain(v.device_stage(context))
    if isinstance(expected, str):
        with pytest.raises(v.CannotRun, match=expected):
            drain(v.model_stage(context, probe))
        return
    _, loaded = drain(v.model_stage(context, probe))
    assert set(loaded.first) == expected
    entries, outputs = drain(v.outputs_stage(context, loaded))
    more, checked = drain(v.precision_stage(context, loaded))
    last, _ = drain(v.throughput_stage(context, outputs, checked))
    assert set(marks([*entries, *more, *last]).values()) <= {v.PASS, v.SKIP}


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_inputs_are_those_of_the_seed_and_batches_share_them():
    inputs = v.draw_inputs(5, (3, 24, 32), 3)
    assert inputs.shape == (5, 3, 24, 32) and inputs.dtype == torch.float32
    assert torch.equal(v.draw_inputs(2, (3, 24, 32), 3), inputs[:2])
    assert not torch.equal(v.draw_inputs(5, (3, 24, 32), 4), inputs)


def test_inputs_have_the_scale_of_normalised_images_and_differ_from_each_other():
    inputs = v.draw_inputs(8, (3, 64, 64), 0).flatten(1)
    assert inputs.std().item() == pytest.approx(1, abs=0.05) and abs(inputs.mean().item()) < 0.05
    coarse = torch.nn.functional.avg_pool2d(v.draw_inputs(8, (3, 64, 64), 0), 8).flatten(1)
    assert torch.pdist(coarse).min() > 5, "also for a model that averages over patches: of plain noise it is about 2"


def test_an_image_goes_through_the_transforms_of_the_model(tmp_path):
    from PIL import Image

    values = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    for name, image in (("a.png", values), ("b.png", 255 - values), ("grey.png", values[:, :, 0])):
        Image.fromarray(image).save(tmp_path / name)
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    given = [tmp_path / "b.png", tmp_path, tmp_path / "gr*.png"]
    found = dict(v.load_images(list(map(str, given)), config))
    assert list(found) == ["b.png", "a.png", "grey.png"], "files, folders, patterns; each file counts once"
    expected = timm.data.create_transform(**config, is_training=False)(Image.fromarray(values))
    assert torch.equal(found["a.png"], expected) and expected.shape == (3, 160, 160)


def save_image(path, mode="RGB", **how):
    from PIL import Image

    values = np.random.default_rng(1).integers(0, 256, (40, 40, 3), np.uint8)
    image = Image.fromarray(values)
    wide = {"I;16": values[:, :, 0].astype(np.uint16) * 256, "I": values[:, :, 0].astype(np.int32) + 70_000,
            "F": values[:, :, 0].astype(np.float32) / 255}  # fmt: skip
    (Image.fromarray(wide[mode]) if mode in wide else image.convert(mode)).save(path, **how)


@pytest.mark.parametrize(
    ("name", "mode", "how"),
    [
        ("a.png", "P", {}),
        ("a.png", "RGBA", {}),
        ("a.png", "L", {}),
        ("a.png", "1", {}),
        ("a.jpg", "CMYK", {}),
        ("a.webp", "RGB", {}),
        ("a.avif", "RGB", {}),
        ("a.gif", "P", {}),
        ("a.tif", "RGB", {"compression": "tiff_deflate"}),
    ],
)
def test_images_of_every_kind_are_read(tmp_path, name, mode, how):
    from PIL import features

    if name[2:] in ("webp", "avif") and not features.check(name[2:]):
        pytest.skip("this Pillow cannot")
    save_image(tmp_path / name, mode, **how)
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    ((_, image),) = v.load_images([str(tmp_path / name)], config)
    assert image.shape == (3, 160, 160) and image.std() > 0.1


@pytest.mark.parametrize(
    ("name", "mode", "message"),
    [
        (
            "a.png",
            "I;16",
            "cannot be read: ValueError: it has values from 0 to 65280, which become black or white in 8 bits",
        ),
        (
            "a.tif",
            "I",
            "cannot be read: ValueError: it has values from 70000 to 70255, which become black or white in 8 bits",
        ),
        ("a.tif", "F", "cannot be read: ValueError: it has values from 0 to 1, which become black or white in 8 bits"),
        ("cut.webp", "RGB", "cannot be read"),
        ("cut.avif", "RGB", "cannot be read"),
        ("cut.png", "RGB", "cannot be read"),
    ],
)
def test_an_image_of_which_nothing_is_left_is_refused_by_name(tmp_path, name, mode, message):
    path = tmp_path / name
    save_image(path, mode)
    if name.startswith("cut"):
        path.write_bytes(path.read_bytes()[:400])
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit"))
    with pytest.raises(v.CannotRun, match=f"the image {path} {message}"):
        list(v.load_images([str(path)], config))


@pytest.mark.parametrize(("channels", "means"), [(4, 3), (4, 4), (1, 3), (3, 1)])
def test_a_model_whose_channels_no_image_has_or_that_has_another_count_of_means_is_an_error(tmp_path, channels, means):
    save_image(tmp_path / "a.png", "RGB")
    config = {"input_size": (channels, 160, 160), "mean": (0.5,) * means, "std": (0.5,) * means, "interpolation": "bicubic"}
    problem = rf"^the model takes {channels} channel\(s\), and its pretrained_cfg has {means} means: --image needs 1 or 3"
    with pytest.raises(v.CannotRun, match=problem):
        list(v.load_images([str(tmp_path / "a.png")], config))


def test_a_folder_of_pictures_is_one_of_a_mac_or_of_classes(tmp_path):
    """Hidden files are no pictures; those in subfolders are named with the pattern that works."""
    save_image(tmp_path / "a.png")
    (tmp_path / "._a.png").write_bytes(b"\0\5\x16\7Mac OS X")
    assert v.image_files([str(tmp_path)]) == [str(tmp_path / "a.png")]
    (tmp_path / "val" / "cat").mkdir(parents=True)
    save_image(tmp_path / "val" / "cat" / "b.png")
    with pytest.raises(v.CannotRun, match="has no images that can be read: use --image '(.*)' for those in its folders") as error:
        v.image_files([str(tmp_path / "val")])
    pattern = re.search("'(.*)'", str(error.value))[1]
    assert v.image_files([pattern]) == [str(tmp_path / "val" / "cat" / "b.png")]


# --- outputs ----------------------------------------------------------------------------------------------------------


def with_the_weights_of(model, features):
    """features_only's model with the same weights: its names differ in underscores and in a prefix."""

    def plain(key):
        return key.removeprefix("model.").replace(".", "_")

    state = {plain(key): value for key, value in model.state_dict().items()}
    features.load_state_dict({key: state[plain(key)] for key in features.state_dict()})
    return features.eval()


# Shapes, so that they do not only agree with each other.
MAPS = {
    "test_vit": [(64, 10, 10)] * 3,
    "test_dinov3": [(96, 16, 16)] * 3,
    "resnet18": [(64, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)],
    "swin_tiny_patch4_window7_224": [(56, 56, 96), (28, 28, 192), (14, 14, 384), (7, 7, 768)],  # channels last
    "dla34": [(32, 112, 112), (64, 56, 56), (128, 28, 28), (256, 14, 14), (512, 7, 7)],
    "test_efficientnet": [(16, 80, 80), (24, 40, 40), (32, 20, 20), (48, 10, 10), (64, 5, 5)],
    "test_nfnet": [(64, 80, 80), (32, 40, 40), (64, 20, 20), (96, 10, 10), (192, 5, 5)],
    "hrnet_w18_small": [(64, 112, 112), (128, 56, 56), (256, 28, 28), (512, 14, 14), (1024, 7, 7)],
    "test_convnext": [(24, 40, 40), (32, 20, 20), (48, 10, 10), (64, 5, 5)],
    "crossvit_9_240": [(128, 20, 20), (256, 14, 14)],
    "lcnet_050": [(16, 112, 112), (32, 56, 56), (64, 28, 28), (128, 14, 14), (256, 7, 7)],
}


@pytest.mark.parametrize("name", MAPS)
def test_feature_maps_are_those_of_features_only_and_finding_them_changes_nothing(name):
    context, loaded = after_model_stage("--model", name, "--batch-sizes", "1")
    cpu, inputs = loaded.cpu, loaded.inputs
    state = {key: value.clone() for key, value in cpu.state_dict().items()}
    before = v.forward_outputs(cpu, inputs)
    maps = v.find_feature_maps(context.options, cpu, inputs)
    both = v.forward_outputs(cpu, inputs, maps)
    found = {key: output for key, output in both.items() if key not in before}

    features = with_the_weights_of(cpu, timm.create_model(name, features_only=True))
    with torch.inference_mode():
        expected = {f"feature_map.{i}": x.numpy() for i, x in enumerate(features(inputs), 1)}
    assert [output.shape[1:] for output in expected.values()] == MAPS[name]
    assert found.keys() == expected.keys() and maps == loaded.maps
    for key, output in found.items():
        assert output.shape == expected[key].shape and np.array_equal(output, expected[key]), key

    assert before.keys() <= both.keys() and all(np.array_equal(before[key], both[key]) for key in before)
    after = cpu.state_dict()
    assert list(after) == list(state) and all(torch.equal(after[key], state[key]) for key in state)


def test_feature_maps_of_the_device_are_computed_on_it():
    _, loaded = after_model_stage("--batch-sizes", "1")
    before = v.forward_outputs(loaded.device, loaded.inputs, loaded.maps)
    loaded.device.blocks[-1].mlp.fc2.weight.data *= 1.1
    after = v.forward_outputs(loaded.device, loaded.inputs, loaded.maps)
    assert [np.array_equal(before[f"feature_map.{i}"], after[f"feature_map.{i}"]) for i in (1, 2, 3)] == [
        True,
        True,
        False,
    ]
    on_cpu = v.forward_outputs(loaded.cpu, loaded.inputs, loaded.maps)
    assert all(np.array_equal(before[key], output) for key, output in on_cpu.items())


def test_a_model_without_feature_maps_has_none_and_its_other_outputs_are_judged():
    context, loaded = after_model_stage("--model", "test_tiny_vit", "--batch-sizes", "1")
    assert loaded.maps is None
    assert marks(drain(v.outputs_stage(context, loaded))[0]) == dict.fromkeys(
        ["outputs.embedding", "outputs.logits", "outputs.tokens", "outputs.determinism"], v.PASS
    )


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("test_vit", {"embedding": (2, 64), "logits": (2, 1000), "tokens": (2, 101, 64)}),
        ("resnet18", {"embedding": (2, 512), "logits": (2, 1000), "unpooled": (2, 512, 7, 7)}),
        ("test_dinov3", {"embedding": (2, 96), "tokens": (2, 261, 96)}),  # has no classifier
        (
            "crossvit_9_240",  # two branches, of which the logits are the mean
            {"embedding": (2, 384), "logits": (2, 1000), "unpooled.1": (2, 401, 128), "unpooled.2": (2, 197, 256)},
        ),
    ],
)
def test_the_outputs_are_those_of_the_forward_pass_of_the_model(name, outputs):
    model = timm.create_model(name).eval()
    v.draw_weights(model, 0)
    inputs = v.draw_inputs(2, timm.data.resolve_model_data_config(model)["input_size"], 0)
    found = v.forward_outputs(model, inputs)
    assert {key: output.shape for key, output in found.items()} == outputs
    with torch.inference_mode():
        assert np.array_equal(found.get("logits", found["embedding"]), model(inputs).numpy())


def test_the_copy_on_the_device_has_the_weights_of_the_model_in_other_memory():
    _, loaded = after_model_stage()
    assert v.sha256(loaded.cpu.state_dict()) == v.sha256(copy.deepcopy(loaded.device).to(CPU).state_dict())
    ours, theirs = ({p.data_ptr() for p in model.parameters()} for model in (loaded.cpu, loaded.device))
    assert not ours & theirs


def test_the_largest_batch_size_is_drawn_and_operations_are_counted():
    context, loaded = after_model_stage()
    assert torch.equal(loaded.inputs, v.draw_inputs(3, (3, 160, 160), seed=0))
    linear = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 5, device="meta"))
    assert v.count_flops(dataclasses.replace(context, meta_model=linear), (3, 8, 8)) == 2 * 3 * 8 * 8 * 5
    assert v.count_flops(dataclasses.replace(context, meta_model=None), (3, 8, 8)) is None
    assert 50e6 < loaded.flops < 100e6, "with attention"


FAMILIES = ["test_vit", "test_dinov3", "resnet18", "test_efficientnet", "test_nfnet", "ghostnet_050", "repvit_m0_9",
            "fastvit_t8", "starnet_s050", "efficientvit_m0", "inception_next_atto", "halonet_h1"]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_activations_are_of_order_1_through_the_whole_depth(name):
    """So float16 does not overflow, and the float32 error of the CPU is far below all limits."""
    model, sizes = timm.create_model(name).eval(), {}
    v.draw_weights(model, seed=0)
    for key, module in model.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            module.register_forward_hook(
                lambda m, i, output, key=key: sizes.update({key: float(output.square().mean().sqrt())})
            )
    embedding = v.forward_outputs(model, v.draw_inputs(2, timm.data.resolve_model_data_config(model)["input_size"], 5))
    assert 0.1 < np.sqrt(np.mean(embedding["embedding"] ** 2)) < 10
    assert 0.05 < min(sizes.values()) and max(sizes.values()) < 20, sizes


def test_random_weights_do_not_depend_on_the_number_of_threads():
    sums, before = set(), torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        model = timm.create_model("test_efficientnet").eval()
        v.draw_weights(model, seed=0)
        sums.add(v.sha256(model.state_dict()))
    torch.set_num_threads(before)
    assert len(sums) == 1
