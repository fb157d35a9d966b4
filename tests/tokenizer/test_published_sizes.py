"""Published tokenizers of many sizes against plain restatements of them (published_networks.py): no
size, envelope, precision or name is built in."""

from __future__ import annotations

import collections
import json

import published_networks as published
import pytest
import torch
from published_networks import BSQ, Diffusers, LlamaGen, MaskBit, SimVQ, Taming, TiTok
from safetensors.torch import load_file, save_file

from tokenizer.published.check import check, told
from tokenizer.published.load import from_pretrained, published_state
from training.errors import UserError


def images(*shape, unit=False, seed=1):
    drawn = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    return drawn if unit else drawn * 2 - 1


def codes(num, *shape):
    return torch.randint(num, shape, generator=torch.Generator().manual_seed(2))


DDCONFIG = {
    "double_z": False, "z_channels": 16, "resolution": 32, "in_channels": 3, "out_ch": 3, "ch": 32,
    "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [16], "dropout": 0.0,
}  # fmt: skip


def taming(target="taming.models.vqgan.VQModel", how="l2", embed=6, count=50, **ddconfig):
    """A model with its configuration, as Lightning's YAML says it."""
    ddconfig = DDCONFIG | ddconfig
    model = Taming(ddconfig | {"embed_dim": embed, "n_embed": count}, how)
    params = {"embed_dim": embed, "n_embed": count, "ddconfig": ddconfig}
    return model, {"model": {"target": target, "params": params}}, count, False


def llamagen(**changes):
    hyper = {
        "codebook_size": 50, "codebook_embed_dim": 5, "codebook_l2_norm": True, "ch": 32,
        "encoder_ch_mult": [1, 2], "decoder_ch_mult": [1, 2], "z_channels": 24, "num_res_blocks": 1,
    } | changes  # fmt: skip
    return LlamaGen(hyper), hyper, hyper["codebook_size"], False


def diffusers(old=False, **changes):
    hyper = {
        "_class_name": "VQModel", "act_fn": "silu", "block_out_channels": [16, 24, 40],
        "down_block_types": ["AttnDownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D"],
        "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D", "AttnUpDecoderBlock2D"],
        "layers_per_block": 1, "latent_channels": 6, "num_vq_embeddings": 33, "sample_size": 32,
        "norm_num_groups": 8, "vq_embed_dim": None, "mid_block_add_attention": True,
    } | changes  # fmt: skip
    return Diffusers(hyper, old), hyper, hyper["num_vq_embeddings"], False


def maskbit(legacy=False, names="maskbit", **changes):
    hyper = {
        "quantizer_type": "lookup-free", "codebook_size": 64, "token_size": 6, "num_channels": 3,
        "hidden_channels": 32, "channel_mult": [1, 2, 1], "num_resolutions": 3, "num_res_blocks": 1,
        "sample_with_conv": True,
    } | changes  # fmt: skip
    count = hyper["codebook_size"]
    config = {"model": {"vq_model": hyper}, "dataset": {"preprocessing": {"resolution": 32}}}
    return MaskBit(hyper, legacy, names), config if names == "maskbit" else hyper, count, True


def simvq(**changes):
    ddconfig = DDCONFIG | {"z_channels": 10} | changes
    quantizer = {
        "target": "taming.modules.vqvae.quantize.SimVQ",
        "params": {"n_e": 55, "e_dim": 10},
    }
    arguments = {"ddconfig": ddconfig, "quantconfig": quantizer, "use_ema": True}
    config = {"model": {"class_path": "taming.models.vq.VQModel", "init_args": arguments}}
    return SimVQ(ddconfig, 55), config, 55, False


def titok(sides, unit=False, told=None):
    hyper = {
        "codebook_size": 40, "token_size": 9, "use_l2_norm": unit, "num_latent_tokens": 7,
        "vit_enc_model_size": "small", "vit_dec_model_size": "large", "vit_enc_patch_size": 8,
        "vit_dec_patch_size": 4, "finetune_decoder": False, "is_legacy": False,
    }  # fmt: skip
    sizes = [dict(zip(("width", "layers", "heads"), side)) for side in sides]
    config = {"model": {"vq_model": hyper}, "dataset": {"preprocessing": {"crop_size": 32}}}
    config |= told or {"vit": {"small": sizes[0], "large": sizes[1]}}
    return TiTok(hyper, sides, 32), config, 40, True


def bsq(bits=12, decoder=None, **changes):
    sizes = {
        "image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "heads": 4, "mlp_ratio": 4,
        "drop_rate": 0.0,
    }  # fmt: skip
    hyper = {
        "embed_dim": bits, "embed_group_size": 1, "l2_norm": True, "post_q_l2_norm": True,
        "logit_laplace": False, "clamp_range": [-1, 1], "vitconfig": sizes,
    } | changes  # fmt: skip
    hyper |= {"dvitconfig": sizes | decoder} if decoder else {}
    config = {"model": {"target": "transcoder.models.bsqvit.VITBSQModel", "params": hyper}}
    return BSQ(hyper), config, 2**bits, False


