"""DALI loader against timm's loader: equal parameters, nearly equal pixels, unusual files."""

from __future__ import annotations

import contextlib
import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from featkd.data import AugmentConfig, BadImageError, DataConfig, build_loader
from featkd.data.augment import apply_op
from featkd.data.augment_params import AugmentParamSampler, evaluation_params
from featkd.data.dali import files, read_ahead, support, unsupported_reason
from featkd.data.dali.files import as_png
from featkd.data.dali.pipeline import build_pipeline, pipeline_inputs
from featkd.data.rand_augment import OPERATIONS
from featkd.train.checkpoint import load
from featkd.train.recipe import LossConfig
from tests.data.conftest import MakeSet, save_noise, spoil, without_segment
from tests.data.loading import config, loading
from tests.train.runs import run

pytest.importorskip("nvidia.dali")
# erased boxes and small crops are likely
PLAIN = AugmentConfig(rand_augment=None, random_erasing=0.5, repeats=1)


def batches(root, split, backend, **options):
    options = {"img_size": 32, "augment": PLAIN, "seed": 3, **options}
    with loading(root, split, backend=backend, **options) as loader:
        found = list(loader)
    return torch.cat([b.images for b in found]), torch.cat([b.targets for b in found])


def levels(root, split, **options):
    """Mean difference of DALI's and timm's pixels per image, in levels of 255."""
    (ours, targets), (theirs, expected) = (
        batches(root, split, backend, **options) for backend in ("dali", "timm")
    )
    assert torch.equal(targets, expected)
    return (ours - theirs).abs().mean((1, 2, 3)) * 255 * 0.225


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_close_to_timm(make_set: MakeSet, split, interpolation):
    """A wrong crop, flip, erased box or filter would differ by tens of levels."""
    root = make_set(train=12, val=8)
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        save_noise(path, (90 + 7 * number, 150 - 5 * number), number)
    apart = levels(root, split, interpolation=interpolation)
    assert len(apart) == (12 if split == "train" else 8)
    assert apart.max() < 0.6


def test_unusual_files_are_read_as_timm_reads_them(make_set: MakeSet):
    root = make_set(train=3, val=6)
    paths = sorted((root / "val").rglob("*.jpg"))
    smooth = Image.open(paths[0]).resize((60, 50), Image.Resampling.BICUBIC)
    smooth.convert("CMYK").save(paths[0], "JPEG")
    smooth.convert("L").save(paths[1], "JPEG")
    smooth.save(paths[2], "WEBP", lossless=True)  # named .jpg
    smooth.save(paths[3], "PNG")
    grey = np.asarray(smooth.convert("L")).astype(np.uint16) * 256
    Image.fromarray(grey).save(paths[4], "PNG")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees, which timm ignores
    smooth.save(paths[5], "JPEG", exif=exif, quality=95)
    apart = levels(root, "val")
    assert len(apart) == 6
    assert apart.max() < 0.7


# arguments near the levels that rand-m9-mstd0.5-inc1 draws, both signs
LIKELY = {
    **dict.fromkeys(("AutoContrast", "Equalize", "Invert"), (0.0,)),
    "Rotate": (27.0, -25.0),
    "Posterize": (1.0, 0.0),
    "Solarize": (26.0,),
    "SolarizeAdd": (99.0,),
    **dict.fromkeys(("Color", "Contrast", "Brightness", "Sharpness"), (1.81, 0.19)),
    "ShearX": (0.27,),
    "ShearY": (-0.27,),
    "TranslateXRel": (0.405,),
    "TranslateYRel": (-0.405,),
}
# largest difference in levels of 255; DALI's affine operations are bilinear, Pillow's bicubic
_LARGEST = {"AutoContrast": 1, "Color": 1, "Contrast": 1, "Equalize": 3}
_MEAN = {"Rotate": 2.0, "Shear": 2.0, "Translate": 2.0, "Sharpness": 0.6}


