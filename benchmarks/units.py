"""How a figure is written: times and bytes in the unit that needs no exponent, three significant digits."""

TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
BYTES = ((2.0**30, "GiB"), (2.0**20, "MiB"), (2.0**10, "KiB"), (1.0, "B"))
SCALED = {"s": TIMES, "B": BYTES}


def scale(value: float, unit: str) -> tuple[float, str]:
    """The factor and the unit to show values of about `value` `unit` in: (1e-6, "µs") for 25e-6 s."""
    steps = SCALED.get(unit, ((1.0, unit),))
    return next((step for step in steps if abs(value) >= step[0]), steps[-1] if value else steps[0])


def digits(value: float | None) -> str:
    """Three significant digits without an exponent where that is readable; a dash for what is not known."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    size = abs(value)
    if not 1e-4 <= size < 1e7:
        return f"{value:.3g}"
    places = 2 if size >= 1 else 3
    if size >= 100:
        return f"{value:,.0f}"
    if size >= 10:
        places = 1
    return f"{value:.{places}f}"


def readable(value: float | None, unit: str) -> str:
    """A figure with its unit: `25.0 µs`, `3`, `-`."""
    if value is None:
        return "-"
    factor, shown = scale(value, unit)
    return f"{digits(value / factor)} {shown}".strip()
