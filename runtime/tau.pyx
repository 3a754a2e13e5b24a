"""Trajectory time (tau): the clock along the fused trajectory (DESIGN 4.5).

Tau runs at rate 1 while tracking, scales with the operator's speed override, ramps to 0 for a stop along the path and
stands in HOLD. Everything that asks "which action is due" is arithmetic in tau, so a robot that stands still consumes
nothing, however long the policy thinks.

The rate follows its target by the time-optimal profile under a bounded rate acceleration and, where asked, a bounded
rate jerk. The profile is piecewise cubic and is evaluated in closed form, so the result does not depend on how host
time was cut into ticks (up to rounding), never overshoots its target and never goes below 0: from any state that
braking can bring to rest inside [0, target], each piece leads to another such state.

The clock also knows where the path ends. It brakes in time to come to rest exactly there, so running out of actions
is a stop along the path and not a step in velocity.
"""

from libc.math cimport INFINITY, fabs, fmax, fmin, isfinite, sqrt

# Longer than any ramp that a clock accepts (max_rate / max_acceleration <= 1e3 s is checked), so "until at rest" is
# one evaluation of the profile. Finite, because 0 * inf is NaN.
cdef double FOREVER = 1e6

# At rest this close to the end of the path counts as the end: 1e-9 s of a 10 rad/s motion is 1e-8 rad.
cdef double AT_END = 1e-9


cdef inline void piece(TauState *state, double jerk, double t) noexcept nogil:
    """Integrates constant rate jerk over t seconds of host time."""
    state.tau += t * (state.rate + t * (state.acceleration / 2 + t * jerk / 6))
    state.rate += t * (state.acceleration + t * jerk / 2)
    state.acceleration += t * jerk


