"""Families whose text is read beside pictures: what stands beside the text part, which is what adapters are for.

Each function gives the modules before `language_model`, from the whole config and the text part's values; None where
the vision part is of another kind than the family's own.
"""

from collections.abc import Mapping
from typing import Any

from topwork.models.structures.parts import NOTHING, Node, block, embedding, gated, linear, listed, norm
from topwork.models.structures.values import Values

SIGLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True,
}  # fmt: skip
CLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 32,
}  # fmt: skip
PIXTRAL = {
    "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
    "num_channels": 3, "patch_size": 16,
}  # fmt: skip
QWEN2_VL = {
    "depth": 32, "embed_dim": 1280, "hidden_size": 3584, "mlp_ratio": 4, "in_channels": 3, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2,
}  # fmt: skip
QWEN2_5_VL = {
    "depth": 32, "hidden_size": 3584, "intermediate_size": 3420, "in_channels": 3, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "out_hidden_size": 3584,
}  # fmt: skip
"""What each vision part's class gives where a config is silent."""


def gemma3(config: Mapping[str, Any], text: Values) -> dict[str, Node] | None:
    """Gemma 3 from 4B on: SigLIP and a projection."""
    c = _vision(config, "siglip_vision_model", SIGLIP)
    if c is None:
        return None
    own = (c.hidden * text.hidden,)
    return {
        "vision_tower": _siglip(c),
        "multi_modal_projector": block(own, mm_soft_emb_norm=norm(c.hidden), avg_pool=NOTHING),
    }


def llava(config: Mapping[str, Any], text: Values) -> dict[str, Node] | None:
    """LLaVA 1.5: CLIP and two layers."""
    c = _vision(config, "clip_vision_model", CLIP)
    if c is None:
        return None
    bias = config.get("multimodal_projector_bias", True)
    return {"vision_tower": _clip(c), "multi_modal_projector": block(**_projection(config, c, text, bias))}


def mistral3(config: Mapping[str, Any], text: Values) -> dict[str, Node] | None:
    """Mistral Small 3.1: Pixtral, neighbouring patches made one, and two layers."""
    c = _vision(config, "pixtral", PIXTRAL)
    if c is None:
        return None
    merged = config.get("spatial_merge_size", 2) ** 2
    projector = block(
        norm=norm(c.hidden),
        patch_merger=block(merging_layer=linear(c.hidden, c.hidden * merged)),
        **_projection(config, c, text, config.get("multimodal_projector_bias", False)),
    )
    return {"vision_tower": _pixtral(c), "multi_modal_projector": projector}


def qwen2_vl(config: Mapping[str, Any], text: Values) -> dict[str, Node] | None:  # noqa: ARG001
    """Qwen2-VL: a vision part that merges patches at its end."""
    c = _vision(config, "qwen2_vl_vision", QWEN2_VL, "qwen2_vl")
    if c is None:
        return None
    width = c.size("embed_dim")
    inner = int(width * c.get("mlp_ratio"))
    mlp = block(fc1=linear(inner, width, True), act=NOTHING, fc2=linear(width, inner, True))
    layer = block(norm1=norm(width, True), norm2=norm(width, True), attn=_fused_attention(width), mlp=mlp)
    merger = _patch_merger(c, width, c.hidden, norm(width, True))
    return {"visual": _qwen_vision(c, width, layer, merger)}


def qwen2_5_vl(config: Mapping[str, Any], text: Values) -> dict[str, Node] | None:  # noqa: ARG001
    """Qwen2.5-VL: the same with RMS norms and gated MLPs."""
    c = _vision(config, "qwen2_5_vl_vision", QWEN2_5_VL, "qwen2_5_vl")
    if c is None:
        return None
    width = c.hidden
    layer = block(norm1=norm(width), norm2=norm(width), attn=_fused_attention(width), mlp=gated(c, bias=True))
    merger = _patch_merger(c, width, c.size("out_hidden_size"), norm(width))
    return {"visual": _qwen_vision(c, width, layer, merger)}


def _vision(config: Mapping[str, Any], kind: str, defaults: Mapping[str, Any], older: str = "") -> Values | None:
    """The vision part's values, where it is of this kind (in `older` configs it had the whole model's)."""
    given = config.get("vision_config")
    if not isinstance(given, dict) or given.get("model_type", kind) not in (kind, older):
        return None
    return Values(kind, given, defaults)


