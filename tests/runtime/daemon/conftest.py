"""The bundle that the daemons of these tests run."""

from support.daemon_bundle import bundle

__all__ = ["bundle"]
