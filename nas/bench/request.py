"""What `nas bench kernels` and `nas bench train` are asked for, checked without torch."""

from hypernas.kernels import OPS

TORCH_OPS = ("gather_scatter", "block_diagonal_linear")  # made of PyTorch's own operators
DTYPE_NAMES = ("float32", "bfloat16")
DEVICES = ("cpu", "cuda")


def check_kernels(op: str, tokens: str, dtypes: str, device: str) -> None:
    """Raises ValueError for what can be refused without torch."""
    check_op(op)
    token_counts(tokens)
    for dtype in dtypes.split(","):
        check_dtype(dtype.strip())
    check_device(device)


def check_op(op: str) -> None:
    if op not in (*OPS, *TORCH_OPS):
        raise ValueError(f"--op {op}: wanted one of {', '.join((*OPS, *TORCH_OPS))}")


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPE_NAMES:
        raise ValueError(f"--dtype {dtype}: wanted one of {', '.join(DTYPE_NAMES)}")


def check_device(name: str, *, cuda: bool = True) -> None:
    """Raises ValueError for a device that is not there; `cuda`: whether a CUDA device is, as far as is known."""
    if name not in DEVICES or (name == "cuda" and not cuda):
        raise ValueError(f"--device {name}: wanted cpu, or cuda where a CUDA device is present")


def token_counts(text: str) -> list[int]:
    """The numbers in a list like 4096,65536. Raises ValueError."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"--tokens {text}: wanted whole numbers from 1 on with commas between them, like 4096,65536")
    return [int(part) for part in parts]