def _projection(config: Mapping[str, Any], c: Values, text: Values, bias: bool) -> dict[str, Node]:
    """Two layers from the hidden states of one or several vision layers to the text's width."""
    layers = config.get("vision_feature_layer", -1)
    seen = c.hidden * (len(layers) if isinstance(layers, list) else 1)
    return {
        "linear_1": linear(text.hidden, seen, bias), "act": NOTHING, "linear_2": linear(text.hidden, text.hidden, bias),
    }  # fmt: skip


def _siglip(c: Values) -> Node:
    width, patch, channels = c.hidden, c.size("patch_size"), c.size("num_channels")
    layer = block(
        layer_norm1=norm(width, True),
        self_attn=_four(width, "out_proj", bias=True),
        layer_norm2=norm(width, True),
        mlp=_mlp(c),
    )
    embeddings = block(
        patch_embedding=Node(tensors=(width * channels * patch * patch, width), whole=True),
        position_embedding=embedding((c.size("image_size") // patch) ** 2, width),
    )
    tower = {"embeddings": embeddings, "encoder": block(layers=listed([layer] * c.layers))}
    head = {"head": _pooling(c)} if c.flag("vision_use_head") else {}
    return block(**tower, post_layernorm=norm(width, True), **head)


def _clip(c: Values) -> Node:
    width, patch, channels = c.hidden, c.size("patch_size"), c.size("num_channels")
    layer = block(
        self_attn=_four(width, "out_proj", bias=True),
        layer_norm1=norm(width, True),
        mlp=_mlp(c),
        layer_norm2=norm(width, True),
    )
    embeddings = block(
        (width,),
        patch_embedding=Node(tensors=(width * channels * patch * patch,), whole=True),
        position_embedding=embedding((c.size("image_size") // patch) ** 2 + 1, width),
    )
    return block(
        embeddings=embeddings,
        pre_layrnorm=norm(width, True),  # so it is written there
        encoder=block(layers=listed([layer] * c.layers)),
        post_layernorm=norm(width, True),
    )


def _pixtral(c: Values) -> Node:
    width, patch, channels = c.hidden, c.size("patch_size"), c.size("num_channels")
    layer = block(
        attention_norm=norm(width), feed_forward=gated(c), attention=_four(width, "o_proj"), ffn_norm=norm(width)
    )
    return block(
        patch_conv=Node(tensors=(width * channels * patch * patch,), whole=True),
        ln_pre=norm(width),
        transformer=block(layers=listed([layer] * c.layers)),
        patch_positional_embedding=NOTHING,
    )


def _qwen_vision(c: Values, width: int, layer: Node, merger: Node) -> Node:
    patch = c.size("in_channels") * c.size("temporal_patch_size") * c.size("patch_size") ** 2
    return block(
        patch_embed=block(proj=Node(tensors=(width * patch,), whole=True)),
        rotary_pos_emb=NOTHING,
        blocks=listed([layer] * c.size("depth")),
        merger=merger,
    )


def _patch_merger(c: Values, width: int, outputs: int, before: Node) -> Node:
    wide = width * c.size("spatial_merge_size") ** 2
    layers = {"0": linear(wide, wide, True), "1": NOTHING, "2": linear(outputs, wide, True)}
    return block(ln_q=before, mlp=block(**layers))


def _four(width: int, out: str, bias: bool = False) -> Node:
    return block(**{name: linear(width, width, bias) for name in ("k_proj", "v_proj", "q_proj", out)})


def _fused_attention(width: int) -> Node:
    return block(qkv=linear(3 * width, width, True), proj=linear(width, width, True))


def _mlp(c: Values) -> Node:
    return block(activation_fn=NOTHING, fc1=linear(c.inner, c.hidden, True), fc2=linear(c.hidden, c.inner, True))


def _pooling(c: Values) -> Node:
    width = c.hidden
    pooled = block((3 * width * width, 3 * width), out_proj=linear(width, width, True))
    return block((width,), attention=pooled, layernorm=norm(width, True), mlp=_mlp(c))
