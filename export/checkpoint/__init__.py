"""Checkpoints as they lie on disk: read strictly, one tensor at a time; written as a stream."""
