"""Forward kinematics and damped inverse kinematics of one serial arm, for Cartesian actions that leave as joints.

The inverse is a Levenberg-Marquardt step on the geometric Jacobian, warm-started from the last command: one tick's
target is near, so one to three iterations do, and their number is bounded. Damping grows with the error (Sugihara
2011, "Solvability-unconcerned inverse kinematics by the Levenberg-Marquardt method"), so an unreachable pose is
approached instead of fought for. Joints that meet their range stay there for the rest of the call and the others take
over. A seventh joint's freedom goes to a posture, through the null space.

No allocation and no Python object in `forward` and `solve`.
"""

from libc.math cimport cos, fabs, sin, sqrt

from chatvla_edge.runtime.rotations cimport rotation_between

import numpy as np

# A linearised step is trusted this far (rad); further, sin and cos have bent away from it.
cdef double LONGEST_STEP = 0.5


cdef inline void turn(const double *r, double x, double y, double z, double *out) noexcept nogil:
    """out = r (3x3, row by row) times the vector."""
    out[0] = r[0] * x + r[1] * y + r[2] * z
    out[1] = r[3] * x + r[4] * y + r[5] * z
    out[2] = r[6] * x + r[7] * y + r[8] * z


cdef inline void compose(const double *a, const double *b, double *out) noexcept nogil:
    """out = a b, rigid transforms of 12 numbers; out is neither a nor b."""
    cdef int i
    for i in range(3):
        out[3 * i] = a[3 * i] * b[0] + a[3 * i + 1] * b[3] + a[3 * i + 2] * b[6]
        out[3 * i + 1] = a[3 * i] * b[1] + a[3 * i + 1] * b[4] + a[3 * i + 2] * b[7]
        out[3 * i + 2] = a[3 * i] * b[2] + a[3 * i + 1] * b[5] + a[3 * i + 2] * b[8]
        out[9 + i] = a[3 * i] * b[9] + a[3 * i + 1] * b[10] + a[3 * i + 2] * b[11] + a[9 + i]


cdef inline void about_axis(const double *axis, double angle, double *r) noexcept nogil:
    """Rodrigues' rotation about a unit vector."""
    cdef double c = cos(angle), s = sin(angle), k = 1.0 - c
    cdef double x = axis[0], y = axis[1], z = axis[2]
    r[0] = c + k * x * x
    r[1] = k * x * y - s * z
    r[2] = k * x * z + s * y
    r[3] = k * y * x + s * z
    r[4] = c + k * y * y
    r[5] = k * y * z - s * x
    r[6] = k * z * x - s * y
    r[7] = k * z * y + s * x
    r[8] = c + k * z * z


cdef inline void solve_spd(double *a, double *b) noexcept nogil:
    """Solve a x = b in place for a symmetric positive definite 6 x 6 matrix (Cholesky; damping keeps it definite)."""
    cdef int i, j, k
    cdef double total
    for i in range(6):
        for j in range(i + 1):
            total = a[6 * i + j]
            for k in range(j):
                total -= a[6 * i + k] * a[6 * j + k]
            if i == j:
                a[7 * i] = sqrt(total)
            else:
                a[6 * i + j] = total / a[7 * j]
    for i in range(6):
        total = b[i]
        for k in range(i):
            total -= a[6 * i + k] * b[k]
        b[i] = total / a[7 * i]
    for i in range(5, -1, -1):
        total = b[i]
        for k in range(i + 1, 6):
            total -= a[6 * k + i] * b[k]
        b[i] = total / a[7 * i]