LDM = "ldm.models.autoencoder.VQModelInterface"
CASES = {
    "taming-f8": lambda: taming(ch_mult=[1, 1, 2, 2], attn_resolutions=[4, 16], z_channels=8),
    "taming-finest": lambda: taming(
        ch_mult=[1, 3], attn_resolutions=[32], num_res_blocks=2, count=37
    ),
    "taming-wide-stem": lambda: taming(ch_mult=[2, 1], attn_resolutions=[]),
    "ldm-f4-noattn": lambda: taming(
        LDM, embed=3, ch_mult=[1, 2, 4], attn_resolutions=[], attn_type="none", z_channels=3
    ),
    "ibq-without-averages": lambda: taming(
        "src.IBQ.models.ibqgan.IBQ", "product", attn_resolutions=[32]
    ),
    "llamagen": lambda: llamagen(encoder_ch_mult=[1, 2, 2], decoder_ch_mult=[2, 1, 2]),
    "llamagen-lengths": lambda: llamagen(codebook_l2_norm=False, num_res_blocks=2),
    "diffusers-old-names": lambda: diffusers(old=True),
    "diffusers-plain": lambda: diffusers(
        block_out_channels=[20, 10], down_block_types=["DownEncoderBlock2D"] * 2, norm_num_groups=5,
        up_block_types=["UpDecoderBlock2D"] * 2, layers_per_block=2, vq_embed_dim=4,
        mid_block_add_attention=False,
    ),
    "maskbit": maskbit,
    "maskbit-deep-decoder": lambda: maskbit(
        num_res_blocks_decoder=2, token_size=5, codebook_size=32, channel_mult=[2, 2],
        num_resolutions=2,
    ),
    "vqgan+": lambda: maskbit(quantizer_type="lookup", codebook_size=77, token_size=12),
    "vqgan+-unit": lambda: maskbit(
        quantizer_type="lookup", codebook_size=77, sample_with_conv=False, use_l2_normalisation=True
    ),
    "maskbit-legacy": lambda: maskbit(True, quantizer_type="lookup", sample_with_conv=False),
    "maskgit": lambda: maskbit(
        names="maskgit", quantizer_type="lookup", sample_with_conv=False, num_res_blocks=3
    ),
    "simvq": lambda: simvq(ch_mult=[1, 2, 2]),
    "titok-sl": lambda: titok(((48, 2, 4), (64, 3, 8))),
    "titok-bl-unit": lambda: titok(((64, 1, 4), (64, 2, 4)), True, {"vit": {"heads": 4}}),
    "bsq-plain": lambda: bsq(l2_norm=False, post_q_l2_norm=False),
    "bsq-two-sizes": lambda: bsq(
        decoder={"width": 32, "heads": 8, "layers": 1, "mlp_ratio": 3, "dim_ffn_output": 50}
    ),
    "bsq-one-map": lambda: bsq(decoder={"use_ffn_output": False}),
    "bsq-36-bits": lambda: bsq(36),
}  # fmt: skip
ONE_SIZE = ("titok", "bsq")


def written(tmp_path, name, save=None, seed=0):
    """A case's folder."""
    torch.manual_seed(seed)
    model, config, count, unit = CASES[name]()
    published.randomised(model, seed)
    given = {"": images(1, 3, 32, 32, unit=unit)}
    drawn = codes(count, 2, 4, 4) if name.startswith("bsq") else codes(count, 2, 3, 5)
    if name.startswith("titok"):
        drawn = codes(count, 2, 7)
    if not name.startswith(ONE_SIZE):
        given["wide."] = images(1, 3, 8, 24, unit=unit)
    return published.write_case(
        tmp_path / name, model, config, given, codes={"free.": drawn}, save=save
    )


@pytest.mark.parametrize("name", CASES)
def test_a_case_of_another_size_agrees(name, tmp_path):
    differences, computed = check(written(tmp_path, name))
    assert all(each.within for each in differences), told(differences)
    assert {"codes", "reconstruction", "free.reconstruction"} <= computed.keys()


@pytest.mark.parametrize("name", ["taming-f8", "maskbit", "titok-sl", "bsq-36-bits"])
def test_names_and_bits_come_back(name, tmp_path):
    folder = written(tmp_path, name)
    expected, found = (
        load_file(folder / "weights.safetensors"),
        published_state(from_pretrained(folder)),
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())


class Anything:
    """What training leaves in a checkpoint beside tensors."""


def zipped(wrap, file="weights.pt", **options):
    return lambda state, folder: torch.save(wrap(state), folder / file, **options)


def prefixed(prefix, state):
    return {f"{prefix}{name}": tensor for name, tensor in state.items()}


