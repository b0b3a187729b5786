"""The model under test: its weights and inputs are those of the seed, and its feature maps those of timm."""

import copy
import dataclasses
import re
import types

import pytest
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


def test_a_model_whose_channels_no_image_has_is_an_error(tmp_path):
    save_image(tmp_path / "a.png", "RGB")
    config = timm.data.resolve_model_data_config(timm.create_model("test_vit")) | {"input_size": (4, 160, 160)}
    with pytest.raises(v.CannotRun, match="^the model takes inputs of 4 channels, which images do not have$"):
        list(v.load_images([str(tmp_path / "a.png")], config))


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
