"""Model FLOPs utilization (Chowdhery et al. 2022, appendix B) for a frozen base with an adapter."""

from ft_assets.training.memory_plan.model_shape import Shape

# Dense bf16 with fp32 accumulation, in TFLOP/s, from NVIDIA's datasheets. The longest name that
# is part of the GPU's name applies.
PEAKS = {
    "H200": 989.5,
    "H100 PCIe": 756.5,
    "H100": 989.5,
    "GH200": 989.5,
    "B200": 2250,
    "A100": 312,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090": 71,
    "A40": 149.7,
    "RTX A6000": 154.8,
}


def flops_per_token(shape: Shape, full: bool = False) -> float:
    """Return the useful FLOPs per token.

    4 for each multiplied parameter: 2 in the forward pass and 2 for the gradients of the
    activations. 6 if all weights are trained. Recomputed layers, attention scores and the adapter
    are not counted.
    """
    return (6.0 if full else 4.0) * shape.multiplied


def peak_flops(gpu: str) -> float | None:
    """Return the dense bf16 peak of a GPU in FLOP/s by its name, or None if it is not in PEAKS."""
    names = sorted((name for name in PEAKS if name.lower() in gpu.lower()), key=len)
    return PEAKS[names[-1]] * 1e12 if names else None


def mfu_percent(tokens_per_s: float, shape: Shape, gpu: str, full: bool = False) -> float | None:
    """Return the share of the GPU's peak in percent, or None if the peak is not known."""
    peak = peak_flops(gpu)
    return round(100 * tokens_per_s * flops_per_token(shape, full) / peak, 2) if peak else None