def test_each_operation_is_close_to_timms():
    """One batch holds all operations, one per image."""
    data = DataConfig(img_size=64)
    sampler = AugmentParamSampler(data, seed=0)
    assert LIKELY.keys() == set(sampler.op_names)
    likely = [(name, argument) for name, arguments in LIKELY.items() for argument in arguments]
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(30, 220, (9, 9, 3), dtype=np.uint8))
    image = coarse.resize((64, 64), Image.Resampling.BICUBIC)
    params = evaluation_params([image.size] * len(likely), 64, 1.0)._replace(
        ops=np.array([[OPERATIONS.index(name)] for name, _ in likely]),
        arguments=np.array([[argument] for _, argument in likely]),
    )
    inputs = pipeline_inputs([as_png(image)] * len(likely), params, 64)
    pipeline = build_pipeline(
        *(data, lambda: inputs),
        batch_size=len(likely),
        num_ops=1,
        fill_color=(124, 116, 104),
        device=torch.device("cpu"),
    )
    (ours,) = pipeline.run()
    ours = np.array(ours.as_tensor()).astype(np.float32)
    for (name, argument), found in zip(likely, ours, strict=True):
        theirs = np.asarray(apply_op(image, name, argument, sampler.op_options), np.float32)
        apart = np.abs(found - theirs)
        mean = next((m for start, m in _MEAN.items() if name.startswith(start)), None)
        if mean is not None:
            assert 0 < apart.mean() < mean, name  # 0 if the operation was not applied
        else:
            assert apart.max() <= _LARGEST.get(name, 0), name
        assert np.abs(theirs - np.asarray(image)).mean() > 0.3, name


def test_operations_follow_the_flip_and_each_other(make_set: MakeSet):
    """Tests the whole loader: a missing second operation or a later flip would be far off."""
    root = make_set(train=48)
    for number, path in enumerate(sorted(root.rglob("*.jpg"))):
        save_noise(path, (80, 70), number)
    augment = replace(PLAIN, rand_augment="rand-m9-n2-mstd0.5-inc1")
    apart = levels(root, "train", augment=augment)
    # no bound on the worst image: solarize or posterize can turn one level into a hundred
    assert apart.median() < 1
    assert apart.quantile(0.8) < 3


@pytest.mark.parametrize("backend", ["dali", "timm"])
def test_channels_last_changes_only_the_memory_format(make_set: MakeSet, backend):
    root = make_set(train=8)
    plain, _ = batches(root, "train", backend)
    options = {"img_size": 32, "augment": PLAIN, "seed": 3, "channels_last": True}
    with loading(root, backend=backend, **options) as loader:
        found = [batch.images for batch in loader]
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in found)
    assert torch.equal(plain, torch.cat(found))


def test_batches_are_not_overwritten_by_later_ones(make_set: MakeSet):
    """The pipeline's own output, which one batch waits in while the next is decoded."""
    kept, copies = [], []
    with loading(make_set(train=40), backend="dali", augment=PLAIN) as loader:
        for _ in range(2):  # the second epoch reuses the pipeline of the first
            loader.close()
            for raw in loader._run():
                if len(raw.targets):  # the last one only ends the epoch
                    kept.append(raw.images)
                    copies.append(raw.images.clone())
    assert len(kept) == 20
    assert all(torch.equal(*pair) for pair in zip(kept, copies, strict=True))
    assert torch.equal(torch.stack(kept[:10]), torch.stack(kept[10:]))  # the same epoch twice


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_the_pipeline_of_a_gpu_can_be_defined(make_set: MakeSet, monkeypatch, device):
    """DALI checks the operators' inputs while it defines the graph; running it needs a driver."""
    from nvidia.dali import fn

    decode, crop, calls, crops = fn.decoders.image_slice, fn.slice, [], []
    monkeypatch.setattr(
        fn.decoders, "image_slice", lambda *inputs, **k: calls.append(k) or decode(*inputs, **k)
    )
    monkeypatch.setattr(fn, "slice", lambda *x, **k: crops.append(crop(*x, **k)) or crops[-1])
    build_pipeline(
        DataConfig(str(make_set()), img_size=32),
        lambda: ([],),
        batch_size=4,
        num_ops=2,
        fill_color=(1, 2, 3),
        device=torch.device(device),
    )
    (options,) = calls
    assert options["device"] == ("cpu" if device == "cpu" else "mixed")
    # By default nvJPEG repeats the chroma samples, which libjpeg and Pillow interpolate.
    assert options["jpeg_fancy_upsampling"] == (device != "cpu")
    # A GPU input for the place or the size would be copied back and waited for.
    (cropped,) = crops
    image, *others = cropped.source.inputs
    assert image.device == ("cpu" if device == "cpu" else "gpu")
    assert [each.device for each in others] == ["cpu"]


