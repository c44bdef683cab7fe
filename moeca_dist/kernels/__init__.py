"""What a cached step and coded rows spend their time on, as few passes over memory: in Triton, and in plain PyTorch.

``select.kernels_for`` is the one place that chooses between them, by device.
"""
