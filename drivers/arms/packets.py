"""When a packet of a robot with a clock of its own was sent, by the host's clock."""


class PacketClock:
    """Stamps packets that a library hands over from its memory. ``sequence``: the robot's time of the newest, ms."""

    def __init__(self, now_ns: int) -> None:
        self.looked_ns = now_ns
        self.captured_ns = 0
        self.sequence = -1

    def look(self, robot_ms: int, asked_ns: int, now_ns: int) -> None:
        """Take note of the packet found between ``asked_ns`` and ``now_ns``; the stamp is never younger than it.

        It had not come by the look before. And the robot's clock says how much later than the one before it was sent.
        """
        if robot_ms != self.sequence:
            since = 1_000_000 * (robot_ms - self.sequence)
            later = self.captured_ns + since if self.captured_ns and 0 < since < 10**9 else 0
            self.captured_ns = min(max(self.looked_ns, later), now_ns)
            self.sequence = robot_ms
        self.looked_ns = asked_ns

    def waited(self, robot_ms: int, asked_ns: int) -> None:
        """Take note of a packet that was waited for from ``asked_ns`` on."""
        self.captured_ns, self.sequence, self.looked_ns = asked_ns, robot_ms, asked_ns
