"""Rigs that come along: one YAML file each."""