def test_unsupported_configurations_are_refused_or_use_timm(make_set: MakeSet):
    blur = AugmentConfig(rand_augment="rand-m9-t3a")
    data = config(make_set(), backend="dali", augment=blur)
    with pytest.raises(ValueError, match=r'data.backend: "dali" can\'t be used: .*GaussianBlur'):
        build_loader(data, split="train", batch_size=4)
    jitter = AugmentConfig(rand_augment=None, color_jitter=0.3)
    assert "color_jitter" in unsupported_reason(replace(data, augment=jitter), training=True)
    assert not unsupported_reason(replace(data, augment=jitter), training=False)
    assert not unsupported_reason(replace(data, augment=AugmentConfig()), training=True)
    auto = replace(data, backend="auto")
    with pytest.warns(UserWarning, match="timm loader instead of DALI: .*GaussianBlur"):
        loader = build_loader(auto, split="train", batch_size=4, device="cuda")
    assert loader.decoder == "timm"
    assert "GaussianBlur" in loader.note
    with pytest.raises(ValueError, match=r"data.backend: expected one of auto, timm, dali"):
        replace(data, backend="DALI")


def test_a_run_builds_a_pipeline_once_for_each_split(recipe, monkeypatch):
    """Also if the epochs end within an update, whose images are not trained on."""
    built = []

    def note(*args, **options):
        built.append(options)
        return build_pipeline(*args, **options)

    monkeypatch.setattr("featkd.data.dali.loader.build_pipeline", note)
    augment = replace(recipe.data.augment, rand_augment=None)
    recipe = replace(
        recipe,
        teacher=None,
        loss=LossConfig(),
        data=replace(recipe.data, backend="dali", augment=augment),
        optim=replace(recipe.optim, accumulate=4),  # one update of 4 of the 6 batches
    )
    outcome = run(recipe)
    assert (outcome.updates, len(built)) == (2, 2)
    assert load(f"{recipe.out}/last.pt")["loader"]["batch"] == 0


def test_a_broken_installation_of_dali_is_reported(make_set: MakeSet, monkeypatch):
    data = config(make_set(), backend="dali", augment=PLAIN)

    def fails(name: str) -> None:
        raise OSError("libdali.so: cannot open shared object file")

    monkeypatch.setattr(support, "import_module", fails)
    with pytest.raises(ValueError, match=r"used: nvidia-dali can't be imported: OSError: libdali"):
        build_loader(data, split="val", batch_size=4)
    monkeypatch.setattr(support, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="can't be used: nvidia-dali is not installed"):
        build_loader(data, split="val", batch_size=4)


def save_jpeg(**options) -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file, "JPEG", **options)
    return file.getvalue()


def is_kept(content: bytes) -> bool:
    """Checks if DALI gets the file itself: not an error, and not Pillow's pixels."""
    with contextlib.suppress(BadImageError):
        return files.load(content, "x")[0].tobytes() == content
    return False


JPEGS = [{}, {"progressive": True}, {"restart_marker_blocks": 1}, {"comment": "\xff"}]


@pytest.mark.parametrize("options", JPEGS, ids=str)
def test_damaged_jpegs_are_not_given_to_dali(options):
    content = save_jpeg(**options)
    assert is_kept(content)
    assert is_kept(content + b"more")
    for cut in range(0, len(content) - 2, 97):
        assert not is_kept(content[:cut])
    scan = content.index(b"\xff\xda")
    for cut in range(0, scan + 10, 3):
        assert not is_kept(content[:cut] + b"\xff\xd9")
    assert not is_kept(content[: scan + 90] + b"\xff" * 9 + b"\2" + content[scan + 100 :])
    for code in (0xDA, 0xDB, 0xC2 if "progressive" in options else 0xC0):
        assert not is_kept(without_segment(content, code))


