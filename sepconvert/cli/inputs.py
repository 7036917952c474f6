"""Models, data and example inputs that a command's options name."""

import math
from collections.abc import Iterable

import click
import numpy as np
import torch
from platformdirs import user_cache_path
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sepconvert.base.errors import SepconvertError, first_line
from sepconvert.base.modules import unshadowed
from sepconvert.base.options import Timing
from sepconvert.calibration.footprint import images_at_once
from sepconvert.cli.options import Options, in_flags, value_of
from sepconvert.factorize.geometry import MAX_INPUT_ELEMENTS
from sepconvert.files.data import (
    Batch,
    Preprocess,
    check_against_model,
    has_labels,
    is_own,
    load_data,
    sample_shape,
)
from sepconvert.files.models import LoadedModel, load_model, parse_input_shape
from sepconvert.files.onnx.facts import OnnxFile
from sepconvert.network.tensors import Inputs, cast, model_dtype

TRAINING_BATCH = 64
"""Images in a step of fine-tuning.

Five epochs of a ResNet-9 end at 87.3 %; with 128 images and the learning rate 5e-3, at 86.6 %."""


def example_of_file(file: OnnxFile) -> Inputs | None:
    """Return inputs of the shapes that an ONNX file gives, or None if more than the batch is open."""
    if any(None in shape[1:] for shape in file.shapes):
        return None
    return tuple(
        torch.from_numpy(np.zeros((1, *(size or 1 for size in shape[1:]))[: len(shape)], dtype))
        for shape, dtype in zip(file.shapes, file.dtypes, strict=True)
    )


def timing_of(options: Options) -> Timing:
    """Return how models are timed; the times of layers are kept in the user's cache."""
    cache = options.get("cache") or user_cache_path("sepconvert") / "latency"
    return value_of(Timing, options, cache=cache)


def read_images(options: Options, name: str) -> DataLoader[Batch] | None:
    """Return the images of --calib or --train, with labels where there are any."""
    spec = options[name]
    if spec is None:
        return None
    labelled = has_labels(spec)
    return load_data(spec, _preprocess(options), batch_size=TRAINING_BATCH, labelled=labelled, parameter=name)


def _preprocess(options: Options) -> Preprocess:
    return Preprocess(options["mean"], options["std"], options["resize"])


def load_subject(options: Options) -> LoadedModel:
    """Load the model that the options name, and move it to --device.

    Raises:
        SepconvertError: the file or the device cannot be used.
    """
    if options["trust"]:
        click.echo(f"sepconvert: --trust: {options['model']} is run as a program", err=True)
    loaded = load_model(
        options["model"],
        factory=options["factory"],
        allow=options["allow"],
        trust=options["trust"],
        ignore_extra_keys=options["ignore_extra_keys"],
    )
    for note in loaded.notes:
        click.echo(f"sepconvert: {in_flags(note)}", err=True)
    try:
        unshadowed(loaded.model).to(options["device"])
        if torch.device(options["device"]).type == "meta":
            raise ValueError("it holds no data")
    except Exception as error:  # torch's errors for unknown and for missing devices share no base class
        raise SepconvertError(
            f"--device {options['device']}: cannot be used: {first_line(error)}; pass --device cpu"
        ) from error
    return loaded


def read_data_and_inputs(options: Options, loaded: LoadedModel) -> tuple[Iterable[Batch] | None, Inputs]:
    """Return the evaluation data, if any, and the inputs to trace, verify and time a model on."""
    data, inputs = read_data_and_examples(options, loaded.example_inputs)
    placed = tuple(value.to(options["device"]) for value in cast(inputs, model_dtype(loaded.model)))
    return None if data is None else _that_fit(data, loaded.model, placed), placed


def _that_fit(data: Iterable[Batch], model: nn.Module, inputs: Inputs) -> Iterable[Batch]:
    """Return our own data in batches small enough for large activations; a user's loader is left as it is."""
    if not is_own(data):
        return data
    try:
        at_once = images_at_once(model, inputs, data.batch_size or 1)
    except Exception:  # the model cannot run on these inputs: tracing reports that better
        return data
    return DataLoader(data.dataset, at_once)


def read_data_and_examples(
    options: Options, example_inputs: Inputs | None, *, labelled: bool = True
) -> tuple[Iterable[Batch] | None, Inputs]:
    """Return evaluation data and inputs in the dtype in which they come.

    `example_inputs` give the shape where neither data nor --input-shape do. Unless the data have to be
    `labelled`, labels are -1 where there are none.
    """
    data = None
    batch = options["batch"]
    unused = [f"--{name}" for name in ("mean", "std", "resize") if options[name] is not None]
    images = next((name for name in ("data", "calib", "train") if options.get(name) is not None), None)
    if unused and images is None:
        raise SepconvertError(
            f"{', '.join(unused)}: only for uint8 images; pass --data, --calib or --train too"
        )
    if options["data"] is None and images is not None and not options["input_shape"]:
        found = read_images(options, images)
        options = {**options, "input_shape": "x".join(map(str, sample_shape(found)))} if found else options
    if options["data"] is not None:
        if labelled:
            data = load_data(options["data"], _preprocess(options))
        else:
            data = load_data(options["data"], _preprocess(options), labelled=has_labels(options["data"]))
        shape = parse_input_shape(options["input_shape"]) if options["input_shape"] else sample_shape(data)
        check_against_model(data, shape, None)
        images = next(iter(data))[0]
        if len(images) < batch:
            raise SepconvertError(
                f"--batch {batch}: the data begins with a batch of {len(images)}; pass a smaller --batch"
            )
        inputs: Inputs = (images[:batch],)
    elif options["input_shape"]:
        shape = parse_input_shape(options["input_shape"])
        if batch * math.prod(shape) > MAX_INPUT_ELEMENTS:
            raise SepconvertError(
                f"--batch {batch}: {batch:,} samples of {options['input_shape']} are more than "
                f"{MAX_INPUT_ELEMENTS:,} elements; pass a smaller one"
            )
        generator = torch.Generator().manual_seed(options["seed"])
        inputs = (torch.randn(batch, *shape, generator=generator),)
    elif example_inputs is not None:
        inputs = tuple(_random(value, batch, options["seed"]) for value in example_inputs)
    else:
        raise SepconvertError(
            "the input's shape is not known; pass --input-shape, e.g. --input-shape 3x224x224, or --data"
        )
    return data, inputs


def _random(value: Tensor, batch: int, seed: int) -> Tensor:
    if not value.is_floating_point() or value.ndim == 0:
        return value
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((batch, *value.shape[1:]), generator=generator).to(value)
