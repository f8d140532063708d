"""Batches from images and arrays."""

import argparse

import command_models
import numpy as np
import pytest
import torch
from torch import nn

from pytorch_quant.commands.outcome import one_line
from pytorch_quant.commands.samples import forward, open_data, top1

Image = pytest.importorskip("PIL.Image")


def options(path, **changed):
    given = {
        "data": str(path),
        "samples": 100,
        "batch_size": 4,
        "seed": 0,
        "image_size": None,
        "resize": None,
        "mean": None,
        "std": None,
        "workers": 0,
        "device": "cpu",
    }
    return argparse.Namespace(**{**given, **changed})


def test_arrays_with_labels(tmp_path):
    x, labels = command_models.arrays(tmp_path / "d.npz", 10)
    batches = open_data(options(tmp_path / "d.npz"), nn.Identity(), None)
    assert (batches.labelled, batches.count, len(batches), batches.classes) == (True, 10, 3, None)
    seen = [(len(inputs), inputs.dtype) for inputs, _ in batches]
    assert seen == [(4, torch.float32), (4, torch.float32), (2, torch.float32)]
    pairs = {
        (float(i[0, 0, 0]), int(k))
        for inputs, ks in batches
        for i, k in zip(inputs, ks, strict=True)
    }
    assert pairs == {(float(i[0, 0, 0]), int(k)) for i, k in zip(x, labels, strict=True)}
    # Again and again the same.
    assert torch.equal(batches.example(), batches.example())


def test_a_sample_is_drawn_over_all_of_them(tmp_path):
    np.savez(tmp_path / "d.npz", np.arange(100.0))
    first, second, other = (
        torch.cat(
            [
                b[0]
                for b in open_data(
                    options(tmp_path / "d.npz", samples=10, seed=s), nn.Identity(), None
                )
            ]
        )
        for s in (0, 0, 1)
    )
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert len(set(first.tolist())) == 10 and first.max() > 50 and first.dtype == torch.float32


