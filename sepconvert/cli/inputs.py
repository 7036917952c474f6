"""Models, data and example inputs that a command's options name."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader
from tqdm import tqdm

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import unshadowed
from sepconvert.base.options.values import Task, Timing
from sepconvert.calibration.footprint import images_at_once
from sepconvert.cli.options import Options, in_flags, value_of
from sepconvert.factorize.geometry import MAX_INPUT_ELEMENTS
from sepconvert.files.data import (
    Batch,
    Preprocess,
    TargetKind,
    check_shape,
    has_labels,
    has_pixels,
    is_own,
    load_data,
    sample_shapes,
    varies,
)
from sepconvert.files.images import Layout, layout_of
from sepconvert.files.models.loading import LoadedModel, load_model
from sepconvert.files.onnx.facts import OnnxFile
from sepconvert.files.onnx.graph.network import OnnxNetwork
from sepconvert.files.sources import parse_input_shape
from sepconvert.measure.metrics.own import scoring_of
from sepconvert.network.copies import private_copy
from sepconvert.network.tensors import (
    InputBatch,
    Inputs,
    arguments,
    batch_dimension,
    by_position,
    cast,
    model_dtype,
)

Arrange = Callable[[Any], Inputs]
"""What a loader yields as x, as the arguments of a model or the inputs of a file."""

TRAINING_BATCH = 64
"""Images in a step of fine-tuning.

Five epochs of a ResNet-9 end at 87.3 %; with 128 images and the learning rate 5e-3, at 86.6 %."""

DENSE_TRAINING_BATCH = 8
"""The same where every pixel has a target: few images say much, and take long."""


def example_of_file(file: OnnxFile) -> Inputs | None:
    """Return inputs of the shapes that an ONNX file gives, or None if more than the batch is open."""
    if any(None in shape[1:] for shape in file.shapes):
        return None
    return tuple(
        torch.from_numpy(np.zeros((1, *(size or 1 for size in shape[1:]))[: len(shape)], dtype))
        for shape, dtype in zip(file.shapes, file.dtypes, strict=True)
    )


def arranged(file: OnnxFile, x: Any) -> Inputs:
    """Return what a loader yields as x as the inputs of an ONNX file: by name of a mapping, else by position.

    Raises:
        SepconvertError: a mapping lacks one of them.
    """
    if isinstance(x, Mapping):
        return by_position(file.names, x)
    return tuple(x) if isinstance(x, tuple | list) else (x,)


def timing_of(options: Options) -> Timing:
    """Return how models are timed; what is kept for the next run is kept in the user's cache."""
    cache = options.get("cache") or user_cache_path("sepconvert") / "latency"
    return value_of(Timing, options, cache=cache)


def read_images(options: Options, name: str) -> DataLoader[Batch] | None:
    """Return the images of --calib or --train, with targets of any form where there are any."""
    spec = options[name]
    if spec is None:
        return None
    kind = _kind_of_targets(options)
    dense = kind is not None
    if kind is None and not Path(spec).is_dir():  # a loss of the task may take targets of any form
        kind = "any"
    return load_data(
        spec,
        _preprocess(options, spec),
        batch_size=DENSE_TRAINING_BATCH if dense else TRAINING_BATCH,
        labelled=has_labels(spec),
        parameter=name,
        kind=kind,
    )


def _kind_of_targets(options: Options) -> TargetKind | None:
    """Return what the metric takes as targets; None for the class numbers of a classifier."""
    scoring = scoring_of(value_of(Task, options))
    return None if scoring.metric is None or scoring.classifies else scoring.metric.targets


def _preprocess(options: Options, spec: str) -> Preprocess:
    """Return the preprocessing of images; those of a library's model are normalised as it says."""
    layout: Layout = options.get("layout") or "nchw"
    mean, std, usual = options["mean"], options["std"], options.get("normalisation")
    if mean is None and std is None and usual is not None and has_pixels(spec):
        mean, std = usual.mean, usual.std
    return Preprocess(mean, std, options["resize"], layout)


