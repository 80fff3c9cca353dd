"""Shapes of diffusers' `UNet2DConditionModel`: the network of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from dataclasses import dataclass

from qhub.route.shapes.parts import Config, NotDerivable, Shapes, conv, linear, matrices, norm, norms

_PLAIN = {"DownBlock2D": False, "CrossAttnDownBlock2D": True, "UpBlock2D": False, "CrossAttnUpBlock2D": True}
#: Options that add weights which this file does not know: with one of them the shapes are unknown.
_OTHER_WEIGHTS = ("class_embed_type", "encoder_hid_dim", "encoder_hid_dim_type", "addition_embed_type_num_heads", "num_class_embeds",
                  "reverse_transformer_layers_per_block", "conv_in_kernel", "conv_out_kernel")  # fmt: skip
_DEFAULTS = {"conv_in_kernel": 3, "conv_out_kernel": 3, "addition_embed_type_num_heads": 64}


@dataclass(frozen=True, slots=True)
class _Level:
    """One resolution: its channels, how many residual blocks, and its attention (0 transformer layers: none)."""

    channels: int
    layers: int
    transformers: int
    heads: int
    cross: int


def unet(config: Config) -> Shapes:
    """A conditional UNet."""
    _refuse_unknown(config)
    levels = _levels(config)
    first, last = levels[0].channels, levels[-1]
    time = 4 * first
    yield from conv("conv_in", (first, config.size("in_channels"), 3, 3))
    yield from linear("time_embedding.linear_1", time, first)
    yield from linear("time_embedding.linear_2", time, time)
    if (condition := config.size("time_cond_proj_dim", 0)) > 0:
        yield from linear("time_embedding.cond_proj", first, condition, bias=False)
    yield from _added(config, time)
    before = first
    for index, level in enumerate(levels):
        sides = tuple(before if place == 0 else level.channels for place in range(level.layers))
        block = f"down_blocks.{index}"
        yield from _level(block, config, level, sides, time)
        if index < len(levels) - 1:
            yield from conv(f"{block}.downsamplers.0.conv", (level.channels, level.channels, 3, 3))
        before = level.channels
    yield from _middle(config, last, time)
    yield from _up(config, levels, time)
    yield from norm("conv_norm_out", first)
    yield from conv("conv_out", (config.size("out_channels"), first, 3, 3))


def _refuse_unknown(config: Config) -> None:
    for key in _OTHER_WEIGHTS:
        if config.values.get(key) not in (None, _DEFAULTS.get(key)):
            raise NotDerivable(key)
    if config.text("mid_block_type", "UNetMidBlock2DCrossAttn") != "UNetMidBlock2DCrossAttn":
        raise NotDerivable("mid_block_type")
    if config.text("resnet_time_scale_shift", "default") != "default" or config.text("attention_type", "default") != "default":
        raise NotDerivable("resnet_time_scale_shift")
    for key in ("dual_cross_attention", "only_cross_attention", "class_embeddings_concat", "resnet_skip_time_act"):
        if config.flag(key, default=False):
            raise NotDerivable(key)


def _levels(config: Config) -> list[_Level]:
    channels = config.sizes("block_out_channels")
    down = config.values.get("down_block_types")
    up = config.values.get("up_block_types")
    if not channels or not isinstance(down, list) or not isinstance(up, list) or not len(channels) == len(down) == len(up):
        raise NotDerivable("block_out_channels")
    if any(not isinstance(kind, str) or kind not in _PLAIN for kind in (*down, *up)) or [_PLAIN[kind] for kind in down] != [
        _PLAIN[kind] for kind in reversed(up)
    ]:
        raise NotDerivable("down_block_types")
    count = len(channels)
    depths, layers = _each(config, "transformer_layers_per_block", 1, count), _each(config, "layers_per_block", 2, count)
    heads_key = "attention_head_dim" if config.values.get("num_attention_heads") is None else "num_attention_heads"
    heads, cross = _each(config, heads_key, 8, count), _each(config, "cross_attention_dim", 1280, count)
    levels = [
        _Level(channels[index], layers[index], depths[index] if _PLAIN[down[index]] else 0, heads[index], cross[index])
        for index in range(count)
    ]
    if max(levels, key=lambda level: level.layers).layers > 64 or max(depths) > 256:
        raise NotDerivable("layers_per_block")
    if any(level.heads == 0 or level.channels % level.heads for level in levels):
        raise NotDerivable(heads_key)
    return levels


def _each(config: Config, key: str, default: int, count: int) -> tuple[int, ...]:
    """The number called `key` of each level; one number means all."""
    if not isinstance(config.values.get(key), list):
        return (config.size(key, default),) * count
    sizes = config.sizes(key)
    if len(sizes) != count:
        raise NotDerivable(key)
    return sizes


def _added(config: Config, time: int) -> Shapes:
    kind = config.values.get("addition_embed_type")
    if kind == "text_time":
        yield from linear("add_embedding.linear_1", time, config.size("projection_class_embeddings_input_dim"))
        yield from linear("add_embedding.linear_2", time, time)
    elif kind is not None:
        raise NotDerivable("addition_embed_type")


def _level(block: str, config: Config, level: _Level, sides: tuple[int, ...], time: int) -> Shapes:
    """Residual blocks whose inputs are `sides` wide, each followed by attention if the level has any."""
    for place, side in enumerate(sides):
        yield from _residual(f"{block}.resnets.{place}", side, level.channels, time)
        if level.transformers:
            yield from _attention(f"{block}.attentions.{place}", config, level, level.transformers)


def _middle(config: Config, last: _Level, time: int) -> Shapes:
    depths = _each(config, "transformer_layers_per_block", 1, len(config.sizes("block_out_channels")))
    for place in (0, 1):
        yield from _residual(f"mid_block.resnets.{place}", last.channels, last.channels, time)
    yield from _attention("mid_block.attentions.0", config, last, depths[-1])


def _up(config: Config, levels: list[_Level], time: int) -> Shapes:
    turned = levels[::-1]
    before = turned[0].channels
    for index, level in enumerate(turned):
        below = turned[min(index + 1, len(turned) - 1)].channels
        skips = (*[level.channels] * level.layers, below)
        sides = tuple((before if place == 0 else level.channels) + skip for place, skip in enumerate(skips))
        block = f"up_blocks.{index}"
        yield from _level(block, config, level, sides, time)
        if index < len(turned) - 1:
            yield from conv(f"{block}.upsamplers.0.conv", (level.channels, level.channels, 3, 3))
        before = level.channels


def _residual(name: str, inner: int, out: int, time: int) -> Shapes:
    yield from norm(f"{name}.norm1", inner)
    yield from conv(f"{name}.conv1", (out, inner, 3, 3))
    yield from linear(f"{name}.time_emb_proj", out, time)
    yield from norm(f"{name}.norm2", out)
    yield from conv(f"{name}.conv2", (out, out, 3, 3))
    if inner != out:
        yield from conv(f"{name}.conv_shortcut", (out, inner, 1, 1))


def _attention(name: str, config: Config, level: _Level, depth: int) -> Shapes:
    width = level.channels
    projection = (width, width) if config.flag("use_linear_projection", default=False) else (width, width, 1, 1)
    yield from norm(f"{name}.norm", width)
    yield from conv(f"{name}.proj_in", projection)
    for index in range(depth):
        block = f"{name}.transformer_blocks.{index}"
        yield from norms(block, ("norm1", "norm2", "norm3"), width)
        for attention, source in (("attn1", width), ("attn2", level.cross)):
            yield from linear(f"{block}.{attention}.to_q", width, width, bias=False)
            yield from matrices(f"{block}.{attention}", ("to_k", "to_v"), (width, source), bias=False)
            yield from linear(f"{block}.{attention}.to_out.0", width, width)
        yield from linear(f"{block}.ff.net.0.proj", 8 * width, width)
        yield from linear(f"{block}.ff.net.2", width, 4 * width)
    yield from conv(f"{name}.proj_out", projection)
