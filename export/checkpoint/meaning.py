"""What a checkpoint's actions and states seem to mean, judged by their sizes alone."""

from chatvla_edge.export.spec import HeadSpec

# (action_dim, state_dim) of the public robots. A guess to be shown, never used: an export must state the meaning.
_KNOWN = {
    (14, 14): "two arms: 6 joint positions [rad] and a gripper each, state alike (ARX R5 / ALOHA)",
    (10, 7): "absolute Cartesian pose: xyz [m], rot6d, gripper; state xyz, euler, gripper (Franka + Robotiq)",
    (7, 8): "LIBERO (third party)",
}


def likely_meaning(head: HeadSpec) -> str:
    """One phrase for a table."""
    known = _KNOWN.get((head.action_dim, head.state_dim))
    if known is None:
        return f"unknown robot with {head.action_dim} actions and {head.state_dim} state values; state it at export"
    return f"by its sizes: {known}; not stored in the checkpoint, state it at export"