cdef class Kinematics:
    """Kinematics of an `ArmModel` of up to 8 joints.

    ``flange_to_tool`` (12 numbers, or None for the model's own tool) replaces the last fixed transform. ``length`` (m)
    weighs a radian of rotation error against metres; ``posture`` (rad, [n]) is where a redundant arm's spare joint is
    drawn while it moves, ``posture_gain`` of the way per call and at most ``posture_step`` (rad). Raises ValueError for
    non-finite or wrong sizes.
    """

    def __init__(
        self,
        model,
        *,
        flange_to_tool=None,
        posture=None,
        double posture_gain=0.02,
        double posture_step=1e-3,
        double length=0.25,
        double bias=1e-6,
        double position_tolerance=1e-6,
        double rotation_tolerance=1e-5,
        int most_iterations=8,
    ):
        n = len(model.joints)
        if not 1 <= n <= MOST_LINKS:
            raise ValueError(f"{model.name}: {n} joints; expected 1 to {MOST_LINKS}")
        self.joints = n
        tool = np.asarray(model.tool if flange_to_tool is None else flange_to_tool, dtype=np.float64)
        rest = np.asarray((model.lower + model.upper) / 2 if posture is None else posture, dtype=np.float64)
        if tool.shape != (12,) or not np.isfinite(tool).all():
            raise ValueError(f"flange_to_tool: expected 12 finite numbers, found {tool.tolist()}")
        if rest.shape != (n,) or not np.isfinite(rest).all():
            raise ValueError(f"posture: expected {n} finite numbers, found {rest.tolist()}")
        if not (0 <= posture_gain < 1 and posture_step >= 0 and length > 0 and bias > 0 and most_iterations >= 1):
            raise ValueError(
                "expected 0 <= posture_gain < 1, posture_step >= 0, length > 0, bias > 0 and most_iterations >= 1"
            )
        for i in range(n):
            for k in range(12):
                self.origins[12 * i + k] = model.origins[i, k]
            for k in range(3):
                self.axes[3 * i + k] = model.axes[i, k]
            self.lower[i] = model.lower[i]
            self.upper[i] = model.upper[i]
            self.posture[i] = rest[i]
        for k in range(12):
            self.tool[k] = tool[k]
        # Six joints have no null space: a posture would only pull them off the target.
        self.posture_gain = posture_gain if n > 6 else 0.0
        self.posture_step = posture_step
        self.length = length
        self.bias = bias
        self.position_tolerance = position_tolerance
        self.rotation_tolerance = rotation_tolerance
        self.most_iterations = most_iterations

    cdef void _frames(self, const double *q, bint with_jacobian) noexcept nogil:
        """Tool pose at ``q``, and the Jacobian (rows: 3 m/rad, then 3 rad/rad times length)."""
        cdef double here[12]
        cdef double there[12]
        cdef double step[12]
        cdef double axis[3]
        cdef Py_ssize_t i, k, n = self.joints
        for k in range(12):
            here[k] = 0.0
        here[0] = here[4] = here[8] = 1.0
        for k in range(9, 12):
            step[k] = 0.0
        for i in range(n):
            compose(here, &self.origins[12 * i], there)
            if with_jacobian:
                turn(there, self.axes[3 * i], self.axes[3 * i + 1], self.axes[3 * i + 2], axis)
                # The moment arm needs the tool point: keep axis and joint position until it is known.
                for k in range(3):
                    self.jacobian[k * MOST_LINKS + i] = there[9 + k]
                    self.jacobian[(3 + k) * MOST_LINKS + i] = axis[k]
            about_axis(&self.axes[3 * i], q[i], step)
            compose(there, step, here)
        compose(here, self.tool, self.pose)
        if not with_jacobian:
            return
        for i in range(n):
            for k in range(3):
                axis[k] = self.pose[9 + k] - self.jacobian[k * MOST_LINKS + i]
                step[k] = self.jacobian[(3 + k) * MOST_LINKS + i]
            self.jacobian[i] = step[1] * axis[2] - step[2] * axis[1]
            self.jacobian[MOST_LINKS + i] = step[2] * axis[0] - step[0] * axis[2]
            self.jacobian[2 * MOST_LINKS + i] = step[0] * axis[1] - step[1] * axis[0]
            for k in range(3, 6):
                self.jacobian[k * MOST_LINKS + i] *= self.length

    cdef void forward(self, const double *q, double *pose) noexcept nogil:
        cdef int k
        self._frames(q, False)
        for k in range(12):
            pose[k] = self.pose[k]

    cdef double _error(self, const double *pose, double *error) noexcept nogil:
        """Weighted twist from the present pose to ``pose``; returns half its square."""
        cdef int k
        cdef double square = 0.0
        for k in range(3):
            error[k] = pose[9 + k] - self.pose[9 + k]
        rotation_between(self.pose, pose, &error[3])
        self.position_residual = sqrt(error[0] * error[0] + error[1] * error[1] + error[2] * error[2])
        self.rotation_residual = sqrt(error[3] * error[3] + error[4] * error[4] + error[5] * error[5])
        for k in range(3, 6):
            error[k] *= self.length
        for k in range(6):
            square += error[k] * error[k]
        return square / 2.0

    cdef bint solve(self, const double *pose, double *q) noexcept nogil:
        cdef double error[6]
        cdef double gram[36]
        cdef double drawn[MOST_LINKS]
        cdef bint locked[MOST_LINKS]
        cdef double damping, total, longest, step
        cdef bint there = False
        cdef Py_ssize_t i, j, k, n = self.joints
        for i in range(n):
            locked[i] = False
            q[i] = self.lower[i] if q[i] < self.lower[i] else self.upper[i] if q[i] > self.upper[i] else q[i]
        self.iterations = 0
        while True:
            self._frames(q, True)
            damping = self._error(pose, error) + self.bias
            there = (
                self.position_residual <= self.position_tolerance and self.rotation_residual <= self.rotation_tolerance
            )
            # NaN in `pose` makes every comparison false: nothing is moved.
            if there or self.iterations >= self.most_iterations or not damping < 1e12:
                return there
            self.iterations += 1
            # The posture draws in the first iteration only, and the task is corrected for what that does to it:
            # z + J' (J J' + d)^-1 (e - J z). The iterations after it are free to converge.
            for i in range(n):
                drawn[i] = 0.0
                if self.iterations == 1:
                    step = self.posture_gain * (self.posture[i] - q[i])
                    drawn[i] = min(max(step, -self.posture_step), self.posture_step)
                if locked[i]:
                    for k in range(6):
                        self.jacobian[k * MOST_LINKS + i] = 0.0
            for k in range(6):
                for i in range(n):
                    error[k] -= self.jacobian[k * MOST_LINKS + i] * drawn[i]
                for j in range(k + 1):
                    total = damping if j == k else 0.0
                    for i in range(n):
                        total += self.jacobian[k * MOST_LINKS + i] * self.jacobian[j * MOST_LINKS + i]
                    gram[6 * k + j] = total
            solve_spd(gram, error)
            longest = LONGEST_STEP
            for i in range(n):
                for k in range(6):
                    drawn[i] += self.jacobian[k * MOST_LINKS + i] * error[k]
                longest = max(longest, fabs(drawn[i]))
            for i in range(n):
                step = q[i] + drawn[i] * (LONGEST_STEP / longest)
                if step < self.lower[i]:
                    step = self.lower[i]
                    locked[i] = True
                elif step > self.upper[i]:
                    step = self.upper[i]
                    locked[i] = True
                q[i] = step

    def tool_pose(self, q):
        """Tool rotation [3, 3] and position [3] (m, base frame) at joint angles ``q`` [n] (rad)."""
        cdef double[::1] angles = self._vector(q)
        cdef double pose[12]
        self.forward(&angles[0], pose)
        numbers = np.array([pose[k] for k in range(12)])
        return numbers[:9].reshape(3, 3), numbers[9:]

    def tool_jacobian(self, q):
        """Geometric Jacobian [6, n], base frame: tool velocity (m/s), then angular velocity (rad/s), per rad/s."""
        cdef double[::1] angles = self._vector(q)
        self._frames(&angles[0], True)
        rows = [[self.jacobian[k * MOST_LINKS + i] for i in range(self.joints)] for k in range(6)]
        return np.array(rows) / np.array([[1.0]] * 3 + [[self.length]] * 3)

    def joints_for(self, rotation, position, start):
        """Joint angles [n] (rad) that bring the tool to a pose, from ``start``, and whether it was reached.

        How far off the answer is stands in ``position_residual`` (m) and ``rotation_residual`` (rad).
        """
        cdef double[::1] angles = self._vector(start).copy()
        cdef double pose[12]
        rotation = np.asarray(rotation, dtype=np.float64)
        position = np.asarray(position, dtype=np.float64)
        if rotation.shape != (3, 3) or position.shape != (3,):
            raise ValueError(f"expected rotation [3, 3] and position [3], found {rotation.shape}, {position.shape}")
        for k in range(9):
            pose[k] = rotation.flat[k]
        for k in range(3):
            pose[9 + k] = position[k]
        reached = self.solve(pose, &angles[0])
        return np.asarray(angles), reached

    def _vector(self, q):
        vector = np.ascontiguousarray(q, dtype=np.float64)
        if vector.shape != (self.joints,):
            raise ValueError(f"expected {self.joints} joint angles, found shape {vector.shape}")
        return vector
