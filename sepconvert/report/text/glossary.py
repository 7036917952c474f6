"""The words of reports and of the documentation, each explained once.

`docs/glossary.md` shows them, and HTML reports, which are readable offline, end with those that they need.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A word, and what it means; code stands in backticks."""

    word: str
    text: str
    more: str = ""  # page and section of the documentation that say more, such as `metrics.md#targets`
    fitted: bool = False  # whether only reports of approximate conversions need it

    @property
    def anchor(self) -> str:
        """Fragment of a link to the entry, within the documentation's page and within a report."""
        kept = "".join(letter for letter in self.word.lower() if letter.isalnum() or letter in " -")
        return kept.replace(" ", "-")


WORDS: tuple[Entry, ...] = (
    Entry(
        "Structure",
        "A way in which a kernel is made of two smaller ones, such as a column times a row, or a depthwise "
        "and a pointwise kernel. Tables call it the scheme and give its name: `spatial-vh`, "
        "`depthwise-pointwise`, `input-subspace` and others.",
        "concepts.md#what-counts-as-exact",
    ),
    Entry(
        "Rank",
        "The number of channels between the two convolutions of a structure, in each group; of "
        "`depthwise-pointwise` and `pointwise-depthwise` the number of depthwise filters for each channel; "
        "of `zero-border` the number of taps that are left. A lower rank means less work; if the kernel's "
        "own rank is higher, the outputs of the layer change.",
        "concepts.md#a-layer-as-two-layers",
    ),
    Entry(
        "Form",
        "A structure with a rank, `spatial-vh 16` for instance: one way to replace a layer.",
        fitted=True,
    ),
    Entry(
        "Plan",
        "The choice of a form for each layer that is replaced; all other layers stay as they are. A "
        "conversion compares plans along the trade-off curve, from slow and faithful to fast and less "
        "faithful, and delivers one of them.",
        "concepts.md#the-steps-of-a-run",
        fitted=True,
    ),
    Entry(
        "Budget",
        "What the plan that is delivered must keep to: the most that the metric may drop, the least "
        "speed-up, a share of the MACs or of the parameters.",
        "howto/approximate.md#choose-the-budget",
        fitted=True,
    ),
    Entry(
        "MACs",
        "Multiply-accumulate operations for one sample; FLOPs are twice as many. Fewer MACs are less work, "
        "but not always less time.",
        "troubleshooting.md#flops-fell-but-latency-did-not",
    ),
    Entry(
        "Speed-up",
        "The latency of the original over that of the converted model: 2.00× means half the time. Brackets "
        "hold the 95 % interval. `~` marks a speed-up that noise can explain: it does not stand out from "
        "what the original shows when it is compared with itself.",
        "concepts.md#what-is-measured-and-how",
    ),
    Entry(
        "Drop",
        "What the metric loses by the conversion on the evaluation data (`--data`), with its paired 95 % "
        "interval; a negative drop is a gain. Drops of accuracy are percentage points (pp).",
        "metrics.md",
    ),
    Entry(
        "Held-out",
        "Held-out images are a quarter of the calibration images, at most 256. Nothing is fitted to them; "
        "plans and steps are compared on them, and none of them is in the evaluation data.",
        "howto/approximate.md#what-you-need",
        fitted=True,
    ),
    Entry(
        "Divergence",
        "How far the outputs of a model are from those of the original, as a mean over the held-out images. "
        "It is 0 if they are equal, and needs no labels. For a classifier it is the Kullback-Leibler "
        "divergence of the class probabilities in nats; for other outputs it is usually a squared error. "
        "Divergences of different models cannot be compared.",
        "metrics.md#how-outputs-are-compared",
        fitted=True,
    ),
    Entry(
        "Equal predictions",
        "The share of held-out images, or of their pixels, for which both models predict the same class, "
        "right or wrong. Also called agreement.",
        fitted=True,
    ),
    Entry(
        "Error",
        "The output error of a layer is √(E‖y − ŷ‖² / E‖y − E y‖²) on the calibration images, where y is the "
        "output of the original layer and ŷ that of the replaced one: 0 is equal, 1 is no better than a "
        "constant. The weight error is ‖W − Ŵ‖ / ‖W‖ of the kernel.",
        "concepts.md#what-is-approximated-and-how",
    ),
    Entry(
        "Sensitivity",
        "How much the outputs of the whole model suffer from the error of one layer: the divergence over the "
        "squared output error of that layer.",
        "concepts.md#the-steps-of-a-run",
        fitted=True,
    ),
    Entry(
        "Drift",
        "The change of a layer's inputs that the layers replaced before it cause. Factors that follow the "
        "drift are fitted to the changed inputs, but still to the outputs of the original, so that they make "
        "up for part of it.",
        fitted=True,
    ),
)

STEPS: tuple[Entry, ...] = (
    Entry(
        "fit the weights",
        "The factors that are nearest to the kernel itself. They are shown for comparison and not used.",
    ),
    Entry(
        "fit the outputs",
        "Factors that are fitted to each layer's outputs on the calibration images, with the inputs of the "
        "original. They are shown for comparison; plans are chosen by them.",
    ),
    Entry(
        "follow the drift, correct the bias",
        "The factors that are delivered. Layers are fitted one after the other, to the inputs that the "
        "layers before them give now; the difference of the means that remains goes into the bias.",
    ),
    Entry(
        "re-estimate BatchNorm",
        "Means and variances of BatchNorm layers are measured anew on the calibration images. The step is "
        "kept only if it brings the outputs nearer to the original's, and if labels, where there are any, do "
        "not speak against it.",
    ),
    Entry(
        "reconstruct",
        "All weights are tuned together on the calibration images, without labels, to reproduce the outputs "
        "of the original and of its layers (`--reconstruct`).",
        "howto/approximate.md#reconstruct",
    ),
    Entry(
        "fine-tune",
        "All weights are trained to reproduce the original's outputs (`--finetune`).",
        "howto/approximate.md#fine-tune-for-minutes",
    ),
    Entry(
        "quantize to int8",
        "The model as its int8 file computes it (`--int8`).",
        "howto/int8.md",
    ),
)
"""Steps from the original to the converted model, as the table "Effect of each step" names them."""
