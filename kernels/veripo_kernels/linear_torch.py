"""The linear ops in plain torch: tiles of the vocabulary against runs of rows, so that logits never exist as a whole.

Products are taken in float32 (float64 stays) whatever the inputs' type, so nothing is rounded between hidden states and
loss. `linear_triton.py` has the same four entry points: `statistics`, `statistics_and_direction`, `gradients` and
`Workspace`.

Letters: T rows, R rows of a run, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

WORKSPACE_BYTES = 1 << 30
"""Of the logits of a run at most: 1,766 rows of a 151,936 vocabulary in float32."""
RUN_BYTES = 1 << 27
"""The same where no completion is longer that must be taken as a whole: as fast from 64 MiB to 1 GiB."""
TILE = 1024
"""Rows of the head taken at once."""
ROWS = 2048
"""With TILE 8 MiB of float32, which stays in a cache; the C library serves blocks of up to 32 MiB from its heap."""


@dataclass(frozen=True)
class Head:
    """A language-model head and how its logits are read: softcap(hidden @ weight.T + bias) / temperature."""

    weight: torch.Tensor
    """[V, D]"""
    bias: torch.Tensor | None = None
    softcap: float | None = None
    temperature: float = 1.0

    @property
    def vocabulary(self) -> int:
        return self.weight.shape[0]


@dataclass(frozen=True)
class Statistics:
    """Of every row's distribution, all [T] in the dtype of the products; logprob of the row's token, entropy in
    nats."""

    logprobs: torch.Tensor
    entropy: torch.Tensor
    logsumexp: torch.Tensor


@dataclass(frozen=True)
class Gradients:
    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    unit: torch.Tensor | None = None
    """[1]: what `weight` counts in; None where that is 1."""


def product_dtype(hidden: torch.Tensor) -> torch.dtype:
    """What products are summed and statistics returned in."""
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _tiles(head: Head, dtype: torch.dtype) -> Iterator[tuple[int, torch.Tensor]]:
    for start in range(0, head.vocabulary, TILE):
        yield start, head.weight[start:start + TILE].to(dtype)


def _buffer(rows: int, head: Head, dtype: torch.dtype) -> torch.Tensor:
    """Room for the logits of a tile, used again and again: fresh blocks would fault in page by page."""
    return torch.empty(min(rows, ROWS), min(head.vocabulary, TILE), dtype=dtype, device=head.weight.device)


def _runs(rows: int) -> Iterator[slice]:
    for start in range(0, rows, ROWS):
        yield slice(start, min(start + ROWS, rows))


def _logits(hidden: torch.Tensor, tile: torch.Tensor, start: int, head: Head, out: torch.Tensor) -> torch.Tensor:
    """Logits [R, tile] over the temperature, in the corner of `out`."""
    logits = torch.mm(hidden, tile.t(), out=out[:len(hidden), :len(tile)])
    if head.bias is not None:
        logits += head.bias[start:start + len(tile)]
    if head.softcap is not None:
        logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits if head.temperature == 1 else logits.div_(head.temperature)


def _own(token_ids: torch.Tensor, start: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows whose token lies in the tile, and its column there."""
    rows = ((token_ids >= start) & (token_ids < start + size)).nonzero()[:, 0]
    return rows, token_ids[rows] - start


class _Online:
    """Running maximum and sums of R rows over tiles; the row's own token is kept out of the sum, so that 1 - p is
    exact."""

    def __init__(self, hidden: torch.Tensor) -> None:
        def filled(value: float) -> torch.Tensor:
            return torch.full((len(hidden),), value, dtype=hidden.dtype, device=hidden.device)

        self.maximum, self.target = filled(-torch.inf), filled(torch.nan)
        self.others, self.moment = filled(0), filled(0)

    def add(self, logits: torch.Tensor, own: tuple[torch.Tensor, torch.Tensor], entropy: bool) -> torch.Tensor:
        """Take a tile in, destroying its logits; returns exp(logits - maximum) with 0 for the row's own token."""
        lowest = torch.finfo(logits.dtype).min
        self.target[own[0]] = logits[own]
        maximum = torch.maximum(self.maximum, logits.amax(1)).clamp(min=lowest)  # finite for a row of -inf so far
        shift = (self.maximum - maximum).clamp(min=lowest)
        decay = shift.exp()
        logits.sub_(maximum[:, None])
        logits[own] = -torch.inf
        exponentials = logits.exp() if entropy else logits.exp_()
        if entropy:
            self.moment = (self.moment + self.others * shift) * decay + logits.mul_(exponentials).nansum(1)
        self.others = self.others * decay + exponentials.sum(1)
        self.maximum = maximum
        return exponentials

    def statistics(self) -> Statistics:
        gap = self.target - self.maximum
        own = gap.exp()
        total = self.others + own
        logsumexp = self.maximum + total.log()
        moment = self.moment + torch.where(own > 0, own * gap, 0)
        likely = -torch.log1p(self.others / own)  # keeps the bits of a log-prob near 0
        return Statistics(torch.where(own > self.others, likely, self.target - logsumexp), total.log() - moment / total,
                          logsumexp)