cdef class TauClock:
    """Tau, its rate, and the bounds under which the rate moves.

    ``max_rate``: the largest speed override; ``max_acceleration``: of the rate, 1/s (2 stops from rate 1 in 0.5 s of
    host time and 0.25 s of tau); ``max_jerk``: of the rate, 1/s^2, ``inf`` for none; ``longest_tick``: host seconds
    that one advance may count: in a longer gap no command flowed and the arm stood, so tau must not run on.
    Raises ValueError for bounds that are not positive.
    """

    def __init__(self, *, max_rate=1.0, max_acceleration=4.0, max_jerk=INFINITY, longest_tick=0.02, tau=0.0):
        bounds = {"max_rate": max_rate, "max_acceleration": max_acceleration, "longest_tick": longest_tick}
        for name, value in bounds.items():
            if not (value > 0 and isfinite(value)):
                raise ValueError(f"{name} is {value}; it must be positive and finite")
        if not max_jerk > 0:
            raise ValueError(f"max_jerk is {max_jerk}; it must be positive (inf for no bound)")
        if max_rate / max_acceleration + max_acceleration / max_jerk > 1e3:
            raise ValueError(f"a ramp to rate {max_rate} would take over 1000 s; raise max_acceleration or max_jerk")
        if not isfinite(tau):
            raise ValueError(f"tau is {tau}; it must be finite")
        self.state.tau = tau
        self.state.rate = 0
        self.state.acceleration = 0
        self.max_rate = max_rate
        self.max_acceleration = max_acceleration
        self.max_jerk = max_jerk
        self.longest_tick = longest_tick
        self.clipped_ticks = 0

    cdef TauState _stepped(self, TauState state, double target, double dt) noexcept nogil:
        """The state after dt seconds of the time-optimal profile toward ``target``."""
        cdef double sign, gap, peak, rise, hold, fall, jerk, start
        if not isfinite(self.max_jerk):
            gap = target - state.rate
            rise = fmin(dt, fabs(gap) / self.max_acceleration)
            state.acceleration = self.max_acceleration if gap > 0 else -self.max_acceleration
            piece(&state, 0, rise)
            if rise < dt or state.rate == target:
                state.rate = target
                state.acceleration = 0
                state.tau += target * (dt - rise)
            return state
        # The rate at which the present acceleration would come to rest: which side of it the target lies on decides
        # the direction of the first piece.
        gap = target - state.rate - state.acceleration * fabs(state.acceleration) / (2 * self.max_jerk)
        sign = 1 if gap > 0 else -1
        start = sign * state.acceleration
        gap = sign * (target - state.rate)
        # rate gained by start -> peak -> 0 at full jerk is (2 peak^2 - start^2) / (2 jerk)
        peak = fmax(sqrt(fmax(self.max_jerk * gap + start * start / 2, 0)), fmax(start, 0))
        hold = 0
        if peak > self.max_acceleration:
            peak = self.max_acceleration
            hold = fmax(gap - (2 * peak * peak - start * start) / (2 * self.max_jerk), 0) / peak
        jerk = sign * self.max_jerk
        rise = (peak - start) / self.max_jerk
        fall = peak / self.max_jerk
        piece(&state, jerk, fmin(dt, rise))
        dt -= rise
        if dt <= 0:
            return state
        piece(&state, 0, fmin(dt, hold))
        dt -= hold
        if dt <= 0:
            return state
        piece(&state, -jerk, fmin(dt, fall))
        dt -= fall
        if dt >= 0:
            state.rate = target
            state.acceleration = 0
            state.tau += target * dt
        return state

    cdef double _stopping_from(self, TauState state) noexcept nogil:
        state.tau = 0
        return self._stepped(state, 0, FOREVER).tau

    cdef double c_stopping_tau(self) noexcept nogil:
        """Tau that a stop begun now would still consume, s."""
        return self._stopping_from(self.state)

    cdef double c_advance(self, double dt_host, double target_rate, double tau_end) noexcept nogil:
        """One tick: dt_host seconds toward target_rate, at rest no later than tau_end (inf: no end). Returns tau.

        Host time that stands, runs backwards or is NaN advances nothing; a NaN or negative target is a stop. Where
        tau_end lies nearer than the stopping distance, the clock brakes at its bounds and passes it.
        """
        cdef TauState trial, slowest
        cdef double low, high, middle
        cdef int _
        if not dt_host > 0:
            return self.state.tau
        if dt_host > self.longest_tick:
            self.clipped_ticks += 1
            dt_host = self.longest_tick
        if not target_rate > 0:
            target_rate = 0
        target_rate = fmin(target_rate, self.max_rate)
        if self.state.rate == 0 and self.state.acceleration == 0 and tau_end - self.state.tau <= AT_END:
            # At rest at (or, after a hard brake, past) the end. Landing on it exactly makes "at the end" a comparison.
            self.state.tau = fmax(self.state.tau, tau_end)
            return self.state.tau
        trial = self._stepped(self.state, target_rate, dt_host)
        if trial.tau + self._stopping_from(trial) > tau_end:
            slowest = self._stepped(self.state, 0, dt_host)
            trial = slowest
            if slowest.tau + self._stopping_from(slowest) < tau_end:
                # The largest target from which the end can still be met; a fixed count keeps the tick's cost bounded.
                low = 0
                high = target_rate
                for _ in range(48):
                    middle = (low + high) / 2
                    slowest = self._stepped(self.state, middle, dt_host)
                    if slowest.tau + self._stopping_from(slowest) <= tau_end:
                        low = middle
                        trial = slowest
                    else:
                        high = middle
        # Rounding may leave -1e-17, or 1e-16 beyond the end; tau never runs backwards.
        if 0 < trial.tau - tau_end < AT_END:
            trial.tau = tau_end
        trial.rate = fmax(trial.rate, 0)
        trial.tau = fmax(trial.tau, self.state.tau)
        self.state = trial
        return self.state.tau

    def advance(self, double dt_host, double target_rate=1.0, double tau_end=INFINITY):
        """One tick of ``dt_host`` seconds toward ``target_rate``, at rest no later than ``tau_end``. Returns tau."""
        return self.c_advance(dt_host, target_rate, tau_end)

    def stopping_tau(self):
        """Tau that a stop begun now would still consume, s."""
        return self.c_stopping_tau()

    @property
    def tau(self):
        return self.state.tau

    @property
    def rate(self):
        return self.state.rate

    @property
    def acceleration(self):
        return self.state.acceleration

    @property
    def clipped(self):
        """Ticks longer than ``longest_tick``, whose excess tau did not count."""
        return self.clipped_ticks
