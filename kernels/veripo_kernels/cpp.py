"""Loads the compiled ops (csrc/) and gives them to torch: shapes for compiling, and one function each.

Letters: T rows, V vocabulary. Definition: reference.gather_logprobs and reference.entropy. No autograd is attached
here; `veripo_kernels.gather` does that. Logits may have any row stride, but must be contiguous along V. The ops on
video frames are defined by `frames_torch.py`, those on slices by `slices_torch.py`; `frames.py` and `slices.py` have
their arguments and check them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from veripo_kernels.once import once

LIBRARY = Path(__file__).with_name("_cpp.so")
CUDA_LIBRARY = Path(__file__).with_name("_cuda.so")
CUDA_CAPABILITY = (9, 0)
OPS = ("gather_logprobs_forward", "gather_logprobs_backward", "gather_logprobs_fused", "isa", "resize_frames",
       "frames_to_patches", "resize_frames_out", "frames_to_patches_out", "planes_to_frames", "planes_to_patches",
       "copy_slices")


@once
def missing() -> str | None:
    """Why the compiled op cannot be used on the CPU; None when it can. The first call loads it.

    Raises:
        RuntimeError: VERIPO_ISA forces a clone that there is not; see `isa`.
    """
    if not LIBRARY.exists():
        return "the extension was not built (no C++ compiler or no torch when it was installed)"
    reason = _load(LIBRARY)
    if reason is None and not all(hasattr(torch.ops.veripo_cpp, name) for name in OPS):
        reason = f"{LIBRARY.name} is older than this file: install again (pip install --no-build-isolation)"
    if reason is None:
        isa()
        _register_fakes()
    return reason


@once
def missing_cuda() -> str | None:
    """Why its CUDA kernels cannot be used; None when they can. The first call loads them."""
    if missing() is not None:
        return missing()
    if not CUDA_LIBRARY.exists():
        return "the CUDA kernels were not built (no nvcc or no CUDA build of torch when it was installed)"
    reason = _load(CUDA_LIBRARY)
    if reason is None and not torch.cuda.is_available():
        return "torch finds no GPU"
    if reason is None and torch.cuda.get_device_capability() != CUDA_CAPABILITY:
        return f"they are compiled for compute capability 9.0, this GPU has {torch.cuda.get_device_capability()}"
    return reason


def forward(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
            ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """log p at token_ids, entropy of p in nats, and log sum exp(logits / temperature), where p is the softmax.

    Args:
        logits: [T, V] float32, bfloat16 or float16.
        token_ids: int64 [T]; an id outside of 0 to V - 1 gives NaN.

    Returns:
        logprobs, entropy, lse: float32 [T] each. Rows of -inf alone give NaN.

    Raises:
        RuntimeError: wrong dtype, shape, device or temperature; names the argument.
    """
    return torch.ops.veripo_cpp.gather_logprobs_forward(logits, token_ids, temperature)


def backward(logits: torch.Tensor, token_ids: torch.Tensor, lse: torch.Tensor, entropy: torch.Tensor,
             dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: float) -> torch.Tensor:
    """(dlogprobs * (onehot - p) - dentropy * p * (log p + entropy)) / temperature, the gradient by logits.

    Args:
        logits, token_ids, temperature: as in `forward`; an id outside of 0 to V - 1 has no onehot.
        lse, entropy: what `forward` returned; dlogprobs, dentropy: gradients by its results. float32 [T], any stride.

    Returns:
        [T, V] in the dtype of logits, contiguous; 0 where p underflows.
    """
    return torch.ops.veripo_cpp.gather_logprobs_backward(logits, token_ids, lse, entropy, dlogprobs, dentropy,
                                                         temperature)


def fused(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, temperature: float
          ) -> tuple[torch.Tensor, torch.Tensor]:
    """Log p at token_ids, and the gradient of sum(coefficient * logprobs) by logits, from one read of logits.

    Args:
        logits, token_ids, temperature: as in `forward`. coefficient: float32 [T].

    Returns:
        logprobs float32 [T], and dlogits [T, V] in the dtype of logits.
    """
    return torch.ops.veripo_cpp.gather_logprobs_fused(logits, token_ids, coefficient, temperature)


def resize_frames(frames: torch.Tensor, height: int, width: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """`frames.resize_frames`, unchecked but for what keeps memory safe."""
    if out is None:
        return torch.ops.veripo_cpp.resize_frames(frames, height, width)
    torch.ops.veripo_cpp.resize_frames_out(frames, out)
    return out


def frames_to_patches(frames: torch.Tensor, height: int, width: int, mean: Sequence[float], std: Sequence[float],
                      patch_size: int, merge_size: int, temporal_patch_size: int, dtype: torch.dtype,
                      out: torch.Tensor | None = None) -> torch.Tensor:
    """`frames.frames_to_patches`."""
    sizes = (frames, height, width, mean, std, patch_size, merge_size, temporal_patch_size)
    if out is None:
        return torch.ops.veripo_cpp.frames_to_patches(*sizes, dtype)
    torch.ops.veripo_cpp.frames_to_patches_out(*sizes, out)
    return out


def planes_to_frames(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, height: int, width: int, matrix: Sequence[int]
                     ) -> torch.Tensor:
    """`frames.planes_to_frames`, with the integers of `frames_torch.yuv_matrix`."""
    return torch.ops.veripo_cpp.planes_to_frames(y, u, v, height, width, matrix)


def planes_to_patches(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, height: int, width: int, matrix: Sequence[int],
                      mean: Sequence[float], std: Sequence[float], patch_size: int, merge_size: int,
                      temporal_patch_size: int, dtype: torch.dtype) -> torch.Tensor:
    """`frames.planes_to_patches`, with the integers of `frames_torch.yuv_matrix`."""
    return torch.ops.veripo_cpp.planes_to_patches(y, u, v, height, width, matrix, mean, std, patch_size, merge_size,
                                                  temporal_patch_size, dtype)


def copy_slices(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
    """`slices.copy_slices`, unchecked but for shapes, strides and dtypes: float32, bfloat16 or float16 that stay so, or
    are rounded from float32."""
    return torch.ops.veripo_cpp.copy_slices(list(sources), list(targets))


def isa() -> str:
    """Which clone of the CPU loops runs: avx512, avx2 or baseline (also what other processors than x86-64 have).

    The widest that the processor has, or the one that the environment variable VERIPO_ISA names; read once.

    Raises:
        RuntimeError: VERIPO_ISA is none of the three, or one that the processor lacks.
    """
    return torch.ops.veripo_cpp.isa()


def _load(library: Path) -> str | None:
    try:
        torch.ops.load_library(library)
    except OSError as error:
        return f"{library.name} cannot be loaded: {error.__cause__ or error}"
    return None


def _register_fakes() -> None:
    def vector(logits: torch.Tensor) -> torch.Tensor:
        return logits.new_empty(logits.shape[0], dtype=torch.float32)

    @torch.library.register_fake("veripo_cpp::gather_logprobs_forward")
    def _(logits: torch.Tensor, token_ids: torch.Tensor, temperature: float
          ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return vector(logits), vector(logits), vector(logits)

    @torch.library.register_fake("veripo_cpp::gather_logprobs_backward")
    def _(logits: torch.Tensor, token_ids: torch.Tensor, lse: torch.Tensor, entropy: torch.Tensor,
          dlogprobs: torch.Tensor, dentropy: torch.Tensor, temperature: float) -> torch.Tensor:
        return logits.new_empty(logits.shape)

    @torch.library.register_fake("veripo_cpp::gather_logprobs_fused")
    def _(logits: torch.Tensor, token_ids: torch.Tensor, coefficient: torch.Tensor, temperature: float
          ) -> tuple[torch.Tensor, torch.Tensor]:
        return vector(logits), logits.new_empty(logits.shape)

    def patches(like: torch.Tensor, height: int, width: int, patch: int, temporal: int, dtype: torch.dtype
                ) -> torch.Tensor:
        times = (like.shape[0] + temporal - 1) // temporal
        return like.new_empty((times * (height // patch) * (width // patch), 3 * temporal * patch**2), dtype=dtype)

    @torch.library.register_fake("veripo_cpp::resize_frames")
    def _(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return frames.new_empty((frames.shape[0], 3, height, width))

    @torch.library.register_fake("veripo_cpp::frames_to_patches")
    def _(frames: torch.Tensor, height: int, width: int, mean: Sequence[float], std: Sequence[float], patch_size: int,
          merge_size: int, temporal_patch_size: int, dtype: torch.dtype) -> torch.Tensor:
        return patches(frames, height, width, patch_size, temporal_patch_size, dtype)

    @torch.library.register_fake("veripo_cpp::resize_frames_out")
    def _(frames: torch.Tensor, out: torch.Tensor) -> None:
        return None

    @torch.library.register_fake("veripo_cpp::frames_to_patches_out")
    def _(frames: torch.Tensor, height: int, width: int, mean: Sequence[float], std: Sequence[float], patch_size: int,
          merge_size: int, temporal_patch_size: int, out: torch.Tensor) -> None:
        return None

    @torch.library.register_fake("veripo_cpp::planes_to_frames")
    def _(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, height: int, width: int, matrix: Sequence[int]
          ) -> torch.Tensor:
        return y.new_empty((y.shape[0], 3, height, width))

    @torch.library.register_fake("veripo_cpp::planes_to_patches")
    def _(y: torch.Tensor, u: torch.Tensor, v: torch.Tensor, height: int, width: int, matrix: Sequence[int],
          mean: Sequence[float], std: Sequence[float], patch_size: int, merge_size: int, temporal_patch_size: int,
          dtype: torch.dtype) -> torch.Tensor:
        return patches(y, height, width, patch_size, temporal_patch_size, dtype)

    @torch.library.register_fake("veripo_cpp::copy_slices")
    def _(sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> torch.Tensor:
        return targets[0].new_empty(2, dtype=torch.int64)