def statistics(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, *, entropy: bool) -> Statistics:
    """One pass over the head; `entropy` False leaves that field meaningless, though not unwritten. hidden [T, D],
    token_ids int64 [T]."""
    parts, buffer = [], _buffer(len(hidden), head, product_dtype(hidden))
    for run in _runs(len(hidden)):
        rows = hidden[run].to(product_dtype(hidden))
        online = _Online(rows)
        for start, tile in _tiles(head, rows.dtype):
            online.add(_logits(rows, tile, start, head, buffer), _own(token_ids[run], start, len(tile)), entropy)
        parts.append(online.statistics())
    return joined(parts, hidden)


def joined(parts: list[Statistics], hidden: torch.Tensor) -> Statistics:
    """Statistics of all rows from those of their runs, of which there may be none."""
    empty = hidden.new_empty(0, dtype=product_dtype(hidden))
    return Statistics(*(torch.cat([empty, *(getattr(part, name) for part in parts)])
                        for name in ("logprobs", "entropy", "logsumexp")))


def statistics_and_direction(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor
                             ) -> tuple[Statistics, torch.Tensor]:
    """Statistics, and d logprob / d hidden [T, D]: two products in all, for a head without softcap that gets no
    gradient."""
    parts, directions = [], [hidden.new_empty(0, hidden.shape[1], dtype=product_dtype(hidden))]
    buffer = _buffer(len(hidden), head, product_dtype(hidden))
    for run in _runs(len(hidden)):
        rows, ids = hidden[run].to(product_dtype(hidden)), token_ids[run]
        online, pulled = _Online(rows), torch.zeros_like(rows)
        own_pull = torch.zeros_like(rows)
        for start, tile in _tiles(head, rows.dtype):
            own = _own(ids, start, len(tile))
            before = online.maximum
            exponentials = online.add(_logits(rows, tile, start, head, buffer), own, False)
            pulled.mul_((before - online.maximum).exp()[:, None]).addmm_(exponentials, tile)
            own_pull[own[0]] = tile[own[1]]
        found = online.statistics()
        parts.append(found)
        # with the own token kept out of the sums: (1 - p_y) W_y - sum over the others of p W
        scale = (online.maximum - found.logsumexp).exp()[:, None] / head.temperature
        directions.append(scale * (online.others[:, None] * own_pull - pulled))
    return joined(parts, hidden), torch.cat(directions)


def _steepness(logits: torch.Tensor, head: Head) -> torch.Tensor | None:
    """Derivative of the softcap at logits / temperature; None without one."""
    if head.softcap is None:
        return None
    return 1 - (logits * (head.temperature / head.softcap)).square()


def _logit_slopes(shifted: torch.Tensor, slopes: torch.Tensor, entropy_slopes: torch.Tensor | None,
                  entropy: torch.Tensor) -> torch.Tensor:
    """Gradient by logits / temperature without the own token's part: -p (g + e (log p + H)), from log p [R, tile],
    which it overwrites."""
    if entropy_slopes is None:
        return shifted.exp_().mul_(-slopes[:, None])
    p = shifted.exp()
    factor = (shifted + entropy[:, None]).mul_(entropy_slopes[:, None]).add_(slopes[:, None])
    return torch.where(p > 0, -p * factor, 0)


