"""How much memory training takes, computed before weights are loaded: a formula over the model's shape. No torch.

What is counted, in bytes: weights (2 a parameter in bf16; NF4 with double quantization: half a byte, one byte of scale for 64
parameters, and 4 bytes for 256 scales: Dettmers et al. 2023), the adapter (fp32 weights, gradients and two moments: 16 a
parameter), what is trained beside it, what each layer keeps for its backward pass, what is alive only for a moment, and the head.
docs/training.md holds the table of predicted and measured peaks.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ft_assets.config.training import TARGETS
from ft_assets.training.memory_plan.model_shape import Shape

NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
PLAIN_SCALES = 4 / 64  # linears.py keeps the scales dequantized
CONTEXT_BYTES = (
    0.55e9  # CUDA's context and cuBLAS' workspaces: outside what torch's allocator counts
)
HEAD_TILE = 4096 * 32768  # TRL's fused head: positions x vocabulary at once
GATHERED_LAYERS = 3  # of a divided base: the layer that computes, and the next one as it arrives and as it is laid out
SLACK = 1.03  # what the allocator reserves and cannot use


@dataclass(frozen=True)
class Setup:
    """What the peak depends on besides the shape.

    `tokens`: of the largest micro-batch, padding included. `kept_layers`: how many layers keep their activations; the others
    keep their input and are computed again. `trained`: parameters of the adapter and beside it (0: all weights are trained). `bytes`: of a number
    (2: bf16, 4: fp32). `whole`: numbers of the modules trained whole beside the adapter, the largest first; `rows`: of the token
    embeddings trained alone. `fused`: linears of training/linears.py. `liger`: its kernels for norms and SwiGLU. `shards`: over how
    many ranks the weights of the layers are divided; what is outside of them, and the adapter, every rank holds.
    """

    tokens: int
    kept_layers: int
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
        """Return a setup whose trained parameters follow from rank and targets, the modules trained whole and the number of
        token embeddings trained alone."""
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
    """Return the parts of the peak in bytes, and `total`, which is what torch's allocator reserves."""
    kept = setup.kept_layers * layer_bytes(shape, setup)
    inputs = (shape.layers - setup.kept_layers) * shape.hidden * _stream(setup)
    again = layer_bytes(shape, setup) if setup.kept_layers < shape.layers else 0.0
    parts = {
        "weights": weight_bytes(shape, setup),
        "gathered_layers": gathered_bytes(shape, setup),
        "adapter": 16.0 * setup.trained + (4.0 * setup.trained if setup.reference else 0.0),
        "beside_adapter": _beside(shape, setup),
        "activations": setup.tokens * (kept + inputs),
        "recomputed_layer": setup.tokens * again,
        "dora_weights": _dora_weights(shape, setup),
        "temporary": max(_temporary(shape, setup), _head(shape, setup)),
        "ends": setup.tokens
        * shape.hidden
        * setup.bytes
        * 3,  # embeddings, last norm, their gradient
    }
    return {**parts, "total": SLACK * sum(parts.values())}


def weight_bytes(shape: Shape, setup: Setup) -> float:
    """Return what the weights take; trained whole, also their fp32 gradients and two moments, and autocast's 16-bit copies."""
    if setup.full:
        return (16.0 + (setup.bytes if setup.bytes < 4 else 0)) * shape.parameters
    linear = (NF4_BYTES + (PLAIN_SCALES if setup.fused else 0)) if setup.quantized else setup.bytes
    return linear * shape.linear_parameters / setup.shards + setup.bytes * shape.other_parameters


def gathered_bytes(shape: Shape, setup: Setup) -> float:
    """Return what the layers take that are whole for the moment, where the weights are divided."""
    if setup.shards == 1:
        return 0.0
    return min(GATHERED_LAYERS, shape.layers) * setup.bytes * shape.linear_parameters / shape.layers


