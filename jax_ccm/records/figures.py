"""Figures of matplotlib: legends that fit, and files."""

from __future__ import annotations

import io
import os
from typing import Any

from jax_ccm.records import paths


def save(figure: Any, path: str | os.PathLike, **options: Any) -> None:
    """Writes a figure of matplotlib as PNG."""
    # By way of memory, since matplotlib opens no URL of a bucket.
    data = io.BytesIO()
    figure.savefig(data, format="png", **options)
    paths.of(path).write_bytes(data.getvalue())


def legend_below(figure: Any, *, most: int, loc: str = "outside lower center", **options: Any) -> None:
    """Puts a legend below a figure, in as many columns as its width has room for.

    Args:
      figure: of matplotlib, with a layout of "constrained"; what is drawn in it is complete.
      most: columns, at most.
      loc: where it stands.
      **options: of ``figure.legend``, such as ``handles`` and ``fontsize``.
    """
    for columns in range(most, 0, -1):
        legend = figure.legend(loc=loc, ncols=columns, frameon=False, **options)
        # Its size is known once it is drawn.
        figure.draw_without_rendering()
        if legend.get_window_extent().width <= figure.bbox.width or columns == 1:
            return
        legend.remove()
