"""A driver of the registry, for the loop of a device's process."""

from chatvla_edge.drivers import registry


def make(name, options):
    return registry.create("arms", name, options)
