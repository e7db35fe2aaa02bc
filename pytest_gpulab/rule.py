"""The sequential sign rule: when do repeats agree enough to decide?

Each repeat votes held, false or neither. At looks of 6, 12, 18 and 24 repeats, 0, 1, 3 and 4 dissents are allowed;
the first look that is met decides, and after the last one the answer is undecided. The claim is about the typical
run (the median), so the rule is exact for any distribution: if the median lies at the threshold a vote is a fair
coin, and `error_probability` counts the coin sequences that the rule would believe.
"""

from __future__ import annotations

from collections.abc import Callable
from math import comb
from typing import Literal, NamedTuple

Outcome = Literal["held", "false", "undecided"]
Vote = Literal[1, 0, -1]
"""1 the claim holds in this repeat, -1 it does not, 0 the calibration's error leaves it open."""


class Look(NamedTuple):
    """After `repeats` votes, at most `dissents` may differ."""

    repeats: int
    dissents: int


LOOKS = (Look(6, 0), Look(12, 1), Look(18, 3), Look(24, 4))
NOTHING_PASSES = -1
"""Dissents allowed where no vote is believed."""


class Result(NamedTuple):
    """What the votes said: `held` and `false` count votes among the `repeats` that were looked at."""

    outcome: Outcome
    repeats: int
    held: int
    false: int


def error_probability(looks: tuple[Look, ...]) -> float:
    """Probability that fair coins are believed in one given direction, exact.

    Walks the distribution of dissents from look to look and takes out what the rule has already believed.
    """
    undecided, believed, seen = {0: 1.0}, 0.0, 0
    for repeats, dissents in looks:
        step = repeats - seen
        spread: dict[int, float] = {}
        for so_far, probability in undecided.items():
            for more in range(step + 1):
                now = so_far + more
                spread[now] = spread.get(now, 0.0) + probability * comb(step, more) / 2**step
        believed += sum(probability for count, probability in spread.items() if count <= dissents)
        undecided = {count: probability for count, probability in spread.items() if count > dissents}
        seen = repeats
    return believed


def looks_for(max_repeats: int, alternatives: int = 1) -> tuple[Look, ...]:
    """The looks up to `max_repeats`, strict enough that any of `alternatives` is wrongly believed as rarely as one.

    Fewer dissents are allowed, look by look, until the error level is split; a look that could not even allow
    none is left out. With none left there is one that nothing passes: the repeats are seen and leave it undecided.
    """
    budget = error_probability(LOOKS) / alternatives
    looks: tuple[Look, ...] = ()
    for repeats, dissents in LOOKS:
        allowed = [Look(repeats, d) for d in range(dissents, -1, -1)]
        fitting = next((look for look in allowed if error_probability((*looks, look)) <= budget), None)
        if repeats <= max_repeats and fitting is not None:
            looks = (*looks, fitting)
    return looks or (Look(max_repeats, NOTHING_PASSES),)


def decide(
    vote: Callable[[int], Vote],
    looks: tuple[Look, ...],
    prepare: Callable[[int], None] = lambda repeats: None,
    looks_against: tuple[Look, ...] | None = None,
) -> Result:
    """Ask for votes 0, 1, 2, ... until a look decides; `prepare` hears before each look how many it needs.

    `looks` decide that the claim holds, `looks_against` (the same, if not given) that it is false. The order of
    asking is fixed: what is already known or cached never changes which votes are looked at.
    """
    for_held, for_false = dict(looks), dict(looks if looks_against is None else looks_against)
    held = false = seen = 0
    for repeats in sorted(for_held | for_false):
        prepare(repeats)
        for index in range(seen, repeats):
            answer = vote(index)
            held += answer == 1
            false += answer == -1
        seen = repeats
        if repeats - held <= for_held.get(repeats, NOTHING_PASSES):
            return Result("held", seen, held, false)
        if repeats - false <= for_false.get(repeats, NOTHING_PASSES):
            return Result("false", seen, held, false)
    return Result("undecided", seen, held, false)


def interval_ranks(repeats: int) -> tuple[int, int]:
    """Ranks (0-based, inclusive) of the order statistics that match the rule at so many repeats.

    The interval lies beyond a threshold exactly when the rule would decide at that look.
    """
    dissents = max((look.dissents for look in LOOKS if look.repeats <= repeats), default=0)
    return dissents, repeats - 1 - dissents
