"""Model FLOPs utilization (Chowdhery et al. 2022, appendix B), for training a frozen base with an adapter."""

from ft_assets.training.memory_plan.model_shape import Shape

# Dense bf16 with fp32 accumulation, TFLOP/s, from NVIDIA's datasheets; the longest matching name counts.
PEAKS = {
    "H200": 989.5, "H100 PCIe": 756.5, "H100": 989.5, "GH200": 989.5, "B200": 2250, "A100": 312, "A30": 165, "A10G": 70, "A10": 125,
    "L40S": 362, "L40": 181, "L4": 121, "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71, "A40": 149.7, "RTX A6000": 154.8,
}  # fmt: skip


def flops_per_token(shape: Shape, full: bool = False) -> float:
    """Return the useful FLOPs a token: forward and the activations' gradients (4 a multiplied parameter); 6 with all
    weights trained. Recomputed layers, attention's scores and the adapter are not counted."""
    return (6.0 if full else 4.0) * shape.multiplied


def peak_flops(gpu: str) -> float | None:
    """Return the GPU's dense bf16 peak in FLOP/s by its name, None if it is not in the table."""
    names = sorted((name for name in PEAKS if name.lower() in gpu.lower()), key=len)
    return PEAKS[names[-1]] * 1e12 if names else None


def mfu_percent(tokens_per_s: float, shape: Shape, gpu: str, full: bool = False) -> float | None:
    """Return the share of the GPU's peak in percent, None if the peak is not known."""
    peak = peak_flops(gpu)
    return round(100 * tokens_per_s * flops_per_token(shape, full) / peak, 2) if peak else None