def sharded(state, folder):
    names, parts = sorted(state), {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        save_file({name: state[name] for name in names[number::3]}, folder / file)
        parts |= dict.fromkeys(names[number::3], file)
    index = {"metadata": {"total_size": 1}, "weight_map": parts}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


COUNTER = torch.tensor(7)
PACKED = {
    "state_dict": zipped(lambda s: {"state_dict": s, "epoch": 3}),
    "model": zipped(lambda s: {"model": s, "optimizer": {"state": {0: {"step": COUNTER}}}}),
    "counter beside": zipped(lambda s: {"model": s, "iteration": COUNTER}),
    "ema": zipped(lambda s: {"model": {k: v + 1 for k, v in s.items()}, "ema": s}),
    "module": zipped(lambda s: {"module": prefixed("module.", s)}),
    "model_state_dict": zipped(lambda s: {"model_state_dict": prefixed("module._orig_mod.", s)}),
    "compiled": zipped(lambda s: collections.OrderedDict(prefixed("_orig_mod.", s))),
    "wrapped in part": zipped(lambda s: prefixed("module.", s) | {"loss.scale": torch.ones(1)}),
    "lightning": zipped(
        lambda s: {
            "state_dict": s, "hyper_parameters": Anything(), "loops": {"a": [Anything()]},
            "callbacks": {Anything: {"best": COUNTER}},
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}],
        },
        "last.ckpt",
    ),
    "old": zipped(lambda s: {"state_dict": s}, "x.bin", _use_new_zipfile_serialization=False),
    "sharded": sharded,
}  # fmt: skip


@pytest.mark.parametrize("how", PACKED)
def test_a_case_in_every_envelope_agrees(how, tmp_path):
    differences, _ = check(written(tmp_path, "taming-wide-stem", PACKED[how]))
    assert all(each.within for each in differences), told(differences)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["taming-wide-stem", "maskbit", "titok-sl"])
def test_files_in_half_precision_are_computed_in_whole(name, dtype, tmp_path):
    """The random numbers are of few bits, so that nothing is lost in the file."""

    def save(state, folder):
        halves = {k: v.to(dtype) if v.is_floating_point() else v for k, v in state.items()}
        assert all(torch.equal(halves[k].to(v.dtype), v) for k, v in state.items())
        save_file(halves, folder / "weights.safetensors")

    differences, _ = check(written(tmp_path, name, save))
    assert all(each.within for each in differences), told(differences)


# What is refused


def test_indexes_that_lie_are_one_line(tmp_path):
    folder = written(tmp_path, "maskbit", sharded)
    index = folder / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    (folder / "model-00002-of-00003.safetensors").rename(folder / "away")
    with pytest.raises(UserError, match=r"model-00002-of-00003\.safetensors is missing"):
        from_pretrained(folder)
    (folder / "away").rename(folder / "model-00002-of-00003.safetensors")
    index.write_text(
        json.dumps(
            {"weight_map": whole["weight_map"] | {"x.weight": "model-00001-of-00003.safetensors"}}
        )
    )
    with pytest.raises(UserError, match=r"model-00001-of-00003\.safetensors lacks x\.weight"):
        from_pretrained(folder)
    for told_wrong in ({"weight_map": {"a": "../a.safetensors"}}, {}, [], {"weight_map": 3}):
        index.write_text(json.dumps(told_wrong))
        with pytest.raises(UserError, match="damaged"):
            from_pretrained(folder)


def test_what_has_no_codes_says_so(tmp_path):
    folder = written(tmp_path, "titok-sl")
    state = load_file(folder / "weights.safetensors")
    del state["quantize.embedding.weight"]
    save_file(state, folder / "weights.safetensors")
    with pytest.raises(UserError, match="continuous and has no codes"):
        from_pretrained(folder)


def test_another_activation_is_refused(tmp_path):
    folder = written(tmp_path, "diffusers-plain")
    config = json.loads((folder / "config.json").read_text()) | {"act_fn": "relu"}
    with pytest.raises(UserError, match="act_fn=relu is not known here"):
        from_pretrained(folder / "weights.safetensors", config=config)


def test_names_that_would_be_one_are_told(tmp_path):
    torch.save({"module.a": torch.ones(1), "a": torch.ones(1)}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"module\.a and a are both a: keep one"):
        from_pretrained(tmp_path / "x.pt")


# Codes of more than 32 bits


def test_36_bits_are_exact_codes(tmp_path):
    folder = written(tmp_path, "bsq-36-bits")
    model = from_pretrained(folder)
    case = load_file(folder / "case.safetensors")
    places = 2 ** torch.arange(35, -1, -1)
    expected = ((case["features"] > 0) * places).sum(-1)
    found = model.encode(case["images"])
    assert torch.equal(found, expected) and int(found.max()) > 2**32
    assert (model.decode(found) - case["reconstruction"]).abs().max() < 1e-4
    assert model.layout.num_codes == (2**36,)
