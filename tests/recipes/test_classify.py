"""recipes/classify.py: its data; its runs are in test_runs.py."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import launcher
from recipes import classify
from recipes.classify import Config, DataConfig


def test_shift_moves_and_fills_with_black() -> None:
    image = torch.arange(1.0, 10.0).view(1, 3, 3)
    assert classify.shift(image, 0, 0).equal(image)
    assert classify.shift(image, 1, 0).tolist() == [[[0, 0, 0], [1, 2, 3], [4, 5, 6]]]
    assert classify.shift(image, -1, 1).tolist() == [[[0, 4, 5], [0, 7, 8], [0, 0, 0]]]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (Config(lr=-1.0), "--lr -1.0: give at least 0"),
        (Config(lr=float("nan")), "--lr nan: give at least 0"),
        (Config(weight_decay=-0.1), "--weight-decay -0.1: give at least 0"),
        (Config(width=0), "--width 0: give at least 1"),
        (Config(dropout=1.0), "--dropout 1.0: give at least 0 and less than 1"),
        (Config(data=DataConfig(channels=2)), "--data.channels 2: give 1 (grey) or 3 (colour)"),
        (Config(data=DataConfig(noise=-1.0)), "--data.noise -1.0: give at least 0"),
    ],
)
def test_numbers_that_cannot_be_are_refused_before_all_else(cfg: Config, message: str) -> None:
    with pytest.raises(launcher.UsageError) as raised:
        classify.train(None, cfg)  # type: ignore[arg-type]
    assert str(raised.value) == message


def test_digits_are_split_once_and_for_all() -> None:
    train, test, classes = classify.digits(DataConfig())
    assert (len(train), len(test), classes) == (1437, 360, 10)
    image, label = test[0]
    assert (image.shape, image.dtype, label) == ((1, 8, 8), torch.float32, test.rows[0]["label"])
    assert 0 <= image.min() < image.max() <= 1
    both = {row["image"].tobytes() for row in train.rows} & {row["image"].tobytes() for row in test.rows}
    assert not both
    again = classify.digits(DataConfig())[1]
    assert all((a["image"] == b["image"]).all() for a, b in zip(test.rows, again.rows, strict=True))


def test_augmentation_draws_from_three_generators() -> None:
    train, test, _ = classify.digits(DataConfig(shift=3))
    assert not train[0][0].equal(train[0][0])
    assert test[0][0].equal(test[0][0])


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of colour images of another size than asked for: red ones and green ones."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    for split in ("train", "test"):
        for label, colour in (("green", (0, 255, 0)), ("red", (255, 0, 0))):
            (tmp_path / "photos" / split / label).mkdir(parents=True)
            for k in range(3):
                Image.new("RGB", (20, 10 + k), colour).save(tmp_path / "photos" / split / label / f"{k}.png")
    return tmp_path / "photos"


def test_a_folder_of_images(photos: Path) -> None:
    train, test, classes = classify.labelled(DataConfig(folder=str(photos), size=12, channels=3))
    assert (len(train), len(test), classes) == (6, 6, 2)
    images = [test[k] for k in range(6)]
    assert {image.shape for image, _ in images} == {(3, 12, 12)}
    for image, label in images:  # label 0 is green, label 1 red
        assert (image[label].mean(), image[1 - label].mean()) == (0, 1)
    grey, _ = classify.labelled(DataConfig(folder=str(photos), size=12))[1][0]
    assert grey.shape == (1, 12, 12)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"folder": "missing"}, "cannot load images from missing: "),
        ({"folder": "empty"}, "cannot load images from empty: "),
        ({"folder": "photos/train"}, "photos/train has the splits train: a train and a test split are needed"),
    ],
)
def test_what_a_person_can_get_wrong_is_one_line(
    photos: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, str], message: str
) -> None:
    monkeypatch.chdir(photos.parent)
    Path("empty").mkdir()
    with pytest.raises(launcher.UsageError, match=message) as raised:
        classify.labelled(DataConfig(**change))  # type: ignore[arg-type]
    assert "\n" not in str(raised.value)


def test_the_digits_cannot_be_scaled() -> None:
    with pytest.raises(launcher.UsageError, match="8 x 8 grey pixels"):
        classify.digits(DataConfig(size=16))


def test_any_size_fits_the_model() -> None:
    model = classify.Classifier(classify.Config(data=DataConfig(channels=3)), classes=7)
    for size in (8, 15, 64):
        assert model(torch.zeros(2, 3, size, size)).shape == (2, 7)
    assert np.isfinite(model(torch.rand(1, 3, 9, 9)).detach().numpy()).all()
