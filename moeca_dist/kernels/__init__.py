"""The small operators on which a cached step spends its time, with few passes over memory: in PyTorch and in Triton.

``select.kernels_of`` is the one place that chooses between them, by the name in ``model.kernels``.
"""
