"""A user's own data sets in place of a source: the same order, splits, weights and resuming."""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import priors
import tokenizer
from priors.backbone import BackboneConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.record import read_record
from priors.train import PriorRun, train_prior
from tokenizer.autoencoder import VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.data.pixels import contents
from tokenizer.data.source import DigitsListing
from tokenizer.data.transforms import BadImage, decode
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.encode import TokensRun, encode_data
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.interface import CodeLayout
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun
from tokenizer.train import train_tokenizer
from training.checkpoint import load_weights
from training.errors import UserError
from training.loop import LoopConfig

SIDE = 8


class Digits:
    """The embedded digits, as somebody else would hold them."""

    def __init__(self, last: int | None = None) -> None:
        listing = DigitsListing()
        self.images, self.labels = listing._images[:last], listing.labels[:last]

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Image.fromarray(self.images[index]), int(self.labels[index])


def run_in(root, name="run", steps=4, **data):
    part = {"channels": 8, "residual_blocks": 1, "residual_channels": 4}
    return TokenizerRun(
        name=name,
        root=str(root),
        data=DataConfig(image_size=SIDE, augment="shift", **data),
        model=VQVAEConfig(
            encoder=ConvEncoderConfig(**part),
            quantizer=VectorConfig(num_codes=16, code_dim=2),
            decoder=ConvDecoderConfig(**part),
        ),
        calibration_images=64,
        loop=LoopConfig(steps=steps, batch_size=8, log_every=1, save_every=2, preview_every=4),
    )


def weights(root, name="run"):
    return load_weights(root / name)


def test_a_data_set_trains_to_the_bit_as_the_source_that_holds_the_same(tmp_path):
    """Split, order, augmentation and calibration: the embedded digits are the oracle."""
    train_tokenizer(run_in(tmp_path, "source", source="digits"))
    train_tokenizer(run_in(tmp_path, "given"), images=Digits())
    one, other = weights(tmp_path, "source"), weights(tmp_path, "given")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert tokenizer.load(tmp_path / "given").config.data.source == "given:Digits"


def test_it_resumes_and_knows_its_images_again(tmp_path):
    short, config = Digits(last=200), run_in(tmp_path)
    train_tokenizer(config, images=short)
    whole = weights(tmp_path)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")  # as a kill leaves it
    train_tokenizer(config, images=short)
    again = weights(tmp_path)
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    recorded = dataclasses.replace(config, data=tokenizer.load(tmp_path / "run").config.data)
    with pytest.raises(UserError, match=r"given:Digits: .* give them again as images="):
        train_tokenizer(recorded)
    short.images = short.images.copy()
    short.images[7, 0, 0] ^= 1
    with pytest.raises(UserError, match="made from other images"):
        train_tokenizer(config, images=short)


def test_codes_of_a_data_set_are_cached(tmp_path):
    train_tokenizer(run_in(tmp_path, "tokenizer", steps=2), images=Digits(200))
    cache = encode_data(TokensRun(root=str(tmp_path)), images=Digits(200))
    train = cache.split("train")
    assert len(train.labels) + len(cache.split("held_out").labels) == 200
    assert encode_data(TokensRun(root=str(tmp_path)), images=Digits(200)).sha256 == cache.sha256
    pixels = decode(DigitsListing().read(int(train.ids[3])), SIDE, 10**6)
    image = torch.from_numpy(pixels.copy())[None].float() / 127.5 - 1
    codes = tokenizer.load(tmp_path / "tokenizer").encode(image)[0]
    assert np.asarray(train.codes)[3, 0].tolist() == codes.tolist()


def test_a_held_out_data_set_is_held_out(tmp_path):
    from tokenizer.data.given import open_given

    _, splits = open_given(DataConfig(image_size=SIDE), Digits(60), Digits(30))
    assert [len(splits[name]) for name in ("train", "held_out")] == [60, 30]
    assert splits["held_out"].ids.tolist() == list(range(60, 90))


class Items(list):
    pass


