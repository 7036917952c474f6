"""Results of the public functions: values that print, and that can be saved, drawn and replayed."""

import base64
import html
import io
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from torch import Tensor, nn

from sepconvert.base.errors import SepconvertError
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.onnx.graph.surgery import converted_model
from sepconvert.files.results import TemporaryFolder
from sepconvert.measure.latency import Speedup
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.measure.profiling import Profile
from sepconvert.pipeline.stages import checked_place, result_folder
from sepconvert.planning.conversion import LayerReport, Verification
from sepconvert.report.files import write_documents
from sepconvert.report.pictures.exhibits import Exhibits
from sepconvert.report.text import inspection
from sepconvert.report.text.numbers import fold
from sepconvert.report.text.tables import overview, summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Plan(dict[str, Any]):
    """The content of a `plan.json`, with the weights of the factors that it names.

    `sepconvert.apply` replays it. `weights` are the tensors of the converted model, by their names in its
    state.
    """

    def __init__(self, document: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
        super().__init__(document)
        self.weights = weights

    def __repr__(self) -> str:
        converted = sum(layer["decision"] == "converted" for layer in self["layers"])
        return f"<plan of mode {self['mode']}: {converted} of {len(self['layers'])} layers converted>"


@dataclass(frozen=True, repr=False)
class ConversionResult:
    """The outcome of a conversion; it prints as a short table.

    `model` is a converted copy of the user's model; of an ONNX file, a module that ONNX Runtime runs the rest
    of, and `onnx_model` is the converted file. `plan` and `report` are the JSON documents that the
    command line writes; `sepconvert.apply` replays the plan. The other fields hold the same results typed:
    profiles of both models, `speedup` (`.median`, `.ci95`), `accuracy` (`.drop` in the metric's unit,
    `.ci95`, `.metric`), one report a convolution, and the verification. They are None in all processes but
    the main one. `exhibits` holds kernels and images of the HTML report, and `files` the folder of all files,
    which is removed with the result if it is a temporary one.
    """

    model: nn.Module
    plan: Plan
    report: dict[str, Any]
    original: Profile | None = None
    converted: Profile | None = None
    speedup: Speedup | None = None
    accuracy: MetricDelta | None = None
    layers: tuple[LayerReport, ...] = ()
    verification: Verification | None = None
    exhibits: Exhibits = field(default_factory=Exhibits)
    files: Path | TemporaryFolder | None = None

    @property
    def onnx_model(self) -> onnx.ModelProto | None:
        """The converted ONNX model, with all its data, where the original was one; else None."""
        return converted_model(self.model, embedded=True) if isinstance(self.model, OnnxNetwork) else None

    def __repr__(self) -> str:
        return overview(self.report) if self.report else "<a conversion that another process reports>"

    def summary(self) -> str:
        """Return the report as the command line prints it: the verdict, costs, notes, and the curve."""
        return summary(self._reported())

    def plot(self) -> "Figure":
        """Return the trade-off curve as a matplotlib figure: what each plan gains, and what it costs.

        Raises:
            SepconvertError: the mode is exact, which has no other plans.
        """
        from sepconvert.report.pictures import curve, drawing  # which import matplotlib

        report = self._reported()
        if report["approximation"] is None:
            raise SepconvertError("plot: exact mode has no curve; convert in the modes approx or auto")
        return drawing.on_paper(curve.drawn(report))

    def _repr_html_(self) -> str:
        """Return the verdict, a table of costs, and the curve, for a notebook."""
        if not self.report:
            return html.escape(repr(self))
        parts = [overview(self.report, style="html")]
        if self.report["approximation"] is not None:
            picture = io.BytesIO()
            self.plot().savefig(picture, format="svg")
            data = base64.b64encode(picture.getvalue()).decode()
            parts.append(f'<img src="data:image/svg+xml;base64,{data}" alt="trade-off curve">')
        return "\n".join(parts)

    def to_html(self) -> str:
        """Return the report as a page that loads nothing from elsewhere."""
        from sepconvert.report.html import render_html  # which imports matplotlib, for plots

        return render_html(self._reported(), self.exhibits)

    def save(self, folder: str | Path) -> Path:
        """Write the files that the command line writes, but for its run.toml, and return their folder.

        Args:
            folder: an empty directory, made if needed.

        Raises:
            SepconvertError: there are no files, as the conversion was checked in torch alone, or the folder
                cannot be written.
        """
        report = self._reported()
        if self.files is None:
            raise SepconvertError(
                "save: the conversion was checked in torch alone, which exports no files; convert with "
                "`check` onnx"
            )
        source = self.files if isinstance(self.files, Path) else self.files.path
        if not source.is_dir():
            raise SepconvertError(
                f"save: {source}, which holds the files of the conversion, is gone; convert anew"
            )
        with result_folder(checked_place(Path(folder))) as place:
            mode = place.stat().st_mode  # that of a temporary folder admits its owner alone
            shutil.copytree(source, place, copy_function=shutil.copyfile, dirs_exist_ok=True)
            place.chmod(mode)
            write_documents(report, self.plan, place, self.exhibits)
        return place

    def _reported(self) -> dict[str, Any]:
        if not self.report:
            raise SepconvertError(
                "the result is of a process that does not report; take that of the main process, of rank 0"
            )
        return self.report


@dataclass(frozen=True, repr=False)
class Inspection:
    """A report on each convolution, from `sepconvert.inspect`; it prints as a verdict and a table."""

    layers: tuple[LayerReport, ...]

    def __repr__(self) -> str:
        return f"{fold(self.verdict)}\n\n{self.table()}"

    def _repr_html_(self) -> str:
        return inspection.page(self.to_json()["layers"])

    @property
    def verdict(self) -> str:
        """One sentence: how many convolutions separate exactly, what it saves, and what to do next."""
        return str(inspection.verdict(self.to_json()["layers"]))

    def table(self, *, all: bool = False) -> str:
        """Return the layers that are nearest to an exact structure, or all, with their reasons."""
        return inspection.table(self.to_json()["layers"], all=all)

    def to_json(self) -> dict[str, Any]:
        """Return `{"layers": […]}`, each with every structure's rank, best error and singular values."""
        return {"layers": [report.to_json() for report in self.layers]}
