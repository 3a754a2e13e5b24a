"""Devices in software that speak the real protocols, so that the real vendor libraries run where no hardware is.

Nothing here shows how a real arm moves, how its firmware fails or how its bus is timed.
"""
