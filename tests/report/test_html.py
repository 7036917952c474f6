"""The page is well formed, needs nothing from elsewhere, and takes names for text."""

import base64
import io
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from profiles import profile, speedup
from report.conftest import MACHINE as RECORDED
from report.int8_forms import deployed

from sepconvert.base.notes import NoteLevel, info, warning
from sepconvert.measure.comparison import Comparison, Delta
from sepconvert.measure.metrics.evaluation import MetricDelta
from sepconvert.measure.metrics.metric import MetricValue
from sepconvert.measure.metrics.named import named
from sepconvert.measure.metrics.uncertainty import MeanDrop
from sepconvert.report.html import render_comparison, render_html
from sepconvert.report.pictures.drawing import STAGE_COLOURS
from sepconvert.report.pictures.exhibits import Exhibits, KernelPair
from sepconvert.report.pictures.samples import ChangedSample, ChangedSamples
from sepconvert.report.text import glossary
from sepconvert.report.text.sentences import causes, sentences

MACHINE = {**RECORDED, "threads": 1}


VOID = {"meta", "br", "img", "input"}


class Page(HTMLParser):
    """Elements, attributes and text of a page whose elements must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.open: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text += data


def plain(note: object) -> str:
    """A sentence as a page shows it, in which parameters are marked up."""
    return str(note).replace("`", "")


def widths(page: Page) -> list[float]:
    styles = [value for name, value in page.attributes if name == "style"]
    return [float(width) for style in styles for width in re.findall(r"^width:([\d.]+)%$", style)]


def test_the_page_says_what_the_document_says(document):
    text = Page(render_html(document)).text
    for expected in [
        "models/net.pt", "2.00×", "2.01M → 1.01M", "4.00×", "1.50× as fast [1.40, 1.60]", "2,012,345",
        "0.25 pp", "stem.conv", "large.conv", "spatial-vh, 2", "4.5e-08", "0.250 → 0.125", "rank 2 of 24",
        *map(plain, sentences(document)),
    ]:  # fmt: skip
        assert expected in text
    assert "~" not in text.partition("What the words mean")[0]


def test_noise_is_marked(document):
    document["delta"]["latency_speedup"]["significant"] = False
    text = Page(render_html(document)).text
    assert "1.50× as fast [1.40, 1.60]\N{NO-BREAK SPACE}~" in text
    assert "1.50× [1.40, 1.60] ~ within noise" in text


def test_noise_is_marked_in_layers_and_on_the_curve(approximate):
    approximate["layers"][1]["latency_speedup"] |= {
        "median": 1.02,
        "ci95": [0.97, 1.05],
        "significant": False,
    }
    with_times(approximate, [None, 0.25, 0.75])[1]["latency_speedup"]["significant"] = False
    text = Page(render_html(approximate)).text
    assert "1.02× [0.97, 1.05] ~ within noise" in text
    assert "1.25× [1.20, 1.30] ~ within noise" in text
    assert "2.25× [1.20, 1.30]" in text
    assert "2.25× [1.20, 1.30] ~" not in text


def test_accuracy_before_and_after_is_a_tile(document, bare):
    text = Page(render_html(document)).text.replace("\n", "")
    assert "accuracy (top-1)96.75 → 96.50 %0.25 pp lost [-0.05, 0.55]on 2,000 samples" in text
    assert "accuracy (top-1)" not in Page(render_html(bare)).text


def opening(page: str) -> list[tuple[str, str]]:
    """Tags and classes of what the body of a page begins with, up to the first picture."""
    body = page[page.index("<body>") : page.index("<svg")]
    return re.findall(r'<(header|h1|h2|p|div|figure)(?: class="([^"]*)")?', body)


def test_the_first_screen_is_title_verdict_tiles_and_curve(approximate):
    found = opening(render_html(approximate))
    assert found[:5] == [("header", ""), ("p", "kicker"), ("h1", ""), ("p", "facts"), ("p", "verdict")]
    rest = [(tag, name) for tag, name in found[5:] if name != "tile"]
    assert rest == [
        ("div", "tiles"), ("p", "quiet"), ("h2", ""), ("figure", ""), ("div", "wide"),
    ]  # fmt: skip


def test_the_head_names_model_date_inputs_and_machine(document):
    page = render_html(document)
    assert "<title>net.pt: sepconvert report</title>" in page
    assert "<h1>net.pt</h1>" in page
    facts = re.search(r'<p class="facts">(.*?)</p>', page)[1]
    assert re.sub("<[^>]*>", "|", facts) == (
        "|exact mode||2026-07-17||input 1×8×4×4||float32||AMD EPYC, ONNX Runtime 1.32.0, 2 threads|"
    )


def test_reports_of_an_earlier_version_are_rendered(document):
    for key in ("created", "name", "input_shapes"):
        del document[key]
    for layer in document["layers"]:
        del layer["factors"]
    page = render_html(document)
    assert "<h1>net.pt</h1>" in page
    assert "3×1 8→2" not in page


def test_warnings_stand_above_the_pictures_and_prose_below(approximate):
    approximate["environment"]["threads"] = 99
    text = Page(render_html(approximate)).text
    verdict, *notes = sentences(approximate)
    warnings = [plain(note) for note in notes if note.level is NoteLevel.WARNING]
    others = [plain(note) for note in notes if note.level is NoteLevel.INFO]
    assert warnings
    assert others
    curve, checked = text.index("Trade-off curve"), text.index("What was checked")
    assert text.index(plain(verdict)) < curve
    assert all(text.index(each) < curve for each in warnings)
    assert all(text.index(each) > checked for each in others)


def test_what_is_exact_says_so(document, approximate):
    text = Page(render_html(document)).text
    assert "outputsexact" in text
    assert "converted, exact" in text
    assert "exact4.5e-08" in text  # the error of the weights
    other = Page(render_html(approximate)).text
    assert "outputsexact" not in other
    assert "converted, exact" not in other


def test_layers_stand_with_factors_bytes_and_intensity(document):
    text = Page(render_html(document)).text
    for expected in ("3×1 8→2768 MACs", "1×3 2→161.54k MACs", "1.00 → 0.50 MiB", "1.91 → 0.954 MACs/byte"):
        assert expected in text
    for side in ("original", "converted"):
        document[side]["latency_ms"]["batch"] = 8
    assert "15.3 → 7.63 MACs/byte" in Page(render_html(document)).text


def test_the_deployed_form(document, approximate):
    assert (
        "The deployed form\nconverted.onnx, float32 (5 kB, any batch size)"
        in Page(render_html(document)).text
    )
    text = Page(render_html(deployed(approximate))).text
    assert text.count("The deployed form") == 1
    assert "converted-int8.onnx, int8 (5 kB, any batch size)" in text
    assert text.index("The deployed form") < text.index("Trade-off curve")


def test_the_slowest_runs_are_counted(document):
    text = Page(render_html(document)).text
    # Of 50 runs, those above the 95th percentile; the slowest take 1.1 times the median.
    assert (
        "Not drawn: the slowest 5 % of the runs (original: 3 of 50, up to 1.65 ms; converted: 3 of 50" in text
    )


def test_another_metric_is_a_tile_and_in_the_curve(restored):
    curve = with_times(restored, [0.25, 0.5, 0.75])
    for point in curve[1:]:
        point["drop"]["unit"] = "dB"
    text = Page(render_html(restored)).text.replace("\n", "")
    assert "psnr28.20 → 28.10 dB0.098 dB lost [0.0901, 0.106]on 300 samples" in text
    assert "psnr drop, dB" in text
    assert "0.25 [-0.25, 0.75]" in text
    assert "psnr, dB" in text  # the axis
    assert "top-1" not in text
    assert " pp" not in text


def test_the_verdict_is_there_once(document):
    verdict = plain(sentences(document)[0])
    text = Page(render_html(document)).text
    assert text.index(verdict) < text.index("time per run")
    assert text.count(verdict) == 1


def test_the_page_is_rendered_without_what_was_not_measured(bare):
    text = Page(render_html(bare)).text
    assert "time per run" not in text
    assert "top-1" not in text
    assert "Predictions that changed" not in text
    assert "Where the time goes" not in text
    assert "None" not in text


def test_a_model_without_convolutions(bare):
    bare["layers"] = []
    assert "nothing was converted. The model runs no convolution" in Page(render_html(bare)).text


@pytest.fixture
def exhibits():
    generator = torch.Generator().manual_seed(0)
    kernels = torch.randn(2, 12, 3, 3, generator=generator).double()
    return Exhibits((KernelPair("large.conv", *kernels),), {31: torch.rand(3, 32, 32, generator=generator)})


def test_the_page_needs_nothing_from_elsewhere(document, exhibits):
    page = Page(render_html(document, exhibits))
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.elements)
    assert not {"srcset", "action", "data"} & {name for name, _ in page.attributes}
    images = [value for name, value in page.attributes if name == "src"]
    assert len(images) == 3
    assert all(value.startswith("data:image/png;base64,") for value in images)
    assert all(value.startswith("#") for name, value in page.attributes if name.endswith("href"))
    without_script = re.sub(r"<script>.*</script>", "", render_html(document), flags=re.DOTALL)
    assert not re.search(r"https?:|//|@import|url\((?!#)", without_script)
    assert "fetch" not in render_html(document)


def test_every_picture_has_a_size(document, exhibits):
    page = Page(render_html(document, exhibits))
    sized = [name for name, value in page.attributes if name in ("width", "height") and value]
    pictures = page.elements.count("img") + page.elements.count("svg")
    assert len(sized) >= 2 * pictures
    assert page.elements.count("svg") == 5  # two spectra, the latencies in two widths, and the stages


def test_what_the_pictures_show(document, exhibits):
    text = render_html(document, exhibits)
    images = [
        np.array(Image.open(io.BytesIO(base64.b64decode(found))))
        for found in re.findall(r'src="data:image/png;base64,([^"]*)"', text)
    ]
    image, before, after = images
    assert before.shape == after.shape == (3, 12 * 4 - 1, 4)  # a transparent column between filters
    assert not before[:, 3::4, 3].any()
    largest = int(exhibits.kernels[0].before[0].argmax())
    red, _, blue, opaque = before[largest // 3, largest % 3].astype(int)
    assert red > blue
    assert opaque == 255
    expected = exhibits.images[31].permute(1, 2, 0).numpy()
    stretched = (expected - expected.min()) / (expected.max() - expected.min()) * 255
    assert np.abs(image - stretched).max() <= 1


def test_predictions_that_changed(document, exhibits):
    text = Page(render_html(document, exhibits)).text
    assert "10 of 2,000. Correct before: 6; correct now: 1; wrong both times: 3. Shown: 1." in text
    assert "7 ✓ → 2" in text
    assert "label 7, sample 31" in text
    document["changed_predictions"]["count"] = 0
    assert "Predictions that changed" not in Page(render_html(document, exhibits)).text


@pytest.fixture
def restorations():
    """Two samples of a model that restores pictures."""
    target = torch.full((1, 1, 32, 32), 0.5)
    shown = tuple(
        ChangedSample(index, target, target, target, target + 0.04 / (index + 1), scores)
        for index, scores in ((0, (28.2, 27.5)), (7, None))
    )
    return Exhibits(changed=ChangedSamples(shown, examined=1300))


def test_samples_that_changed_are_shown_with_their_scores(restored, restorations):
    page = Page(render_html(restored, restorations))
    text = " ".join(page.text.split())
    assert "2 of 1,300 that were compared." in text
    assert "sample 0: psnr 28.20 dB → 27.50 dB input target before after difference × 20" in text
    assert "sample 7 input" in text
    assert page.elements.count("img") == 12
    assert {name for name, value in page.attributes if value == "difference × 20"} == {"alt"}
    assert "Samples that changed" not in render_html(restored, Exhibits())
    pictures = page.elements.count("img") + page.elements.count("svg")
    assert (
        len([name for name, value in page.attributes if name in ("width", "height") and value])
        >= 2 * pictures
    )


def test_why_no_samples_are_shown(restored):
    page = render_html(restored, Exhibits(changed=ChangedSamples(reason="a <b>")))
    assert '<p class="warning">Warning: no samples are shown that changed: a &lt;b&gt;.</p>' in page


def test_a_comparison_shows_the_metric():
    reached = [
        replace(profile(1.0), metric=MetricValue("psnr", "dB", True, value, 300)) for value in (28.2, 28.1)
    ]
    delta = MetricDelta(named("psnr"), 28.2, 28.1, 0.1, MeanDrop(np.full(300, 0.1)))
    text = Page(render_comparison(Comparison(tuple(reached), ("a", "b"), (Delta(accuracy=delta),)), [])).text
    assert "psnr28.20 dB of 30028.10 dB of 300" in text
    assert "drop, dB-0.1 [0.1, 0.1]" in text


def test_why_it_is_not_faster(document):
    text = Page(render_html(document)).text
    assert all(cause in text for cause in causes(document))
    assert "grouped, im2col and GEMM" in text


def test_the_command(document):
    assert document["command"] in Page(render_html(document)).text


def rows_of(page: str) -> list[list[str]]:
    """The cells of the table of stages."""
    (table,) = re.findall(r'<table class="stages">.*?</table>', page, re.DOTALL)
    rows = re.findall(r"<tr>(<td>.*?)</tr>", table, re.DOTALL)
    return [[re.sub(r"<.*?>", "", cell) for cell in row.split("</td>")[:-1]] for row in rows]


def test_what_the_time_went_to(document):
    page = render_html(document)
    assert "200 s; peak memory 3.2 GB." in Page(page).text
    rows = rows_of(page)
    assert rows[0] == ["surveyby layerlarge: 40 s; stem: 24 s", "72.0", "36.0", "144.0", "3.25"]
    assert [row[0] for row in rows[1:]] == ["timing", "export", "other work", "start", "trace", "report"]
    assert sum(float(row[1]) for row in rows) == pytest.approx(200.25, abs=0.1)
    assert sum(float(row[2]) for row in rows) == pytest.approx(100, abs=0.2)


def test_the_bar_and_the_table_have_the_same_colours(document):
    longer = [{**document["stages"][0], "stage": f"stage {n}", "wall_s": 100.0 + n} for n in range(4)]
    document["stages"] += longer
    page = render_html(document)
    shown = re.findall(r'<i style="background:(.*?)"></i>', page)
    assert shown == [*STAGE_COLOURS, *STAGE_COLOURS[-1:] * 3]
    (bar,) = re.findall(r'<svg [^>]*aria-label="Shares of the stages.*?</svg>', page, re.DOTALL)
    assert re.findall(r"fill: (var[^;]*|color-mix[^;]*);", bar) == list(STAGE_COLOURS)


def test_a_report_that_does_not_know_its_stages(document, bare):
    del document["stages"]  # version 0.1.0
    for each in (document, bare):
        assert "Time of the conversion" not in Page(render_html(each)).text


def test_warnings_stand_out_and_parameters_are_code(document):
    assert 'warning">' not in render_html(document)
    document["environment"]["threads"] = 99
    document["layers"][0]["reason"] = "costs more (`gate` none)"
    document["layers"][1]["reason"] = "`<b>`"
    text = render_html(document)
    assert '<p class="warning">Warning: 99 threads share 8 cores and wait for each other; pass ' in text
    assert "<code>threads</code> 8 or fewer" in text
    document["delta"]["latency_speedup"].update(median=0.8, ci95=[0.75, 0.85])
    assert '<p class="verdict warning">Warning: keep the original' in render_html(document)
    assert "costs more (<code>gate</code> none)" in text
    assert "<code>&lt;b&gt;</code>" in text


HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "{{ 7 * 7 }}",
    "</style></title>&amp;'",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_are_text(document, name):
    unnamed = Page(render_html(document))
    document["layers"][0].update(name=name, reason=name, kind=name)
    document["model"]["path"] = name
    document["environment"]["cpu"] = name
    document["layers"][1]["structures"][0]["scheme"] = name
    document["stages"][4]["parts"][name] = 1.0
    page = Page(render_html(document))
    assert [e for e in page.elements if e != "code"] == [e for e in unnamed.elements if e != "code"]
    assert {key for key, _ in page.attributes} == {key for key, _ in unnamed.attributes}
    assert page.text.count(name) == 9  # the title and a sentence too
    document["layers"][0]["spectrum"]["scheme"] = document["command"] = name
    assert {key for key, _ in Page(render_html(document)).attributes} == {
        key for key, _ in unnamed.attributes
    }


def test_bars_keep_to_their_cell(document):
    document["layers"][1]["macs"] = [1_000_000, 4_000_000]  # --gate none converts what does not pay
    assert widths(Page(render_html(document))) == pytest.approx([0.3, 25, 100, 100, 50])  # MACs, latency


def test_an_approximate_conversion(approximate):
    text = Page(render_html(approximate)).text
    assert "Measured on 256 held-out images." in text
    assert "re-estimate BatchNorm (not kept)" in text
    assert "0.25 [-0.05, 0.55]" in text
    assert (
        "output if fitted to the weights 0.88; output if replaced alone 0.50; weights 1.25; sensitivity 2.5."
        in text
    )
    assert "Fine-tuning" not in text
    epoch = {"epoch": 1, "weights": "average", "loss": 0.5, "divergence": 0.03125, "accuracy": 0.875}
    approximate["approximation"]["finetune"] = {
        "history": [epoch],
        "delivered": epoch,
        "stopped": None,
        "attempts": [],
    }
    text = Page(render_html(approximate)).text
    assert "average, best" in text
    assert "Fine-tuning of a plan that was not delivered" in text
    approximate["approximation"]["steps"].append(
        {**approximate["approximation"]["steps"][0], "kind": "finetune"}
    )
    assert "not delivered" not in Page(render_html(approximate)).text
    assert "87.5 %" in text


def with_times(document, drops):
    """A curve of plans that were carried out and timed, the last delivered."""
    curve = document["approximation"]["curve"]
    curve[1:] = [
        {
            **curve[1],
            "converted": number + 1,
            "heldout": {"divergence": 0.01 * 2**number, "agreement": 0.9},
            "drop": None
            if drop is None
            else {"value": drop, "unit": "pp", "ci95": [drop - 0.5, drop + 0.5], "n": 9},
            "predicted_speedup": 1.5 + number,
            "latency_speedup": {"median": 1.25 + number, "ci95": [1.2, 1.3], "significant": True},
            "delivered": drop == drops[-1],
        }
        for number, drop in enumerate(drops)
    ]
    return curve


def test_the_caption_of_the_curve_says_which_way_is_better(approximate):
    with_times(approximate, [None, 0.25, 0.75])
    assert "Above is better for top-1" in Page(render_html(approximate)).text
    approximate["delta"]["metric"] |= {"name": "mse", "unit": "", "higher_is_better": False}
    assert "Below is better for mse" in Page(render_html(approximate)).text


def test_the_curve_is_drawn(approximate):
    with_times(approximate, [None, 0.25, 0.75])
    page = Page(render_html(approximate))
    assert page.elements.count("svg") == 7  # two spectra, the latencies in two widths and the stages too
    for expected in ("divergence from", "top-1 drop, pp", "measured speed-up, ×"):
        assert expected in page.text
    for predicted, measured in (("1.50×", "1.25×"), ("3.50×", "3.25×")):
        assert predicted in page.text
        assert measured in page.text
    # Nothing is fetched, and the same document gives the same page.
    assert not [value for name, value in page.attributes if name in ("src", "href") and "//" in (value or "")]
    assert render_html(approximate) == render_html(approximate)


def test_a_curve_without_times_is_drawn_over_macs(approximate):
    for point in with_times(approximate, [0.25, 0.75]):
        point["latency_speedup"] = None
    page = Page(render_html(approximate))
    assert "fewer MACs, ×" in page.text
    assert "measured speed-up, ×" not in page.text


def wide_curve(page: str) -> str:
    """The trade-off curve for wide screens."""
    pattern = r'<div class="wide">(<svg [^>]*aria-label="Change of.*?</svg>)'
    (found,) = re.findall(pattern, page, re.DOTALL)
    return found


def test_the_delivered_plan_is_always_on_the_curve(approximate):
    # One plan and the original are all that was carried out.
    page = render_html(approximate)
    picture = wide_curve(page)
    assert "← delivered" in picture
    approximate["approximation"]["curve"][1]["delivered"] = False
    approximate["approximation"]["curve"][0]["delivered"] = True
    assert "original ← delivered" in render_html(approximate)


def test_signs_are_alike_in_picture_and_table(approximate):
    curve = with_times(approximate, [0.25, 0.5, 0.75])
    curve[1]["latency_speedup"]["significant"] = False
    curve[2]["drop"]["n"] = 5
    page = render_html(approximate)
    picture = wide_curve(page)
    (table,) = re.findall(r"<details><summary>4 plans in numbers.*?</table>", page, re.DOTALL)
    rows = [re.sub("<[^>]*>", "|", row) for row in re.findall(r"<tr><td.*?</tr>", table)]
    assert [sign for row in rows for sign in "~*←" if sign in row] == ["~", "*", "←"]
    shown = re.findall(r">([~*← a-z]*[~*←][~*← a-z]*)</text>", picture)
    assert sorted({sign for text in shown for sign in text if sign in "~*←"}) == sorted("~*←")
    assert "~ and hollow: the speed-up is within noise. * by 5 of the 9 samples, which decided." in page
    with_times(approximate, [0.25, 0.5, 0.75])
    assert "which decided." not in render_html(approximate)


def test_a_plan_at_the_edge_of_the_picture_is_explained(approximate):
    with_times(approximate, [60.0, 0.25])
    assert "Triangles: plans beyond the edge." in render_html(approximate)
    with_times(approximate, [0.5, 0.25])
    assert "Triangles" not in render_html(approximate)


def test_every_picture_of_two_widths_is_shown_once(document):
    page = render_html(document)
    assert page.count('<div class="wide">') == page.count('<div class="slim">') == 1
    assert ".slim { display: none" in page
    assert "screen and (max-width: 44rem) { .wide { display: none } .slim { display: block }" in page


def test_a_comparison_begins_with_verdict_and_tiles():
    models = profile(2.0, top1=0.5), profile(1.0, top1=0.5, macs=500)
    comparison = Comparison(models, ("a.onnx", "b.onnx"), (Delta(speedup=speedup(2.0)),))
    page = render_comparison(comparison, [info("Timed in turns."), warning("it <was> busy.")], MACHINE)
    assert opening(page)[:5] == [
        ("header", ""), ("p", "kicker"), ("h1", ""), ("p", "facts"), ("p", "verdict"),
    ]  # fmt: skip
    assert "<h1>b.onnx against a.onnx</h1>" in page
    assert re.search(
        r'<p class="facts"><span>\d{4}-\d\d-\d\d</span><span>batch 1</span><span>AMD EPYC, ', page
    )
    text = Page(page).text.replace("\n", "")
    assert comparison.verdict in text
    for tile in ("time per run2.00 → 1.00 ms2.00× as fast [1.98, 2.02]", "MACs1k → 5002.00× fewer"):
        assert tile in text
    assert text.index("it <was> busy") < text.index("In numbers") < text.index("Timed in turns.")
    assert '<p class="warning">Warning: it &lt;was&gt; busy.</p>' in page


def test_the_tiles_of_a_comparison_are_those_of_the_fastest():
    models = tuple(profile(each) for each in (4.0, 1.0, 2.0))
    deltas = tuple(Delta(speedup=speedup(each)) for each in (4.0, 2.0))
    text = Page(render_comparison(Comparison(models, ("a", "b", "c"), deltas), [])).text
    assert "4.00 → 1.00 ms" in text
    alone = Page(render_comparison(Comparison(models[:1], ("a",)), [])).text
    assert "→" not in alone


def test_models_of_one_name_are_all_drawn():
    page = render_comparison(Comparison((profile(1.0), profile(2.0), profile(3.0)), ("net.onnx",) * 3), [])
    legend = page[page.index("legend_1") : page.index("</svg>")]
    assert legend.count(">net.onnx<") == 3


def test_words_are_explained_where_links_lead(approximate, bare):
    page = render_html(approximate)
    assert {*re.findall(r'href="#([^"]+)"', page)} <= {*re.findall(r' id="([^"]+)"', page)}
    for entry in (*glossary.WORDS, *glossary.STEPS):
        assert f'<dt id="{entry.anchor}"><b>{entry.word}</b></dt>' in page
    assert 'id="rank"' in render_html(bare)
    for word in ("drift", "held-out", "fine-tune"):
        assert f'id="{word}"' not in render_html(bare)
