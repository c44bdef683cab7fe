"""Slow references of the two network families: loops over tokens, heads and experts, written from the papers' formulas.

They share no code with the package and none of its tricks: one token's row, one head, one expert at a time. All of them
compute in the dtype of their inputs, so the same code gives float32 and float64 results. Parameters come as a mapping
of original checkpoint keys; ``prefix`` says which module is meant.

Shape suffixes: B images, T tokens of one image, D hidden size, A head dimension, E experts, K experts per token,
C channels, H height, W width.
"""

import math

import torch

ROPE_BASE = 10000.0
ADA_NORM_EPS = 1e-6  # the norms without parameters that adaLN modulates
QK_NORM_EPS = 1e-5


# ---- elementary pieces, each on one vector -------------------------------------------------------------------------


def silu(x):
    return x / (1 + torch.exp(-x))


def linear(params, prefix, x_D):
    bias = params.get(f"{prefix}.bias")
    y = (params[f"{prefix}.weight"] * x_D).sum(dim=1)
    return y if bias is None else y + bias


def standardise(x_D, eps):
    mean = x_D.sum() / len(x_D)
    variance = ((x_D - mean) ** 2).sum() / len(x_D)
    return (x_D - mean) / torch.sqrt(variance + eps)


def swiglu(params, prefix, x_D):
    gate = linear(params, f"{prefix}.gate_proj", x_D)
    up = linear(params, f"{prefix}.up_proj", x_D)
    return linear(params, f"{prefix}.down_proj", silu(gate) * up)


def dense_mlp(params, prefix, x_D):
    """DSMoE's even blocks."""
    return linear(params, f"{prefix}.fc2", silu(linear(params, f"{prefix}.fc1", x_D)))


# ---- routing of one token: {expert id: weight} ----------------------------------------------------------------------


def largest(values, count):
    """Indices of the ``count`` largest numbers; among equals the lowest index wins (any choice would be valid)."""
    return sorted(range(len(values)), key=lambda index: (-values[index], index))[:count]


