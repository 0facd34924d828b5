"""How much memory training takes, computed before weights are loaded: a formula over the shape.

No torch. What is counted, in bytes:

- weights: 2 per parameter in bf16, 1 in FP8. NF4 with double quantization takes half a byte, one
  byte of scale for 64 parameters, and 4 bytes for 256 scales (Dettmers et al. 2023).
- the adapter: fp32 weights, gradients and two moments, 16 per parameter.
- other trained parameters beside the adapter.
- what each layer keeps for its backward pass.
- temporary tensors, and the head.

docs/training.md has the table of predicted and measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ft_assets.config.training import TARGETS
from ft_assets.training.memory_plan.model_shape import Shape

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
PLAIN_SCALES = 4 / 64  # linears.py keeps the scales dequantized
PROBE_TOKENS = 256  # of a row of the probe before training in FP8 (training/fp8_probe.py)
CONTEXT_BYTES = (
    0.55e9  # CUDA's context and cuBLAS' workspaces; torch's allocator does not count them
)
HEAD_TILE = 4096 * 32768  # TRL's fused head: positions x vocabulary at once
# Of a sharded base: the layer that computes, and the next one as it arrives and as it is laid out.
GATHERED_LAYERS = 3
CHUNK = 64  # tokens at once of transformers' gated delta rule in plain torch
SLACK = 1.03  # what the allocator reserves and cannot use


@dataclass(frozen=True)
class Kept:
    """Measured bytes per token that a layer keeps for its backward pass (layer_memory.py).

    mean: over all layers. largest: of the layer that keeps most.
    """

    mean: float
    largest: float


@dataclass(frozen=True)
class Setup:
    """Everything that the peak depends on besides the shape.

    tokens: of the largest micro-batch, padding included.
    checkpointed_layers: layers that keep only their input and recompute their activations.
    trained: parameters of the adapter and beside it; 0 if all weights are trained.
    bytes: of a number (2: bf16, 4: fp32).
    whole: parameters of each module trained fully beside the adapter, the largest first.
    rows: parameters of the token embeddings that are trained alone.
    fused: the linears of training/linears.py are used.
    liger: liger's kernels for norms and SwiGLU are used.
    shards: the number of ranks that the weights of the layers are sharded over. Every rank holds
      the other weights and the adapter in whole.
    fp8: products with the base are in FP8 (training/fp8.py).
    fla: flash-linear-attention computes the gated delta rule.
    kept: measured on the loaded model, in place of this module's formulas for a layer.
    """

    tokens: int
    checkpointed_layers: int
    trained: int
    targets: tuple[str, ...]
    quantized: bool = False
    full: bool = False
    bytes: int = 2
    dropout: bool = False
    fused: bool = True
    liger: bool = True
    reference: bool = False  # DPO: a second, frozen adapter
    shards: int = 1
    dora: bool = False
    whole: tuple[int, ...] = ()
    rows: int = 0
    fp8: bool = False
    fla: bool = False
    kept: Kept | None = None

    @classmethod
    def of(
        cls,
        shape: Shape,
        r: int,
        targets: str | list[str],
        modules: Sequence[str] = (),
        tokens_alone: int = 0,
        **given: object,
    ) -> "Setup":
        """Make a setup and count its trained parameters.

        They follow from rank and targets, the `modules` trained fully, and the number of token
        embeddings trained alone (`tokens_alone`).
        """
        names = TARGETS[targets] if isinstance(targets, str) else tuple(targets)
        whole = tuple(sorted(shape.module_parameters(modules).values(), reverse=True))
        adapter = shape.adapter_parameters(r, targets, bool(given.get("dora")))
        rows = tokens_alone * shape.hidden
        return cls(
            trained=adapter + sum(whole) + rows,
            targets=tuple(names),
            whole=whole,
            rows=rows,
            **given,  # type: ignore[arg-type]
        )


def predict(shape: Shape, setup: Setup) -> dict[str, float]:
    """Return the parts of the peak in bytes, and `total`, which torch's allocator reserves."""
    kept = setup.kept or _kept(shape, setup)
    stored = (shape.layers - setup.checkpointed_layers) * kept.mean
    inputs = setup.checkpointed_layers * shape.hidden * _residual_bytes(setup)
    recomputed = kept.largest if setup.checkpointed_layers else 0.0
    ends = setup.tokens * shape.hidden * setup.bytes * 3  # embeddings, last norm, their gradient
    parts = {
        "weights": weight_bytes(shape, setup),
        "gathered_layers": gathered_bytes(shape, setup),
        "adapter": 16.0 * setup.trained + (4.0 * setup.trained if setup.reference else 0.0),
        "beside_adapter": _beside(shape, setup),
        "activations": setup.tokens * (stored + inputs),
        "recomputed_layer": setup.tokens * recomputed,
        "dora_weights": _dora_weights(shape, setup),
        "temporary": max(_temporary(shape, setup), _head(shape, setup)),
        "ends": ends,
    }
    return {**parts, "total": SLACK * max(sum(parts.values()), _before_fp8(shape, setup))}


