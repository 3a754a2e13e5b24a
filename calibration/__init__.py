"""Quantization calibration sets, camera intrinsics, hand-eye and latency calibration."""
