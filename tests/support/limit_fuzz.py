"""Adversarial command streams for the limiter: what a broken policy, tracker or clock could send."""

import numpy as np

from . import limit_oracle

HOME = np.array([0.0, -0.785, 0.0, -2.356, 0.0, 1.571, 0.785])


def arms(load_arm):
    """Name -> (limiter arguments, oracle bounds, start), for every kind of arm and several periods."""
    found = {}
    for name, period in [("panda", 1_000_000), ("panda", 5_000_000), ("fr3", 1_000_000), ("fr3", 2_000_000)]:
        model = load_arm(name)
        box = np.array([[0.25, -0.45, 0.15], [0.65, 0.45, 0.80]])
        spheres = np.array([[0.45, 0.25, 0.45, 0.10], [0.55, -0.3, 0.6, 0.15]])
        walled = {"box": box.ravel().tolist(), "spheres": spheres.tolist()}
        arguments = limiter_arguments(model, period)
        bounds = {
            "lower": model.lower,
            "upper": model.upper,
            "velocity": model.velocity,
            "acceleration": model.acceleration,
            "jerk": model.jerk,
            "period_ns": period,
            "velocity_at": limit_oracle.fr3_velocity if name == "fr3" else None,
        }
        key = f"{name}@{period // 1000}us"
        found[key] = (arguments, limit_oracle.Bounds(**bounds), HOME)
        walls = limit_oracle.Bounds(**bounds, tool=limit_oracle.franka_flange, box=box, spheres=spheres)
        found[key + "+walls"] = (arguments | walled, walls, HOME)
    model = load_arm("arx_r5")
    wide = {
        "lower": np.append(model.lower, 0.0),
        "upper": np.append(model.upper, 0.088),
        "velocity": np.append(model.velocity, 0.3),
        "acceleration": np.array([20.0, 20, 20, 30, 30, 30, 2]),
        "jerk": np.array([400.0, 400, 400, 900, 900, 900, 60]),
        "period_ns": 2_000_000,
        "step": np.array([0.006] * 6 + [0.0005]),
    }
    listed = {key: value if key == "period_ns" else value.tolist() for key, value in wide.items()}
    found["arx@2000us"] = (listed, limit_oracle.Bounds(**wide), np.array([0.0, 0.5, 0.6, 0.0, 0.0, 0.0, 0.04]))
    return found


def limiter_arguments(model, period_ns):
    arguments = {
        "lower": model.lower.tolist(),
        "upper": model.upper.tolist(),
        "velocity": model.velocity.tolist(),
        "acceleration": model.acceleration.tolist(),
        "jerk": model.jerk.tolist(),
        "period_ns": period_ns,
        "origins": model.origins.tolist(),
        "axes": model.axes.tolist(),
        "tip": model.tool[9:].tolist(),
    }
    return arguments if model.curve is None else arguments | {"curve": model.curve.tolist()}


def stream(rng, bounds, start, count):
    """Wanted positions [count, n], tick times [count] ns and brake flags [count], from a random mixture of attacks."""
    n = len(bounds.lower)
    wanted = np.empty((count, n))
    brake = np.zeros(count, bool)
    span = bounds.upper - bounds.lower
    dt = bounds.period_ns / 1e9
    here = start.copy()
    at = 0
    while at < count:
        length = min(int(rng.integers(1, 400)), count - at)
        piece = slice(at, at + length)
        time = np.arange(1, length + 1)[:, None] * dt
        goal = rng.uniform(bounds.lower - 0.2 * span, bounds.upper + 0.2 * span)
        match rng.integers(13):
            case 0:
                wanted[piece] = goal
            case 1:
                wanted[piece] = here
            case 2:
                wanted[piece] = here + span * 0.3 * np.sin(time * rng.uniform(0.5, 60, n))
            case 3:
                wanted[piece] = rng.uniform(bounds.lower, bounds.upper, (length, n))
            case 4:
                wanted[piece] = here + time * rng.normal(0, 1, n) * bounds.velocity
            case 5:
                wanted[piece] = np.where(rng.random((length, n)) < 0.02, rng.choice([np.nan, np.inf, -np.inf]), goal)
            case 6:
                wanted[piece] = rng.choice([1e300, -1e300, 1e9, -1e9, 5e-324], (length, n))
            case 7:
                wanted[piece] = np.where(rng.random(n) < 0.5, bounds.lower, bounds.upper)
            case 8:
                wanted[piece] = np.where((np.arange(length)[:, None] // rng.integers(1, 40)) % 2, goal, here)
            case 9:
                wanted[piece] = here + rng.normal(0, 1e-3, (length, n)).cumsum(axis=0)
            case 10:
                wanted[piece] = np.nextafter(np.where(rng.random(n) < 0.5, bounds.lower, bounds.upper), here)
            case 11:
                # A feasible minimum-jerk move, where the arm may be anywhere by now.
                u = np.clip(time / max(time[-1, 0], dt), 0, 1)
                wanted[piece] = here + (goal - here) * u**3 * (10 - 15 * u + 6 * u * u)
            case _:
                wanted[piece] = goal
                brake[piece] = rng.random(length) < 0.3
        finite = wanted[at + length - 1]
        here = np.where(np.isfinite(finite), np.clip(finite, bounds.lower, bounds.upper), here)
        at += length
    return wanted, times(rng, bounds, count), brake


def times(rng, bounds, count):
    """Mostly the grid; then skipped, early, repeated, reversed, far and impossible times."""
    period = bounds.period_ns
    step = np.full(count, period, dtype=np.int64)
    odd = rng.random(count) < 0.02
    near = [0, 1, period // 2, period - period // 8 - 1, period - period // 8, 2 * period, 5 * period]
    far = [-1, -7 * period, bounds.gap_ns, bounds.gap_ns + 1, 3 * bounds.gap_ns]
    choices = np.array([*near, *far])
    step[odd] = rng.choice(choices, int(odd.sum()))
    ticks = 10 * bounds.gap_ns + np.cumsum(step)
    broken = rng.random(count) < 2e-4
    ticks[broken] = rng.choice(np.array([-1, -(2**63), 2**63 - 1, 2**62, 2**62 + 1, 0]), int(broken.sum()))
    return ticks


def run(limiter, start, start_ns, wanted, ticks, brake):
    """Commands [k, n] and answers [k] of a limiter, interpreted or compiled."""
    limiter.reset(start.tolist(), start_ns)
    commands = np.empty(wanted.shape)
    answers = np.empty(len(wanted), dtype=np.int64)
    want = np.frombuffer(limiter.wanted, dtype=np.float64)
    command = np.frombuffer(limiter.command, dtype=np.float64)
    tick, stop = limiter.tick, limiter.brake
    for k, (row, at, braking) in enumerate(zip(wanted, ticks.tolist(), brake.tolist(), strict=True)):
        want[:] = row
        answers[k] = stop(at) if braking else tick(at)
        commands[k] = command
    return commands, answers
