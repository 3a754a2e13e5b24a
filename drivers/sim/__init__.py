"""Simulated worlds behind simulated cameras and arms: numpy only, no clocks, no threads."""
