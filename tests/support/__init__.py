"""Tiny geometries and inputs that several tests share."""
