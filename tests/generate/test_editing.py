"""Editing an image: what is known stays, the hole is filled, and what was in it plays no part."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from einops import rearrange, reduce, repeat
from PIL import Image
from tiny import command
from torch import nn

import tokenizer
from generate.drawing import Request
from generate.edit import Edit, blank, border, box, choose_hints, edit_image, shifted, unknown_codes
from priors.backbone import BackboneConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.interface import SampleOptions
from priors.run import PriorRun
from priors.sampling.noise import uniform_noise
from priors.train import train_prior
from tokenizer.data.dataset import DataConfig
from tokenizer.encode import TokensRun, encode_data
from tokenizer.interface import CodeLayout
from tokenizer.run import TokenizerRun
from training.checkpoint import write_weights
from training.config import from_dict, to_yaml
from training.errors import UserError

ONE, TWO = CodeLayout(((4, 4),), (16,)), CodeLayout(((2, 2), (4, 4)), (16, 16))
SIZE = (16, 16)


class Blocks(nn.Module):
    """Squares to 16 grey levels: 4 px ones and, with two levels, 8 px ones, of which pictures show
    nothing."""

    def __init__(self, layout=ONE):
        super().__init__()
        self.layout = layout

    def encode(self, images):
        sides = [images.shape[-1] // grid[0] for grid in self.layout.grids]
        levels = [
            reduce(images, "b c (h p) (w q) -> b h w", "mean", p=side, q=side) for side in sides
        ]
        return self.layout.join([((level + 1) / 2 * 15).round().long() for level in levels])

    def decode(self, codes, layout=None):
        blocks = self.layout.split(codes)[-1].float() / 15 * 2 - 1
        return repeat(blocks, "b h w -> b c (h p) (w q)", c=3, p=4, q=4)


class Noise:
    """Fills holes evenly, and remembers what was known."""

    num_classes = 3

    def __init__(self, layout=ONE):
        self.layout, self.known = layout, []

    def sample(self, labels, options, sample_ids, known=None, given=None):
        self.known.append(known)
        drawn = uniform_noise(options.seed, sample_ids, 0, (self.layout.length,)).mul(16).long()
        return torch.where(known < 0, drawn, known)


def picture(seed=0):
    return torch.randint(
        0, 256, (3, *SIZE), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def request(num=5, classes=(0, 1), **options):
    return Request(num, classes, SampleOptions(**options))


def test_codes_are_unknown_where_their_patch_touches_the_hole():
    hole = box(
        SIZE, 7, 8, 2, 1
    )  # one pixel wide, over the border between rows 1 and 2 of the 4x4 grid
    assert unknown_codes(hole, ONE).view(4, 4).nonzero().tolist() == [[1, 2], [2, 2]]
    grown = unknown_codes(hole, ONE, 1).view(4, 4)
    assert grown[:, 1:].all() and not grown[:, 0].any()
    coarse, fine = TWO.split(unknown_codes(hole, TWO)[None])
    assert coarse[0].nonzero().tolist() == [[0, 1], [1, 1]] and torch.equal(
        fine[0].flatten(), unknown_codes(hole, ONE)
    )
    odd = CodeLayout(
        ((3, 5),), (9,)
    )  # patches of 16/3 x 16/5 pixels: those that share a pixel both see it
    assert unknown_codes(box(SIZE, 5, 0, 1, 16), odd).view(3, 5)[:, 0].tolist() == [
        True,
        True,
        False,
    ]


def test_tokens_without_a_place_can_only_be_varied():
    sequence = CodeLayout(((7,),), (9,))
    assert unknown_codes(torch.ones(SIZE, dtype=torch.bool), sequence).all()
    with pytest.raises(UserError, match="belongs to a place"):
        unknown_codes(box(SIZE, 0, 0, 4, 4), sequence)


def test_holes():
    assert (
        box(SIZE, 1, 2, 3, 4).nonzero().min(0).values.tolist() == [1, 2]
        and box(SIZE, 1, 2, 3, 4).sum() == 12
    )
    assert border(SIZE, 3).sum() == 256 - 100 and not border(SIZE, 3)[3:13, 3:13].any()
    image = picture()
    moved, hole = shifted(image, 5, -2)
    assert torch.equal(moved[:, 5:, :-2], image[:, :-5, 2:])
    assert hole[:5].all() and hole[:, -2:].all() and not hole[5:, :-2].any()
    assert torch.equal(shifted(image, 0, 0)[0], image) and not shifted(image, 0, 0)[1].any()
    for wrong in (
        lambda: box(SIZE, 8, 8, 9, 1),
        lambda: box(SIZE, -1, 0, 1, 1),
        lambda: border(SIZE, 8),
    ):
        with pytest.raises(UserError, match="16x16"):
            wrong()
    with pytest.raises(UserError, match="out of the frame"):
        shifted(image, 16, 0)
    for wrong in ({"hole": ~box(SIZE, 0, 0, *SIZE)}, {"keep": (1.5,)}, {"dilate": -1}):
        with pytest.raises(UserError):
            Edit(**{"hole": box(SIZE, 0, 0, 1, 1), **wrong})


def test_a_blank_hole_takes_the_nearest_colours():
    image, hole = picture(), box(SIZE, 0, 4, 16, 4)
    filled = blank(image, hole)
    assert torch.equal(filled[:, ~hole], image[:, ~hole])
    assert torch.equal(filled[:, :, 4], image[:, :, 3]) and torch.equal(
        filled[:, :, 7], image[:, :, 8]
    )
    assert torch.equal(blank(image, torch.ones_like(hole)), image)


@pytest.mark.parametrize("layout", [ONE, TWO], ids=["one_level", "two_levels"])
def test_known_codes_and_pixels_stay_exactly(layout):
    prior, blocks, image = Noise(layout), Blocks(layout), picture()
    hole = box(SIZE, 5, 6, 4, 3)
    made = edit_image(prior, blocks, image, Edit(hole), request(), batch_size=3)
    assert made.images.shape == (5, *SIZE, 3) and made.labels.tolist() == [0, 1, 0, 1, 0]
    pixels = torch.from_numpy(made.images).permute(0, 3, 1, 2)
    assert (pixels[:, :, ~hole] == image[:, ~hole]).all()
    unknown = unknown_codes(hole, layout, 1)
    own = blocks.encode(blank(image, hole)[None].float() / 127.5 - 1)
    assert (torch.from_numpy(made.codes)[:, ~unknown] == own[:, ~unknown]).all()
    assert ((torch.cat(prior.known) < 0) == unknown).all()
    decoded = ((blocks.decode(torch.from_numpy(made.codes)) + 1) * 127.5).round()
    assert (pixels[:, :, hole] == decoded[:, :, hole]).all()
    plain = edit_image(prior, blocks, image, Edit(hole, composite=False), request(), batch_size=3)
    assert (plain.codes == made.codes).all() and (
        plain.images.transpose(0, 3, 1, 2) == decoded.numpy()
    ).all()


def test_what_was_in_the_hole_plays_no_part_unless_some_is_kept():
    hole, image = box(SIZE, 4, 4, 8, 8), picture()
    other = torch.where(hole, picture(1), image)
    made = [
        edit_image(Noise(), Blocks(), each, Edit(hole, dilate=0), request())
        for each in (image, other)
    ]
    assert (made[0].images == made[1].images).all() and (made[0].codes == made[1].codes).all()
    kept = [
        edit_image(Noise(), Blocks(), each, Edit(hole, (0.5,), 0), request())
        for each in (image, other)
    ]
    assert (kept[0].codes != kept[1].codes).any()


def test_a_share_of_each_level_is_kept_by_each_sample_for_itself():
    everything, ids = torch.ones(20, dtype=torch.bool), torch.arange(40)
    hints = choose_hints(everything, TWO, (0.5, 0.25), 0, ids)
    assert (hints[:, :4].sum(1) == 2).all() and (hints[:, 4:].sum(1) == 4).all()
    assert len(hints.unique(dim=0)) > 30 and hints.float().mean(0).min() > 0
    assert torch.equal(choose_hints(everything, TWO, (0.5, 0.25), 0, ids[7:9]), hints[7:9])
    assert not torch.equal(choose_hints(everything, TWO, (0.5, 0.25), 1, ids), hints)
    unknown = torch.arange(20) >= 12
    assert choose_hints(unknown, TWO, (1.0,), 0, ids).equal(unknown.expand(40, -1))
    assert not choose_hints(everything, TWO, (0.0,), 0, ids).any()
    with pytest.raises(UserError, match="each of 2 levels"):
        choose_hints(everything, TWO, (0.1, 0.2, 0.3), 0, ids)


def test_variations_keep_codes_and_no_batch_changes_them():
    image, edit = picture(), Edit(torch.ones(SIZE, dtype=torch.bool), (0.5,))
    whole = edit_image(Noise(), Blocks(), image, edit, request(9), batch_size=9)
    own = Blocks().encode(image[None].float() / 127.5 - 1).numpy()
    assert ((whole.codes == own).sum(1) >= 8).all() and (whole.codes != own).any(1).all()
    for batch_size in (1, 4):
        assert (
            edit_image(Noise(), Blocks(), image, edit, request(9), batch_size).images
            == whole.images
        ).all()


def test_a_raster_prior_says_which_holes_it_can_fill():
    prior = (
        AutoregressiveConfig(backbone=BackboneConfig(dim=16, depth=1, heads=2)).build(ONE, 3).eval()
    )
    image, blocks = picture(), Blocks()
    with pytest.raises(UserError, match="beginning"):
        edit_image(prior, blocks, image, Edit(box(SIZE, 0, 0, 8, 16)), request(2))
    made = edit_image(prior, blocks, image, Edit(box(SIZE, 8, 0, 8, 16), dilate=0), request(2))
    assert (made.images[:, :8] == image[:, :8].permute(1, 2, 0).numpy()).all()


def digits_root(root, patch, kind="masked"):
    """A root with a Blocks tokenizer, its tokens of 16 px digits, and a prior of a few steps."""
    for place in ("tokenizer.encode.load", "tokenizer.load"):
        patch.setattr(place, lambda folder: Blocks(), raising=False)
    write_weights(
        root / "tokenizer" / "weights" / "model.safetensors", {"none": torch.zeros(1)}, {}
    )
    data = DataConfig(source="digits", image_size=16)
    (root / "tokenizer" / "config.yaml").write_text(to_yaml(TokenizerRun(data=data)))
    encode_data(TokensRun(root=str(root), tokenizer=str(root / "tokenizer")))
    raw = {
        "root": str(root),
        "prior": {"kind": kind, "backbone": {"dim": 16, "depth": 1, "heads": 2}},
        "loop": {"steps": 4, "batch_size": 16, "save_every": 4, "preview_every": 4, "log_every": 4},
    }
    train_prior(from_dict(PriorRun, raw, "test"))
    return root


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    assert callable(tokenizer.load)
    with pytest.MonkeyPatch.context() as patch:
        yield digits_root(tmp_path_factory.mktemp("root"), patch)


def edited(out):
    return np.load(out / "edits.npz"), json.loads((out / "edits.json").read_text())["made_from"]


def test_command_fills_a_box_of_a_data_set_image(root, tmp_path, capsys):
    out, words = tmp_path / "out", ["held_out:3", "--box", "4,4,8,6", "--num", 2, "--dilate", 0]
    assert command("generate.inpaint", root, *words, "--out", out) == 0
    arrays, made_from = edited(out)
    original = np.asarray(Image.open(out / "original.png"))
    assert (
        arrays["arr_0"].shape == (2, 16, 16, 3)
        and len(set(arrays["arr_1"])) == 1
        and arrays["arr_1"][0] < 10
    )
    assert (arrays["arr_0"][:, :, :4] == original[:, :4]).all() and made_from["dilate"] == 0
    masked = np.asarray(Image.open(out / "masked.png"))
    assert ((masked != original).any(-1) == box(SIZE, 4, 4, 8, 6).numpy()).all()
    assert len(list(out.glob("00000?-?.png"))) == 2 and (out / "grid.png").is_file()
    capsys.readouterr()
    assert (
        command("generate.inpaint", root, *words, "--out", out) == 0
        and "current" in capsys.readouterr().out
    )
    assert command("generate.inpaint", root, *words, "--seed", 1, "--out", out) == 0
    assert "look at" in capsys.readouterr().out


def test_command_takes_pictures_and_masks(root, tmp_path):
    pixels = rearrange(picture(), "c h w -> h w c").numpy().repeat(3, 0).repeat(3, 1)
    Image.fromarray(np.pad(pixels, ((0, 0), (12, 12), (0, 0)))).save(
        tmp_path / "wide.png"
    )  # 48 x 72, the middle counts
    hole = np.zeros((48, 72), np.uint8)
    hole[24:, 12:] = 255
    Image.fromarray(hole).save(tmp_path / "mask.png")
    out = tmp_path / "out"
    words = [tmp_path / "wide.png", "--mask", tmp_path / "mask.png", "--num", 1, "--out", out]
    assert command("generate.inpaint", root, *words) == 0
    arrays, _ = edited(out)
    assert arrays["arr_1"].tolist() == [10]  # of no class, as nobody said which
    original = np.asarray(Image.open(out / "original.png"))
    assert (arrays["arr_0"][0, :8] == original[:8]).all() and (
        arrays["arr_0"][0, 8:] != original[8:]
    ).any()
    assert abs(original.astype(int) - rearrange(picture(), "c h w -> h w c").numpy()).mean() < 40


def test_command_swaps_classes_and_extends(root, tmp_path):
    out = tmp_path / "out"
    words = ["train:0", "--keep", "0.3", "--classes", "2,7", "--num", 2, "--out", out]
    assert command("generate.inpaint", root, *words) == 0
    arrays, made_from = edited(out)
    assert arrays["arr_1"].tolist() == [2, 7, 2, 7] and made_from["keep"] == [0.3]
    assert (
        command("generate.inpaint", root, "train:0", "--shift=-6,0", "--num", 1, "--out", out) == 0
    )
    shifted_up, _ = edited(out)
    original = np.asarray(Image.open(out / "original.png"))
    assert (shifted_up["arr_0"][0, :10] == original[:10]).all()
    assert (
        command("generate.inpaint", root, "train:0", "--border", 2, "--no-composite", "--out", out)
        == 0
    )


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["held_out:3"], "nothing says what to make anew"),
        (["held_out:99999", "--border", "2"], "numbered from 0"),
        (
            ["nosuch.png", "--border", "2"],
            "nosuch.png: cannot be read as an image (No such file or directory)",
        ),
        (["held_out:3", "--box", "1,2,3"], "--box"),
        (["held_out:3", "--box", "10,2,30,3"], "within the image of 16x16"),
        (["held_out:3", "--border", "2", "--sampler", "nosuch"], "sampler is 'nosuch'"),
        (["held_out:3", "--border", "2", "--mask", "a.png"], "not allowed with"),
    ],
)
def test_command_errors_are_one_line(root, words, hint, tmp_path, capsys):
    assert command("generate.inpaint", root, *words, "--out", tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and hint in error and not (tmp_path / "out").exists()


def test_other_folders_are_left_alone(root, tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("precious")
    assert command("generate.inpaint", root, "train:0", "--border", 2, "--out", tmp_path) == 2
    assert (
        "choose another --out" in capsys.readouterr().err
        and (tmp_path / "thesis.txt").read_text() == "precious"
    )