def _own_slopes(logprobs: torch.Tensor, slopes: torch.Tensor, entropy_slopes: torch.Tensor | None, entropy: torch.Tensor
                ) -> torch.Tensor:
    """Gradient by the own token's logit / temperature, all [R]: g (1 - p) - e p (log p + H), with all bits of 1 - p."""
    by_logprob = -slopes * torch.expm1(logprobs)
    if entropy_slopes is None:
        return by_logprob
    p = logprobs.exp()
    return by_logprob - torch.where(p > 0, entropy_slopes * p * (logprobs + entropy), 0)


def live_rows(slopes: torch.Tensor, entropy_slopes: torch.Tensor | None) -> torch.Tensor:
    """The rows that have a slope, int64."""
    return (slopes != 0 if entropy_slopes is None else (slopes != 0) | (entropy_slopes != 0)).nonzero()[:, 0]


def few_rows(slopes: torch.Tensor, entropy_slopes: torch.Tensor | None = None) -> torch.Tensor | None:
    """`live_rows`, or None where leaving the others out saves less than picking these costs."""
    live = live_rows(slopes, entropy_slopes)
    return live if 8 * len(live) <= 7 * len(slopes) else None


def gradients(hidden: torch.Tensor, head: Head, token_ids: torch.Tensor, found: Statistics, slopes: torch.Tensor,
              entropy_slopes: torch.Tensor | None, *, needs: tuple[bool, bool, bool]) -> Gradients:
    """Gradients of sum(slopes * logprobs + entropy_slopes * entropy) by hidden, weight and bias, where `needs` says so.

    Logits are computed again (three products with the two gradients), for the rows with a slope only.
    """
    rows = live_rows(slopes, entropy_slopes)
    if not len(rows):  # the first run of rows writes what is made empty below, and there is none
        return Gradients(*(torch.zeros_like(part) if need and part is not None else None
                           for part, need in zip((hidden, head.weight, head.bias), needs, strict=True)))
    dtype = product_dtype(hidden)
    dhidden = torch.zeros(len(rows), hidden.shape[1], dtype=dtype, device=hidden.device)
    dweight = torch.empty_like(head.weight) if needs[1] else None
    dbias = None if head.bias is None or not needs[2] else torch.empty_like(head.bias)
    ids, logsumexp, entropy, slopes = token_ids[rows], found.logsumexp[rows], found.entropy[rows], slopes[rows]
    entropy_slopes = None if entropy_slopes is None else entropy_slopes[rows]
    own_slopes = _own_slopes(found.logprobs[rows], slopes, entropy_slopes, entropy)
    buffer = _buffer(len(rows), head, dtype)
    inputs = [hidden[rows[run]].to(dtype) for run in _runs(len(rows))]
    for start, tile in _tiles(head, dtype):
        dtile = None if dweight is None else dweight[start:start + len(tile)]
        if dtile is not None and dtile.dtype != dtype:
            dtile = torch.empty_like(tile)
        dbias_tile = torch.zeros(len(tile), dtype=dtype, device=tile.device)
        for run, x in zip(_runs(len(rows)), inputs, strict=True):
            logits = _logits(x, tile, start, head, buffer)
            steepness = _steepness(logits, head)
            own = _own(ids[run], start, len(tile))
            e = None if entropy_slopes is None else entropy_slopes[run]
            dlogits = _logit_slopes(logits.sub_(logsumexp[run, None]), slopes[run], e, entropy[run])
            dlogits[own] = own_slopes[run][own[0]]
            if steepness is not None:
                dlogits *= steepness
            if head.temperature != 1:
                dlogits /= head.temperature
            dbias_tile += dlogits.sum(0) if dbias is not None else 0
            if needs[0]:
                dhidden[run].addmm_(dlogits, tile)
            if dtile is not None:
                dtile.addmm_(dlogits.t(), x, beta=int(run.start != 0))  # with beta 0 what stood there is not read
        if dweight is not None and dtile is not None and dtile.dtype != dweight.dtype:
            dweight[start:start + len(tile)] = dtile
        if dbias is not None:
            dbias[start:start + len(tile)] = dbias_tile
    full = torch.zeros_like(hidden).index_copy_(0, rows, dhidden.to(hidden.dtype)) if needs[0] else None
    return Gradients(full, dweight, dbias)


