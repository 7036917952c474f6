"""What data are read from, and shapes of inputs: checked before anything is read.

Nothing here imports torch or numpy, so that a mistyped path is reported at once.
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from sepconvert.base.errors import SepconvertError
from sepconvert.factorize.geometry import MAX_INPUT_ELEMENTS
from sepconvert.files.callables import check_callable


def check_data(spec: str, parameter: str, targets: str | None = None) -> None:
    """Raise `SepconvertError` unless the data are there that a parameter names, and their targets.

    Args:
        spec: a file, a folder, or `pkg.mod:callable` or `file.py:callable`, which is not imported.
        parameter: name of the parameter that `spec` was passed as, for error messages.
        targets: a folder of masks or pictures, for images in the folder `spec`.
    """
    if not spec:
        raise SepconvertError(f"`{parameter}`: is empty; expected an .npz file, a folder or pkg.mod:callable")
    path = Path(spec)
    if not (path.is_dir() or path.is_file()):
        if ":" not in spec or path.suffix == ".npz":
            raise SepconvertError(
                f"`{parameter}` {spec}: there is no such file or folder; expected an .npz file, a folder of "
                "class folders with images, or pkg.mod:callable that returns a DataLoader"
            )
        check_callable(spec, parameter)
    if targets is None:
        return
    if not path.is_dir():
        raise SepconvertError(
            f"`targets` {targets}: is for images in a folder, and `{parameter}` is {spec}, which holds its "
            "own targets (y); leave `targets` out, or pass the folder of the images"
        )
    if not Path(targets).is_dir():
        raise SepconvertError(
            f"`targets` {targets}: there is no such folder; pass the one that holds a mask or a picture for "
            "each image, of the same name"
        )


def parse_input_shape(text: str) -> tuple[int, ...]:
    """Parse the shape of one sample, without the batch dimension: `"3x224x224"` becomes `(3, 224, 224)`.

    Raises:
        SepconvertError: the text is no such shape, or the sample has too many elements.
    """
    sizes = text.strip().lower().replace("×", "x").split("x")
    if not all(re.fullmatch(r"[0-9]{1,9}", size.strip()) for size in sizes):
        raise SepconvertError(f"`input_shape` {text!r}: expected sizes joined by x, such as 3x224x224")
    shape = tuple(int(size) for size in sizes)
    if not is_sensible(shape):
        raise SepconvertError(
            f"`input_shape` {text!r}: sizes must be at least 1, their product at most {MAX_INPUT_ELEMENTS}; "
            "give the shape of one sample, such as 3x224x224"
        )
    return shape


def is_sensible(shape: Sequence[object], most: int = MAX_INPUT_ELEMENTS) -> bool:
    """Return whether a shape consists of whole numbers from 1, of at most `most` elements together."""
    sizes = [size for size in shape if isinstance(size, int) and size >= 1]
    return len(sizes) == len(shape) and math.prod(sizes) <= most
