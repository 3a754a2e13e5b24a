"""Statistics of measured samples, wherever they come from: timed here, by a servo, or by an external program.

Samples lie in rounds. A round is a stretch in which everything that is compared met the same machine, so two sample
sets are compared round by round, and never by pooling: a stall that hits round 7 hits both sides of pair 7.

Intervals are order statistics: the true median lies between the k-th smallest and the k-th largest pair with a
probability that follows from the binomial distribution alone. No shape is assumed, and no resampling seed is needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import erfc, exp, lgamma, log, sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import BaseModel, ConfigDict

CONFIDENCE = 0.95

# Fewer pairs than this (six: 97 %; five: 94 %; four: 88 %) cannot tell a difference from luck.
LEAST_CONFIDENCE = 0.9

# Where a distribution is kept for its curve: every percent, and the tail.
CURVE = (*(hundredth / 100 for hundredth in range(100)), 0.995, 0.999, 0.9995, 0.9999, 1.0)


@dataclass(frozen=True)
class Samples:
    """What was measured of one thing: `rounds` of one sample or more each, in `unit` (times are in seconds, "s").

    A round without a sample is refused: a pair would have one side only.
    """

    name: str
    rounds: Sequence[NDArray[np.float64]]
    unit: str = "s"

    def __post_init__(self) -> None:
        if not self.rounds or any(values.size == 0 for values in self.rounds):
            raise ValueError(f"{self.name}: found no sample in some round, expected one at least in each")
        if not np.isfinite(self.values).all():
            raise ValueError(f"{self.name}: found NaN or infinity among the samples")

    @classmethod
    def of(cls, name: str, *rounds: ArrayLike, unit: str = "s", scale: float = 1.0) -> "Samples":
        """Samples from elsewhere, each round a flat array; `scale` brings them to `unit` (1e-9 for ns)."""
        return cls(name, tuple(np.ravel(np.asarray(values, np.float64)) * scale for values in rounds), unit)

    @property
    def values(self) -> NDArray[np.float64]:
        """All samples of all rounds, `[n] float64`."""
        return np.concatenate(list(self.rounds))

    def quantile(self, q: float) -> float | None:
        """The q-quantile of all samples; None in the tail where fewer than 1 / (1 - q) samples do not carry it."""
        values = self.values
        carried = q <= 0.5 or q == 1 or values.size * (1 - q) >= 1 - 1e-9
        return float(np.quantile(values, q)) if carried else None

    def by_round(self, q: float = 0.5) -> NDArray[np.float64]:
        """The q-quantile of each round, `[rounds] float64`."""
        if len({values.size for values in self.rounds}) == 1:  # thousands of rounds of one sample, for instance
            return np.asarray(np.quantile(np.stack(list(self.rounds)), q, axis=1), np.float64)
        return np.array([np.quantile(values, q) for values in self.rounds])


@dataclass(frozen=True)
class Interval:
    """A median with the order statistics around it, and the probability that they enclose the true one."""

    value: float
    low: float
    high: float
    confidence: float


def median_interval(values: ArrayLike, confidence: float = CONFIDENCE) -> Interval:
    """The median of `values` `[n]` and its distribution-free interval.

    Where so few values cannot give the confidence asked for, the interval is their whole range and says its own.
    """
    ordered = np.sort(np.asarray(values, np.float64))
    count = ordered.size
    if count == 0:
        raise ValueError("found no value, expected one at least")
    rank, outside = 1, 2 * _at_most(0, count)
    while rank < (count + 1) // 2 and (wider := 2 * _at_most(rank, count)) <= 1 - confidence:
        rank, outside = rank + 1, wider
    return Interval(float(np.median(ordered)), float(ordered[rank - 1]), float(ordered[-rank]), max(0.0, 1 - outside))


def _at_most(k: int, n: int) -> float:
    """P(at most k of n fair coins show heads); the normal approximation where n is large (error < 1e-3)."""
    if n > 400:
        return _normal((k + 0.5 - n / 2) / (sqrt(n) / 2))
    return sum(exp(lgamma(n + 1) - lgamma(i + 1) - lgamma(n - i + 1) - n * log(2)) for i in range(k + 1))


def _normal(z: float) -> float:
    return erfc(-z / sqrt(2)) / 2


class Noise(BaseModel):
    """How far apart two measurements of the same thing were: the interval of A over A, and its worst side."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: float
    high: float
    rounds: int
    confidence: float

    @property
    def floor(self) -> float:
        """A ratio nearer to 1 than this is noise: 0.02 means 2 % in either direction."""
        return exp(max(abs(log(self.low)), abs(log(self.high)))) - 1


