"""Modules with Transformer Engine's parameter names, made of torch and Megatron-Core's own linear layers.

The tests hold them to the names and checkpoint keys that extensions/transformer_engine.py gives, so that one spec call,
one weight mapping and one checkpoint serve the CPU and the GPU.
"""
