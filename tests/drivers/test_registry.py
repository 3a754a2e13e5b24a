"""Every driver that a rig file may name can be imported and described without its vendor library."""

import pytest

from chatvla_edge.drivers import registry
from chatvla_edge.drivers.protocols import Manners, Options

EVERY = [(role, name) for role in registry.ROLES for name in registry.OURS[role]]


@pytest.mark.parametrize(("role", "name"), EVERY)
def test_a_driver_has_options_and_manners(role, name):
    driver = registry.load(role, name)
    assert issubclass(driver.OPTIONS, Options)
    if role == "arms":
        assert isinstance(driver.MANNERS, Manners)


def test_an_unknown_driver_is_refused_by_name():
    with pytest.raises(registry.UnknownDriverError, match="'toaster'"):
        registry.find("arms", "toaster")
