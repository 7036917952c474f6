"""Options of the ONNX files that are written, as a value."""

from collections.abc import Sequence
from dataclasses import dataclass

from sepconvert.base.errors import SepconvertError, quoted
from sepconvert.base.options.declared import check_options, option

LEAST_OPSET = 18  # of torch's exporter, whose operators are of that version


@dataclass(frozen=True)
class Export:
    """Names and opset of the ONNX files that a model is exported to.

    An ONNX file that is converted keeps its own.
    """

    input_names: Sequence[str] | None = option(
        "Names of the inputs in ONNX files, in order and joined by commas.",
        joined=True,
        metavar="NAME,NAME…",
        shown_default="the arguments of the model's forward",
    )
    output_names: Sequence[str] | None = option(
        "Names of the outputs in ONNX files, in order and joined by commas.",
        joined=True,
        metavar="NAME,NAME…",
        shown_default="the keys of a mapping or fields of a dataclass, else output or output_0, output_1, …",
    )
    opset: int | None = option(
        "Opset of ONNX files.",
        low=LEAST_OPSET,
        whole=True,
        metavar="N",
        shown_default="that of torch's exporter",
    )

    def __post_init__(self) -> None:
        """Check the range, and that each name is one, and given once."""
        check_options(self)
        for name in ("input_names", "output_names"):
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, list | tuple) or not all(isinstance(each, str) for each in value):
                raise SepconvertError(f"`{name}`: expected a list of names, got {quoted(value)}")
            if not value or not all(each and each == each.strip() for each in value):
                raise SepconvertError(
                    f"`{name}`: a name is empty, or begins or ends with a space; got {quoted(value)}"
                )
            object.__setattr__(self, name, tuple(value))
        names = [*(self.input_names or ()), *(self.output_names or ())]
        if twice := next((each for each in names if names.count(each) > 1), None):
            raise SepconvertError(
                f"`input_names`, `output_names`: {twice} is given twice; name each value otherwise"
            )

    def given(self) -> list[str]:
        """Return the names of the options that are not left to their defaults."""
        return [name for name in ("input_names", "output_names", "opset") if getattr(self, name) is not None]