def _beside(shape: Shape, setup: Setup) -> float:
    """Return what modules trained whole and token embeddings trained alone take besides weights, gradients and moments.

    Autocast's 16-bit copies, and the gradient of the largest module, which is made before it is added to that of the
    micro-batch before. Of token rows: PEFT's TrainableTokensLayer copies the embeddings with the rows in place in each pass,
    or makes the gradient of that copy; a tied head keeps such a copy until its backward pass and then has a gradient besides.
    """
    copies = setup.bytes * sum(setup.whole) if setup.bytes < 4 else 0
    gradient = 4.0 * setup.whole[0] if setup.whole else 0.0
    replaced = (
        (2 if shape.tied else 1) * setup.bytes * shape.vocabulary * shape.hidden
        if setup.rows
        else 0
    )
    return copies + gradient + replaced


def _dora_weights(shape: Shape, setup: Setup) -> float:
    """Return what PEFT's DoraLinearLayer makes of the targets' weights.

    Where dropout is on, it multiplies the dropped input with the frozen weight once more, dense and cast, and autograd keeps
    that matrix for the layers that keep their activations. For the norm, the largest target is there for a moment in fp32 as
    base, update, scaled update and sum, beside an identity of its input's size.
    """
    if not setup.dora:
        return 0.0
    sizes = shape.targets(setup.targets)
    dense = setup.bytes * sum(read * made for read, made in sizes) if setup.dropout else 0
    layers = min(shape.layers, setup.kept_layers + 1)  # one is computed again
    return layers * dense + max(4.0 * (4 * read * made + read * read) for read, made in sizes)


def _stream(setup: Setup) -> int:
    """Return the bytes of a number of the residual: PEFT's DoRA on an NF4 base returns fp32, on others what the base returns."""
    return 4 if setup.dora and setup.quantized else setup.bytes


def layer_bytes(shape: Shape, setup: Setup) -> float:
    """Return what one layer keeps for its backward pass, a token.

    The residual before both norms, the normed input where a target reads it, q, k, v and the attention's output, gate and
    up, and SwiGLU's product where down is a target. A frozen matrix keeps nothing.
    """
    wide, unit = shape.intermediate, setup.bytes
    targets = set(setup.targets)
    inputs = {
        "attention": (shape.hidden, {"q_proj", "k_proj", "v_proj"}),
        "output": (shape.query, {"o_proj"}),
        "mlp": (shape.hidden, {"gate_proj", "up_proj"}),
        "down": (wide, {"down_proj"}),
    }
    numbers = 2 * shape.query + 2 * shape.keys + 2 * wide
    extra = (
        2 * shape.hidden * _stream(setup) + 4.0 * shape.heads
    )  # the residual; the kernel's log-sum-exp, fp32
    # PEFT's layer has its own copy of the input where it is dropped (and a mask), or cast to the adapter's fp32 and back by autocast
    own = (
        not setup.fused and not setup.full and (setup.dropout or setup.dora or not setup.quantized)
    )
    for name, (size, readers) in inputs.items():
        used = len(readers & targets) if not setup.full else len(readers)
        if used and own:
            extra += used * size * (unit + (1.0 if setup.dropout else 0.0))
        elif used and name != "output":  # the attention keeps o's input already
            numbers += size
    if setup.dora:  # DoraLinearLayer scales two products and keeps both; without dropout one of them is the base's own
        extra += (
            unit
            * (2 if setup.dropout else 1)
            * sum(made for _, made in shape.targets(setup.targets))
        )
    if not setup.liger:
        extra += 2 * 4.0 * shape.hidden  # the norms' fp32 copies
        numbers += wide  # silu(gate)
    return numbers * unit + extra


def _temporary(shape: Shape, setup: Setup) -> float:
    """Return what the widest moment of a layer's backward pass holds: SwiGLU's gradients, and matrices dequantized."""
    numbers = (2 if setup.liger else 4) * shape.intermediate + 2 * shape.hidden
    matrix = shape.hidden * shape.intermediate * setup.bytes if setup.quantized else 0
    dora = (
        3 * 4.0 * max(made for _, made in shape.targets(setup.targets)) if setup.dora else 0.0
    )  # its scaled products, fp32
    return setup.tokens * (numbers * setup.bytes + dora) + 2 * matrix


def _head(shape: Shape, setup: Setup) -> float:
    tile = min(HEAD_TILE, setup.tokens * shape.vocabulary)
    return tile * 4.0 + tile * setup.bytes + setup.tokens * shape.hidden * (setup.bytes + 4.0)
