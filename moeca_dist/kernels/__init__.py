"""What a cached step spends its time on, as few passes over memory: Triton kernels and their plain-PyTorch references.

``select.kernels_for`` is the one place that chooses between them, by device.
"""
