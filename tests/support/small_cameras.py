"""A robot with small cameras: the same policy, a fraction of the patches."""

from chatvla_edge.export.robots import Robot, load
from chatvla_edge.runtime.bundle import Camera, Resize

HEIGHT, WIDTH = 60, 90
GRID = (4, 6)


def camera(name: str) -> Camera:
    resize = Resize(step="resize", height=14 * GRID[0], width=14 * GRID[1], filter="bicubic")
    return Camera(name=name, height=HEIGHT, width=WIDTH, preprocessing=(resize,), grid=GRID)


def ROBOT(*names: str) -> Robot:  # noqa: N802
    return load("arx_r5_bimanual").model_copy(update={"cameras": tuple(camera(name) for name in names)})
