"""Families that are built as llama is: what of it differs stands in each one's function."""

from topwork.models.structures.parts import (
    NOTHING,
    Node,
    attention,
    block,
    embedding,
    expert_matrices,
    experts,
    fused_gated,
    gated,
    linear,
    listed,
    norm,
    norms,
    projections,
    router,
)  # fmt: skip
from topwork.models.structures.values import Values

BEFORE = ("input_layernorm", "post_attention_layernorm")
AFTER = ("post_attention_layernorm", "post_feedforward_layernorm")
AROUND = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
"""Where a layer's norms stand: before attention and MLP, after them, or both."""


def decoder(c: Values, *layers: Node, last: Node | None = None, head_bias: bool = False) -> Node:
    """The model around its layers: one for all, or one each."""
    nodes = layers if len(layers) > 1 else layers * c.layers
    return block(
        model=block(
            embed_tokens=embedding(c.vocabulary, c.hidden),
            layers=listed(nodes),
            norm=last or norm(c.hidden),
            rotary_emb=NOTHING,
        ),
        lm_head=linear(c.vocabulary, c.hidden, head_bias),
    )


def llama(c: Values) -> Node:
    """Llama, Mistral, Granite, SmolLM 3: `attention_bias` and `mlp_bias` where the config has them."""
    bias = c.flag("attention_bias")
    return decoder(
        c,
        block(
            self_attn=attention(**projections(c, bias, bias)),
            mlp=gated(c, bias=c.flag("mlp_bias")),
            **norms(c.hidden, *BEFORE),
        ),
    )


def qwen2(c: Values) -> Node:
    """Biases on queries, keys and values."""
    return decoder(c, block(self_attn=attention(**projections(c, True)), mlp=gated(c), **norms(c.hidden, *BEFORE)))


def qwen3(c: Values) -> Node:
    """A norm on each head of queries and keys."""
    bias = c.flag("attention_bias")
    own = attention(**projections(c, bias, bias), **norms(c.head_dim, "q_norm", "k_norm"))
    return decoder(c, block(self_attn=own, mlp=gated(c), **norms(c.hidden, *BEFORE)))


def gemma2(c: Values) -> Node:
    """Norms before and after."""
    bias = c.flag("attention_bias")
    return decoder(
        c, block(self_attn=attention(**projections(c, bias, bias)), mlp=gated(c), **norms(c.hidden, *AROUND))
    )


def gemma3(c: Values) -> Node:
    """Norms before and after, and on the heads."""
    bias = c.flag("attention_bias")
    own = attention(**projections(c, bias, bias), **norms(c.head_dim, "q_norm", "k_norm"))
    return decoder(c, block(self_attn=own, mlp=gated(c), **norms(c.hidden, *AROUND)))


def phi3(c: Values) -> Node:
    """Queries, keys and values in one layer, gate and up in another."""
    width = c.heads * c.head_dim
    own = attention(
        o_proj=linear(c.hidden, width), qkv_proj=linear(width + 2 * c.key_value_heads * c.head_dim, c.hidden)
    )
    return decoder(
        c,
        block(
            self_attn=own,
            mlp=fused_gated(c),
            **norms(c.hidden, *BEFORE),
            resid_attn_dropout=NOTHING,
            resid_mlp_dropout=NOTHING,
        ),
    )


def olmo(c: Values) -> Node:
    """Norms that learn nothing."""
    bias, plain = c.flag("attention_bias"), norm(c.hidden, weight=False)
    layer = block(
        self_attn=attention(**projections(c, bias, bias)),
        mlp=gated(c),
        input_layernorm=plain,
        post_attention_layernorm=plain,
    )
    return decoder(c, layer, last=plain)


def olmo2(c: Values) -> Node:
    """Norms after attention and MLP, and over all heads of queries or keys at once."""
    bias = c.flag("attention_bias")
    own = attention(
        **projections(c, bias, bias),
        q_norm=norm(c.heads * c.head_dim),
        k_norm=norm(c.key_value_heads * c.head_dim),
    )
    return decoder(c, block(self_attn=own, mlp=gated(c), **norms(c.hidden, *AFTER)))


def exaone4(c: Values) -> Node:
    """Norms after attention and MLP, and on each head."""
    own = attention(**projections(c), **norms(c.head_dim, "q_norm", "k_norm"))
    return decoder(c, block(self_attn=own, mlp=gated(c), **norms(c.hidden, *AFTER)))


def glm(c: Values) -> Node:
    """Biases on queries, keys and values alone, gate and up in one layer."""
    own = attention(**projections(c, c.flag("attention_bias")))
    return decoder(c, block(self_attn=own, mlp=fused_gated(c), **norms(c.hidden, *BEFORE)))


def glm4(c: Values) -> Node:
    """The same with norms after attention and MLP too."""
    own = attention(**projections(c, c.flag("attention_bias")))
    around = norms(c.hidden, *BEFORE, "post_self_attn_layernorm", "post_mlp_layernorm")
    return decoder(c, block(self_attn=own, mlp=fused_gated(c), **around))


def cohere(c: Values) -> Node:
    """One norm for attention and MLP, which stand beside each other."""
    bias = c.flag("attention_bias")
    head_norms = {
        "q_norm": norm(c.heads * c.head_dim), "k_norm": norm(c.key_value_heads * c.head_dim),
    } if c.flag("use_qk_norm") else {}  # fmt: skip
    own = attention(**projections(c, bias, bias), **head_norms)
    return decoder(c, block(self_attn=own, mlp=gated(c), input_layernorm=norm(c.hidden)))