def test_several_arrays_are_keywords(tmp_path):
    path = tmp_path / "d.npz"
    model = command_models.two_inputs()
    codes, x = np.arange(12).reshape(4, 3) % 7, np.ones((4, 32), np.float32)
    np.savez(path, codes=codes, x=x)
    (batch,) = open_data(options(path, seed=3), model, None)
    assert set(batch[0]) == {"codes", "x"} and batch[0]["codes"].dtype == torch.int64
    assert torch.equal(forward(model, batch), model(**batch[0]))
    np.savez(path, codes=codes, y=x)
    with pytest.raises(ValueError, match="which has no y; its arguments are codes, x"):
        open_data(options(path), model, None)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.ones((3, 2)), "labels": np.ones(3)}, "whole numbers of shape"),
        ({"x": np.ones((3, 2)), "labels": np.ones(2, int)}, "same number of samples"),
        ({"labels": np.ones(2, int)}, "no inputs"),
        ({"x": np.ones((2, 2)), "labels": np.array([0, -1])}, "count from 0, got -1"),
        ({"x": np.array(["a", "b"])}, "'x' cannot be a tensor"),
        ({"x": np.ones((2, 2), ">f4")}, "'x' cannot be a tensor"),
        ({"x": np.ones((0, 2))}, "at least one"),
        ({"x": np.array([{}])}, "plain arrays"),
    ],
)
def test_wrong_arrays(tmp_path, arrays, message):
    np.savez(tmp_path / "d.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_data(options(tmp_path / "d.npz"), nn.Identity(), None)


def test_wrong_places(tmp_path):
    (tmp_path / "d.txt").write_text("")
    (tmp_path / "d.npz").write_text("no zip file")
    with pytest.raises(ValueError, match="neither a folder of images nor"):
        open_data(options(tmp_path / "d.txt"), nn.Identity(), None)
    with pytest.raises(ValueError, match="npz is no"):
        open_data(options(tmp_path / "d.npz"), nn.Identity(), None)
    (tmp_path / "d.npz").write_bytes(b"")
    with pytest.raises(ValueError, match="npz is no"):
        open_data(options(tmp_path / "d.npz"), nn.Identity(), None)
    with open(tmp_path / "d.npz", "wb") as file:
        np.save(file, np.ones(3))
    with pytest.raises(ValueError, match=r"write it with np\.savez"):
        open_data(options(tmp_path / "d.npz"), nn.Identity(), None)
    with pytest.raises(FileNotFoundError):
        open_data(options(tmp_path / "none"), nn.Identity(), None)


def picture(path, size=(40, 30), color=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(path.name))
    pixels = rng.integers(0, 256, (size[1], size[0], 3), np.uint8)
    pixels[:] = pixels if color is None else color
    Image.fromarray(pixels).save(path)
    return path


def test_a_folder_for_each_class(tmp_path):
    for name, color in (("b", 200), ("a", 100), ("c", 50)):
        picture(tmp_path / name / "1.png", color=color)
        (tmp_path / name / "notes.txt").write_text("")
    small = options(tmp_path, image_size=8, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    batches = open_data(small, nn.Identity(), None)
    assert batches.classes == 3
    ((inputs, labels),) = batches
    found = {int(k): round(255 * float(i.mean())) for i, k in zip(inputs, labels, strict=True)}
    assert found == {0: 100, 1: 200, 2: 50} and inputs.shape == (3, 3, 8, 8)


def test_images_without_labels(tmp_path):
    Image.new("L", (9, 9), 255).save(tmp_path / "grey.png")
    picture(tmp_path / "1.jpg")
    batches = open_data(options(tmp_path, image_size=8), nn.Identity(), None)
    assert not batches.labelled and [len(part) for part in batches] == [1]
    with pytest.raises(ValueError, match="need labels"):
        top1(nn.Flatten(), batches, name="x", progress=False)


@pytest.mark.parametrize("size", [(40, 30), (30, 47), (15, 15)])
def test_pictures_become_tensors_as_in_torchvision(tmp_path, size):
    try:
        from torchvision import transforms
    except Exception as error:
        pytest.skip(f"torchvision cannot be imported: {error}")
    picture(tmp_path / "1.png", size)
    (batch,) = open_data(options(tmp_path, image_size=14), nn.Identity(), None)
    expected = transforms.Compose(
        [
            transforms.Resize(16),
            transforms.CenterCrop(14),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(Image.open(tmp_path / "1.png"))
    torch.testing.assert_close(batch[0][0], expected, rtol=0, atol=1e-6)


def test_the_transform_of_the_weights(tmp_path):
    picture(tmp_path / "1.png")

    def transform(picture):
        assert picture.mode == "RGB"
        return torch.tensor([float(picture.size[0])])

    (batch,) = open_data(options(tmp_path), nn.Identity(), transform)
    assert batch[0].tolist() == [[40.0]]
    # What the user says counts more.
    (batch,) = open_data(options(tmp_path, image_size=8), nn.Identity(), transform)
    assert batch[0].shape == (1, 3, 8, 8)


def test_wrong_folders(tmp_path, monkeypatch):
    def refused(folder, message):
        with pytest.raises(ValueError, match=message):
            list(open_data(options(folder), nn.Identity(), None))

    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "holds no images")
    picture(tmp_path / "set" / "train" / "cat" / "1.png")
    refused(tmp_path / "set", r"folders of class folders \(train\); give one of them")
    picture(tmp_path / "mixed" / "cat" / "1.png")
    picture(tmp_path / "mixed" / "2.png")
    refused(tmp_path / "mixed", "beside folders")
    picture(tmp_path / "gap" / "cat" / "1.png")
    (tmp_path / "gap" / "dog").mkdir()
    refused(tmp_path / "gap", "the class folder dog holds no images")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "1.png").write_bytes(b"\x89PNG")
    refused(tmp_path / "broken", "1.png is no image that can be read")
    # Pillow has errors that are no OSError.
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
        refused(tmp_path / "gap" / "cat", "1.png is no image that can be read.*bomb")
    picture(tmp_path / "fine" / "1.png")
    with pytest.raises(ValueError, match="--resize 8 is smaller"):
        open_data(options(tmp_path / "fine", resize=8, image_size=16), nn.Identity(), None)


def test_an_error_in_another_process_is_one_line(tmp_path):
    (tmp_path / "1.png").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError) as caught:
        list(open_data(options(tmp_path, workers=1), nn.Identity(), None))
    assert one_line(caught.value).startswith(f"{tmp_path / '1.png'} is no image that can be read")
    assert "Traceback" not in one_line(caught.value)


def test_top1(tmp_path):
    logits = np.random.default_rng(0).normal(size=(11, 5)).astype(np.float32)
    labels = np.random.default_rng(1).integers(0, 5, 11)
    np.savez(tmp_path / "d.npz", logits, labels=labels)
    batches = open_data(options(tmp_path / "d.npz"), nn.Identity(), None)
    expected = 100 * np.mean(logits.argmax(1) == labels)
    assert top1(nn.Identity(), batches, name="x", progress=False) == pytest.approx(expected)
    with pytest.raises(ValueError, match="5 classes and the model 3 logits"):
        top1(nn.Linear(5, 3), batches, name="x", progress=False)


def test_classes_and_logits_that_differ(tmp_path):
    for name in "ab":
        picture(tmp_path / name / "1.png")
    batches = open_data(options(tmp_path, image_size=2), nn.Identity(), None)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(ValueError, match="2 classes and the model 5 logits"):
        top1(model, batches, name="x", progress=False)