def with_layout(options: Options, shapes: Sequence[Sequence[int | None]]) -> Options:
    """Return the options with the layout of images that an ONNX file takes, by the shapes of its inputs.

    Images are not arranged in silence: a layout that --layout does not name is told on standard error.
    """
    if options["layout"] is not None or len(shapes) != 1:
        return options
    layout = layout_of(shapes[0])
    if layout == "nhwc" and any(options.get(name) is not None for name in ("data", "calib", "train")):
        _tell(
            "the ONNX file takes images as N×H×W×C, and uint8 images are given so; pass --layout nchw if "
            "that is wrong"
        )
    return {**options, "layout": layout}


def load_subject(options: Options) -> LoadedModel:
    """Load the model that the options name, and move it to --device.

    Raises:
        SepconvertError: the file or the device cannot be used.
    """
    if options["trust"]:
        _tell(f"--trust: {options['model']} is run as a program")
    loaded = load_model(
        options["model"],
        factory=options["factory"],
        factory_args=options["factory_args"],
        allow=options["allow"],
        trust=options["trust"],
        ignore_extra_keys=options["ignore_extra_keys"],
    )
    for note in loaded.notes:
        _tell(in_flags(note))
    try:
        unshadowed(loaded.model).to(options["device"])
        if torch.device(options["device"]).type == "meta":
            raise ValueError("it holds no data")
    except Exception as error:  # torch's errors for unknown and for missing devices share no base class
        raise SepconvertError(
            f"--device {options['device']}: cannot be used: {first_line(error)}; pass --device cpu"
        ) from error
    return loaded


def suited(options: Options, loaded: LoadedModel) -> Options:
    """Return the options with the way in which the model takes images: their layout, and normalisation."""
    if isinstance(loaded.model, OnnxNetwork):
        return with_layout(options, loaded.model.input_shapes)
    return with_normalisation(options, [loaded])


def with_normalisation(options: Options, models: Iterable[LoadedModel]) -> Options:
    """Return the options with the normalisation of images that the libraries of models give.

    It is that of uint8 images for which neither --mean nor --std is given, and told on standard error.

    Raises:
        SepconvertError: there are such images, and the models want them normalised in different ways.
    """
    known = {each.path: each.normalisation for each in models if each.normalisation is not None}
    specs = [options[name] for name in ("data", "calib", "train") if options.get(name) is not None]
    given = options["mean"] is not None or options["std"] is not None
    if given or not known or not any(map(has_pixels, specs)):
        return options
    path, found = next(iter(known.items()))
    if other := next((each for each, way in known.items() if way != found), None):
        raise SepconvertError(
            f"{other}: its library normalises images in another way than that of {path}; pass `mean` and "
            "`std`, which hold for all models"
        )
    mean, std = (",".join(f"{value:g}" for value in each) for each in (found.mean, found.std))
    _tell(
        f"{path}: uint8 images are normalised as its library says: --mean {mean} --std {std}; pass these if "
        "others are right"
    )
    return {**options, "normalisation": found}


def read_data_and_inputs(options: Options, loaded: LoadedModel) -> tuple[DataLoader[Batch] | None, Inputs]:
    """Return the evaluation data, if any, and the inputs to trace, verify and time a model on."""
    model = loaded.model
    data, inputs = read_data_and_examples(options, loaded.example_inputs, model)
    placed: Inputs = pytree.tree_map_only(
        Tensor, lambda value: value.to(options["device"]), cast(inputs, model_dtype(model))
    )
    return None if data is None else _that_fit(data, model, placed), placed


def _that_fit(data: DataLoader[Batch], model: nn.Module, inputs: Inputs) -> DataLoader[Batch]:
    """Return our own data in batches small enough for large activations; a user's loader is left as it is."""
    if not is_own(data):
        return data
    try:
        at_once = images_at_once(model, InputBatch(inputs), data.batch_size or 1)
    except Exception:  # the model cannot run on these inputs: tracing reports that better
        return data
    return DataLoader(data.dataset, at_once)


