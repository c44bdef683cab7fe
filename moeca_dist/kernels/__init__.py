"""What a cached step spends its time on, as few passes over memory: in plain PyTorch, and in Triton.

``select.kernels_of`` is the one place that chooses between them, by the name in ``model.kernels``.
"""