def test_what_is_no_image_is_said_and_not_guessed():
    from tokenizer.data.given import GivenListing

    picture = Image.new("RGB", (4, 4))
    for item, words in (
        (torch.rand(3, 4, 4), "float32, not of uint8"),
        (np.zeros((4, 4, 4), np.uint8), "not (H, W, 3)"),
        ("nowhere.png", "cannot be read"),
        ((picture, 1, 2), "has 3 parts"),
    ):
        with pytest.raises(UserError) as caught:
            GivenListing(Items([item]))
        assert words in str(caught.value) and str(caught.value).startswith("images[0]: ")
    with pytest.raises(UserError, match="of the map style"):
        GivenListing(iter(()))

    class Random(Items):
        def __getitem__(self, index):
            return torch.randint(256, (3, 4, 4), dtype=torch.uint8)

    with pytest.raises(UserError, match="another image each time"):
        GivenListing(Random([0]))


def test_pixels_in_memory_take_the_path_of_a_file(tmp_path):
    rgb = torch.randint(256, (3, 5, 7), dtype=torch.uint8)
    Image.fromarray(rgb.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    forms = [rgb, rgb.permute(1, 2, 0).numpy(), Image.open(tmp_path / "a.png"), tmp_path / "a.png"]
    found = [decode(contents(form), 4, 10**6) for form in forms]
    assert all(np.array_equal(found[0], other) for other in found[1:])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(tmp_path / "a.png").save(tmp_path / "b.png", exif=exif)
    turned = decode(contents(tmp_path / "b.png"), 4, 10**6)
    assert np.array_equal(decode(contents(Image.open(tmp_path / "b.png")), 4, 10**6), turned)
    assert not np.array_equal(turned, found[0])
    with pytest.raises(BadImage):
        contents(torch.zeros(3, 4, 4))
    flat = decode(contents(torch.zeros(1, 4, 4, dtype=torch.uint8)), 4, 100)
    assert flat.shape == (3, 4, 4)


class Codes:
    """Sequences of four codes, each of a class; every one begins with its class."""

    def __init__(self, count: int = 40) -> None:
        self.codes = torch.randint(8, (count, 4), generator=torch.Generator().manual_seed(0))
        self.codes[:, 0] = torch.arange(count) % 2

    def __len__(self):
        return len(self.codes)

    def __getitem__(self, index):
        return self.codes[index], int(self.codes[index, 0])


def test_a_prior_trains_on_codes_of_ones_own(tmp_path):
    layout = CodeLayout(((2, 2),), (8,))
    prior = AutoregressiveConfig(backbone=BackboneConfig(dim=16, depth=1, heads=2))
    loop = LoopConfig(steps=4, batch_size=8, log_every=1, save_every=2)
    config = PriorRun(root=str(tmp_path), prior=prior, loop=loop)
    train_prior(config, tokens=Codes(), layout=layout)
    whole = weights(tmp_path, "prior")
    shutil.rmtree(tmp_path / "prior" / "checkpoints" / "step-00000004")
    train_prior(config, tokens=Codes(), layout=layout)
    again = weights(tmp_path, "prior")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    loaded = priors.load(tmp_path / "prior")
    assert (loaded.layout, loaded.num_classes) == (layout, 2)
    with pytest.raises(UserError, match="draws codes alone"):
        read_record(tmp_path / "prior").tokenizer_folder(tmp_path / "prior")
    with pytest.raises(UserError, match=r"tokens"):
        train_prior(config, tokens=Codes(41), layout=layout)
    for tokens, told in (
        ([torch.zeros(3, dtype=torch.int64)] * 9, "not 4 whole numbers"),
        ([torch.full((4,), 8)] * 9, r"outside \[0, 8\)"),
        ([torch.zeros(4)] * 9, "not 4 whole numbers"),
    ):
        with pytest.raises(UserError, match=told):
            train_prior(config, tokens=tokens, layout=layout)
    with pytest.raises(UserError, match="layout="):
        train_prior(config, tokens=Codes())
