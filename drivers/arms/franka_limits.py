"""What the makers of the Franka arms permit, by the generation of the arm. rad, s.

Numbers of libfranka (`rate_limiting.h`) and of the makers' data sheets. An FR3's velocity limit falls towards the
joints' ends; what stands here is its cap, which holds in the middle.
"""

from chatvla_edge.drivers.protocols import AxisBounds

JOINTS = 7
AXES = tuple(f"joint{i}" for i in range(1, JOINTS + 1))

# FCI version -> generation: what a control box answers tells which arm hangs on it.
GENERATIONS = {5: "fer", 10: "fr3"}

BOUNDS = {
    "fer": AxisBounds(
        lower=(-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973),
        upper=(2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973),
        velocity=(2.175, 2.175, 2.175, 2.175, 2.61, 2.61, 2.61),
        acceleration=(15.0, 7.5, 10.0, 12.5, 15.0, 20.0, 20.0),
        jerk=(7500.0, 3750.0, 5000.0, 6250.0, 7500.0, 10000.0, 10000.0),
    ),
    "fr3": AxisBounds(
        lower=(-2.7437, -1.7837, -2.9007, -3.0421, -2.8065, 0.5445, -3.0159),
        upper=(2.7437, 1.7837, 2.9007, -0.1518, 2.8065, 4.5169, 3.0159),
        velocity=(2.62, 2.62, 2.62, 2.62, 5.26, 4.18, 5.26),
        acceleration=(10.0,) * JOINTS,
        jerk=(5000.0,) * JOINTS,
    ),
}


def narrower() -> AxisBounds:
    """What holds for either generation: all that can be said before an arm has answered."""
    fer, fr3 = BOUNDS["fer"], BOUNDS["fr3"]
    return AxisBounds(
        lower=tuple(map(max, fer.lower, fr3.lower)),
        upper=tuple(map(min, fer.upper, fr3.upper)),
        velocity=tuple(map(min, fer.velocity, fr3.velocity)),
        acceleration=tuple(map(min, fer.acceleration or (), fr3.acceleration or ())),
        jerk=tuple(map(min, fer.jerk or (), fr3.jerk or ())),
    )
