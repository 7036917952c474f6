"""What an inspection found in text: a verdict, and the layers that are nearest to an exact structure."""

from collections.abc import Sequence
from itertools import chain

from sepconvert.base.notes import Note, ReasonCode, info
from sepconvert.report.text.numbers import (
    Document,
    duration_text,
    fold,
    ratio_text,
    written_count,
    written_size,
)
from sepconvert.report.text.tables import change_text, kernel_text, layer_table, structure_table, text_table

_NEAREST = 10  # layers in the short table


def verdict(layers: Sequence[Document]) -> Note:
    """Return how many convolutions separate exactly, what it saves, and what to do next."""
    found = [layer for layer in layers if layer["reason_code"] != ReasonCode.UNFOLLOWED]
    if not found:
        return info("The model runs no convolution on these inputs; pass one that does.")
    converted = [layer for layer in found if layer["decision"] == "converted"]
    before, after = (sum(layer["macs"][side] for layer in found) for side in (0, 1))
    count = f"{len(converted)} of {len(found)} convolution{'s' * (len(found) > 1)}"
    if converted:
        saved = ratio_text(before / after) if after else "infinitely"
        return info(
            f"{count} separate exactly, which leaves {saved} fewer MACs to all of them: convert the model in "
            "`mode` exact."
        )
    near = _by_nearness(found)
    if not near:
        return info(f"{count} separate: none can be replaced, for the reasons below.")
    best = _best(near[0])
    return info(
        f"{count} separate exactly. The nearest, {near[0]['name']}, is {best['best_relative_error']:.1%} off "
        f"a {best['scheme']} form of rank {max(best['paying_rank'], 1)}. `mode` auto, with `calib` and "
        "`data`, finds approximations that pay at a small loss of accuracy."
    )


def table(layers: Sequence[Document], *, all: bool = False) -> str:
    """Return the layers that separate or are nearest to it, and below them why others do not; or all."""
    if all:
        return "\n".join([layer_table(layers), "", structure_table(layers)])
    near = _by_nearness(layers)
    shown = near[:_NEAREST]
    rows = [_row(layer) for layer in shown]
    headers = ["layer", "kernel", "nearest structure", "rank", "error", "MACs"]
    lines = [text_table(rows, headers, [20, None, 23, None, None, None])] if rows else []
    if len(near) > len(shown):
        lines.append(f"{len(near) - len(shown)} others are further from any structure (`all` shows them).")
    lines += _reasons([layer for layer in layers if not layer["structures"]])
    return "\n".join(chain(lines[:1], [""] * bool(rows and lines[1:]), lines[1:]))


def outlook_verdict(outlook: Document) -> str:
    """Return how many layers and forms a conversion would try, and what time and memory it may take."""
    layers = [layer for layer in outlook["layers"] if layer["forms"]]
    if not layers:
        return "No convolution may be replaced, for the reasons below."
    forms = sum(sum(layer["forms"].values()) for layer in layers)
    low, high = (duration_text(seconds) for seconds in outlook["seconds"])
    images = ", ".join(f"{count:,} {name}" for name, count in outlook["images"].items())
    return (
        f"{forms} forms of {len(layers)} of {len(outlook['layers'])} convolutions would be tried, in about "
        f"{low} to {high} and {written_size(outlook['bytes'])} of memory (images: {images})."
    )


def outlook_table(outlook: Document) -> str:
    """Return the numbers of ranks to try of each structure, and below them why layers are kept.

    Layers of which the same is tried share a row.
    """
    groups: dict[tuple[str, ...], list[str]] = {}
    for layer in outlook["layers"]:
        forms = tuple(f"{scheme} {count}" for scheme, count in layer["forms"].items())
        groups.setdefault((written_count(layer["macs"]), *forms), []).append(layer["name"])
    rows = [[_some(names, 2), macs, ", ".join(forms)] for (macs, *forms), names in groups.items() if forms]
    headers = ["layers", "MACs", "structures, and numbers of their ranks"]
    lines = [text_table(rows, headers, [26, None, 42])] if rows else []
    lines += _reasons([layer for layer in outlook["layers"] if not layer["forms"]], "no form has fewer MACs")
    return "\n".join(lines)


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
    rank = best["rank"] if layer["decision"] == "converted" else max(best["paying_rank"], 1)
    error = "exact" if layer["decision"] == "converted" else f"{best['best_relative_error']:.1e}"
    macs = (
        change_text(*layer["macs"]) if layer["decision"] == "converted" else written_count(layer["macs"][0])
    )
    return [layer["name"], kernel_text(layer), best["scheme"], f"{rank} of {best['full_rank']}", error, macs]


def _reasons(layers: Sequence[Document], otherwise: str = "") -> list[str]:
    """Return a line for each reason to keep layers, with their names."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        reasons.setdefault(layer["reason"] or otherwise, []).append(layer["name"])
    return [fold(f"{_some(names)}: {text}.") for text, names in reasons.items()]


def _some(names: Sequence[str], most: int = 6) -> str:
    """Return names joined by commas, the first ones and a count where there are many."""
    rest = len(names) - most
    return ", ".join(names) if rest <= 1 else f"{', '.join(names[:most])} and {rest} others"