class Ratio(BaseModel):
    """`of` over `over`, pair by pair: the median of the rounds' ratios with its interval.

    `difference` says whether the two may be called different: enough pairs, an interval that excludes 1, and a ratio
    beyond what the same thing showed against itself.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    of: str
    over: str
    quantile: float = 0.5
    value: float
    low: float
    high: float
    confidence: float
    rounds: int
    noise: Noise | None = None

    @property
    def difference(self) -> bool:
        """Whether the ratio is a difference and not noise."""
        beyond = self.noise is None or abs(log(self.value)) > log(1 + self.noise.floor)
        return self.confidence >= LEAST_CONFIDENCE and not self.low <= 1 <= self.high and beyond

    @property
    def text(self) -> str:
        """The ratio as it may be quoted: noise is called noise, and too few pairs are called that."""
        if self.confidence < LEAST_CONFIDENCE:
            return f"{self.value:.2f}x, too few rounds ({self.rounds}) to tell"
        if not self.difference:
            floor = "" if self.noise is None else f" (A/A {percent(self.noise.floor)})"
            return f"within noise{floor}"
        return f"{self.value:.3g}x [{self.low:.3g}, {self.high:.3g}]"


def percent(share: float) -> str:
    """A noise floor as it is printed: `±1.3 %`."""
    return f"±{share * 100:.2g} %" if share < 0.1 else f"±{share * 100:.0f} %"


def ratio(of: Samples, over: Samples, *, quantile: float = 0.5, noise: Noise | None = None) -> Ratio:
    """The ratio of a quantile of two sample sets, round by round. `noise` comes from `noise_floor` or `compare`."""
    upper, lower = _paired(of, over, quantile)
    if min(upper.min(), lower.min()) <= 0:
        raise ValueError(f"{of.name} over {over.name}: found a value <= 0, which has no ratio; use `difference`")
    # The median of an even number of pairs is the mean of two: taken of logarithms, a/b and b/a stay reciprocal.
    found = median_interval(np.log(upper / lower))
    return Ratio(
        of=of.name,
        over=over.name,
        quantile=quantile,
        value=exp(found.value),
        low=exp(found.low),
        high=exp(found.high),
        confidence=found.confidence,
        rounds=len(upper),
        noise=noise,
    )


def difference(of: Samples, over: Samples, *, quantile: float = 0.5) -> Interval:
    """How far a quantile of `of` lies above that of `over`, round by round, in their unit."""
    upper, lower = _paired(of, over, quantile)
    return median_interval(upper - lower)


def noise_floor(first: Samples, second: Samples, *, quantile: float = 0.5) -> Noise:
    """The noise that two interleaved measurements of the same thing show."""
    found = ratio(first, second, quantile=quantile)
    return Noise(low=found.low, high=found.high, rounds=found.rounds, confidence=found.confidence)


def _paired(of: Samples, over: Samples, quantile: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if of.unit != over.unit or len(of.rounds) != len(over.rounds):
        raise ValueError(
            f"{of.name} has {len(of.rounds)} rounds in {of.unit}, {over.name} {len(over.rounds)} in {over.unit}: "
            "only the same number of rounds in the same unit makes pairs"
        )
    return of.by_round(quantile), over.by_round(quantile)


def curve(values: ArrayLike) -> list[tuple[float, float]]:
    """Pairs (share, value) of the distribution, as far into the tail as the number of samples carries it."""
    ordered = np.sort(np.asarray(values, np.float64))
    kept = [q for q in CURVE if q in (0, 1) or min(q, 1 - q) * ordered.size >= 1 - 1e-9]
    return [(q, float(value)) for q, value in zip(kept, np.quantile(ordered, kept), strict=True)]
