"""Cameras: RealSense, ZED, any V4L2 device, recordings; and what turns their time into host time."""
