"""Families whose text is read beside pictures: the text part stands among the others, and is what adapters are for."""

from topwork.models.structures import llama
from topwork.models.structures.parts import NOTHING, Node, block, embedding, linear, listed, norm
from topwork.models.structures.values import Values

SIGLIP = {
    "hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12,
    "num_channels": 3, "image_size": 224, "patch_size": 16, "vision_use_head": True,
}  # fmt: skip
"""What the vision part's class gives where a config is silent."""


def gemma3(c: Values) -> Node:
    """Gemma 3 from 4B on: SigLIP, a projection, and the text model."""
    vision = Values("siglip_vision_model", c.get("vision_config") or {}, SIGLIP)
    text = llama.gemma3(c).inside
    own = (vision.hidden * c.hidden,)
    return block(
        model=block(
            vision_tower=_siglip(vision),
            multi_modal_projector=block(own, mm_soft_emb_norm=norm(vision.hidden), avg_pool=NOTHING),
            language_model=text["model"],
        ),
        lm_head=text["lm_head"],
    )


def _siglip(c: Values) -> Node:
    width, patch, channels = c.hidden, c.size("patch_size"), c.size("num_channels")
    layer = block(
        layer_norm1=norm(width, True),
        self_attn=block(**{name: linear(width, width, True) for name in ("k_proj", "v_proj", "q_proj", "out_proj")}),
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


def _mlp(c: Values) -> Node:
    return block(activation_fn=NOTHING, fc1=linear(c.inner, c.hidden, True), fc2=linear(c.hidden, c.inner, True))


def _pooling(c: Values) -> Node:
    width = c.hidden
    pooled = block((3 * width * width, 3 * width), out_proj=linear(width, width, True))
    return block((width,), attention=pooled, layernorm=norm(width, True), mlp=_mlp(c))