def read_data_and_examples(
    options: Options,
    example_inputs: Inputs | None,
    subject: nn.Module | OnnxFile,
    *,
    labelled: bool = True,
) -> tuple[DataLoader[Batch] | None, Inputs]:
    """Return evaluation data, and inputs of a model or an ONNX file in the dtype in which they come.

    `example_inputs` give the shape where neither data nor --input-shape do. Unless the data have to be
    `labelled`, there are no targets where the data hold none.
    """
    data = _evaluation_data(options, labelled=labelled)
    if options["input_shape"]:
        shape = parse_input_shape(options["input_shape"])
        if data is not None and _is_shape_of(data, shape, options):
            return data, _first_of(data, options, subject)
        return data, (_noise(shape, options),)
    images = data
    for name in ("calib", "train"):
        if images is None and options.get(name) is not None:
            images = read_images(options, name)
    if images is not None:
        if varies(images):
            raise SepconvertError(
                "`input_shape`: is needed, as the images differ in size and latency is timed at one; pass "
                "it, e.g. `input_shape` 3x256x256, or `resize`"
            )
        shapes = sample_shapes(images, options.get("batch_dim") or 0)
        if data is None and len(shapes) == 1:
            return None, (_noise(shapes[0], options),)
        return data, _first_of(images, options, subject)
    if example_inputs is None:
        raise SepconvertError(
            "the input's shape is not known; pass --input-shape, e.g. --input-shape 3x224x224, or --data"
        )
    again: Inputs = pytree.tree_map_only(Tensor, partial(_random, options), example_inputs)
    return None, again


def _is_shape_of(data: DataLoader[Batch], shape: tuple[int, ...], options: Options) -> bool:
    """Return whether all samples have a shape; raise `SepconvertError` if its model takes none."""
    shapes = sample_shapes(data, options.get("batch_dim") or 0)
    if len(shapes) > 1:
        raise SepconvertError(
            f"`input_shape`: is of one input, and `data` has {len(shapes)}; leave it out: their own are taken"
        )
    dense = _is_dense(options)
    check_shape(shapes[0], shape, dense=dense)
    return shapes[0] == shape and not (dense and varies(data))


def _is_dense(options: Options) -> bool:
    """Return whether the model may be given images of any size: the metric is none of a classifier's."""
    return options["targets"] is not None or _kind_of_targets(options) is not None


def _evaluation_data(options: Options, *, labelled: bool) -> DataLoader[Batch] | None:
    spec = options["data"]
    if spec is None:
        return None
    return load_data(
        spec,
        _preprocess(options, spec),
        labelled=labelled or has_labels(spec),
        targets=options["targets"],
        kind=_kind_of_targets(options),
    )


def _first_of(data: DataLoader[Batch], options: Options, subject: nn.Module | OnnxFile) -> Inputs:
    """Return the inputs of the first samples of the data, as many as are timed."""
    x, batch, axis = next(iter(data))[0], options["batch"], options.get("batch_dim")
    if isinstance(subject, OnnxFile):
        inputs = arranged(subject, x)
    else:
        inputs = arguments(subject, x)
        if axis is None:
            axis = batch_dimension(private_copy(subject), InputBatch(inputs).on(subject).inputs)
    samples = InputBatch(inputs, axis or 0)
    if len(samples) < batch:
        raise SepconvertError(
            f"--batch {batch}: the data begins with a batch of {len(samples)}; pass a smaller --batch"
            + (", or --resize" if varies(data) else "")
        )
    return samples[:batch].inputs


def _noise(shape: tuple[int, ...], options: Options) -> Tensor:
    """Return random samples of a shape, as many as are timed."""
    batch, axis = options["batch"], options.get("batch_dim") or 0
    if batch * math.prod(shape) > MAX_INPUT_ELEMENTS:
        raise SepconvertError(
            f"--batch {batch}: {batch:,} samples of {'x'.join(map(str, shape))} are more than "
            f"{MAX_INPUT_ELEMENTS:,} elements; pass a smaller one"
        )
    generator = torch.Generator().manual_seed(options["seed"])
    return torch.randn(*shape[:axis], batch, *shape[axis:], generator=generator)


def _random(options: Options, value: Tensor) -> Tensor:
    """Return random values in the place of an example input, with as many samples as are timed."""
    axis = options.get("batch_dim") or 0
    if not value.is_floating_point() or value.ndim <= axis:
        return value
    generator = torch.Generator().manual_seed(options["seed"])
    shape = (*value.shape[:axis], options["batch"], *value.shape[axis + 1 :])
    return torch.randn(shape, generator=generator).to(value)


def _tell(text: str) -> None:
    """Print a line on standard error, above the line of progress if there is one."""
    tqdm.write(f"sepconvert: {text}", file=sys.stderr)
