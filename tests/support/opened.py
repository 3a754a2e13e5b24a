"""A driver of the registry, opened, in the shape that the loop of a device's process asks."""

from chatvla_edge.drivers import registry


class Opened:
    def __init__(self, name, options, rate):
        self.driver = registry.create("arms", name, options)
        self.driver.open(rate)
        self.command = self.driver.command
        self.stop = self.driver.stop

    def state(self):
        state = self.driver.state()
        return state.position, state.velocity, state.effort, state.captured_ns, bool(state.fault)