def _before_fp8(shape: Shape, setup: Setup) -> float:
    """Return the peak of the probe in the compute dtype, before 16-bit weights become FP8."""
    if not setup.fp8 or setup.quantized:
        return 0.0
    before = replace(setup, fp8=False, tokens=PROBE_TOKENS, checkpointed_layers=0)
    activations = PROBE_TOKENS * shape.layers * _kept(shape, before).mean
    logits = PROBE_TOKENS * shape.vocabulary * (2 * setup.bytes + 2 * 4.0)
    return weight_bytes(shape, before) + activations + logits + _temporary(shape, before)


def weight_bytes(shape: Shape, setup: Setup) -> float:
    """Return the bytes of the weights.

    With full fine-tuning they include fp32 gradients, two moments, and autocast's 16-bit copies.
    """
    if setup.full:
        return (16.0 + (setup.bytes if setup.bytes < 4 else 0)) * shape.parameters
    experts = shape.experts.parameters if shape.experts else 0
    linear = 1.0 if setup.fp8 else setup.bytes
    if setup.quantized:
        linear = NF4_BYTES + (PLAIN_SCALES if setup.fused else 0)
    sharded = linear * shape.linear_parameters + setup.bytes * experts
    return sharded / setup.shards + setup.bytes * shape.other_parameters


def gathered_bytes(shape: Shape, setup: Setup) -> float:
    """Return the bytes of the layers that are temporarily gathered, if the weights are sharded."""
    if setup.shards == 1:
        return 0.0
    experts = shape.experts.parameters if shape.experts else 0
    layer = (shape.linear_parameters + experts) / shape.layers
    return min(GATHERED_LAYERS, shape.layers) * setup.bytes * layer


def _beside(shape: Shape, setup: Setup) -> float:
    """Return the other bytes of fully trained modules and of token embeddings trained alone.

    Other than weights, gradients and moments: autocast's 16-bit copies, and the gradient of the
    largest module, which is made before it is added to that of the micro-batch before.

    Token rows: PEFT's TrainableTokensLayer copies the embeddings with the rows in place in each
    pass, or makes the gradient of that copy. A tied head keeps such a copy until its backward pass
    and then has a gradient as well.
    """
    copies = setup.bytes * sum(setup.whole) if setup.bytes < 4 else 0
    gradient = 4.0 * setup.whole[0] if setup.whole else 0.0
    if not setup.rows:
        return copies + gradient
    embeddings = setup.bytes * shape.vocabulary * shape.hidden
    return copies + gradient + (2 if shape.tied else 1) * embeddings


def _dora_weights(shape: Shape, setup: Setup) -> float:
    """Return the bytes of the matrices that PEFT's DoraLinearLayer makes of the targets' weights.

    With dropout it multiplies the dropped input with the frozen weight once more, dense and cast.
    Autograd keeps that matrix for each layer that is not checkpointed. For the norm, the largest
    target exists temporarily in fp32 as base, update, scaled update and sum, beside an identity
    matrix of its input's size.
    """
    if not setup.dora:
        return 0.0
    sizes = shape.targets(setup.targets)
    dense = setup.bytes * sum(read * made for read, made in sizes) if setup.dropout else 0
    # One of the checkpointed layers is recomputed.
    layers = min(shape.layers, shape.layers - setup.checkpointed_layers + 1)
    return layers * dense + max(4.0 * (4 * read * made + read * read) for read, made in sizes)


def _residual_bytes(setup: Setup) -> int:
    """Return the bytes of a number of the residual.

    PEFT's DoRA returns fp32 on an NF4 base, and the base's own dtype on others.
    """
    return 4 if setup.dora and setup.quantized else setup.bytes


def _kept(shape: Shape, setup: Setup) -> Kept:
    """Return what the layers of a shape keep, by the formulas.

    A layer of the gated delta rule has its MLP in common with a layer of attention.
    """
    attention = layer_bytes(shape, setup) + _expert_bytes(shape, setup)
    if not shape.recurrence:
        return Kept(attention, attention)
    heads = setup.bytes * (2 * shape.query + 2 * shape.keys) + 4.0 * shape.heads
    recurrent = attention - heads + _recurrence_bytes(shape, setup)
    share = shape.recurrence.layers / shape.layers
    mean = share * recurrent + (1 - share) * attention
    return Kept(mean, max(recurrent, attention))


