"""Layers of a page: what became of each, its factors, and the arithmetic for each byte that it moves."""

from sepconvert.report.text.numbers import Document, three_digits, written_count

_MIB = 2**20


def decision_text(layer: Document) -> str:
    """Return what became of a layer, and whether the result is exact."""
    if layer["decision"] == "kept":
        return "kept"
    if layer["exact"]:
        return "converted, exact"
    return "converted" if layer["approximation"] is not None else "converted, within tolerance"


def kernel_text(kernel: Document) -> str:
    """Return size, channels and groups of a convolution, such as `3×1 64→40` or `3×3 64→64 depthwise`."""
    size = "×".join(map(str, kernel["kernel_size"]))
    channels = f"{kernel['in_channels']}→{kernel['out_channels']}"
    if kernel["groups"] == 1:
        return f"{size} {channels}"
    if kernel["groups"] == kernel["in_channels"]:
        return f"{size} {channels} depthwise"
    return f"{size} {channels}, {kernel['groups']} groups"


def factor_rows(layer: Document) -> list[tuple[str, str]]:
    """Return the convolutions that replace a layer, and the MACs of each.

    They are unknown of reports of version 0.1.0.
    """
    return [(kernel_text(each), f"{written_count(each['macs'])} MACs") for each in layer.get("factors", ())]


def traffic(layer: Document) -> str:
    """Return the bytes that a layer moves in a run, before and after; empty where that is unknown."""
    if layer["execution"] is None:
        return ""
    before, after = (f"{moved / _MIB:.2f}" for moved in layer["execution"]["bytes_moved"])
    return f"{before} → {after} MiB"


def intensity(layer: Document, batch: int) -> str:
    """Return the MACs for each byte that a layer moves in a run of a batch, before and after."""
    if layer["execution"] is None or not all(layer["execution"]["bytes_moved"]):
        return ""
    moved = zip(layer["macs"], layer["execution"]["bytes_moved"], strict=True)
    before, after = (three_digits(batch * macs / each) for macs, each in moved)
    return f"{before} → {after} MACs/byte"
