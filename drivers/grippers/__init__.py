"""Grippers that are devices of their own."""
