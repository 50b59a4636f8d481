"""Back end `triton`: `launch` is the host side; the other modules hold the kernels."""

from gigabatch.kernels.fused.launch import specialize, sweep, tune, update_top_k

__all__ = ["specialize", "sweep", "tune", "update_top_k"]
