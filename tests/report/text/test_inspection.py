"""An inspection in text: the layers nearest to a structure first, and a reason for each other."""

from sepconvert.report.text.inspection import outlook_table, outlook_verdict, table, verdict


def layer(name, *errors, decision="kept", reason="no exact structure", code="full-rank", macs=(1000, 1000)):
    kernel = {"kernel_size": [3, 3], "in_channels": 8, "out_channels": 16, "groups": 1}
    return {
        "name": name, "kind": "Conv2d", "kernel": kernel, "decision": decision, "reason": reason,
        "reason_code": code, "macs": list(macs), "scheme": "spatial-vh" if decision == "converted" else None,
        "structures": [
            {"scheme": scheme, "rank": 24, "full_rank": 24, "paying_rank": 5, "best_relative_error": error}
            for scheme, error in zip(("spatial-vh", "input-subspace"), errors, strict=False)
        ],
    }  # fmt: skip


LAYERS = [
    layer("far", 0.5, 0.75), layer("near", 0.25, 0.125),
    layer("named", reason="not selected", code="not-selected"), layer("unfold", code="unfollowed"),
]  # fmt: skip


def names(text):
    return [line.split()[0] for line in text.splitlines()[2:] if line.startswith(("far", "near", "sep"))]


def test_nothing_separates():
    assert str(verdict(LAYERS)) == (
        "0 of 3 convolutions separate exactly. The nearest is near: rank 5 of structure input-subspace "
        "leaves an error of 12.5 % of its kernel. `mode` auto, with `calib` and `data`, may find "
        "approximations that pay at a small loss of accuracy."
    )
    assert names(table(LAYERS)) == ["near", "far"]
    assert "named: not selected." in table(LAYERS)


def test_what_separates_comes_first():
    found = [*LAYERS, layer("sep", 1e-8, 0.5, decision="converted", macs=(1000, 250))]
    assert str(verdict(found)) == (
        "1 of 4 convolutions separates exactly, which takes all of them from 4k MACs to 3.25k, 1.23× fewer: "
        "convert the model in `mode` exact."
    )
    assert names(table(found)) == ["sep", "near", "far"]
    assert "exact" in table(found).splitlines()[2]


def test_long_inspections_are_cut():
    many = [layer(f"near{number}", 0.25 + number / 1000) for number in range(30)]
    text = table(many)
    assert len(names(text)) == 10
    assert "20 others are further from any structure (`all` lists them)." in text


def test_no_convolution():
    assert "runs no convolution" in str(verdict([]))
    assert "0 of 1 convolution can be replaced" in str(verdict([layer("named", reason="not selected")]))


def test_an_outlook_groups_layers_alike():
    layers = [
        {"name": name, "macs": 2_000_000, "forms": {"spatial-vh": 3}, "reason": None} for name in "abcd"
    ]
    kept = {"name": "stem", "macs": 100, "forms": {}, "reason": "not selected"}
    outlook = {
        "layers": [*layers, kept], "seconds": [30.0, 120.0], "bytes": int(2e9),
        "images": {"fitted": 1280, "held out": 256, "scored": 5000},
        "uncounted": [],
    }  # fmt: skip
    assert outlook_verdict(outlook) == (
        "12 forms of 4 of 5 convolutions would be tried, in about 30 s to 120 s and 2.0 GB of memory "
        "(images: 1,280 fitted, 256 held out, 5,000 scored)."
    )
    text = outlook_table(outlook)
    assert "a, b and 2 more" in text
    assert text.endswith("stem: not selected.")
    assert outlook_verdict({**outlook, "layers": [kept]}).startswith("No convolution may be replaced")