class Workspace:
    """Logits of one run of rows, kept between `open` (their statistics) and `close` (both gradients): three products.

    Between the two the caller computes the slopes, which may depend on every log-prob of the run. `every_row`: the runs
    leave no row of `hidden` out, so that a GPU need not clear their gradients first.
    """

    step = 0
    """Runs are as long as the workspace allows, the last what is left: their borders show in a sum's last bits."""

    def __init__(self, head: Head, hidden: torch.Tensor, rows: int, *, needs_hidden: bool, needs_weight: bool,
                 every_row: bool) -> None:
        self.head, self.dtype = head, product_dtype(hidden)
        self.logits = torch.empty(rows, head.vocabulary, dtype=self.dtype, device=hidden.device)
        self.dhidden = torch.zeros_like(hidden) if needs_hidden else None  # `close` leaves rows without a slope out
        self.dweight = torch.zeros(head.weight.shape, dtype=self.dtype, device=hidden.device) if needs_weight else None

    @staticmethod
    def rows_for(workspace_bytes: int, head: Head, hidden: torch.Tensor) -> int:
        """Rows whose logits fit."""
        return max(workspace_bytes // (head.vocabulary * product_dtype(hidden).itemsize), 1)

    def open(self, hidden: torch.Tensor, token_ids: torch.Tensor, estimate: torch.Tensor | None, *, entropy: bool
             ) -> Statistics:
        """Statistics of rows [R, D], R at most `rows`; as in `statistics`. `estimate`: a guess of their log-probs,
        which this one does not need."""
        self.x, self.ids = hidden.to(self.dtype), token_ids
        self.kept = self.logits[:len(hidden)]
        online = _Online(self.x)
        for start, tile in _tiles(self.head, self.dtype):
            kept = _logits(self.x, tile, start, self.head, out=self.kept[:, start:start + len(tile)])
            online.add(kept.clone(), _own(token_ids, start, len(tile)), entropy)
        self.found = online.statistics()
        return self.found

    def close(self, slopes: torch.Tensor, entropy_slopes: torch.Tensor | None, rows: torch.Tensor) -> None:
        """Add the gradients for slopes [R]; `rows` int64 [R] says which rows of the whole the run was."""
        found, x, ids, some = self.found, self.x, self.ids, few_rows(slopes, entropy_slopes)
        if some is not None:  # clipped tokens, say
            x, ids, rows, slopes = x[some], ids[some], rows[some], slopes[some]
            entropy_slopes = None if entropy_slopes is None else entropy_slopes[some]
            found = Statistics(found.logprobs[some], found.entropy[some], found.logsumexp[some])
        dx = torch.zeros_like(x)
        own_slopes = _own_slopes(found.logprobs, slopes, entropy_slopes, found.entropy)
        for start, tile in _tiles(self.head, self.dtype):
            kept = self.kept[:, start:start + len(tile)]
            kept = kept if some is None else kept[some]
            own = _own(ids, start, len(tile))
            dlogits = _logit_slopes(kept.sub_(found.logsumexp[:, None]), slopes, entropy_slopes, found.entropy)
            dlogits[own] = own_slopes[own[0]]
            if self.dhidden is not None:
                dx.addmm_(dlogits, tile)
            if self.dweight is not None:
                self.dweight[start:start + len(tile)].addmm_(dlogits.t(), x)
        if self.dhidden is not None:
            self.dhidden[rows] = (dx / self.head.temperature).to(self.dhidden.dtype)

    def add(self, rows: torch.Tensor, hidden: torch.Tensor, token_ids: torch.Tensor, found: Statistics,
            slopes: torch.Tensor, entropy_slopes: torch.Tensor | None) -> None:
        """Add the gradients of rows [R, D], R more than `rows`, whose statistics are known; their logits are computed
        again."""
        more = gradients(hidden, self.head, token_ids, found, slopes, entropy_slopes,
                         needs=(self.dhidden is not None, self.dweight is not None, False))
        if self.dhidden is not None and more.hidden is not None:
            self.dhidden[rows] = more.hidden
        if self.dweight is not None and more.weight is not None:
            self.dweight += more.weight * self.head.temperature

    def finish(self) -> Gradients:
        """dhidden [T, D] in the dtype of hidden, dweight [V, D] in that of the products."""
        if self.dweight is not None and self.head.temperature != 1:
            self.dweight /= self.head.temperature
        return Gradients(self.dhidden, self.dweight, None)
