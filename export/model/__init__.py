"""The reference: ChatVLA-2 in PyTorch. Every parity check of this project compares with it."""
