"""Models that timm and torchvision build by name, with weights out of caches that the tests fill."""

import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from sepconvert.base.errors import SepconvertError
from sepconvert.files.models.libraries import RANDOM, Normalisation, build_named, timm_config
from sepconvert.files.models.names import name_of
from sepconvert.network.tensors import sha256_of, state_tensors

timm = pytest.importorskip("timm")
torchvision = pytest.importorskip("torchvision")

pytestmark = [
    # timm scripts functions when it is imported, and torchvision warns of how some weights are drawn.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
]

IMAGENET = Normalisation((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def build(text):
    name = name_of(Path(text))
    assert name is not None
    return build_named(name)


def refused(text):
    with pytest.raises(SepconvertError) as caught:
        build(text)
    message = str(caught.value)
    assert message.startswith(f"{text}: ")
    assert "\n" not in message
    return message.removeprefix(f"{text}: ")


@pytest.fixture
def offline(monkeypatch):
    """A machine without a network, which looks up no names."""

    def fail(*arguments, **keywords):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


FACTS = {
    "timm:test_resnet": ((3, 160, 160), Normalisation((0.5,) * 3, (0.5,) * 3)),
    "torchvision:squeezenet1_1": ((3, 224, 224), IMAGENET),
    "torchvision:inception_v3?init_weights=false": ((3, 299, 299), IMAGENET),
    "torchvision:lraspp_mobilenet_v3_large": ((3, 520, 520), IMAGENET),
    # It takes images of any size, and normalises them itself.
    "torchvision:ssdlite320_mobilenet_v3_large": (None, None),
    # Of pairs of images, and of videos.
    "torchvision:raft_small": (None, None),
    "torchvision:swin3d_t": (None, None),
}


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(("text", "facts"), FACTS.items(), ids=FACTS)
def test_models_say_what_they_take_and_fetch_nothing(text, facts):
    found = build(text)
    assert (found.input_size and tuple(found.input_size), found.normalisation) == facts
    assert not found.model.training
    assert found.weights == RANDOM


def test_random_weights_are_told_of_and_the_same_each_time():
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    first, second = build("timm:test_resnet"), build("timm:test_resnet")
    assert torch.equal(torch.random.get_rng_state(), state)
    assert sha256_of(state_tensors(first.model).values()) == sha256_of(state_tensors(second.model).values())
    (note,) = first.notes
    assert note == (
        "WARNING: timm:test_resnet: its weights are random, so that accuracy and outputs mean nothing; for "
        "trained ones, pass 'timm:test_resnet?weights=DEFAULT'"
    )


def test_arguments_reach_the_library():
    assert build("timm:test_resnet?num_classes=7").model.num_classes == 7
    assert build("torchvision:squeezenet1_1?num_classes=7").model.num_classes == 7
    grey = build("timm:test_resnet?in_chans=1")
    assert grey.model.conv1[0].in_channels == 1
    assert grey.normalisation is None  # that of three channels


@pytest.mark.usefixtures("offline")
def test_what_a_library_does_not_know_is_named():
    assert refused("timm:resnett50").startswith("timm knows no such model; the nearest are resnet50,")
    assert refused("torchvision:resnet8") == "torchvision knows no such model; the nearest are resnet18, " \
        "resnet50, resnet34"  # fmt: skip
    assert refused("timm:qqqq").endswith("knows no such model; its documentation lists them")
    assert "Invalid pretrained tag (foo) for resnet50" in refused("timm:resnet50.foo")
    assert refused("torchvision:squeezenet1_1?weights=NOTHING") == (
        "torchvision knows no such weights; expected one of IMAGENET1K_V1, DEFAULT"
    )
    assert "timm cannot build it (TypeError: " in refused("timm:test_resnet?colour=red")
    assert "torchvision cannot build it (TypeError: " in refused("torchvision:squeezenet1_1?num_classes=x")


@pytest.mark.usefixtures("offline")
def test_without_a_network_one_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert refused("torchvision:squeezenet1_1?weights=DEFAULT").startswith(
        "torchvision cannot fetch its weights (gaierror: [Errno -2] Name or service not known); connect to "
        "the network and check the name, or pass the file of the weights"
    )
    no_copy = "(there is no connection to its host, and no copy of it in the cache); connect to the network"
    cache = f"cache_dir={tmp_path}"
    assert refused(f"timm:test_resnet?weights=DEFAULT&{cache}").startswith(
        f"timm cannot fetch its weights {no_copy}"
    )
    assert refused(f"hf-hub:timm/test_resnet.r160_in1k?{cache}").startswith(f"timm cannot fetch it {no_copy}")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("weights", ["DEFAULT", "IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_weights_of_torchvision(tmp_path, monkeypatch, weights):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    trained = torchvision.models.squeezenet1_1().eval()
    url = torchvision.models.SqueezeNet1_1_Weights.DEFAULT.url
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.save(trained.state_dict(), tmp_path / "hub" / "checkpoints" / url.rpartition("/")[2])
    found = build(f"torchvision:squeezenet1_1?weights={weights}")
    assert (found.weights, found.notes) == (weights, ())
    assert sha256_of(state_tensors(found.model).values()) == sha256_of(state_tensors(trained).values())


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("text", ["timm:test_resnet?weights=DEFAULT", "hf-hub:timm/test_resnet.r160_in1k?"])
def test_weights_of_the_hub(tmp_path, text):
    """A cache as the hub's client lays it out."""
    trained = timm.create_model("test_resnet").eval()
    repository = tmp_path / "models--timm--test_resnet.r160_in1k"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    timm.models.save_for_hf(trained, snapshot, model_config={"num_classes": 1000})
    found = build(f"{text}{'' if text.endswith('?') else '&'}cache_dir={tmp_path}")
    assert (found.weights, found.notes) == ("DEFAULT", ())
    assert sha256_of(state_tensors(found.model).values()) == sha256_of(state_tensors(trained).values())
    assert found.normalisation == Normalisation((0.5,) * 3, (0.5,) * 3)


def test_configurations_of_timm():
    model = nn.Sequential()
    assert timm_config(model) == {}
    model.pretrained_cfg = {"input_size": (3, 8, 8)}
    assert timm_config(model) == {"input_size": (3, 8, 8)}
