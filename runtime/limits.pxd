"""C types of `limits.py`, and what the servo calls: everything here is `nogil`, allocates nothing, raises nothing."""

cimport cython

cdef int POSITION, VELOCITY, ACCELERATION, JERK, BRAKING, WORKSPACE, NONFINITE, TIME, FOLLOWING
cdef int ADVANCE, REPEAT, BRAKE
cdef long long HORIZON
cdef double SLACK, GRAIN, WORST_GRAIN, EDGE, UNNOTICED
cdef int TRIES, HALVINGS, CLOSINGS, PIECES, MOST_JOINTS
cdef int STEPS_1, STEPS_2, STEPS_3, SLOPE_1, SLOPE_3, HOLD, AHEAD, BEHIND, FASTEST, SLOWEST, END, RAMPED, ENTRY, EXIT
cdef int STOP_SIZE


@cython.locals(
    n=double, side=double, pace=double, n1=double, n2=double, n3=double, peak=double, hold=double, found=bint,
    down=double, up=double, entry=double, leave=double, ramped=double, held=double, last=double, end=double,
    fastest=double, m=double, behind=double, root=double,
)
cdef bint plan_stop(
    double v, double a, double top, double change, double dt, double *out, Py_ssize_t at
) noexcept nogil


@cython.final
cdef class Limiter:
    # Written by the caller before each tick, read by it after; n numbers each. Writing `command` breaks the promise.
    cdef readonly double[::1] wanted
    cdef readonly double[::1] measured
    cdef readonly double[::1] command
    # State of the last command, for a tracker that must start again from where the limiter really is.
    cdef readonly double[::1] speed
    cdef readonly double[::1] acceleration
    cdef readonly long long[::1] counts
    cdef readonly Py_ssize_t joints
    cdef readonly bint ready
    cdef readonly double dt

    cdef long long period_ns, early_ns, gap_ns, last_ns, due_ns
    cdef double[::1] lower, upper, velocity, top, change, lag
    cdef double[::1] curve_offset, curve_gain, curve_lower, curve_upper
    cdef Py_ssize_t links, balls
    cdef bint guarded
    cdef double[::1] origins, axes, tip, box, spheres, reach
    cdef double[::1] before, pace, next_command, next_speed, next_acceleration, pick, angles
    cdef double stops[16 * 14]
    cdef double fresh[16 * 14]

    @cython.locals(refused=int, i=Py_ssize_t)
    cpdef int start(self, long long tick_ns) noexcept nogil

    @cython.locals(step=int, clipped=int, i=Py_ssize_t)
    cpdef int tick(self, long long tick_ns) noexcept nogil

    @cython.locals(step=int)
    cpdef int brake(self, long long tick_ns) noexcept nogil

    @cython.locals(i=Py_ssize_t, still=bint)
    cpdef bint standing(self) noexcept nogil

    @cython.locals(elapsed="long long")
    cdef int _clock(self, long long tick_ns) noexcept nogil

    @cython.locals(i=Py_ssize_t, k=Py_ssize_t)
    cdef void _rest(self) noexcept nogil

    @cython.locals(i=Py_ssize_t)
    cdef void _count_all(self, int kind) noexcept nogil

    @cython.locals(
        q=double, v=double, a=double, dt=double, top=double, change=double, wanted=double, target=double,
        asked=double, pace=double, lean=double, lost=bint, pick=double, clipped=int, certified=bint, kind=int,
    )
    cdef int _choose(self, Py_ssize_t i) noexcept nogil

    @cython.locals(low=double, high=double, middle=double)
    cdef double _approach(self, Py_ssize_t i, double target, double pace, double lean) noexcept nogil

    @cython.locals(at=Py_ssize_t, v=double, q=double)
    cdef double _overshoot(self, Py_ssize_t i, double a, double target, double pace, double lean) noexcept nogil

    @cython.locals(good=double, bad=double, found=bint, middle=double)
    cdef void _search(self, Py_ssize_t i, double refused) noexcept nogil

    cdef bint _attempt(self, Py_ssize_t i, double a) noexcept nogil

    @cython.locals(at=Py_ssize_t, q=double)
    cdef bint _certify(self, Py_ssize_t i) noexcept nogil

    @cython.locals(
        at=Py_ssize_t, gain=double, offset=double, room=double, fastest=double, furthest=double, hold=double,
        ramped=double, entry=double, leave=double, closest=double, passed=double,
    )
    cdef bint _under_curve(self, Py_ssize_t i, double side) noexcept nogil

    @cython.locals(at=Py_ssize_t, k=Py_ssize_t, a=double, v=double)
    cdef void _step_stop(self, Py_ssize_t i) noexcept nogil

    @cython.locals(i=Py_ssize_t)
    cdef void _follow_stops(self) noexcept nogil

    @cython.locals(i=Py_ssize_t, k=Py_ssize_t)
    cdef void _commit(self) noexcept nogil

    @cython.locals(scale=double, agreed=bint, i=Py_ssize_t, a=double)
    cdef void _retreat(self) noexcept nogil

    @cython.locals(
        radius=double, longest=double, begin=double, finish=double, fastest=double, up=double, down=double,
        at=Py_ssize_t, i=Py_ssize_t, piece=Py_ssize_t,
    )
    cdef bint _contained(self) noexcept nogil

    @cython.locals(at=Py_ssize_t, dt=double, k=double, left=double, hold=double, travelled=double)
    cdef double _travelled(self, Py_ssize_t i, double steps) noexcept nogil

    @cython.locals(
        x=double, y=double, z=double, u=double, v=double, w=double, ax=double, ay=double, az=double, c=double, s=double,
        along=double, back=Py_ssize_t, i=Py_ssize_t, o=Py_ssize_t, b=Py_ssize_t,
    )
    cdef bint _holds(self, double radius) noexcept nogil
