"""Files of pictures: their type, and how a figure is written."""

import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from jclt.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH, MAX_DOTS = 200, 60_000  # along a side of the picture; matplotlib cannot draw more than 65,536


def find_picture_type(path: Path) -> str:
    """The file type that the name ends in, PNG without an ending."""
    from matplotlib.figure import Figure

    kind, known = path.suffix.removeprefix(".").lower() or "png", Figure().canvas.get_supported_filetypes()
    if kind not in known:
        raise UserError(f"{path}: cannot draw '{kind}', expected one of {', '.join(sorted(known))}")
    return kind


def save_figure(figure: "Figure", file: Path | io.BytesIO, kind: str, dots_per_inch: int = DOTS_PER_INCH) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph .* missing")  # scripts that the font lacks
        figure.savefig(file, dpi=min(dots_per_inch, MAX_DOTS / max(figure.get_size_inches())), format=kind)
