"""Switches that must be held, or must not be pressed, for a rig to move.

They are read by software, every 20 ms, and are no rated enabling devices: an emergency stop that cuts the power belongs
beside each. Whatever is not certain counts as released: no connection, no answer, an answer of before.
"""
