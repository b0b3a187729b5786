"""Runs the script that its arguments name with a few more timm models: python with_test_models.py SCRIPT [ARGUMENT ...]

test_dinov3            the family of the default model, small: 3 blocks of width 96, with register tokens and RoPE
test_vit_without_convolution   its patch embedding is a matrix product
test_tiny_vit          one block of width 32 at 32 x 32, so that its kernels take no time
test_vit_with_a_slow_host      the same, and its Python takes 100 ms
test_vit_that_waits    reads a value on the host in its forward pass, so that no graph can be captured
test_trained_vit       vit_small_patch14_dinov2 at 98 x 98, where trained weights take seconds; timm resamples the positions
test_deep_vit          24 blocks of width 64 at 64 x 64
test_vit_that_branches         takes a branch that depends on a value, so that it is not one graph for torch.compile
test_vit_with_a_table_on_the_cpu   makes a tensor on the CPU in each forward pass, as timm's DINOv3 does
test_vit_with_antialias        resamples its input with a kernel that computes on the CPU inside torch_npu
test_vit_that_gets_slower      waits 2 ms more after each 10 forward passes
test_vit_wrong_in_half         is 1 % off on an NPU, where its inputs are in half precision
test_vit_that_keeps_a_bias     as LeViT in timm 1.0.20: in the type that its weights had, until it is trained
test_swin              small, with windows of 4 x 4 tokens
test_encoder           has no head: forward_head raises NotImplementedError, as that of qwen3_vit_88m_enc does
test_vit_with_bessel   uses an operator that torch_npu has no kernel for, so that torch_npu would compute it on the CPU

TEST_BACKENDS=1 registers two backends of torch.compile: "scaled" computes outputs 1 % too large, "sleeping" never ends.
TEST_ALLOW_HF32="conv matmul" sets torch_npu's HF32 switches to that, as a user's program could. And
TEST_INTERNAL_FORMAT=no forbids internal formats, whose convolutions the emulated Ascend lacks: torch_npu 2.9.0 allows them.
"""

import functools
import os
import runpy
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import validate_npu

validate_npu.import_packages()

import torch
from timm.layers import PatchEmbed
from timm.models import register_model
from timm.models.eva import vit_small_patch16_dinov3
from timm.models.swin_transformer import swin_tiny_patch4_window7_224
from timm.models.vision_transformer import VisionTransformer, vit_small_patch14_dinov2


@register_model
def test_dinov3(pretrained=False, **kwargs):
    return vit_small_patch16_dinov3(pretrained, **{**kwargs, "embed_dim": 96, "depth": 3, "num_heads": 3})


@register_model
def test_trained_vit(pretrained=False, **kwargs):
    model = vit_small_patch14_dinov2(img_size=98)
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 98, 98)}
    return model


@register_model
def test_deep_vit(pretrained=False, **kwargs):
    model = VisionTransformer(img_size=64, embed_dim=64, depth=24, num_heads=2)
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model


class LinearPatches(PatchEmbed):
    def forward(self, x):
        patches = torch.nn.functional.pixel_unshuffle(x, self.patch_size[0]).flatten(2).transpose(1, 2)
        return torch.nn.functional.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


@register_model
def test_vit_without_convolution(pretrained=False, **kwargs):
    return VisionTransformer(embed_dim=64, depth=2, num_heads=2, embed_layer=LinearPatches)


def tiny(kind):
    model = kind(img_size=32, embed_dim=32, depth=1, num_heads=1)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model


@register_model
def test_tiny_vit(pretrained=False, **kwargs):
    return tiny(VisionTransformer)


class VisionTransformerWithASlowHost(VisionTransformer):
    def forward_features(self, x, **kwargs):
        time.sleep(0.1)
        return super().forward_features(x, **kwargs)


@register_model
def test_vit_with_a_slow_host(pretrained=False, **kwargs):
    return tiny(VisionTransformerWithASlowHost)


class VisionTransformerThatWaits(VisionTransformer):
    def forward_features(self, x, **kwargs):
        return super().forward_features(x * float(x.isfinite().all()), **kwargs)


@register_model
def test_vit_that_waits(pretrained=False, **kwargs):
    return tiny(VisionTransformerThatWaits)


class VisionTransformerThatBranches(VisionTransformer):
    def forward_features(self, x, **kwargs):
        return super().forward_features(x if x.isfinite().all() else x * 0, **kwargs)


@register_model
def test_vit_that_branches(pretrained=False, **kwargs):
    return tiny(VisionTransformerThatBranches)


