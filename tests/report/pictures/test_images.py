"""Images show the values that they are given."""

import pytest
import torch
from data_urls import pixels

from sepconvert.report.pictures.images import picture, pixels_of


@pytest.mark.parametrize(("channels", "mode"), [(1, (2, 2)), (3, (2, 2, 3)), (5, (2, 2))])
def test_images_are_stretched_from_black_to_white(channels, mode):
    image = torch.arange(channels * 4.0).reshape(channels, 2, 2) * 10 - 3
    found = picture(image)
    shown = pixels(found["url"])
    assert shown.shape == mode
    assert (shown.min(), shown.max()) == (0, 255)
    assert (found["width"], found["height"]) == (2, 2)


def test_an_image_of_one_value_is_black():
    assert not pixels(picture(torch.full((1, 2, 2), 7.0))["url"]).any()


def test_values_beyond_black_and_white_are_clipped():
    shown = pixels_of(torch.tensor([[[-1.0, 0.0, 0.5, 1.0, 9.0]]]), 0.0, 1.0)
    assert shown.tolist() == [[0, 0, 128, 255, 255]]
