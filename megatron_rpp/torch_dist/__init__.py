"""Megatron's torch_dist checkpoints as files.

Nothing in a checkpoint is called or imported while it is read.
"""
