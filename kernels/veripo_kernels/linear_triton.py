"""The linear ops on a GPU: `jit/linear.py` for everything that touches logits, cuBLAS for the products that follow.

The same entry points as `linear_torch.py`. Inputs of two bytes keep a run's logits in float16 relative to their row,
with float32 sums; the head is turned to float16 slab by slab (exact for every bfloat16 weight of ordinary size) because
both sides of a product must be of one type. float32 inputs keep float32.

Letters: R rows of a run, V vocabulary, D hidden.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from veripo_kernels.jit import linear as jit
from veripo_kernels.linear_torch import Gradients, Head, Statistics, few_rows, joined, live_rows

_ROWS = 8192
"""Rows whose statistics are taken at once: the sums of their tiles are 58 MiB for V = 151,936."""
_SLAB = 16384
"""Rows of the head in float16 at once."""
_CONFIDENT = -3.0
"""The guess of a log-prob where nobody gives one; a row that is off by more than 3 is repaired."""
_NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def _kept_dtype(hidden: torch.Tensor) -> torch.dtype:
    return torch.float32 if hidden.dtype == torch.float32 else torch.float16


def _aligned(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix as the copy engine wants it: rows that are contiguous and start at 16 bytes (else a copy)."""
    short = -matrix.shape[1] % (16 // matrix.itemsize)
    if short:
        return torch.nn.functional.pad(matrix, (0, short))
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % 16 else matrix  # a part of a flat buffer of parameters, say


class _Tiles:
    """`logit_tile` over some rows, its tables and its launch."""

    def __init__(self, hidden: torch.Tensor, head: Head, token_ids: torch.Tensor) -> None:
        if hidden.dtype not in _NAMES:
            raise ValueError(f"hidden must be bfloat16, float16 or float32 for impl 'triton', got {hidden.dtype}")
        self.shape = dict(jit.tile_shape(_NAMES[hidden.dtype]))
        self.launch = {name: self.shape.pop(name) for name in ("num_warps", "num_stages")}
        self.hidden, self.weight, self.head = _aligned(hidden), _aligned(head.weight), head
        self.token_ids = token_ids = token_ids.contiguous()
        self.rows, self.tiles = len(hidden), triton.cdiv(head.vocabulary, self.shape["BV"])
        # one by one: parts of one block start wherever rows put them, and each alignment compiles the kernels again
        self.maximum, self.others, self.moment = (
            hidden.new_empty(self.tiles, self.rows, dtype=torch.float32) for _ in range(3))
        self.target = hidden.new_empty(self.rows, dtype=torch.float32)
        self.reading = (1 / head.temperature, head.softcap or 1.0)
        self.flags = {"HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": head.softcap is not None}
        self.bias = self.target if head.bias is None else head.bias.contiguous()
        if self.rows:
            jit.own_logit[(self.rows,)](
                self.hidden, self.weight, self.bias, token_ids, self.target, head.vocabulary, self.hidden.shape[1],
                self.hidden.stride(0), self.weight.stride(0), *self.reading, **self.flags, BD=1024)

    def run(self, mode: str, with_entropy: bool, *, kept: torch.Tensor | None = None, **rows: torch.Tensor | None
            ) -> None:
        blank = self.target
        given: dict[str, Any] = dict.fromkeys(
            ("offset", "logsumexp", "entropy", "rest", "slopes", "entropy_slopes", "inverse_scale"), blank)
        given |= {name: value for name, value in rows.items() if value is not None}
        if self.rows:
            jit.logit_tile[(triton.cdiv(self.rows, self.shape["BR"]) * self.tiles,)](
                TensorDescriptor.from_tensor(self.hidden, [self.shape["BR"], self.shape["BD"]]),
                TensorDescriptor.from_tensor(self.weight, [self.shape["BV"], self.shape["BD"]]),
                self.bias, self.token_ids, given["offset"], self.maximum, self.others, self.moment,
                blank if kept is None else kept, given["logsumexp"], given["entropy"], given["rest"],
                given["slopes"], given["entropy_slopes"], given["inverse_scale"], self.rows, self.head.vocabulary,
                self.hidden.shape[1], 0 if kept is None else kept.stride(0), *self.reading, MODE=mode,
                ENTROPY=with_entropy, PRECISION="ieee", **self.flags, **self.shape, **self.launch)

    def combine(self, entropy: bool, offset: torch.Tensor | None = None) -> tuple[Statistics, list[torch.Tensor]]:
        """Statistics, and for kept rows settled offset, rest and scale."""
        out = [torch.empty_like(self.target) for _ in range(6 if offset is not None else 3)]
        block = 32
        jit.combine[(triton.cdiv(self.rows, block),)](
            self.maximum, self.others, self.moment, self.target, self.target if offset is None else offset, *out[:3],
            *(out[3:] or [self.target] * 3), self.rows, self.tiles, ENTROPY=entropy, KEEP=offset is not None, BR=block,
            BT=32)
        return Statistics(out[0], out[1], out[2]), out[3:]


def statistics(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, *, entropy: bool) -> Statistics:
    """As in `linear_torch.statistics`."""
    parts: list[Statistics] = []
    for start in range(0, len(hidden), _ROWS):
        tiles = _Tiles(hidden[start:start + _ROWS], head, token_ids[start:start + _ROWS])
        tiles.run(jit.STATISTICS, entropy)
        parts.append(tiles.combine(entropy)[0])
    return joined(parts, hidden)


def statistics_and_direction(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, workspace_bytes: int = 1 << 30
                             ) -> tuple[Statistics, torch.Tensor]:
    """As in `linear_torch.statistics_and_direction`."""
    rows = min(Workspace.rows_for(workspace_bytes, head, hidden), max(len(hidden), 1))
    space = Workspace(head, hidden, rows, needs_hidden=True, needs_weight=False, dhidden_dtype=torch.float32)
    parts: list[Statistics] = []
    for index in torch.arange(len(hidden), device=hidden.device).split(rows):
        parts.append(space.open(hidden[index], token_ids[index], None))
        space.close(torch.ones_like(parts[-1].logprobs), None, index)
    direction = space.finish().hidden
    assert direction is not None
    return joined(parts, hidden), direction


def gradients(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, found: Statistics, slopes: torch.Tensor,
              entropy_slopes: torch.Tensor | None, *, needs: tuple[bool, bool, bool], workspace_bytes: int = 1 << 30
              ) -> Gradients:
    """As in `linear_torch.gradients`."""
    live = live_rows(slopes, entropy_slopes)
    rows = min(Workspace.rows_for(workspace_bytes, head, hidden), max(len(live), 1))
    space = Workspace(head, hidden, rows, needs_hidden=needs[0], needs_weight=needs[1])
    dbias = torch.zeros(head.vocabulary, dtype=torch.float32, device=hidden.device) if needs[2] else None
    for index in live.split(rows):
        tiles = _Tiles(hidden[index], head, token_ids[index])
        slope = slopes[index].float()
        tilt = None if entropy_slopes is None else entropy_slopes[index].float()
        rest = -torch.expm1(found.logprobs[index])
        scale = (slope.abs() * rest if tilt is None else slope.abs() + tilt.abs()).clamp(min=_FAINT)
        kept = space.kept[:len(index)]
        tiles.run(jit.GRADIENT, tilt is not None, kept=kept, logsumexp=found.logsumexp[index],
                  entropy=found.entropy[index], rest=rest, slopes=slope, entropy_slopes=tilt,
                  inverse_scale=_LIFTED / scale)
        space.accumulate(kept, scale / _LIFTED, hidden[index], index)
        if dbias is not None:
            dbias += (scale / _LIFTED / head.temperature) @ kept.float()
    out = space.finish()
    return Gradients(out.hidden, None if out.weight is None else out.weight.to(head.weight.dtype),
                     None if dbias is None or head.bias is None else dbias.to(head.bias.dtype))


_LIFTED = 256.0
"""A kept gradient is at most this (times 1 + log V with an entropy slope): as far from float16's smallest as from its
largest."""
_FAINT = 1e-30
"""Rows whose largest gradient is less are not scaled up any further: 1 / scale stays a float32."""


class Workspace:
    """As `linear_torch.Workspace`."""

    def __init__(self, head: Head, hidden: torch.Tensor, rows: int, *, needs_hidden: bool, needs_weight: bool,
                 dhidden_dtype: torch.dtype | None = None) -> None:
        self.head, self.dtype = head, _kept_dtype(hidden)
        pitch = -(-head.vocabulary // 128) * 128
        self.kept = torch.empty(rows, pitch, dtype=self.dtype, device=hidden.device)[:, :head.vocabulary]
        self.dhidden = torch.zeros_like(hidden, dtype=dhidden_dtype or hidden.dtype) if needs_hidden else None
        self.dweight = torch.zeros_like(head.weight, dtype=torch.float32) if needs_weight else None

    @staticmethod
    def rows_for(workspace_bytes: int, head: Head, hidden: torch.Tensor) -> int:
        """Rows whose kept logits fit, a multiple of 128 where that many do."""
        rows = max(workspace_bytes // (-(-head.vocabulary // 128) * 128 * _kept_dtype(hidden).itemsize), 1)
        return rows // 128 * 128 or rows

    def open(self, hidden: torch.Tensor, token_ids: torch.Tensor, estimate: torch.Tensor | None) -> Statistics:
        """Statistics of rows [R, D]; `estimate` [R] guesses their log-probs (old ones, say)."""
        self.x = hidden
        self.tiles = _Tiles(hidden, self.head, token_ids)
        guess = (torch.full_like(self.tiles.target, _CONFIDENT) if estimate is None
                 else estimate.float().nan_to_num(nan=_CONFIDENT))
        self.offset = self.tiles.target - guess.clamp(-8.0, 0.0) - 8.0
        self.tiles.run(jit.KEEP, True, kept=self.kept[:len(hidden)], offset=self.offset)
        self.found, (self.settled, self.rest, self.scale) = self.tiles.combine(True, self.offset)
        return self.found

    def close(self, slopes: torch.Tensor, entropy_slopes: torch.Tensor | None, rows: torch.Tensor) -> None:
        """Add the gradients for slopes [R]; `rows` int64 [R] says which rows of the whole the run was."""
        tiles, found, slopes = self.tiles, self.found, slopes.float()
        kept, tilt = self.kept[:tiles.rows], entropy_slopes
        scale = self.scale * slopes if tilt is None else (slopes.abs() + tilt.abs()) / _LIFTED
        span = 16
        jit.settle[(tiles.rows, triton.cdiv(tiles.tiles, span))](
            kept, tiles.maximum, tiles.token_ids, self.offset, self.settled, self.rest, found.logprobs, found.entropy,
            found.logsumexp, slopes, slopes if tilt is None else tilt.float(), torch.where(scale == 0, 0, 1 / scale),
            tiles.rows, self.head.vocabulary, tiles.tiles, kept.stride(0), ENTROPY=tilt is not None,
            BV=tiles.shape["BV"], SPAN=span)
        self.accumulate(kept, scale, self.x, rows)

    def accumulate(self, kept: torch.Tensor, scale: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """dhidden[rows] = scale * (kept @ head), dweight += kept.T @ (scale * hidden)."""
        scale = torch.where(scale == 0, 0, scale / self.head.temperature)
        some = few_rows(scale)
        if some is not None:  # clipped tokens, say; their rows of `kept` are left out slab by slab
            scale, hidden, rows = scale[some], hidden[some], rows[some]
        scaled, power = hidden.float() * scale[:, None], 1.0
        if self.dtype == torch.float16:  # an exact factor that brings the largest number to [8192, 16384)
            largest = float(scaled.abs().amax()) if len(scaled) else 0.0
            power = 2.0 ** (13 - math.floor(math.log2(largest))) if 0 < largest < math.inf else 1.0
        scaled = (scaled * power).to(self.dtype)
        product = torch.zeros_like(hidden, dtype=torch.float32)
        for start in range(0, self.head.vocabulary, _SLAB):
            part = kept[:, start:start + _SLAB]
            part = part if some is None else part[some]
            if self.dhidden is not None:
                add_product(product, part, self.head.weight[start:start + _SLAB].to(self.dtype))
            if self.dweight is not None:
                add_product(self.dweight[start:start + _SLAB], part.t(), scaled, alpha=1 / power)
        if self.dhidden is not None:
            self.dhidden[rows] = (scale[:, None] * product).to(self.dhidden.dtype)

    def add(self, rows: torch.Tensor, more: Gradients) -> None:
        """As in `linear_torch.Workspace.add`."""
        if self.dhidden is not None and more.hidden is not None:
            self.dhidden[rows] = more.hidden
        if self.dweight is not None and more.weight is not None:
            self.dweight += more.weight

    def finish(self) -> Gradients:
        """dhidden [T, D] in the dtype of hidden, dweight [V, D] float32."""
        return Gradients(self.dhidden, self.dweight, None)


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, alpha: float = 1.0) -> None:
    """total += alpha * a @ b, total float32, summed in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, alpha=alpha)
    elif total.is_cuda:
        torch.addmm(total, a, b, torch.float32, alpha=alpha, out=total)
    else:  # the interpreter's tests; the CPU has no product of this kind
        total.addmm_(a.float(), b.float(), alpha=alpha)
