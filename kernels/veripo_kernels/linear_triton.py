"""The linear ops on a GPU: `jit/linear.py` for everything that touches logits, cuBLAS for the products that follow.

The same entry points as `linear_torch.py`. Inputs of two bytes keep a run's logits in float16 relative to their row,
with float32 sums; a bfloat16 head is turned to float16 once (exact for every weight of ordinary size), while the first
run reads it anyway, because both sides of a product must be of one type. float32 inputs keep float32.

Nothing here waits for the device but `gradients`, which looks for the rows with a slope. So rows that get no slope
after all (clipped tokens) stay in their products; `linear_torch.py` leaves them out.

Letters: R rows of a run, V vocabulary, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from triton.tools.tensor_descriptor import TensorDescriptor

from veripo_kernels.jit import linear as jit
from veripo_kernels.jit import linear_sums as sums
from veripo_kernels.linear_torch import Gradients, Head, Statistics, joined, live_rows

_ROWS = 8192
"""Rows whose statistics are taken at once: the sums of their tiles are 58 MiB for V = 151,936."""
WORKSPACE_BYTES = RUN_BYTES = 5 << 28
"""Of the logits of a run: 4,352 rows of a 151,936 vocabulary. 8,192 rows are two runs, and each run after the first
reads and writes the head's gradient once more."""
_SLAB = 51_200
"""Rows of the head that a product sums over; then the sums are added in float32. A matrix unit rounds towards zero."""
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
        self.target, self.peak = (hidden.new_empty(self.rows, dtype=torch.float32) for _ in range(2))
        self.reading = (1 / head.temperature, head.softcap or 1.0)
        self.flags = {"HAS_BIAS": head.bias is not None, "HAS_SOFTCAP": head.softcap is not None}
        self.bias = self.target if head.bias is None else head.bias.contiguous()
        if self.rows:
            jit.own_logit[(self.rows,)](
                self.hidden, self.weight, self.bias, token_ids, self.target, self.peak, head.vocabulary,
                self.hidden.shape[1], self.hidden.stride(0), self.weight.stride(0), *self.reading, **self.flags,
                BD=1024)

    def run(self, mode: str, with_entropy: bool, *, kept: torch.Tensor | None = None,
            narrow: torch.Tensor | None = None, **rows: torch.Tensor | None) -> None:
        """Launch; `narrow` [V, D] takes a copy of the head in its own type."""
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
                given["slopes"], given["entropy_slopes"], given["inverse_scale"], blank if narrow is None else narrow,
                self.rows, self.head.vocabulary, self.hidden.shape[1], 0 if kept is None else kept.stride(0),
                *self.reading, MODE=mode, ENTROPY=with_entropy, NARROW=narrow is not None, PRECISION="ieee",
                **self.flags, **self.shape, **self.launch)

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


def statistics_and_direction(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor,
                             workspace_bytes: int = WORKSPACE_BYTES) -> tuple[Statistics, torch.Tensor]:
    """As in `linear_torch.statistics_and_direction`."""
    rows = _share(len(hidden), Workspace.rows_for(workspace_bytes, head, hidden))
    space = Workspace(head, hidden, rows, needs_hidden=True, needs_weight=False, every_row=True,
                      dhidden_dtype=torch.float32)
    parts: list[Statistics] = []
    for index in torch.arange(len(hidden), device=hidden.device).split(rows):
        parts.append(space.open(hidden[index], token_ids[index], None, entropy=False))
        space.close(torch.ones_like(parts[-1].logprobs), None, index)
    direction = space.finish().hidden
    assert direction is not None
    return joined(parts, hidden), direction


