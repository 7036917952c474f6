"""Names of models that a library builds: read, refused where they are malformed, without the libraries."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sepconvert.base.errors import SepconvertError
from sepconvert.files.models import names
from sepconvert.files.models.names import ModelName, check_library, name_of


def read(text):
    found = name_of(Path(text))
    assert found is not None
    assert found.text == text
    return found


NAMES = {
    "timm:resnet50": ("timm", "resnet50", None, {}),
    "timm:resnet50.a1_in1k": ("timm", "resnet50.a1_in1k", None, {}),
    "torchvision:resnet18?weights=DEFAULT": ("torchvision", "resnet18", "DEFAULT", {}),
    "torchvision:resnet18?weights=IMAGENET1K_V1": ("torchvision", "resnet18", "IMAGENET1K_V1", {}),
    "torchvision:resnet18?weights=None": ("torchvision", "resnet18", None, {}),
    "timm:resnet50?pretrained=1": ("timm", "resnet50", "DEFAULT", {}),
    "timm:resnet50?pretrained=True": ("timm", "resnet50", "DEFAULT", {}),
    "timm:resnet50?pretrained=false": ("timm", "resnet50", None, {}),
    "timm:resnet50?num_classes=10&global_pool=max": (
        "timm", "resnet50", None, {"num_classes": 10, "global_pool": "max"},
    ),
    "timm:resnet50?block_args={'a':[1,2]}&in_chans=null": (
        "timm", "resnet50", None, {"block_args": {"a": [1, 2]}, "in_chans": None},
    ),
    # A repository is named for its weights.
    "hf-hub:timm/resnet18.a1_in1k": ("hf-hub", "timm/resnet18.a1_in1k", "DEFAULT", {}),
    "hf-hub:me/net@v1.2?pretrained=0": ("hf-hub", "me/net@v1.2", None, {}),
}  # fmt: skip


@pytest.mark.parametrize(("text", "parts"), NAMES.items(), ids=NAMES)
def test_names_are_read(text, parts):
    assert read(text) == ModelName(text, *parts)


@pytest.mark.parametrize(
    "text", ["net.pt", "resnet50", "tmm:resnet50", "c:net.pt", "Timm:resnet50", "a/timm:b"]
)
def test_other_paths_are_files(text):
    assert name_of(Path(text)) is None


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("timm:resnet50").touch()
    assert name_of(Path("timm:resnet50")) is None


MISTAKES = {
    "timm:": "names no model; expected a name such as timm:resnet50",
    "torchvision:?weights=DEFAULT": "names no model; expected a name such as torchvision:resnet18",
    "timm:res net": "names 'res net'; expected a name such as timm:resnet50",
    "torchvision:segmentation/fcn_resnet50": "names 'segmentation/fcn_resnet50'; expected a name such as",
    "hf-hub:resnet18": "names 'resnet18'; expected a name such as hf-hub:timm/resnet18.a1_in1k",
    "hf-hub:a/b/c": "names 'a/b/c'; expected a name such as hf-hub:timm/resnet18.a1_in1k",
    "timm:resnet50?": "expected KEY=VALUE after the ?, and between &, got ''; e.g. ?weights=DEFAULT or",
    "timm:resnet50?weights": "expected KEY=VALUE after the ?, and between &, got 'weights'; e.g.",
    "timm:resnet50?a=1&a=2": "gives a twice; leave one out",
    "timm:resnet50?weights=DEFAULT&pretrained=1": "weights and pretrained say the same; leave pretrained out",
    "timm:resnet50?pretrained=maybe": "expected pretrained=1 or pretrained=0, got 'maybe'",
    "timm:resnet50?weights=a1_in1k": "expected weights=DEFAULT; other weights of timm are a part of the name",
    "torchvision:resnet18?weights=3": "expected weights=DEFAULT, or the name of other weights, got 3",
    "torchvision:resnet18?weights=": "expected weights=DEFAULT, or the name of other weights, got ''",
    "timm:resnet50.a1_in1k?checkpoint_path=x.pth": "checkpoint_path names a file, which is not read so; pass "
    "the file itself, with `factory` timm.models:resnet50",
    "timm:resnet50?pretrained_cfg={'file':'x.pth'}": "pretrained_cfg names a file",
}


@pytest.mark.parametrize(("text", "message"), MISTAKES.items(), ids=MISTAKES)
def test_malformed_names_are_refused(text, message):
    with pytest.raises(SepconvertError) as caught:
        name_of(Path(text))
    assert str(caught.value).startswith(f"{text}: {message}")


@given(
    st.dictionaries(
        st.from_regex(r"[a-z_][a-z0-9_]{0,8}", fullmatch=True).filter(
            lambda key: key not in ("weights", "pretrained", *names._OF_FILES) and key.isidentifier()
        ),
        st.none() | st.booleans() | st.integers() | st.lists(st.integers(), max_size=3)
        | st.from_regex(r"[g-m][a-z]{0,8}", fullmatch=True),
        max_size=4,
    )
)  # fmt: skip
def test_arguments_round_trip(arguments):
    """Written as Python writes them, texts without quotes."""
    query = "&".join(f"{key}={value}" for key, value in arguments.items())
    assert read(f"timm:net?{query}" if query else "timm:net").arguments == arguments


@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("timm:resnet50.a1_in1k?weights=DEFAULT", "resnet50.a1_in1k"),
        ("hf-hub:me/net.x@a/b", "net.x"),
        ("torchvision:resnet18", "resnet18"),
    ],
)
def test_the_stem_names_files(text, stem):
    assert read(text).stem == stem


@pytest.mark.parametrize(
    ("text", "with_weights"),
    [
        ("timm:a", "timm:a?weights=DEFAULT"),
        ("timm:a?pretrained=0&num_classes=3", "timm:a?weights=DEFAULT&num_classes=3"),
        ("torchvision:a?weights=None", "torchvision:a?weights=DEFAULT"),
    ],
)
def test_the_name_with_weights_asks_for_them(text, with_weights):
    assert read(text).with_weights == with_weights
    assert read(with_weights).weights == "DEFAULT"
    assert read(with_weights).arguments == read(text).arguments


@pytest.mark.parametrize(
    ("text", "library"), [("timm:a", "timm"), ("hf-hub:a/b", "timm"), ("torchvision:a", "torchvision")]
)
def test_a_library_that_is_not_installed_is_named(monkeypatch, text, library):
    monkeypatch.setattr(names, "find_spec", lambda name: None)
    with pytest.raises(SepconvertError) as caught:
        check_library(read(text))
    message = f"{text}: is built by {library}, which is not installed; pip install {library}"
    assert str(caught.value) == message


def test_no_heavy_library_is_imported():
    program = (
        "import sys\n"
        "from pathlib import Path\n"
        "from sepconvert.files.models.names import check_library, name_of\n"
        "check_library(name_of(Path('torchvision:resnet18?weights=DEFAULT')))\n"
        "print({'torch', 'numpy', 'timm', 'torchvision'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)  # noqa: S603
    assert done.stdout == "set()\n"