def _recurrence_bytes(shape: Shape, setup: Setup) -> float:
    """Return the bytes per token that the gated delta rule of a layer keeps.

    Both ways: the convolution's input and output, the gate, and the gated norm in fp32. Plain torch
    computes in fp32, with the keys repeated for each value head: 8 tensors of keys, 3 of values, 5
    of a chunk's pairs, and the state of each chunk. Of flash-linear-attention, its inputs and the
    pairs in 16 bits are counted, which is derived from its code and not measured.
    """
    assert shape.recurrence
    rule = shape.recurrence
    common = setup.bytes * (2 * (2 * rule.key + rule.value) + rule.value) + 4.0 * 3 * rule.value
    if setup.fla:
        return common + setup.bytes * (2 * rule.key + 2 * rule.value + CHUNK * rule.heads)
    keys = rule.heads * rule.key_dim
    state = rule.key_dim * rule.value / CHUNK
    return common + 4.0 * (8 * keys + 3 * rule.value + 5 * CHUNK * rule.heads + state)


def _expert_bytes(shape: Shape, setup: Setup) -> float:
    """Return the bytes per token that the experts of a layer keep.

    For each expert of a token: gate and up, silu(gate), and the output that the router scales.
    """
    if not shape.experts:
        return 0.0
    return setup.bytes * shape.experts.per_token * (3 * shape.experts.width + shape.hidden)


def layer_bytes(shape: Shape, setup: Setup) -> float:
    """Return the bytes per token that one layer of attention keeps for its backward pass.

    The residual before both norms, the normed input where a target reads it, q, k, v and the
    attention's output, gate and up, and SwiGLU's product if down is a target. A frozen matrix keeps
    nothing.
    """
    wide = shape.intermediate
    unit = setup.bytes
    targets = set(setup.targets)
    inputs = {
        "attention": (shape.hidden, {"q_proj", "k_proj", "v_proj"}),
        "output": (shape.query, {"o_proj"}),
        "mlp": (shape.hidden, {"gate_proj", "up_proj"}),
        "down": (wide, {"down_proj"}),
    }
    numbers = 2 * shape.query + 2 * shape.keys + 2 * wide
    # The residual; the attention kernel's log-sum-exp in fp32.
    extra = 2 * shape.hidden * _residual_bytes(setup) + 4.0 * shape.heads
    # PEFT's layer has its own copy of the input if it is dropped out (and a mask), or if autocast
    # casts it to the adapter's fp32 and back.
    own = (
        not setup.fused and not setup.full and (setup.dropout or setup.dora or not setup.quantized)
    )
    for name, (size, readers) in inputs.items():
        used = len(readers & targets) if not setup.full else len(readers)
        if used and own:
            extra += used * size * (unit + (1.0 if setup.dropout else 0.0))
        elif used and name != "output":  # the attention keeps o's input already
            numbers += size
    if setup.dora:
        # DoraLinearLayer scales two products and keeps both; without dropout one is the base's own.
        made = sum(size for _, size in shape.targets(setup.targets))
        extra += unit * (2 if setup.dropout else 1) * made
    if not setup.liger:
        extra += 2 * 4.0 * shape.hidden  # the norms' fp32 copies
        numbers += wide  # silu(gate)
    return numbers * unit + extra


def _temporary(shape: Shape, setup: Setup) -> float:
    """Return the bytes of the temporary tensors of a layer's backward pass at its widest point.

    They are SwiGLU's gradients and dequantized matrices. FP8: also the quantized gradients, and the
    matrices transposed.
    """
    numbers = (2 if setup.liger else 4) * shape.intermediate + 2 * shape.hidden
    if shape.experts:
        numbers += shape.experts.per_token * (3 * shape.experts.width + 2 * shape.hidden)
    matrix = shape.hidden * shape.intermediate * setup.bytes if setup.quantized else 0
    quantized = 0
    if setup.fp8:
        matrix = shape.hidden * shape.intermediate
        quantized = 2 * shape.intermediate
    scaled = 0.0  # DoRA's scaled products, fp32
    if setup.dora:
        scaled = 3 * 4.0 * max(made for _, made in shape.targets(setup.targets))
    return setup.tokens * (numbers * setup.bytes + quantized + scaled) + 2 * matrix


def _head(shape: Shape, setup: Setup) -> float:
    tile = min(HEAD_TILE, setup.tokens * shape.vocabulary)
    return tile * 4.0 + tile * setup.bytes + setup.tokens * shape.hidden * (setup.bytes + 4.0)
