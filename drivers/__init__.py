"""Cameras, arms, grippers and simulators, each behind a small protocol; vendor libraries are imported lazily."""
