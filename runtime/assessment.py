"""Which conditions are present in what was observed, since when, and in words that an operator can use."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isinf
from typing import NamedTuple

from chatvla_edge.runtime.conditions import TABLE, Condition, Context, Unit
from chatvla_edge.runtime.modes import MS
from chatvla_edge.runtime.observations import Observations


@dataclass(frozen=True)
class Reason:
    """A condition that is present."""

    condition: Condition
    subject: str
    amount: float
    allowed: float
    words: str
    since_ns: int

    @property
    def key(self) -> tuple[str, str]:
        """Which condition, of what."""
        return self.condition.name, self.subject

    def sentence(self) -> str:
        """What was found, what was expected, what to do."""
        of = f" ({self.subject})" if self.subject else ""
        said = f": {self.words}" if self.words else ""
        if self.condition.unit is Unit.TIME:
            found = "never seen" if isinf(self.amount) else f"{self.amount / MS:.0f} ms"
            said = f": {found}, allowed {self.allowed / MS:.0f} ms"
        elif self.condition.unit is Unit.LENGTH:
            said = f": {self.amount:.3f} rad or m, allowed {self.allowed:g}"
        return f"{self.condition.name}{of}{said}. {self.condition.remedy}"


class Watched(NamedTuple):
    """An amount that exceeded its budget and has not been forgiven yet."""

    reason: Reason
    over_ns: int  # when it last did
    present: bool


Watch = Mapping[tuple[str, str], Watched]


def assess(seen: Observations, context: Context, before: Watch) -> tuple[Watch, tuple[Reason, ...]]:
    """Hold ``seen`` against the table: what to remember for the next call, and what is present, most severe first."""
    watch: dict[tuple[str, str], Watched] = {}
    now_ns = context.now_ns
    for condition in reversed(TABLE):
        if context.mode not in condition.judged_in or (context.errand and not condition.of_errands):
            continue
        for finding in condition.sense(seen, context):
            allowed = condition.allowed(finding.period_ns)
            was = before.get((condition.name, finding.subject))
            if not finding.amount <= allowed:  # so written, NaN is too much
                since_ns = was.reason.since_ns if was else now_ns
                reason = Reason(condition, finding.subject, finding.amount, allowed, finding.words, since_ns)
                watch[reason.key] = Watched(reason, now_ns, now_ns - since_ns >= condition.lasting_ns)
            elif was and was.present and now_ns - was.over_ns < condition.settle_ns:
                watch[was.reason.key] = was
    return watch, tuple(watched.reason for watched in watch.values() if watched.present)
