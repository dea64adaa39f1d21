"""Which slices of the policy's parameters make up the engine's: pure, from names and shapes alone.

The plan is verified before it is used: every element of every engine parameter is written exactly once, the rows that
pad the vocabulary excepted. `layouts.py` says where each parameter goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from veripo_fast.errors import ConfigError
from veripo_fast.weights.layouts import Geometry, Place, Rules
from veripo_fast.weights.parts import Part, Shape, SliceCopy, fits, matrix


def plan(sources: Mapping[str, Shape], targets: Mapping[str, Shape], geometry: Geometry, *, tp: int = 1, rank: int = 0,
         tower: bool = True) -> list[SliceCopy]:
    """The copies that fill the engine parameters of one tensor-parallel rank.

    Args:
        sources: name -> shape of the policy's parameters (`named_parameters()` of the Hugging Face model).
        targets: name -> shape of the engine's, as `rank` of `tp` has them.
        tower: False where the engine runs without a vision tower: neither side's `visual` parameters are looked at.

    Raises:
        ConfigError: a parameter that the family does not have, a shape that does not fit, or an engine parameter that
            the copies fill not at all, in part or twice; each by name.
    """
    rules = Rules(geometry, tp, rank)
    wanted = {name: shape for name, shape in targets.items() if tower or not name.startswith("visual.")}
    copies: list[SliceCopy] = []
    for name, shape in sources.items():
        if _left_out(name, geometry, tower):
            continue
        copies += _checked(rules.place(name, shape), name, wanted)
    _check_covered(copies, wanted, rules)
    return copies


def by_source(copies: Sequence[SliceCopy]) -> dict[str, list[SliceCopy]]:
    """The copies of each parameter of the policy."""
    groups: dict[str, list[SliceCopy]] = {}
    for copy in copies:
        groups.setdefault(copy.source.name, []).append(copy)
    return groups


def _left_out(name: str, geometry: Geometry, tower: bool) -> bool:
    """Whether a parameter has no place in the engine: a frozen tower's, and a head that is the embedding."""
    return (not tower and name.startswith("model.visual.")) or (geometry.tied and name == "lm_head.weight")


# -- verification -----------------------------------------------------------------------------------------------------

def _checked(place: Place, name: str, targets: Mapping[str, Shape]) -> tuple[SliceCopy, ...]:
    """The copies of a place that the engine has, in the size that it must have there."""
    if place.target not in targets:
        raise ConfigError(f"{name}: the engine has no parameter {place.target} that would take it")
    if not fits(targets[place.target], place.size):
        raise ConfigError(f"{name}: the engine's {place.target} must have {place.size[0]} x {place.size[1]} elements "
                          f"on this rank, got {list(targets[place.target])}")
    return place.copies


def _check_covered(copies: Sequence[SliceCopy], targets: Mapping[str, Shape], rules: Rules) -> None:
    parts: dict[str, list[Part]] = {name: [] for name in targets}
    for copy in copies:
        parts[copy.target.name].append(copy.target)
    for name, shape in targets.items():
        rows, width = matrix(shape)
        wanted, filled = (rows - rules.padding(name)) * width, sum(part.numel for part in parts[name])
        for one, other in _pairs(parts[name]):
            if one.overlaps(other):
                raise ConfigError(f"engine parameter {name}: rows {one.rows} and {other.rows} are written twice")
        if filled != wanted:
            raise ConfigError(f"engine parameter {name}: the policy's weights fill {filled:,} of its {wanted:,} "
                              f"elements; {rules.geometry.family} does not have it, or a parameter is missing")


def _pairs(parts: Sequence[Part]) -> Iterator[tuple[Part, Part]]:
    for number, one in enumerate(parts):
        for other in parts[number + 1:]:
            yield one, other