def gradients(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, found: Statistics, slopes: torch.Tensor,
              entropy_slopes: torch.Tensor | None, *, needs: tuple[bool, bool, bool],
              workspace_bytes: int = WORKSPACE_BYTES) -> Gradients:
    """As in `linear_torch.gradients`."""
    live = live_rows(slopes, entropy_slopes)
    rows = _share(len(live), Workspace.rows_for(workspace_bytes, head, hidden))
    space = Workspace(head, hidden, rows, needs_hidden=needs[0], needs_weight=needs[1],
                      every_row=len(live) == len(hidden))
    dbias = torch.zeros(head.vocabulary, dtype=torch.float32, device=hidden.device) if needs[2] else None
    for index in live.split(rows):
        part = Statistics(found.logprobs[index], found.entropy[index], found.logsumexp[index])
        kept, scale = space.again(index, hidden[index], token_ids[index], part, slopes[index],
                                  None if entropy_slopes is None else entropy_slopes[index])
        if dbias is not None:
            dbias += (scale / head.temperature) @ kept.float()
    out = space.finish()
    weight = None
    if out.weight is not None and out.unit is not None:  # one pass: the unit, and the rounding to the head's type
        weight = torch.mul(out.weight, out.unit, out=torch.empty_like(out.weight, dtype=head.weight.dtype))
    return Gradients(out.hidden, weight, None if dbias is None or head.bias is None else dbias.to(head.bias.dtype))


def _share(rows: int, limit: int) -> int:
    """Rows of a run where `limit` fit, so that no more runs than needed are of about one length."""
    runs = max(triton.cdiv(rows, limit), 1)
    return max(min(triton.cdiv(triton.cdiv(rows, runs), Workspace.step) * Workspace.step, limit, rows), 1)


_LIFTED = 256.0
"""A kept gradient is at most this (times 1 + log V with an entropy slope): as far from float16's smallest as from its
largest."""
_FAINT = 1e-30
"""Rows whose largest gradient is less are not scaled up any further: 1 / scale stays a float32."""


