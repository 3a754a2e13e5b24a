"""Seams cannot be told from the motion around them: the benchmark's measure, small."""

import pytest

from chatvla_edge.benchmarks.seams import Setting, measure

SETTING = Setting(duration=12.0)


@pytest.mark.parametrize("mode", ["blend", "ensemble", "rtc"])
def test_velocity_steps_near_seams_are_those_of_the_motion(mode):
    found = measure(SETTING, mode, seeds=2, phases=3)
    # Two short tapes resolve the ratio to some per cent (the control, mode "tape", scatters as much); the benchmark
    # itself resolves it to one.
    assert {signal: result["ratio"] < 1.08 for signal, result in found.items()} == {"fused": True, "sent": True}


def test_switching_is_what_it_is_compared_with():
    assert measure(SETTING, "switch", seeds=1, phases=2)["fused"]["ratio"] > 20
