"""Checkpoint -> bundle. Runs on a workstation: torch, transformers, onnx and quantizers live here."""
