"""Ops with fast back ends: an op is a module of its own, `hypernas.kernels.swiglu`, definition first."""

# Names alone, so that importing this package brings neither torch nor Triton. The op itself is the constant of the same
# name in its module: `swiglu.SWIGLU`.
OPS = (
    "stream_boundary",
    "stream_chain",
    "stream_mix",
    "stream_read",
    "sinkhorn",
    "cosine_gate",
    "swiglu",
    "rms_norm",
)