class Workspace:
    """As `linear_torch.Workspace`."""

    step = 128
    """Runs are made of about one length, in multiples of the rows of a tile: a last short one would leave most
    processors idle."""

    def __init__(self, head: Head, hidden: torch.Tensor, rows: int, *, needs_hidden: bool, needs_weight: bool,
                 every_row: bool, dhidden_dtype: torch.dtype | None = None) -> None:
        self.head, self.dtype = head, _kept_dtype(hidden)
        pitch = -(-head.vocabulary // 128) * 128
        self.kept = torch.empty(rows, pitch, dtype=self.dtype, device=hidden.device)[:, :head.vocabulary]
        fresh = torch.empty_like if every_row else torch.zeros_like
        self.dhidden = (fresh(hidden, dtype=dhidden_dtype or hidden.dtype, memory_format=torch.contiguous_format)
                        if needs_hidden else None)
        self.dweight = (torch.empty(head.weight.shape, dtype=torch.float32, device=hidden.device) if needs_weight
                        else None)
        self.unit = torch.ones(3, dtype=torch.float32, device=hidden.device)
        self.begun = False
        self.factor = head.weight if head.weight.dtype == self.dtype else None
        """The head [V, D] as the products with what is kept take it; a run makes it."""

    @staticmethod
    def rows_for(workspace_bytes: int, head: Head, hidden: torch.Tensor) -> int:
        """Rows whose kept logits fit, a multiple of 128 where that many do."""
        rows = max(workspace_bytes // (-(-head.vocabulary // 128) * 128 * _kept_dtype(hidden).itemsize), 1)
        return rows // 128 * 128 or rows

    def _run(self, mode: str, with_entropy: bool, **arguments: torch.Tensor | None) -> None:
        """Launch the tiles; the first launch turns the head to float16 on the way, where that is wanted."""
        narrow = None
        if self.factor is None and self.dhidden is not None and self.tiles.rows:
            narrow = self.tiles.weight.new_empty(self.head.vocabulary, self.tiles.weight.shape[1], dtype=self.dtype)
            self.factor = narrow[:, :self.head.weight.shape[1]]
        self.tiles.run(mode, with_entropy, narrow=narrow, **arguments)

    def open(self, hidden: torch.Tensor, token_ids: torch.Tensor, estimate: torch.Tensor | None, *, entropy: bool
             ) -> Statistics:
        """Statistics of rows [R, D]; `estimate` [R] guesses their log-probs (old ones, say)."""
        self.x = hidden
        self.tiles = _Tiles(hidden, self.head, token_ids)
        guess = (torch.full_like(self.tiles.target, _CONFIDENT) if estimate is None
                 else estimate.float().nan_to_num(nan=_CONFIDENT))
        self.offset = self.tiles.target - guess.clamp(-8.0, 0.0) - 8.0
        self._run(jit.KEEP, entropy, kept=self.kept[:len(hidden)], offset=self.offset)
        self.found, (self.settled, self.rest, self.scale) = self.tiles.combine(entropy, self.offset)
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
        self._accumulate(kept, scale, self.x, rows)

    def again(self, rows: torch.Tensor, hidden: torch.Tensor, token_ids: torch.Tensor, found: Statistics,
              slopes: torch.Tensor, entropy_slopes: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradients of rows [R, D] whose statistics are known; returns them by logit as kept [R, V], and the
        scale [R] of these."""
        self.tiles = _Tiles(hidden, self.head, token_ids)
        slope, tilt = slopes.float(), None if entropy_slopes is None else entropy_slopes.float()
        rest = -torch.expm1(found.logprobs)
        scale = (slope.abs() * rest if tilt is None else slope.abs() + tilt.abs()).clamp(min=_FAINT)
        kept = self.kept[:len(hidden)]
        self._run(jit.GRADIENT, tilt is not None, kept=kept, logsumexp=found.logsumexp, entropy=found.entropy,
                  rest=rest, slopes=slope, entropy_slopes=tilt, inverse_scale=_LIFTED / scale)
        self._accumulate(kept, scale / _LIFTED, hidden, rows)
        return kept, scale / _LIFTED

    def add(self, rows: torch.Tensor, hidden: torch.Tensor, token_ids: torch.Tensor, found: Statistics,
            slopes: torch.Tensor, entropy_slopes: torch.Tensor | None) -> None:
        """As in `linear_torch.Workspace.add`: as many rows at once as the workspace has room for."""
        step = _share(len(rows), len(self.kept))
        for start in range(0, len(rows), step):
            some = slice(start, start + step)
            part = Statistics(found.logprobs[some], found.entropy[some], found.logsumexp[some])
            self.again(rows[some], hidden[some], token_ids[some], part, slopes[some],
                       None if entropy_slopes is None else entropy_slopes[some])

    def _accumulate(self, kept: torch.Tensor, scale: torch.Tensor, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """dhidden[rows] = scale * (kept @ head), dweight += kept.T @ (scale * hidden)."""
        if not self.tiles.rows:
            return
        scale, width = torch.where(scale == 0, 0, scale / self.head.temperature), hidden.shape[1]
        if self.dhidden is not None and self.factor is not None:
            product = torch.empty(hidden.shape, dtype=torch.float32, device=hidden.device)
            for start in range(0, self.head.vocabulary, _SLAB):
                add_product(product, kept[:, start:start + _SLAB], self.factor[start:start + _SLAB], add=start > 0)
            sums.spread_rows[(len(rows),)](product, scale, rows, self.dhidden, width, BD=1024)
        if self.dweight is None:
            return
        if self.dtype == torch.float16:
            sums.choose_unit[(1,)](scale, self.tiles.peak, self.unit, len(rows), FIRST=not self.begun, BR=1024)
            if self.begun:
                count = self.dweight.numel()
                sums.change_unit[(triton.cdiv(count, 4096),)](self.dweight, self.unit, count, BLOCK=4096)
        scaled = torch.empty(hidden.shape, dtype=self.dtype, device=hidden.device)
        sums.scale_rows[(len(rows),)](hidden, scale, self.unit, scaled, width, hidden.stride(0), BD=1024)
        add_product(self.dweight, kept.t(), scaled, add=self.begun)
        self.begun = True

    def finish(self) -> Gradients:
        """dhidden [T, D] in the dtype of hidden, dweight [V, D] float32 in `unit` [1]."""
        if self.dweight is not None and not self.begun:
            self.dweight.zero_()
        return Gradients(self.dhidden, self.dweight, None, self.unit[:1])


def add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *, add: bool) -> None:
    """total = a @ b, added to what is there where `add` says so; total float32, summed in float32."""
    if a.dtype == torch.float32:
        total.addmm_(a, b, beta=int(add))  # with beta 0 what stood there is not read
    elif total.is_cuda:
        torch.addmm(total, a, b, torch.float32, beta=int(add), out=total)
    else:  # the interpreter's tests; the CPU has no product of this kind
        total.addmm_(a.float(), b.float(), beta=int(add))
