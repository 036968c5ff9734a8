"""Families that are built otherwise: GPT-2's and OPT's kin."""

from topwork.models.structures.parts import (
    NOTHING,
    Node,
    attention,
    block,
    embedding,
    linear,
    listed,
    norm,
    projections,
)  # fmt: skip
from topwork.models.structures.values import INNER, Values


def gpt2(c: Values) -> Node:
    """Queries, keys and values in one layer; learned positions."""
    width, inner = c.hidden, c.size(*INNER, default=4 * c.hidden)
    layer = block(
        ln_1=norm(width, True),
        attn=attention(
            c_attn=linear(3 * width, width, True),
            c_proj=linear(width, width, True),
            attn_dropout=NOTHING,
            resid_dropout=NOTHING,
        ),
        ln_2=norm(width, True),
        mlp=block(c_fc=linear(inner, width, True), c_proj=linear(width, inner, True), act=NOTHING, dropout=NOTHING),
    )
    model = block(
        wte=embedding(c.vocabulary, width),
        wpe=embedding(c.size("n_positions", "max_position_embeddings"), width),
        drop=NOTHING,
        h=listed([layer] * c.layers),
        ln_f=norm(width, True),
    )
    return block(transformer=model, lm_head=linear(c.vocabulary, width))


def gpt_neox(c: Values) -> Node:
    """Pythia's: queries, keys and values in one layer, attention beside the MLP."""
    width, bias = c.hidden, c.flag("attention_bias")
    layer = block(
        input_layernorm=norm(width, True),
        post_attention_layernorm=norm(width, True),
        post_attention_dropout=NOTHING,
        post_mlp_dropout=NOTHING,
        attention=attention(query_key_value=linear(3 * width, width, bias), dense=linear(width, width, bias)),
        mlp=block(dense_h_to_4h=linear(c.inner, width, True), dense_4h_to_h=linear(width, c.inner, True), act=NOTHING),
    )
    model = block(
        embed_in=embedding(c.vocabulary, width),
        emb_dropout=NOTHING,
        layers=listed([layer] * c.layers),
        final_layer_norm=norm(width, True),
        rotary_emb=NOTHING,
    )
    return block(gpt_neox=model, lm_head=linear(c.vocabulary, width))


def opt(c: Values) -> Node:
    """Learned positions from 2 on, an embedding that may be narrower than the model."""
    width, bias, learned = c.hidden, c.flag("enable_bias"), c.flag("layer_norm_elementwise_affine")
    narrow = c.size("word_embed_proj_dim", default=width)
    plain = norm(width, True, learned)
    own = projections(c, bias, bias, "out_proj")
    layer = block(
        self_attn=attention(**{name: own[name] for name in ("k_proj", "v_proj", "q_proj", "out_proj")}),
        activation_fn=NOTHING,
        self_attn_layer_norm=plain,
        fc1=linear(c.inner, width, bias),
        fc2=linear(width, c.inner, bias),
        final_layer_norm=plain,
    )
    between = {"project_out": linear(narrow, width), "project_in": linear(width, narrow)} if narrow != width else {}
    last = (
        {"final_layer_norm": plain} if c.flag("do_layer_norm_before") and not c.flag("_remove_final_layer_norm") else {}
    )
    model = block(
        embed_tokens=embedding(c.vocabulary, narrow),
        embed_positions=embedding(c.size("max_position_embeddings") + 2, width, whole=True),
        **between,
        **last,
        layers=listed([layer] * c.layers),
    )
    return block(model=block(decoder=model), lm_head=linear(c.vocabulary, narrow))


def phi(c: Values) -> Node:
    """Biases everywhere, the head too."""
    own = projections(c, True, True, "dense")
    on_heads = {name: norm(c.head_dim, True) for name in ("q_layernorm", "k_layernorm")}
    layer = block(
        self_attn=attention(**own, **(on_heads if c.flag("qk_layernorm") else {})),
        mlp=block(activation_fn=NOTHING, fc1=linear(c.inner, c.hidden, True), fc2=linear(c.hidden, c.inner, True)),
        input_layernorm=norm(c.hidden, True),
        resid_dropout=NOTHING,
    )
    model = block(
        embed_tokens=embedding(c.vocabulary, c.hidden),
        layers=listed([layer] * c.layers),
        rotary_emb=NOTHING,
        embed_dropout=NOTHING,
        final_layernorm=norm(c.hidden, True),
    )
    return block(model=model, lm_head=linear(c.vocabulary, c.hidden, True))


def bloom(c: Values) -> Node:
    """A norm on the embedding, positions by ALiBi."""
    width = c.hidden
    layer = block(
        input_layernorm=norm(width, True),
        self_attention=attention(
            query_key_value=linear(3 * width, width, True),
            dense=linear(width, width, True),
            attention_dropout=NOTHING,
        ),
        post_attention_layernorm=norm(width, True),
        mlp=block(
            dense_h_to_4h=linear(4 * width, width, True),
            gelu_impl=NOTHING,
            dense_4h_to_h=linear(width, 4 * width, True),
        ),
    )
    model = block(
        word_embeddings=embedding(c.vocabulary, width),
        word_embeddings_layernorm=norm(width, True),
        h=listed([layer] * c.layers),
        ln_f=norm(width, True),
    )
    return block(transformer=model, lm_head=linear(c.vocabulary, width))


def falcon(c: Values) -> Node:
    """One head of keys and values for all, or groups of them in the newer form."""
    width, inner, bias = c.hidden, c.size(*INNER, default=4 * c.hidden), c.flag("bias")
    if c.flag("new_decoder_architecture"):
        outputs = (2 * c.key_value_heads + c.heads) * c.head_dim
    else:
        outputs = width + 2 * c.head_dim if c.flag("multi_query") else 3 * width
    layer = block(
        self_attention=attention(
            query_key_value=linear(outputs, width, bias), dense=linear(width, width, bias), attention_dropout=NOTHING
        ),
        mlp=block(dense_h_to_4h=linear(inner, width, bias), act=NOTHING, dense_4h_to_h=linear(width, inner, bias)),
        **{name: norm(width, True) for name in _falcon_norms(c)},
    )
    model = block(
        word_embeddings=embedding(c.vocabulary, width),
        h=listed([layer] * c.layers),
        ln_f=norm(width, True),
        rotary_emb=NOTHING,
    )
    return block(transformer=model, lm_head=linear(c.vocabulary, width))


def _falcon_norms(c: Values) -> tuple[str, ...]:
    if not c.flag("parallel_attn"):
        return "post_attention_layernorm", "input_layernorm"
    two = c.get("num_ln_in_parallel_attn") or (2 if c.flag("new_decoder_architecture") else 1)
    return ("ln_attn", "ln_mlp") if two == 2 else ("input_layernorm",)
