"""Batches on the device: pixels as timm's transforms give them, one batch ahead."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import Compose, Normalize, ToTensor

from featkd.data import AugmentConfig, DataConfig
from featkd.data.device import DeviceStage, normalize_and_erase
from featkd.data.erasing import Eraser
from tests.data.conftest import MakeSet
from tests.data.loading import DALI, loading

CPU = torch.device("cpu")
ERASING = AugmentConfig(rand_augment=None, random_erasing=0.5, repeats=1)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two photographs that scikit-learn has, and parts of them."""
    sklearn = pytest.importorskip("sklearn.datasets")
    root = tmp_path_factory.mktemp("photographs")
    for label, pixels in enumerate(sklearn.load_sample_images().images):
        folder = root / "val" / f"class{label}"
        folder.mkdir(parents=True)
        image = Image.fromarray(pixels)
        for number, (width, height) in enumerate([(640, 427), (333, 400), (500, 230)]):
            image.crop((0, 0, width, height)).save(folder / f"{number}.jpg", quality=95)
    (root / "train").symlink_to(root / "val")
    return root


@pytest.mark.filterwarnings("ignore:data.val_split")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("backend", ["timm", DALI])
def test_evaluation_pixels_equal_timms(
    photographs: Path, backend: str, channels_last: bool
) -> None:
    """DALI's equal the normalization of its own levels, which are close to Pillow's."""
    options = {"img_size": 224, "backend": backend, "channels_last": channels_last}
    with loading(photographs, "val", **options) as loader:
        images = torch.cat([batch.images for batch in loader])
    config = DataConfig()
    assert images.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )
    transform = create_transform(
        224, interpolation="bicubic", mean=config.mean, std=config.std, crop_pct=0.875
    )
    paths = sorted((photographs / "val").rglob("*.jpg"))
    expected = torch.stack([transform(Image.open(path)) for path in paths])
    if backend == "timm":
        assert (images - expected).abs().max() <= 1e-6
        assert torch.equal(images, expected)
        return
    mean, std = torch.tensor((config.mean, config.std), dtype=torch.float64)[:, :, None, None]
    levels = ((images * std + mean) * 255).round()
    assert ((levels / 255 - mean) / std - images).abs().max() <= 1e-6
    assert (images - expected).abs().mean() * 255 * 0.225 < 0.6


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("shape", [(9, 20, 20), (1, 1, 1), (2, 3, 3)])
def test_training_pixels_on_each_device(shape: tuple[int, int, int], channels_last: bool) -> None:
    """Both forms equal torchvision's normalization with slices of the noise written into it."""
    count, side, _ = shape
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.from_numpy(pixels)
    targets = torch.arange(count)
    keys = torch.stack((targets, targets + 7, targets * 0), dim=1)
    config = DataConfig(img_size=side, channels_last=channels_last, augment=ERASING)
    stage = DeviceStage(config, training=True, seed=3, device=CPU)
    found, same_targets = stage.finish(stage.send(images, targets, keys))
    assert torch.equal(same_targets, targets)

    step = Compose([ToTensor(), Normalize(config.mean, config.std)])
    expected = torch.stack([step(x) for x in pixels])
    eraser = Eraser(0.5, side, seed=3)
    boxes, noise = eraser.boxes(keys.numpy()), eraser.noise()
    for image, (top, left, height, width, offset) in zip(expected, boxes.tolist(), strict=True):
        own = noise[offset : offset + 3 * side * side].view(3, side, side)
        box = slice(None), slice(top, top + height), slice(left, left + width)
        if height:
            image[box] = own[box]
    assert torch.equal(found, expected)
    assert found.is_contiguous(memory_format=memory_format)
    if side == 20:
        assert 0 < (boxes[:, 2] > 0).sum() < count

    statistics = torch.tensor((config.mean, config.std))
    for drawn in (torch.from_numpy(boxes), None):
        fused = normalize_and_erase(
            *(images, statistics, drawn, noise), channels_last=channels_last
        )
        want = expected if drawn is not None else torch.stack([step(x) for x in pixels])
        torch.testing.assert_close(fused, want, rtol=0, atol=1e-6)
        assert fused.is_contiguous(memory_format=memory_format)


def test_nothing_is_erased_in_evaluation() -> None:
    config = DataConfig(img_size=8, augment=AugmentConfig(random_erasing=1.0))
    stage = DeviceStage(config, training=False, seed=0, device=CPU)
    sent = stage.send(torch.zeros(2, 8, 8, 3, dtype=torch.uint8), torch.zeros(2), torch.zeros(2, 3))
    assert sent.boxes is None
    images, _ = stage.finish(sent)
    assert torch.equal(images, images[..., :1, :1].expand_as(images))


@pytest.mark.usefixtures("backend")
def test_the_next_batch_is_sent_before_one_is_returned(
    make_set: MakeSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    send, finish = DeviceStage.send, DeviceStage.finish
    monkeypatch.setattr(DeviceStage, "send", lambda *a: calls.append("send") or send(*a))
    monkeypatch.setattr(DeviceStage, "finish", lambda *a: calls.append("finish") or finish(*a))
    with loading(make_set(train=12)) as loader:
        for number, _ in enumerate(loader, start=1):
            calls.append("use")
            assert loader.state_dict()["batch"] == number
    assert calls == [
        *("send", "send", "finish", "use"),
        *("send", "finish", "use", "finish", "use"),
    ]