class VisionTransformerWithATableOnTheCpu(VisionTransformer):
    def forward_features(self, x, **kwargs):
        return super().forward_features(x + torch.linspace(-1, 1, x.shape[-1]).to(x), **kwargs)


@register_model
def test_vit_with_a_table_on_the_cpu(pretrained=False, **kwargs):
    return tiny(VisionTransformerWithATableOnTheCpu)


class VisionTransformerWithBessel(VisionTransformer):
    def forward_features(self, x, **kwargs):
        return torch.special.bessel_j0(super().forward_features(x, **kwargs))


@register_model
def test_vit_with_bessel(pretrained=False, **kwargs):
    return VisionTransformerWithBessel(embed_dim=64, depth=2, num_heads=2)


class VisionTransformerWithAntialias(VisionTransformer):
    def forward_features(self, x, **kwargs):
        x = torch.nn.functional.interpolate(x, (32, 32), mode="bicubic", antialias=True)
        return super().forward_features(x, **kwargs)


@register_model
def test_vit_with_antialias(pretrained=False, **kwargs):
    return tiny(VisionTransformerWithAntialias)


class VisionTransformerThatGetsSlower(VisionTransformer):
    passes = 0

    def forward_features(self, x, **kwargs):
        type(self).passes += x.device.type == "npu"
        time.sleep(0.002 * (self.passes // 10))
        return super().forward_features(x, **kwargs)


@register_model
def test_vit_that_gets_slower(pretrained=False, **kwargs):
    return tiny(VisionTransformerThatGetsSlower)


class VisionTransformerWrongInHalf(VisionTransformer):
    def forward_features(self, x, **kwargs):
        wrong = x.device.type == "npu" and x.dtype == torch.float16
        return super().forward_features(x, **kwargs) * (1.01 if wrong else 1)


@register_model
def test_vit_wrong_in_half(pretrained=False, **kwargs):
    return tiny(VisionTransformerWrongInHalf)


class VisionTransformerThatKeepsABias(VisionTransformer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.shift_bias, self.kept = torch.nn.Parameter(torch.zeros(self.embed_dim)), {}

    def train(self, mode=True):
        self.kept = {} if mode else self.kept
        return super().train(mode)

    def forward_features(self, x, **kwargs):
        if str(x.device) not in self.kept:
            self.kept[str(x.device)] = 1 * self.shift_bias
        return super().forward_features(x, **kwargs) + self.kept[str(x.device)]


@register_model
def test_vit_that_keeps_a_bias(pretrained=False, **kwargs):
    return tiny(VisionTransformerThatKeepsABias)


@register_model
def test_swin(pretrained=False, **kwargs):
    small = {"img_size": 64, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = swin_tiny_patch4_window7_224(pretrained, **{**kwargs, **small})
    model.pretrained_cfg = {**model.pretrained_cfg, "input_size": (3, 64, 64)}
    return model


class Encoder(VisionTransformer):
    def forward_head(self, x, pre_logits=False):
        raise NotImplementedError("Encoder does not support classification use cases.")

    def forward(self, x):
        return self.forward_features(x)


@register_model
def test_encoder(pretrained=False, **kwargs):
    model = Encoder(img_size=32, embed_dim=32, depth=1, num_heads=1, num_classes=0)
    model.pretrained_cfg = {"input_size": (3, 32, 32)}
    return model


def scaled(factor):
    """A backend of torch.compile that runs the graph, and multiplies its outputs."""
    return lambda graph, inputs: lambda *args: [factor * output for output in graph(*args)]


@functools.cache
def register_backends():
    from torch._dynamo import register_backend

    register_backend(scaled(1.01), name="scaled")
    register_backend(lambda graph, inputs: time.sleep(600), name="sleeping")


def set_switches():
    if "TEST_BACKENDS" in os.environ:
        register_backends()
    if os.environ.keys() & {"TEST_ALLOW_HF32", "TEST_INTERNAL_FORMAT"}:
        import torch_npu  # noqa: F401
    if "TEST_INTERNAL_FORMAT" in os.environ:
        torch.npu.config.allow_internal_format = False
    if "TEST_ALLOW_HF32" in os.environ:
        torch.npu.conv.allow_hf32 = "conv" in os.environ["TEST_ALLOW_HF32"]
        torch.npu.matmul.allow_hf32 = "matmul" in os.environ["TEST_ALLOW_HF32"]


if __name__ == "__main__":
    set_switches()
    del sys.argv[0]
    runpy.run_path(sys.argv[0], run_name="__main__")