def test_headers_read_without_pillow_are_those_that_pillow_reads(monkeypatch):
    """Damaged headers too: a file is refused, kept or converted as by Pillow alone."""
    contents = [save_jpeg(**options) for options in JPEGS]
    contents += [save_jpeg(exif=b"Exif\0\0"), save_jpeg(icc_profile=b"profile"), b"", b"GIF"]
    rng = np.random.default_rng(0)
    plain = save_jpeg()
    header = plain.index(b"\xff\xda")
    for place in rng.integers(2, header + 14, 400).tolist():
        other = rng.integers(0, 256, 1, dtype=np.uint8).tobytes()
        contents.append(plain[:place] + other + plain[place + 1 :])
    opened = []
    real = files.open_image
    monkeypatch.setattr(files, "open_image", lambda content: opened.append(1) or real(content))

    def outcome(content):
        try:
            file, size = files.load(content, "x")
        except BadImageError as error:
            return str(error)
        return file.tobytes(), size

    found = [outcome(content) for content in contents]
    few = len(opened)
    monkeypatch.setattr(files, "_usual_size", lambda segments: None)
    expected = [outcome(content) for content in contents]
    assert len(opened) - few == len(contents)
    assert few < len(contents) / 2
    assert found == expected
    assert found[0] == (plain, (70, 90))


def test_images_of_a_few_pixels(make_set: MakeSet):
    """timm rounds a quarter of their crops to 0 pixels, which come out black or end a pipeline."""
    root = make_set(train=64, classes=1)
    for number, path in enumerate(sorted((root / "train").rglob("*.jpg"))):
        size = ((1, 1), (1, 2), (2, 1), (1, 7))[number % 4]
        path.unlink()
        Image.new("RGB", size, (200, 200, 200)).save(path.with_suffix(".png"))
    augment = replace(PLAIN, random_erasing=0)
    options = {"augment": augment, "mean": (0, 0, 0), "std": (1, 1, 1), "on_bad_image": "skip"}
    ours, _ = batches(root, "train", "dali", **options)
    theirs, _ = batches(root, "train", "timm", **options)
    for images in (ours, theirs):
        assert images.shape == (64, 3, 32, 32)
        assert (images - 200 / 255).abs().max() < 0.005


def test_a_pipeline_that_fails_on_good_files_raises(make_set: MakeSet, monkeypatch):
    """The files are checked and fed again once, not endlessly."""
    root = make_set(val=4, classes=1)
    path = sorted((root / "val").rglob("*.jpg"))[2]
    spoil(path, "other tables")
    monkeypatch.setattr(read_ahead, "load_decodable", files.load)  # as if Pillow decoded it
    with pytest.raises(
        RuntimeError,
        match=r"DALI failed on .*/002.jpg, which Pillow decodes: .+; set data.backend to .timm.$",
    ):
        batches(root, "val", "dali")


def test_a_new_pipeline_continues_without_a_difference(make_set: MakeSet):
    """Batches, states and bad files equal those of timm's loader, whatever was in flight."""
    root = make_set(val=28, train=40, classes=1)
    for split, numbers in (("train", (5, 6, 30)), ("val", (0, 4, 5, 9, 20, 26, 27))):
        for number in numbers:
            path = sorted((root / split).rglob("*.jpg"))[number]
            spoil(path, "other tables" if number % 5 else "text")
    for split, size in (("train", 4), ("val", 2)):
        seen = []
        for backend in ("dali", "timm"):
            options = {"augment": PLAIN, "on_bad_image": "skip", "backend": backend, "seed": 1}
            with loading(root, split, size, **options) as loader:
                seen.append(
                    [(b.keys.tolist(), b.bad, loader.state_dict()["batch"]) for b in loader]
                    + [(sorted(loader.bad_images), loader.state_dict())]
                )
        assert seen[0] == seen[1]
        assert len(seen[0][-1][0]) == (3 if split == "train" else 7)
