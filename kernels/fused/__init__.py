"""The `triton` back end. `launch` is the host's side, the other modules hold the kernels."""

from gigabatch.kernels.fused.launch import fit, sweep, top, tune

__all__ = ["fit", "sweep", "top", "tune"]
