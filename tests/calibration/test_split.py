"""Which images are fitted to, which judge, which are trained on, and which are scored."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from sepconvert.base.errors import SepconvertError
from sepconvert.base.options.values import Calibration
from sepconvert.calibration import split as module
from sepconvert.calibration.split import (
    CalibrationSet,
    Division,
    Overlap,
    SeenTwice,
    check_shapes,
    find_seen_twice,
    image_hashes,
    split_data,
)
from sepconvert.network.tensors import InputBatch

X = torch.rand(600, 1, 6, 6, generator=torch.Generator().manual_seed(0))
Y = torch.arange(600) % 10


def divided(data=None, calib=None, train=None, *, images=100, epochs=0):
    return split_data(data, calib, train, division(images, epochs))


def division(images=100, epochs=0):
    return Division(Calibration(images=images), epochs, seed=0, batched=batched)


def batched(x):
    """The values of a mapping by name, or a tuple, as a model takes them."""
    return InputBatch(tuple(x.values()) if isinstance(x, dict) else tuple(x) if isinstance(x, list) else (x,))


def images_of(batches):
    return torch.cat([batch.inputs[0] for batch in batches])


class Recorded(Dataset):
    """Remembers which samples were asked for."""

    def __init__(self, x, y):
        self.x, self.y, self.asked = x, y, []

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.asked.append(index)
        return self.x[index], self.y[index]

    def read_by(self, loader):
        """Return the indices that a loader reads."""
        self.asked.clear()
        assert sum(len(x) for x, _ in loader) == len(self.asked)
        return set(self.asked)


def test_what_is_calibrated_on_is_not_scored():
    dataset = Recorded(X[:300], Y[:300])
    parts = divided(DataLoader(dataset, batch_size=32))
    calibrated = set(dataset.asked)
    assert len(calibrated) == 100
    assert parts.calibration.images == 75
    assert parts.calibration.origin == "split off `data`, and not scored"
    scored = dataset.read_by(parts.scored)
    assert len(scored) == 200
    assert calibrated.isdisjoint(scored)
    # Training gets the images that were split off, but for those that judge.
    trained, judged = dataset.read_by(parts.training.train), dataset.read_by(parts.training.judge)
    assert trained | judged == calibrated
    assert trained.isdisjoint(judged)


def test_what_is_held_out_is_neither_fitted_to_nor_trained_on():
    dataset = Recorded(X[:300], Y[:300])
    data = DataLoader(TensorDataset(X, Y))
    parts = divided(data, DataLoader(dataset, batch_size=32), epochs=3)
    assert parts.scored is data
    assert parts.calibration.origin == "`calib`"
    judged = dataset.read_by(parts.training.judge)
    assert len(judged) == 25
    assert judged.isdisjoint(dataset.read_by(parts.training.train))
    assert torch.equal(images_of(parts.calibration.heldout), X[sorted(judged)])
    assert torch.equal(torch.cat(parts.calibration.labels), Y[sorted(judged)])


def test_images_to_train_on_are_fitted_to_if_there_are_no_others():
    parts = divided(train=DataLoader(TensorDataset(X, Y)), images=40)
    assert parts.calibration.origin == "`train`"
    assert parts.calibration.images == 30
    assert len(parts.training.judge.dataset) == 10
    assert len(parts.training.train.dataset) == 590


def test_batches_of_calibration_do_not_depend_on_those_of_the_loader():
    one, many = (
        divided(calib=DataLoader(TensorDataset(X, Y), batch_size=size), images=400).calibration.fit
        for size in (1, 200)
    )
    assert [len(batch) for batch in one] == [64, 64, 64, 64, 44]
    assert all(torch.equal(*(each.inputs[0] for each in pair)) for pair in zip(one, many, strict=True))


@pytest.mark.parametrize(("count", "role"), [(1, "data"), (0, "data"), (0, "calib")])
def test_too_few_images_to_split(count, role):
    with pytest.raises(SepconvertError, match=r"no image is left to fit to \(.*`(data|calib)`.*\)"):
        divided(**{role: DataLoader(TensorDataset(X[:count], Y[:count]))}, images=8)


def test_no_images_at_all():
    assert divided().calibration is None
    scored = [(X[:4], Y[:4])]
    parts = divided(scored)  # no DataLoader: of such data no part can be split off
    assert (parts.scored, parts.calibration, parts.training) == (scored, None, None)
    with pytest.raises(SepconvertError, match="`finetune`: needs images to train on; pass `calib`"):
        divided(DataLoader(TensorDataset(X, Y)), epochs=1)


def test_other_images_to_train_on_have_judges_of_their_own():
    """Those to fit to may have no labels where those to train on have some."""
    calib = DataLoader(TensorDataset(X[:40]), batch_size=8)
    train = Recorded(X[100:200], Y[100:200])
    parts = divided(calib=calib, train=DataLoader(train, batch_size=8), images=40, epochs=1)
    assert parts.training.labelled
    assert all((labels == -1).all() for labels in parts.calibration.labels)
    judged = train.read_by(parts.training.judge)
    assert len(judged) == 25
    trained = train.read_by(parts.training.train)
    assert len(trained) == 75
    assert judged.isdisjoint(trained)
    with pytest.raises(SepconvertError, match="`finetune`: needs images to judge by too, got 3 in all"):
        divided(calib=calib, train=DataLoader(TensorDataset(X[:3])), images=40, epochs=1)


def test_images_need_no_labels():
    parts = divided(calib=DataLoader(TensorDataset(X[:8]), batch_size=4), images=8)
    assert parts.calibration.images == 6
    assert not parts.training.labelled


@pytest.mark.parametrize("samples", [X[:8], [{"image": x, "name": "a"} for x in X[:8]]])
def test_images_may_come_in_batches_of_other_forms(samples):
    loader = DataLoader(samples, batch_size=4)
    parts = divided(calib=loader, train=loader, images=8, epochs=1)
    found = images_of(parts.calibration.fit + parts.calibration.heldout)
    assert {*map(float, found.sum((1, 2, 3)))} == {*map(float, X[:8].sum((1, 2, 3)))}
    assert parts.training.origin == "`calib`"  # of the same images the same are held out
    x, y = next(iter(parts.training.train))
    assert (x.shape[1:], y) == (X.shape[1:], None)
    assert not parts.training.labelled


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (X[:8].index_fill(0, torch.tensor([3]), float("inf")), "the images hold NaN or Inf"),
        (torch.zeros(8, 1, 6, 6), "every image is of one colour"),
    ],
)
def test_images_that_say_nothing(images, message):
    with pytest.raises(SepconvertError, match=message):
        divided(calib=DataLoader(TensorDataset(images)))


def test_shapes_are_those_of_the_model():
    calib, other = (DataLoader(TensorDataset(x)) for x in (X[:8], torch.rand(8, 3, 5, 5)))
    example = InputBatch((X[:1],))
    check_shapes(divided(calib=calib), example, division())
    check_shapes(divided(), InputBatch((X[:1], X[:1])), division())
    for dense in (False, True):
        with pytest.raises(SepconvertError, match="images to fit to are 3×5×5, the model is run on 1×6×6"):
            check_shapes(divided(calib=other), example, division(), dense=dense)
    with pytest.raises(SepconvertError, match="images to train on are 3×5×5, the model is run on 1×6×6"):
        check_shapes(divided(calib=calib, train=other), example, division())
    with pytest.raises(SepconvertError, match="are 1×6×6, the model is run on 1×6×6 and 1×6×6"):
        check_shapes(divided(calib=calib), InputBatch((X[:1], X[:1])), division())


def test_images_of_another_size_suit_a_dense_task_alone():
    parts = divided(calib=DataLoader(TensorDataset(X[:8])))
    large = InputBatch((torch.rand(1, 1, 40, 30),))
    check_shapes(parts, large, division(), dense=True)
    with pytest.raises(SepconvertError, match="images to fit to are 1×6×6, the model is run on 1×40×30"):
        check_shapes(parts, large, division())


def test_images_of_several_sizes_are_batched_by_size():
    images = [X[n, :, : 6 - n % 3] for n in range(90)]
    parts = divided(calib=DataLoader([(x, n % 4) for n, x in enumerate(images)]), images=80)
    for batches in (parts.calibration.fit, parts.calibration.heldout):
        shapes = [batch.shapes for batch in batches]
        assert sorted(shapes) == [((1, height, 6),) for height in (4, 5, 6)]
    # Each keeps its label.
    known = {float(x.sum()): n % 4 for n, x in enumerate(images)}
    for batch, labels in zip(parts.calibration.heldout, parts.calibration.labels, strict=True):
        assert [known[float(x.sum())] for x in batch.inputs[0]] == labels.tolist()
    check_shapes(parts, InputBatch((X[:1],)), division())


def test_targets_of_any_form_are_no_labels():
    boxes = [(x, [{"boxes": n}]) for n, x in enumerate(X[:8])]
    loader = DataLoader(boxes, 4, collate_fn=lambda b: (torch.stack([x for x, _ in b]), [y for _, y in b]))
    for data in (loader, DataLoader(TensorDataset(X[:8], X[:8])), DataLoader([(x, "a") for x in X[:8]])):
        parts = divided(calib=data, images=8)
        assert not parts.training.labelled
        assert all((labels == -1).all() for labels in parts.calibration.labels)
        _, y = next(iter(parts.training.train))
        assert y is not None


@pytest.mark.parametrize("form", [lambda x: (x, -x), lambda x: {"left": x, "right": -x}])
def test_several_inputs_are_batched_together(form):
    samples = [(form(x), n % 10) for n, x in enumerate(X[:40])]
    parts = divided(calib=DataLoader(samples, 3), images=40)
    assert [len(batch) for batch in parts.calibration.fit] == [30]
    left, right = parts.calibration.fit[0].inputs
    assert torch.equal(left, -right)
    assert left.shape == (30, 1, 6, 6)


def test_processes_share_the_batches(monkeypatch):
    images = CalibrationSet(tuple(InputBatch((X[:10],)).split(2)), (), (), "test")
    model = nn.Conv2d(1, 1, 1).double()
    monkeypatch.setattr(module, "processes", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(module, "rank", lambda rank=rank: rank)
        share = images.share(model)
        assert list(share) == list(range(rank, 5, 2))
        assert torch.equal(share[rank].inputs[0], X[2 * rank : 2 * rank + 2].double())
    monkeypatch.setattr(module, "processes", lambda: 6)
    with pytest.raises(SepconvertError, match="5 batches for 6 processes; pass more images"):
        images.share(model)


def loader(x):
    return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), batch_size=16)


def seen_twice(scored, trained=False, **roles):
    parts = divided(**{role: loader(x) for role, x in roles.items()}, epochs=trained)
    return find_seen_twice(parts, hashes(scored), division(epochs=trained))


def hashes(x):
    return image_hashes(InputBatch((x,)))


def test_hashes_are_those_of_values():
    whole = (X[:4] * 255).round()
    expected = hashes(whole)
    assert len(set(expected)) == 4
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.uint8):
        assert hashes(whole.to(dtype)) == expected
    assert hashes(whole.transpose(2, 3).contiguous().transpose(2, 3)) == expected
    changed = whole.clone()
    changed[2, 0, 5, 5] += 1
    assert [a == b for a, b in zip(hashes(changed), expected, strict=True)] == [True, True, False, True]


def test_all_inputs_of_a_sample_are_hashed():
    steps = torch.rand(7, 4, 3)  # T × N × F
    found = image_hashes(InputBatch((steps,), 1))
    assert len(set(found)) == 4
    for place in ((slice(None), 0), 1):
        ids = torch.zeros(7, 4, dtype=torch.long)
        ids[place] = 3
        both = image_hashes(InputBatch((steps, ids), 1))
        same = [a == b for a, b in zip(both, image_hashes(InputBatch((steps, 0 * ids), 1)), strict=True)]
        assert same == ([False, True, True, True] if place != 1 else [False] * 4)


def test_images_that_are_fitted_to_and_scored_are_counted():
    calib = X[:80]
    assert seen_twice(X[80:300], calib=calib).calib == Overlap(80, 80, 0)
    assert seen_twice(X[70:300], calib=calib) == SeenTwice(Overlap(80, 80, 10), None)
    # An image that is scored three times counts three times.
    assert seen_twice(X[[79, 79, 79, *range(100, 300)]], calib=calib).calib.scored == 3
    # Of `calib`, 100 of 400 images are fitted to; 40 of the 400 are scored.
    found = seen_twice(X[:240], calib=X[200:]).calib
    assert found == Overlap(100, 100, found.scored)
    assert 3 < found.scored < 20


@pytest.mark.parametrize(
    ("scored", "roles", "name"),
    [
        (X[:100], {"calib": X[:100]}, "calib"),
        (X[:600], {"calib": X[:60]}, "calib"),  # all that are fitted to, and a tenth of the data
        (X[:30], {"calib": X[:100]}, "calib"),  # all of the data
        (X[:300], {"train": X[:300]}, "train"),
        (X[:300], {"calib": X[400:], "train": X[:300]}, "train"),
        (X[:40], {"calib": X[300:400], "train": X}, "train"),  # some of the sample, thus most of the data
    ],
)
def test_the_same_images_for_two_purposes_are_refused(scored, roles, name):
    with pytest.raises(
        SepconvertError, match=rf"`{name}`: \d+ of \d+ images that were compared are in `data`"
    ):
        seen_twice(scored, trained="train" in roles, **roles)


def test_all_images_that_are_trained_on_and_scored_are_found():
    alike = seen_twice(X[:300], trained=True, calib=X[250:])
    assert alike.calib == Overlap(100, 100, alike.calib.scored)
    assert 5 < alike.calib.scored < 30
    assert alike.train == Overlap(350, 350, 50)
    other = seen_twice(X[:300], trained=True, calib=X[500:], train=X[250:500])
    assert other == SeenTwice(Overlap(100, 100, 0), Overlap(250, 250, 50))
    assert seen_twice(X[:300], trained=True, calib=X[500:], train=X[299:500]).train.scored == 1


def test_frequent_images_refuse_no_data():
    """Black frames, say: most images of both sets, but one in many that differ."""
    black = torch.zeros(60, 1, 6, 6)
    found = seen_twice(torch.cat([black, X[:40]]), calib=torch.cat([black[:50], X[100:130]]))
    assert found.calib == Overlap(80, 80, 60)


def test_duplicates_within_the_data_are_counted():
    """A part is split off by us: the user cannot help it."""
    twice = torch.cat([X[:100], X[:100]])
    parts = divided(loader(twice))
    scored = [each for x, _ in parts.scored for each in hashes(x)]
    found = find_seen_twice(parts, scored, division()).calib
    assert found.compared == 100
    assert 20 < found.scored < 80


def test_nothing_is_seen_twice_without_calibration():
    assert find_seen_twice(divided(), [], division()) is None
