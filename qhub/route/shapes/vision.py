"""Shapes of image models: ViT, ResNet (transformers' and timm's), ConvNeXt."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from qhub.route.shapes.parts import Config, NotDerivable, Shapes, batch_norm, conv, is_base, linear, matrices, norm, norms

#: timm's names → (blocks of each stage, whether they are bottlenecks).
_TIMM: Mapping[str, tuple[tuple[int, ...], bool]] = {
    "resnet18": ((2, 2, 2, 2), False),
    "resnet34": ((3, 4, 6, 3), False),
    "resnet50": ((3, 4, 6, 3), True),
    "resnet101": ((3, 4, 23, 3), True),
    "resnet152": ((3, 8, 36, 3), True),
}


def vit(config: Config) -> Shapes:
    """Vision transformer."""
    model = _prefix(config, "vit")
    hidden, inner = config.size("hidden_size"), config.size("intermediate_size")
    patch = config.size("patch_size", 16)
    if patch == 0:
        raise NotDerivable("patch_size")
    patches = (config.size("image_size", 224) // patch) ** 2
    bias = config.flag("qkv_bias", default=True)
    yield f"{model}embeddings.cls_token", (1, 1, hidden)
    yield f"{model}embeddings.position_embeddings", (1, patches + 1, hidden)
    yield from conv(f"{model}embeddings.patch_embeddings.projection", (hidden, config.size("num_channels", 3), patch, patch))
    for index in config.blocks("num_hidden_layers"):
        block = f"{model}encoder.layer.{index}"
        yield from matrices(f"{block}.attention.attention", ("query", "key", "value"), (hidden, hidden), bias=bias)
        yield from linear(f"{block}.attention.output.dense", hidden, hidden)
        yield from linear(f"{block}.intermediate.dense", inner, hidden)
        yield from linear(f"{block}.output.dense", hidden, inner)
        yield from norms(block, ("layernorm_before", "layernorm_after"), hidden)
    yield from norm(f"{model}layernorm", hidden)
    if model:
        yield from linear("classifier", config.labels(), hidden)
    else:
        yield from linear("pooler.dense", config.size("pooler_output_size", hidden), hidden)


def convnext(config: Config) -> Shapes:
    """ConvNeXt."""
    model = _prefix(config, "convnext")
    widths, depths = config.sizes("hidden_sizes"), config.sizes("depths")
    if not widths or len(widths) != len(depths) or max(depths) > 4096:
        raise NotDerivable("hidden_sizes")
    patch, before = config.size("patch_size", 4), widths[0]
    yield from conv(f"{model}embeddings.patch_embeddings", (before, config.size("num_channels", 3), patch, patch))
    yield from norm(f"{model}embeddings.layernorm", before)
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        if stage:
            yield from norm(f"{model}encoder.stages.{stage}.downsampling_layer.0", before)
            yield from conv(f"{model}encoder.stages.{stage}.downsampling_layer.1", (width, before, 2, 2))
        for index in range(depth):
            yield from _convnext_block(f"{model}encoder.stages.{stage}.layers.{index}", width, config)
        before = width
    yield from norm(f"{model}layernorm", before)
    if model:
        yield from linear("classifier", config.labels(), before)


def _convnext_block(block: str, width: int, config: Config) -> Shapes:
    scale = config.values.get("layer_scale_init_value", 1e-6)
    if not isinstance(scale, (int, float)):
        raise NotDerivable("layer_scale_init_value")
    if scale > 0:
        yield f"{block}.layer_scale_parameter", (width,)
    yield from conv(f"{block}.dwconv", (width, 1, 7, 7))
    yield from norm(f"{block}.layernorm", width)
    yield from linear(f"{block}.pwconv1", 4 * width, width)
    yield from linear(f"{block}.pwconv2", width, 4 * width)


def resnet(config: Config) -> Shapes:
    """ResNet as transformers writes it."""
    model = _prefix(config, "resnet")
    widths, depths = config.sizes("hidden_sizes"), config.sizes("depths")
    bottleneck = config.text("layer_type", "bottleneck") == "bottleneck"
    if not widths or len(widths) != len(depths) or max(depths) > 4096:
        raise NotDerivable("hidden_sizes")
    before = config.size("embedding_size", 64)
    yield from _conv_norm(f"{model}embedder.embedder", (before, config.size("num_channels", 3), 7, 7))
    for stage, (width, depth) in enumerate(zip(widths, depths, strict=True)):
        strides = stage > 0 or config.flag("downsample_in_first_stage", default=False)
        for index in range(depth):
            block = f"{model}encoder.stages.{stage}.layers.{index}"
            if before != width or (strides and index == 0):
                yield from _conv_norm(f"{block}.shortcut", (width, before, 1, 1))
            for place, shape in enumerate(_residual(width, before, bottleneck=bottleneck)):
                yield from _conv_norm(f"{block}.layer.{place}", shape)
            before = width
    if model:
        yield from linear("classifier.1", config.labels(), before)


def _conv_norm(name: str, shape: tuple[int, ...]) -> Shapes:
    yield from conv(f"{name}.convolution", shape, bias=False)
    yield from batch_norm(f"{name}.normalization", shape[0])


def _residual(width: int, before: int, *, bottleneck: bool) -> tuple[tuple[int, int, int, int], ...]:
    """Shapes of the convolutions of one residual block of output `width`."""
    if not bottleneck:
        return ((width, before, 3, 3), (width, width, 3, 3))
    narrow = width // 4
    return ((narrow, before, 1, 1), (narrow, narrow, 3, 3), (width, narrow, 1, 1))


def timm_resnet(config: Config) -> Shapes:
    """ResNet as timm and torchvision write it."""
    depths, bottleneck = _TIMM[config.text("architecture")]
    before = 64
    yield from conv("conv1", (before, config.size("in_chans", 3), 7, 7), bias=False)
    yield from batch_norm("bn1", before)
    for stage, depth in enumerate(depths):
        width = (64 << stage) * (4 if bottleneck else 1)
        for index in range(depth):
            block = f"layer{stage + 1}.{index}"
            for place, shape in enumerate(_residual(width, before, bottleneck=bottleneck), start=1):
                yield from conv(f"{block}.conv{place}", shape, bias=False)
                yield from batch_norm(f"{block}.bn{place}", shape[0])
            if index == 0 and (stage or before != width):
                yield from conv(f"{block}.downsample.0", (width, before, 1, 1), bias=False)
                yield from batch_norm(f"{block}.downsample.1", width)
            before = width
    yield from linear("fc", config.size("num_classes", 1000), before)


def _prefix(config: Config, base: str) -> str:
    architecture = config.text("architecture")
    if architecture.endswith("ForImageClassification"):
        return f"{base}."
    if is_base(architecture):
        return ""
    raise NotDerivable(architecture)


VISION: dict[str, Callable[[Config], Shapes]] = {"vit": vit, "convnext": convnext, "resnet": resnet}
TIMM: dict[str, Callable[[Config], Shapes]] = dict.fromkeys(_TIMM, timm_resnet)
