"""What an inspection found in text: a verdict, and the layers that are nearest to an exact structure."""

from collections.abc import Sequence

from tabulate import tabulate

from sepconvert.base.errors import some_of
from sepconvert.base.notes import Note, ReasonCode, info
from sepconvert.report.text.numbers import (
    Document,
    duration_text,
    fold,
    percent_text,
    ratio_text,
    written_count,
    written_size,
)
from sepconvert.report.text.tables import (
    change_text,
    coded,
    kernel_text,
    layer_table,
    reasons,
    structure_table,
    text_table,
)

_NEAREST = 10  # layers in the short table

_HEADERS = ("layer", "kernel", "nearest structure", "rank", "error", "MACs")


def verdict(layers: Sequence[Document]) -> Note:
    """Return how many convolutions separate exactly, what it saves, and what to do next."""
    found = [layer for layer in layers if layer["reason_code"] != ReasonCode.UNFOLLOWED]
    if not found:
        return info("The model runs no convolution on these inputs; pass one that does.")
    converted = [layer for layer in found if layer["decision"] == "converted"]
    before, after = (sum(layer["macs"][side] for layer in found) for side in (0, 1))
    count = f"{len(converted)} of {len(found)} convolution{'s' * (len(found) > 1)}"
    if converted:
        total = f"{written_count(before)} MACs to {written_count(after)}"
        saved = f", {ratio_text(before / after)} fewer" if after else ""
        return info(
            f"{count} separate{'s' * (len(converted) == 1)} exactly, which takes all of them from {total}"
            f"{saved}: convert the model in `mode` exact."
        )
    near = _by_nearness(found)
    if not near:
        return info(f"{count} can be replaced, for the reasons below.")
    best = _best(near[0])
    return info(
        f"{count} separate exactly. The nearest is {near[0]['name']}: rank {max(best['paying_rank'], 1)} of "
        f"structure {best['scheme']} leaves an error of {percent_text(best['best_relative_error'], 1)} % of "
        "its kernel. `mode` auto, with `calib` and `data`, may find approximations that pay at a small "
        "loss of accuracy."
    )


def table(layers: Sequence[Document], *, all: bool = False) -> str:
    """Return the layers that separate or are nearest to it, and below them why others do not; or all."""
    if all:
        return "\n".join([layer_table(layers), "", structure_table(layers)])
    rows, below = _nearest(layers)
    above = [text_table(rows, _HEADERS, [20, None, 23, None, None, None])] if rows else []
    return "\n".join([*above, *[""] * bool(above and below), *map(fold, below)])


def page(layers: Sequence[Document]) -> str:
    """Return the verdict, and what `table` returns, as HTML."""
    rows, below = _nearest(layers)
    shown = tabulate(rows, _HEADERS, tablefmt="html", disable_numparse=True) if rows else ""
    return "".join([_division(str(verdict(layers))), shown, *map(_division, below)])


def outlook_verdict(outlook: Document) -> str:
    """Return how many layers and forms a conversion would try, and what time and memory it may take."""
    layers = [layer for layer in outlook["layers"] if layer["forms"]]
    if not layers:
        return "No convolution may be replaced, for the reasons below."
    forms = sum(sum(layer["forms"].values()) for layer in layers)
    low, high = (duration_text(seconds) for seconds in outlook["seconds"])
    images = ", ".join(f"{count:,} {name}" for name, count in outlook["images"].items())
    more = f", {' and '.join(outlook['uncounted'])} not counted," if outlook["uncounted"] else ""
    return (
        f"{forms} forms of {len(layers)} of {len(outlook['layers'])} convolutions would be tried, in about "
        f"{low} to {high}{more} and {written_size(outlook['bytes'])} of memory (images: {images})."
    )


def outlook_table(outlook: Document) -> str:
    """Return the numbers of ranks to try of each structure, and below them why layers are kept.

    Layers of which the same is tried share a row.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer in outlook["layers"]:
        forms = tuple(f"{scheme} {count}" for scheme, count in layer["forms"].items())
        groups.setdefault((written_count(layer["macs"]), *forms), []).append(layer["name"])
    rows = [[some_of(names, 2), macs, ", ".join(forms)] for (macs, *forms), names in groups.items() if forms]
    headers = ["layers", "MACs", "structures, and numbers of their ranks"]
    lines = [text_table(rows, headers, [26, None, 42])] if rows else []
    kept = [layer for layer in outlook["layers"] if not layer["forms"]]
    lines += map(fold, reasons(kept, most=6, otherwise="no form has fewer MACs"))
    return "\n".join(lines)


def _nearest(layers: Sequence[Document]) -> tuple[list[list[str]], list[str]]:
    """Return a row for each of the nearest layers, and sentences on the others."""
    near = _by_nearness(layers)
    rest = len(near) - _NEAREST
    below = [f"{rest} others are further from any structure (`all` lists them)."] if rest > 0 else []
    below += reasons([layer for layer in layers if not layer["structures"]], most=6)
    return [_row(layer) for layer in near[:_NEAREST]], below


def _division(text: str) -> str:
    return f"<div>{coded(text)}</div>"


def _by_nearness(layers: Sequence[Document]) -> list[Document]:
    """Return the layers that have structures: those that separate, and then the others by their error."""
    with_structures = [layer for layer in layers if layer["structures"]]
    return sorted(
        with_structures,
        key=lambda layer: (
            layer["decision"] != "converted",
            0.0 if layer["decision"] == "converted" else _best(layer)["best_relative_error"],
            layer["macs"][1] - layer["macs"][0],
        ),
    )


def _best(layer: Document) -> Document:
    """Return the structure that a layer is converted to, or the one whose kernel is nearest to its own."""
    chosen = [each for each in layer["structures"] if each["scheme"] == layer["scheme"]]
    nearest: Document = min(chosen or layer["structures"], key=lambda each: each["best_relative_error"])
    return nearest


def _row(layer: Document) -> list[str]:
    best = _best(layer)
    rank, error = max(best["paying_rank"], 1), f"{best['best_relative_error']:.1e}"
    if layer["decision"] == "converted":
        rank, error = best["rank"], "exact"
    return [
        layer["name"],
        kernel_text(layer),
        best["scheme"],
        f"{rank} of {best['full_rank']}",
        error,
        change_text(*layer["macs"]),
    ]
