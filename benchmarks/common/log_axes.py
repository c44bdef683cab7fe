"""Logarithmic axes that span little more than a decade."""

from matplotlib.axes import Axes


def plain_log(axes: Axes) -> None:
    """The y axis, with plain numbers in place of powers of ten, also between them."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
