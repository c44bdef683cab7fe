"""What a cached step spends its time on, as few passes over memory: in Triton, and in plain PyTorch.

``select.kernels_for`` is the one place that chooses between them, by device.
"""
