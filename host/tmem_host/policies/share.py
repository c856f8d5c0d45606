"""Dividing bytes between claimants that have a floor and a cap each.

Both divisions are "water filling": one level rises until everything is given away, each claimant following
it between its floor and its cap. `by_weight` gives all there is; `in_proportion` only shrinks what was asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Claim:
    """How fast a claimant's share rises with the level, and its limits in bytes."""

    rate: int
    floor_bytes: int = 0
    cap_bytes: int | None = None

    def at(self, level: float) -> int:
        """Its share at a level, within its limits."""
        share = int(self.rate * level)
        if self.cap_bytes is not None:
            share = min(share, self.cap_bytes)
        return max(share, self.floor_bytes)


def by_weight(available_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """Divide `available_bytes` in proportion to the rates; what a cap leaves over goes to the others.

    The sum never exceeds `available_bytes`. Floors hold while their sum fits; when it does not, the floors
    themselves are scaled down in proportion. A floor above a cap counts as the cap.
    """
    claims = [_sane(claim) for claim in claims]
    floors_bytes = sum(claim.floor_bytes for claim in claims)
    if floors_bytes >= available_bytes:
        return [claim.floor_bytes * available_bytes // max(1, floors_bytes) for claim in claims]
    return _fill(available_bytes, claims, top_level=float(available_bytes))


def in_proportion(available_bytes: int, claims: Sequence[Claim]) -> list[int]:
    """What each claimant asked for (its rate, in bytes), all scaled down alike if the sum does not fit.

    Limits and sum hold as in `by_weight`.
    """
    claims = [_sane(claim) for claim in claims]
    asked = [claim.at(1.0) for claim in claims]
    if sum(asked) <= available_bytes:
        return asked
    if sum(claim.floor_bytes for claim in claims) >= available_bytes:
        return by_weight(available_bytes, claims)
    return _fill(available_bytes, claims, top_level=1.0)


def _sane(claim: Claim) -> Claim:
    if claim.cap_bytes is not None and claim.floor_bytes > claim.cap_bytes:
        return Claim(claim.rate, claim.cap_bytes, claim.cap_bytes)
    return claim


def _fill(available_bytes: int, claims: Sequence[Claim], top_level: float) -> list[int]:
    """The shares at the highest level at or below `top_level` whose sum fits; the sum at level 0 must fit."""
    low, high = 0.0, top_level
    if sum(claim.at(high) for claim in claims) <= available_bytes:
        return [claim.at(high) for claim in claims]
    # A double has 53 bits of mantissa; 128 halvings find the level to the last of them.
    for _ in range(128):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if sum(claim.at(middle) for claim in claims) <= available_bytes:
            low = middle
        else:
            high = middle
    return [claim.at(low) for claim in claims]
