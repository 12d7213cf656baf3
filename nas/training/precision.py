"""In what a device's matrix products are computed, by its kind, "cpu" or "cuda": told without torch."""

from hypernas.kernels import processor


def rounds_products(kind: str) -> bool:
    """Whether products are in bfloat16: on a GPU and on a CPU with matrix units. On any other CPU they are in float32.

    There bfloat16 gains a third at best and costs reproducibility between machine types.
    """
    return kind == "cuda" or processor.has_amx()


def precision(kind: str) -> str:
    """What a training on such a device computes in, in words: rows of two precisions differ in their last digits."""
    if not rounds_products(kind):
        return "float32"
    return f"bfloat16 products: {'cuda' if kind == 'cuda' else 'amx'}"