def dsmoe_scores(x_D, weight_ED, bias_E, *, n_group=1, topk_group=1):
    """(scores, choice) per expert: the weights come from the first, the decision from the second."""
    scores = [float(1 / (1 + torch.exp(-(row_D * x_D).sum()))) for row_D in weight_ED]
    choice = [score + float(bias) for score, bias in zip(scores, bias_E, strict=True)]
    size = len(choice) // n_group
    kept_groups = largest(group_scores(choice, n_group), topk_group)
    # A dropped group's choices become 0, not -inf: with a negative bias they can still win.
    return scores, [value if expert // size in kept_groups else 0.0 for expert, value in enumerate(choice)]


def group_scores(choice, n_group):
    """The sum of each group's two best experts."""
    size = len(choice) // n_group
    return [sum(sorted(choice[group * size : (group + 1) * size])[-2:]) for group in range(n_group)]


def dsmoe_weights(scores, chosen, scale):
    total = sum(scores[expert] for expert in chosen) + 1e-20
    return {expert: scores[expert] / total * scale for expert in chosen}


def dsmoe_route(x_D, weight_ED, bias_E, *, k, n_group=1, topk_group=1, scale=1.0):
    """Sigmoid scores; bias and groups decide who is chosen, the unbiased scores decide the weights."""
    scores, choice = dsmoe_scores(x_D, weight_ED, bias_E, n_group=n_group, topk_group=topk_group)
    return dsmoe_weights(scores, largest(choice, k), scale)


def dit_moe_probabilities(x_D, weight_ED):
    logits = [float((row_D * x_D).sum()) for row_D in weight_ED]
    top = max(logits)
    exponentials = [math.exp(logit - top) for logit in logits]
    return [value / sum(exponentials) for value in exponentials]


def dit_moe_route(x_D, weight_ED, *, k):
    """Softmax over all experts; the chosen ones keep their raw probabilities."""
    probabilities = dit_moe_probabilities(x_D, weight_ED)
    return {expert: probabilities[expert] for expert in largest(probabilities, k)}


def moe_layer(params, prefix, experts_prefix, x_TD, route):
    """``route(x_D)`` gives one token's {expert: weight}; the shared expert, or else the input, is added unweighted."""
    has_shared = f"{prefix}.shared_experts.up_proj.weight" in params
    rows = []
    for x_D in x_TD:
        y_D = swiglu(params, f"{prefix}.shared_experts", x_D) if has_shared else x_D
        for expert, weight in route(x_D).items():
            y_D = y_D + weight * swiglu(params, f"{experts_prefix}.{expert}", x_D)
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD.clone()


# ---- attention of one image -----------------------------------------------------------------------------------------


def rotate_2d(x_A, row, column):
    """2-D RoPE of one head's vector: the first half turns with the row, the second with the column.

    Inside a half, element i and element i + half/2 form the pair that turns by position * base^(-i / (half/2)).
    """
    half = len(x_A) // 2
    quarter = half // 2
    out = x_A.clone()
    for start, position in ((0, row), (half, column)):
        for i in range(quarter):
            angle = position * ROPE_BASE ** (-i / quarter)
            cos, sin = math.cos(angle), math.sin(angle)
            first, second = x_A[start + i], x_A[start + quarter + i]
            out[start + i] = first * cos - second * sin
            out[start + quarter + i] = second * cos + first * sin
    return out


def qk_norm(params, name, x_A):
    """Affine LayerNorm of one head's vector, then rounding to fp16."""
    normed = standardise(x_A, QK_NORM_EPS) * params[f"{name}.weight"] + params[f"{name}.bias"]
    return normed.to(torch.float16).to(x_A.dtype)


def attention(params, prefix, x_TD, num_heads, *, rope=False, normed=False):
    """Softmax attention; ``normed`` selects the XL/G layout (other names, q and k normalised and rounded)."""
    qkv_name, out_name = ("Wqkv", "out_proj") if normed else ("qkv", "proj")
    num_tokens, width = x_TD.shape
    size, side = width // num_heads, math.isqrt(num_tokens)
    qkv = [linear(params, f"{prefix}.{qkv_name}", x_D) for x_D in x_TD]
    heads = []
    for head in range(num_heads):
        columns = slice(head * size, (head + 1) * size)
        q, k, v = ([row[part * width : (part + 1) * width][columns] for row in qkv] for part in range(3))
        if normed:
            q = [qk_norm(params, f"{prefix}.q_norm", row) for row in q]
            k = [qk_norm(params, f"{prefix}.k_norm", row) for row in k]
        if rope:
            q = [rotate_2d(row, token // side, token % side) for token, row in enumerate(q)]
            k = [rotate_2d(row, token // side, token % side) for token, row in enumerate(k)]
        outputs = []
        for token in range(num_tokens):
            scores = torch.stack([(q[token] * key).sum() / math.sqrt(size) for key in k])
            weights = torch.exp(scores - scores.max())
            weights = weights / weights.sum()
            outputs.append(sum(weight * value for weight, value in zip(weights, v, strict=True)))
        heads.append(outputs)
    merged = [torch.cat([outputs[token] for outputs in heads]) for token in range(num_tokens)]
    return torch.stack([linear(params, f"{prefix}.{out_name}", row) for row in merged])


# ---- blocks and the way in and out ----------------------------------------------------------------------------------


def modulated(x_TD, shift_D, scale_D):
    return torch.stack([standardise(x_D, ADA_NORM_EPS) * (1 + scale_D) + shift_D for x_D in x_TD])


def block(params, prefix, x_TD, c_D, attend, feed_forward):
    """adaLN-Zero block of one image: ``attend`` and ``feed_forward`` map [T, D] -> [T, D]."""
    six = linear(params, f"{prefix}.adaLN_modulation.1", silu(c_D))
    shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = six.split(len(c_D))
    x_TD = x_TD + gate_a * attend(modulated(x_TD, shift_a, scale_a))
    return x_TD + gate_f * feed_forward(modulated(x_TD, shift_f, scale_f))


def patch_embed(params, x_CHW, patch):
    """Token (row, column) is the patch's dot product with every filter."""
    weight, bias = params["x_embedder.proj.weight"], params["x_embedder.proj.bias"]
    _, height, width = x_CHW.shape
    tokens = []
    for row in range(0, height, patch):
        for column in range(0, width, patch):
            window = x_CHW[:, row : row + patch, column : column + patch]
            tokens.append((weight * window).sum(dim=(1, 2, 3)) + bias)
    return torch.stack(tokens)


def sincos_position(row, column, width):
    """The fixed embedding of one token: first half for its column, second for its row, each [sines, cosines]."""
    quarter = width // 4
    vector = []
    for position in (column, row):
        angles = [position * 10000 ** (-i / quarter) for i in range(quarter)]
        vector += [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]
    return vector


def unpatchify(x_TV, patch, channels):
    """A token's vector holds its patch as (row, column, channel), channel fastest."""
    side = math.isqrt(len(x_TV))
    image = torch.zeros(channels, side * patch, side * patch, dtype=x_TV.dtype)
    for token, vector in enumerate(x_TV):
        for p in range(patch):
            for q in range(patch):
                for c in range(channels):
                    row, column = token // side * patch + p, token % side * patch + q
                    image[c, row, column] = vector[(p * patch + q) * channels + c]
    return image


def timestep_waves(t):
    """256 sinusoids of the raw time: all cosines, then all sines."""
    angles = [t * 10000 ** (-i / 128) for i in range(128)]
    return [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]


def timestep_embedding(params, t):
    """The sinusoids through Linear-SiLU-Linear."""
    waves = torch.tensor(timestep_waves(t), dtype=params["t_embedder.mlp.0.weight"].dtype)
    return linear(params, "t_embedder.mlp.2", silu(linear(params, "t_embedder.mlp.0", waves)))


def final_layer(params, x_TD, c_D):
    shift_D, scale_D = linear(params, "final_layer.adaLN_modulation.1", silu(c_D)).split(len(c_D))
    return torch.stack([linear(params, "final_layer.linear", x_D) for x_D in modulated(x_TD, shift_D, scale_D)])


# ---- whole networks -------------------------------------------------------------------------------------------------


def dsmoe_forward(params, x_CHW, t, y, *, num_heads, patch=2, **routing):
    """One image through DSMoE: MoE wherever the block has a router; ``routing`` as in :func:`dsmoe_route`."""
    x_TD = patch_embed(params, x_CHW, patch)
    c_D = timestep_embedding(params, t) + params["y_embedder.embedding_table.weight"][y]
    for index in _blocks(params):
        name = f"blocks.{index}.mlp"

        def feed_forward(h_TD, name=name):
            if f"{name}.gate.weight" not in params:
                return torch.stack([dense_mlp(params, name, h_D) for h_D in h_TD])
            gate = (params[f"{name}.gate.weight"], params[f"{name}.gate.e_score_correction_bias"])
            return moe_layer(
                params, name, f"{name}.experts.blocks", h_TD, lambda h_D: dsmoe_route(h_D, *gate, **routing)
            )

        def attend(h_TD, index=index):
            return attention(params, f"blocks.{index}.attn", h_TD, num_heads, rope=True)

        x_TD = block(params, f"blocks.{index}", x_TD, c_D, attend, feed_forward)
    return unpatchify(final_layer(params, x_TD, c_D), patch, _out_channels(params, patch))


def dit_moe_forward(params, x_CHW, t, y, *, num_heads, k, patch=2):
    """One image through DiT-MoE; the keys tell which of the two attention layouts it has."""
    normed = "blocks.0.attn.Wqkv.weight" in params
    x_TD = patch_embed(params, x_CHW, patch) + params["pos_embed"][0]
    c_D = timestep_embedding(params, t) + params["y_embedder.embedding_table.weight"][y]
    for index in _blocks(params):
        name = f"blocks.{index}.moe"

        def feed_forward(h_TD, name=name):
            weight = params[f"{name}.gate.weight"]
            return moe_layer(params, name, f"{name}.experts", h_TD, lambda h_D: dit_moe_route(h_D, weight, k=k))

        def attend(h_TD, index=index):
            return attention(params, f"blocks.{index}.attn", h_TD, num_heads, normed=normed)

        x_TD = block(params, f"blocks.{index}", x_TD, c_D, attend, feed_forward)
    return unpatchify(final_layer(params, x_TD, c_D), patch, _out_channels(params, patch))


def _blocks(params):
    return range(1 + max(int(key.split(".")[1]) for key in params if key.startswith("blocks.")))


def _out_channels(params, patch):
    return len(params["final_layer.linear.bias"]) // patch**2