def stablelm(c: Values) -> Node:
    """Layer norms with biases."""
    after = {} if c.flag("use_parallel_residual") else {"post_attention_layernorm": norm(c.hidden, True)}
    layer = block(
        self_attn=attention(**projections(c, c.flag("use_qkv_bias"))),
        mlp=gated(c),
        input_layernorm=norm(c.hidden, True),
        **after,
        dropout=NOTHING,
    )
    return decoder(c, layer, last=norm(c.hidden, True))


def starcoder2(c: Values) -> Node:
    """Layer norms, and an MLP of two layers."""
    bias = c.flag("use_bias")
    mlp = block(c_fc=linear(c.inner, c.hidden, bias), c_proj=linear(c.hidden, c.inner, bias), act=NOTHING)
    layer = block(
        self_attn=attention(**projections(c, bias, bias)),
        mlp=mlp,
        input_layernorm=norm(c.hidden, True),
        post_attention_layernorm=norm(c.hidden, True),
    )
    return decoder(c, layer, last=norm(c.hidden, True))


def mixtral(c: Values) -> Node:
    """Experts in the MLP's place."""
    number = c.size("num_local_experts", "num_experts")
    moe = block(gate=router(number, c.hidden), experts=experts(c, number, c.inner))
    return decoder(c, block(self_attn=attention(**projections(c)), mlp=moe, **norms(c.hidden, *BEFORE)))


def qwen3_moe(c: Values) -> Node:
    """Experts in the MLP's place, but in the layers that are named or lie between."""
    number, bias = c.size("num_experts", "num_local_experts"), c.flag("attention_bias")
    own = attention(**projections(c, bias, bias), **norms(c.head_dim, "q_norm", "k_norm"))
    moe = block(experts=experts(c, number, c.size("moe_intermediate_size")), gate=router(number, c.hidden))
    return decoder(c, *_sparse(c, own, moe))


def olmoe(c: Values) -> Node:
    """Experts in the MLP's place, and norms over all heads of queries or keys at once."""
    number, bias = c.size("num_experts", "num_local_experts"), c.flag("attention_bias")
    own = attention(
        **projections(c, bias, bias),
        q_norm=norm(c.hidden),
        k_norm=norm(c.hidden // c.heads * c.key_value_heads),
    )
    moe = block(gate=router(number, c.hidden), experts=experts(c, number, c.inner))
    return decoder(c, block(self_attn=own, mlp=moe, **norms(c.hidden, *BEFORE)))


def qwen2_moe(c: Values) -> Node:
    """The same with an expert that every token visits."""
    number, shared = c.size("num_experts", "num_local_experts"), c.size("shared_expert_intermediate_size")
    own = attention(**projections(c, c.flag("qkv_bias")))
    moe = block(
        gate=router(number, c.hidden),
        experts=experts(c, number, c.size("moe_intermediate_size")),
        shared_expert=gated(c, shared),
        shared_expert_gate=linear(1, c.hidden),
    )
    return decoder(c, *_sparse(c, own, moe))


def _sparse(c: Values, own: Node, moe: Node) -> list[Node]:
    """Which layers have experts, by `decoder_sparse_step` and `mlp_only_layers`."""
    step, plain = c.size("decoder_sparse_step"), c.get("mlp_only_layers") or ()
    mlps = [moe if at not in plain and (at + 1) % step == 0 else gated(c) for at in range(c.layers)]
    return [block(self_attn=own, mlp=mlp, **norms(c.hidden, *BEFORE)) for mlp in mlps]


def gpt_oss(c: Values) -> Node:
    """Sinks in the attention, and experts with biases."""
    number, inner, bias = c.size("num_local_experts", "num_experts"), c.inner, c.flag("attention_bias")
    held = (number * c.hidden * 2 * inner, number * 2 * inner, number * inner * c.hidden, number * c.hidden)
    held_experts = Node(tensors=held, whole=True, matrices=expert_matrices(c, number, inner))
    moe = block(router=router(number, c.hidden, True), experts=held_experts)
    own = attention((c.heads,), **projections(c, bias, bias))
    return decoder(c, block(self_attn=own, mlp=moe, **norms(c.hidden, *BEFORE)))


def deepseek_v3(c: Values) -> Node:
    """Keys and values from one narrow row (MLA), and experts behind the first layers."""
    layers = [
        block(self_attn=_latent(c), mlp=mlp, **norms(c.hidden, *BEFORE))
        for mlp in (gated(c) if at < c.get("first_k_dense_replace") else _shared(c) for at in range(c.layers))
    ]
    return decoder(c, *layers)


def _latent(c: Values) -> Node:
    bias, rank, rotary = c.flag("attention_bias"), c.size("kv_lora_rank"), c.size("qk_rope_head_dim")
    width, values = c.size("qk_nope_head_dim") + rotary, c.size("v_head_dim")
    if c.get("q_lora_rank") is None:
        queries = {"q_proj": linear(c.heads * width, c.hidden)}
    else:
        narrow = c.size("q_lora_rank")
        queries = {
            "q_a_proj": linear(narrow, c.hidden, bias),
            "q_a_layernorm": norm(narrow),
            "q_b_proj": linear(c.heads * width, narrow),
        }
    return attention(
        **queries,
        kv_a_proj_with_mqa=linear(rank + rotary, c.hidden, bias),
        kv_a_layernorm=norm(rank),
        kv_b_proj=linear(c.heads * (width - rotary + values), rank),
        o_proj=linear(c.hidden, c.heads * values, bias),
    )


def _shared(c: Values) -> Node:
    number, inner = c.size("n_routed_experts", "num_local_experts"), c.size("moe_intermediate_size")
    return block(
        experts=experts(c, number, inner),
        gate=router(number, c.hidden),
        shared_experts=gated(c, inner * c.size("n_shared_experts")),
    )
