"""Published generators of masked codes (Halton-MaskGIT, TiTok's, MaskBit's): equal to their authors'
code, and to their definitions written down once more; any file, and back to the same bits."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from golden import golden
from safetensors.torch import load_file, save_file
from test_cache import save_images
from tiny import command

import priors
from priors.interface import SampleOptions
from priors.published.check import check
from priors.published.imports import export_prior, import_prior
from priors.published.load import from_pretrained
from priors.published.table import PEERS
from priors.run import PriorRun
from priors.train import train_prior
from tokenizer.autoencoder import VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.titok import TiTokDecoderConfig
from tokenizer.encode import TokensRun, encode_data
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.titok import TiTokEncoderConfig
from tokenizer.published.check import told
from tokenizer.published.load import published_state
from tokenizer.quantizers.lookup_free import LookupFreeConfig
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun
from training.checkpoint import write_weights
from training.command import UserError
from training.config import to_yaml
from training.loop import LoopConfig
from training.optim import OptimizerConfig

# golden case (of which the kinds are called so, too) -> what no shape tells
GOLDEN = {
    "halton-maskgit": "heads",
    "titok-generator": "num_attention_heads",
    "maskbit-generator": "heads",
}
WIDTH, HEADS, HIDDEN, BLOCKS, CODES, CLASSES, LENGTH = 12, 3, 20, 2, 16, 3, 4


def linear(name, rows, columns, bias=True):
    return {f"{name}.weight": (rows, columns)} | ({f"{name}.bias": (rows,)} if bias else {})


def norm(name):
    return {f"{name}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}


def halton_shapes(width=WIDTH, heads=HEADS, registers=1):
    inner = width // heads * heads
    shapes = {
        "cls_emb.weight": (CLASSES + 1, width),
        "tok_emb.weight": (CODES + 1, width),
        "pos_emb.weight": (LENGTH, width),
        "head.bias": (CODES + 1,),
        "last_norm.norm_final.weight": (width,),
        "last_norm.norm_final.bias": (width,),
    } | linear("last_norm.mlp.1", 2 * width, width)
    if registers:
        shapes["reg_tokens.weight"] = (registers, width)
    for number in range(BLOCKS):
        block = f"transformer.layers.{number}"
        for side in "qkv":
            shapes |= linear(f"{block}.attn.w{side}", inner, width, False)
        shapes |= linear(f"{block}.attn.wo", width, inner, False)
        shapes |= linear(f"{block}.ff.w1", HIDDEN, width, False)
        shapes |= linear(f"{block}.ff.w3", HIDDEN, width, False)
        shapes |= linear(f"{block}.ff.w2", width, HIDDEN, False)
        shapes |= linear(f"{block}.mlp.1", 6 * width, width)
        shapes |= {f"{block}.{each}.weight": (width,) for each in ("ln1", "ln2")}
    return shapes


def bert_shapes():
    shapes = {
        "model.embeddings.word_embeddings.weight": (CODES + CLASSES + 2, WIDTH),
        "model.embeddings.position_embeddings.weight": (LENGTH + 1, WIDTH),
        "model.embeddings.token_type_embeddings.weight": (2, WIDTH),
    }
    shapes |= norm("model.embeddings.LayerNorm") | linear("model.lm_head", CODES, WIDTH)
    for number in range(BLOCKS):
        layer = f"model.encoder.layer.{number}"
        for side in ("self.query", "self.key", "self.value", "output.dense"):
            shapes |= linear(f"{layer}.attention.{side}", WIDTH, WIDTH)
        shapes |= linear(f"{layer}.intermediate.dense", HIDDEN, WIDTH)
        shapes |= linear(f"{layer}.output.dense", WIDTH, HIDDEN)
        shapes |= norm(f"{layer}.attention.output.LayerNorm") | norm(f"{layer}.output.LayerNorm")
    return shapes


def uvit_shapes():
    shapes = {
        "embeddings.weight": (CODES + CLASSES + 2, WIDTH),
        "pos_embed": (1, LENGTH + 1, WIDTH),
    }
    shapes |= norm("norm") | linear("lm_head", CODES, WIDTH)
    blocks = ["mid_block", *(f"{side}_blocks.{n}" for side in ("in", "out") for n in range(2))]
    for block in blocks:
        shapes |= linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, False)
        shapes |= linear(f"{block}.attn.proj", WIDTH, WIDTH)
        shapes |= linear(f"{block}.mlp.fc1", HIDDEN, WIDTH) | norm(f"{block}.norm1")
        shapes |= linear(f"{block}.mlp.fc2", WIDTH, HIDDEN) | norm(f"{block}.norm2")
        if block.startswith("out"):
            shapes |= linear(f"{block}.skip_linear", WIDTH, 2 * WIDTH)
    return shapes


def maskbit_shapes(splits=2, prenorm=False):
    shapes = {"class_emb.weight": (CLASSES + 1, WIDTH), "pos_emb": (1, LENGTH + 1, WIDTH)}
    shapes |= linear("input_proj", WIDTH, 4) | norm("first_layer.0")
    shapes |= linear("last_layer.0", WIDTH, WIDTH) | norm("last_layer.2")
    shapes |= linear("prediction_layer", splits << 4 // splits, WIDTH)
    for number in range(BLOCKS):
        layer = f"transformer.layers.{number}"
        shapes |= {
            f"{layer}.0.mha.in_proj_weight": (3 * WIDTH, WIDTH),
            f"{layer}.0.mha.in_proj_bias": (3 * WIDTH,),
        }
        shapes |= linear(f"{layer}.0.mha.out_proj", WIDTH, WIDTH) | norm(f"{layer}.0.norm")
        shapes |= linear(f"{layer}.1.net.0", HIDDEN, WIDTH) | norm(f"{layer}.1.norm")
        shapes |= linear(f"{layer}.1.net.2", WIDTH, HIDDEN)
    return shapes | (norm("norm_after_transformer") if prenorm else {})


def halton(width=WIDTH, heads=HEADS, registers=1):
    tensors = drawn(halton_shapes(width, heads, registers))
    return tensors | {"head.weight": tensors["tok_emb.weight"].clone()}, {"heads": heads}


def titok(shapes):
    generator = {"num_attention_heads": HEADS, "dropout": 0.1}
    return drawn(shapes), {"model": {"generator": generator}}


def maskbit(splits=2, prenorm=False):
    tensors = drawn(maskbit_shapes(splits, prenorm))
    tensors["bits_to_indices"] = 2 ** torch.arange(4 // splits, dtype=torch.int32)
    return tensors, {"heads": HEADS, "use_prenorm": prenorm}


def drawn(shapes):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.5)
        for name, shape in shapes.items()
    }


TINY = {  # variant -> (kind, the tensors and the configuration of a file)
    "halton": ("halton-maskgit", halton),
    "halton of uneven heads": ("halton-maskgit", lambda: halton(13, 3, 2)),
    "halton without registers": ("halton-maskgit", lambda: halton(registers=0)),
    "titok": ("titok-generator", lambda: titok(bert_shapes())),
    "titok with long skips": ("titok-generator", lambda: titok(uvit_shapes())),
    "maskbit": ("maskbit-generator", maskbit),
    "maskbit in one group": ("maskbit-generator", lambda: maskbit(1)),
    "maskbit in four groups": ("maskbit-generator", lambda: maskbit(4)),
    "maskbit with norms before": ("maskbit-generator", lambda: maskbit(2, True)),
}
VARIANTS = pytest.mark.parametrize("variant", TINY)


# What each computes, in float64, from its authors' definition


class Definition:
    """Of one sequence of ids; masks are None."""

    def __init__(self, tensors, heads):
        self.tensors = {name: each.double() for name, each in tensors.items()}
        self.heads = heads

    def __getitem__(self, name):
        return self.tensors[name]

    def linear(self, name, rows):
        made = rows @ self[f"{name}.weight"].T
        return made + self[f"{name}.bias"] if f"{name}.bias" in self.tensors else made

    def layer_norm(self, name, rows, eps):
        centred = rows - rows.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
        return scaled * self[f"{name}.weight"] + self[f"{name}.bias"]

    def attend(self, query, key, value):
        width = query.shape[1] // self.heads
        parts = []
        for start in range(0, width * self.heads, width):
            part = slice(start, start + width)
            scores = query[:, part] @ key[:, part].T / width**0.5
            parts.append(scores.softmax(-1) @ value[:, part])
        return torch.cat(parts, 1)

    def rms(self, rows):
        return rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    def halton(self, ids, label):
        rows = torch.stack([self["tok_emb.weight"][CODES if i is None else i] for i in ids])
        rows = rows + self["pos_emb.weight"]
        if "reg_tokens.weight" in self.tensors:
            rows = torch.cat([rows, self["reg_tokens.weight"]])
        condition = F.silu(self["cls_emb.weight"][label])
        for number in range(BLOCKS):
            block = f"transformer.layers.{number}"
            parts = self.linear(f"{block}.mlp.1", condition).chunk(6)
            shift, scale, gate, shift2, scale2, gate2 = parts
            inner = self.rms(rows) * self[f"{block}.ln1.weight"] * (1 + scale) + shift
            query, key, value = (self.linear(f"{block}.attn.w{side}", inner) for side in "qkv")
            attended = self.attend(self.rms(query), self.rms(key), value)
            rows = rows + gate * self.linear(f"{block}.attn.wo", attended)
            inner = self.rms(rows) * self[f"{block}.ln2.weight"] * (1 + scale2) + shift2
            up = F.silu(self.linear(f"{block}.ff.w1", inner)) * self.linear(f"{block}.ff.w3", inner)
            rows = rows + gate2 * self.linear(f"{block}.ff.w2", up)
        shift, scale = self.linear("last_norm.mlp.1", condition).chunk(2)
        last = "last_norm.norm_final"
        rows = self.rms(rows[:LENGTH]) * self[f"{last}.weight"] + self[f"{last}.bias"]
        return (rows * (1 + scale) + shift) @ self["head.weight"].T + self["head.bias"]

    def titok(self, ids, label):
        numbers = [CODES + 1 + label, *(CODES if i is None else i for i in ids)]
        if "pos_embed" in self.tensors:
            return self.uvit(self["embeddings.weight"][numbers] + self["pos_embed"][0])
        table, eps = "model.embeddings", 1e-12
        rows = self[f"{table}.word_embeddings.weight"][numbers]
        rows = rows + self[f"{table}.position_embeddings.weight"]
        rows = rows + self[f"{table}.token_type_embeddings.weight"][0]
        rows = self.layer_norm(f"{table}.LayerNorm", rows, eps)
        for number in range(BLOCKS):
            layer = f"model.encoder.layer.{number}"
            sides = (
                self.linear(f"{layer}.attention.self.{side}", rows)
                for side in ("query", "key", "value")
            )
            made = self.linear(f"{layer}.attention.output.dense", self.attend(*sides))
            rows = self.layer_norm(f"{layer}.attention.output.LayerNorm", made + rows, eps)
            made = F.gelu(self.linear(f"{layer}.intermediate.dense", rows))
            made = self.linear(f"{layer}.output.dense", made)
            rows = self.layer_norm(f"{layer}.output.LayerNorm", made + rows, eps)
        return self.linear("model.lm_head", rows[1:])

    def uvit(self, rows):
        kept = []
        for block in ("in_blocks.0", "in_blocks.1", "mid_block", "out_blocks.0", "out_blocks.1"):
            if block.startswith("out"):
                rows = self.linear(f"{block}.skip_linear", torch.cat([rows, kept.pop()], 1))
            inner = self.layer_norm(f"{block}.norm1", rows, 1e-5)
            attended = self.attend(*self.linear(f"{block}.attn.qkv", inner).chunk(3, 1))
            rows = rows + self.linear(f"{block}.attn.proj", attended)
            inner = self.layer_norm(f"{block}.norm2", rows, 1e-5)
            up = F.gelu(self.linear(f"{block}.mlp.fc1", inner))
            rows = rows + self.linear(f"{block}.mlp.fc2", up)
            if block.startswith("in"):
                kept.append(rows)
        return self.linear("lm_head", self.layer_norm("norm", rows, 1e-5)[1:])

    def maskbit(self, ids, label):
        """ids: (N, splits) of groups, None where masked; logits (N, splits, codes of a group)."""
        width, prenorm = (
            len(self["bits_to_indices"]),
            "norm_after_transformer.weight" in self.tensors,
        )

        def bits(group):
            return (
                [0.0] * width
                if group is None
                else [(group >> i & 1) * 2.0 - 1 for i in range(width)]
            )

        signs = [[sign for group in groups for sign in bits(group)] for groups in ids]
        signs = torch.tensor(signs, dtype=torch.float64)
        rows = torch.cat([self.linear("input_proj", signs), self["class_emb.weight"][label][None]])
        rows = self.layer_norm("first_layer.0", rows + self["pos_emb"][0], 1e-12)
        for number in range(BLOCKS):
            layer = f"transformer.layers.{number}"

            def attend(given, layer=layer):
                mha = f"{layer}.0.mha"
                sides = given @ self[f"{mha}.in_proj_weight"].T + self[f"{mha}.in_proj_bias"]
                return self.linear(f"{mha}.out_proj", self.attend(*sides.chunk(3, 1)))

            def feed(given, layer=layer):
                return self.linear(
                    f"{layer}.1.net.2", F.gelu(self.linear(f"{layer}.1.net.0", given))
                )

            for branch, name in ((attend, f"{layer}.0.norm"), (feed, f"{layer}.1.norm")):
                if prenorm:
                    rows = rows + branch(self.layer_norm(name, rows, 1e-12))
                else:
                    rows = self.layer_norm(name, rows + branch(rows), 1e-12)
        if prenorm:
            rows = self.layer_norm("norm_after_transformer", rows, 1e-12)
        rows = F.gelu(self.linear("last_layer.0", rows))
        rows = self.linear("prediction_layer", self.layer_norm("last_layer.2", rows, 1e-12))
        return rows[:-1].view(len(ids), len(ids[0]), -1)


def cases(variant, count=4):
    """What a folder's case.safetensors would hold, its logits by the definitions above."""
    kind, make = TINY[variant]
    tensors, config = make()
    definition = Definition(tensors, config.get("heads", HEADS))
    generator = torch.Generator().manual_seed(1)
    shape, size = (count, LENGTH), CODES
    if kind == "maskbit-generator":
        width = len(tensors["bits_to_indices"])
        shape, size = (count, LENGTH, 4 // width), 1 << width
    tokens = torch.randint(size, shape, generator=generator)
    masked = torch.rand(shape, generator=generator) < 0.6
    labels = torch.arange(count) % CLASSES
    ids = tokens.masked_fill(masked, size)
    law = getattr(definition, kind.partition("-")[0])
    case = {"tokens": tokens, "masked": masked, "labels": labels, "input_ids": ids}
    for name, whose in (("conditional", labels), ("unconditional", [CLASSES] * count)):
        rows = [law(none(row.tolist(), size), int(who)) for row, who in zip(ids, whose)]
        case[f"logits.{name}"] = torch.stack(rows).float()
    if kind == "maskbit-generator":
        place = (1 << width) ** torch.arange(4 // width)
        case["codes"] = (tokens * place).sum(-1)
    return tensors, config, case


def none(ids, mask):
    """Nested lists with None for the mask."""
    return [none(i, mask) if isinstance(i, list) else None if i == mask else i for i in ids]


def write(folder, variant, change=None, suffix="safetensors", envelope=None):
    """A tiny prior's folder."""
    tensors, config = TINY[variant][1]()
    tensors = {k: v for k, v in (tensors | (change or {})).items() if v is not None}
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(envelope(tensors) if envelope else tensors, file)
    return file


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


# Their authors' code


@pytest.mark.parametrize("case", GOLDEN)
def test_a_generator_gives_what_its_authors_code_gives(case):
    differences, _ = check(golden(case))
    assert all(each.within for each in differences), told(differences)
    assert {"input_ids", "logits.conditional", "logits.unconditional"} <= {
        each.name for each in differences
    }


@pytest.mark.parametrize("case", GOLDEN)
def test_a_generator_is_recognised_without_its_configuration(case, tmp_path):
    shutil.copy(golden(case) / "weights.safetensors", tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=rf"no configuration says {GOLDEN[case]}\b.*config=FILE"):
        from_pretrained(tmp_path / "x.safetensors")
    found = from_pretrained(tmp_path / "x.safetensors", config=golden(case) / "config.json")
    assert found.published.peer.kind == case


@pytest.mark.parametrize("case", GOLDEN)
def test_under_published_names_a_generator_is_its_file(case):
    same_bits(
        published_state(from_pretrained(golden(case))),
        load_file(golden(case) / "weights.safetensors"),
    )


@pytest.mark.parametrize("case", GOLDEN)
def test_the_definitions_are_their_authors_code(case, monkeypatch):
    tensors = load_file(golden(case) / "weights.safetensors")
    tensors = {name.removeprefix("module._orig_mod."): each for name, each in tensors.items()}
    values = load_file(golden(case) / "case.safetensors")
    mask = 8 if case == "maskbit-generator" else 64
    for name, value in (("BLOCKS", 3), ("CODES", 64), ("LENGTH", values["tokens"][0].numel())):
        monkeypatch.setattr(f"{__name__}.{name}", value)
    law = getattr(Definition(tensors, 4), case.partition("-")[0])
    for row in range(2):
        ids = values["input_ids"][row]
        ids = ids if case == "maskbit-generator" else ids.flatten()
        found = law(none(ids.tolist(), mask), int(values["labels"][row]))
        torch.testing.assert_close(
            found.float(), values["logits.conditional"][row], atol=1e-4, rtol=0
        )


# Small cases of our own


@VARIANTS
def test_logits_are_those_of_the_definition(variant, tmp_path):
    _, _, case = cases(variant)
    write(tmp_path, variant)
    save_file(case, tmp_path / "case.safetensors")
    differences, computed = check(tmp_path)
    assert all(each.within for each in differences), told(differences)
    assert computed.keys() == case.keys() - {"tokens", "masked", "labels"}
    prior = from_pretrained(tmp_path)
    assert prior.published.peer.kind == TINY[variant][0]
    # Without the mask it is the ids that are given.
    alone = {name: each for name, each in case.items() if name not in ("tokens", "masked", "codes")}
    made = prior.published.peer.outputs(prior, alone)
    torch.testing.assert_close(made["logits.conditional"], computed["logits.conditional"])


@VARIANTS
def test_a_round_trip_keeps_the_bits(variant, tmp_path):
    file = write(tmp_path / "theirs", variant)
    prior = from_pretrained(tmp_path / "theirs")
    folder = import_prior(tmp_path / "theirs", tmp_path / "run" / "prior")
    ours = priors.load(folder)
    same_bits(ours.state_dict(), prior.state_dict())
    codes, labels, ids = torch.randint(CODES, (3, LENGTH)), torch.arange(3), torch.arange(3)
    assert torch.equal(ours.nll(codes, labels).nats, prior.nll(codes, labels).nats)
    options = SampleOptions(seed=3, guidance=2.0)
    assert torch.equal(ours.sample(labels, options, ids), prior.sample(labels, options, ids))
    out = export_prior(folder, tmp_path / "theirs", tmp_path / "out.safetensors")
    same_bits(load_file(out), load_file(file))


@VARIANTS
@pytest.mark.parametrize(
    ("suffix", "envelope"),
    [
        ("pth", lambda tensors: {"iter": 3, "model_state_dict": tensors, "global_epoch": 1}),
        (
            "pth",
            lambda tensors: {
                "model_state_dict": {f"module._orig_mod.{n}": t for n, t in tensors.items()},
                "optimizer_state_dict": {"state": {0: {"exp_avg": torch.ones(2)}}},
            },
        ),
        ("bin", lambda tensors: {"model": tensors}),
        ("pt", lambda tensors: {"ema": tensors, "model": {n: t + 1 for n, t in tensors.items()}}),
    ],
)
def test_envelopes_are_taken_off(variant, suffix, envelope, tmp_path):
    write(tmp_path / "plain", variant)
    write(tmp_path / "wrapped", variant, suffix=suffix, envelope=envelope)
    found = from_pretrained(tmp_path / "wrapped")
    same_bits(found.state_dict(), from_pretrained(tmp_path / "plain").state_dict())


@VARIANTS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision_load_and_come_back(variant, dtype, tmp_path):
    tensors = TINY[variant][1]()[0]
    halves = {n: t.to(dtype) if t.is_floating_point() else t for n, t in tensors.items()}
    write(tmp_path, variant, halves)
    prior = from_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in prior.parameters())
    same_bits(published_state(prior), halves)


@VARIANTS
def test_what_is_missing_left_over_or_of_another_shape_is_named(variant, tmp_path):
    kind, make = TINY[variant]
    tensors = make()[0]
    names = ("ln2.weight", "attention.output.dense.weight", "attn.proj.weight", "1.net.0.weight")
    name = max(n for n in tensors if n.endswith(names))
    for change, line in (
        ({name: None}, rf"as {kind} it lacks {name}: is it whole"),
        ({name: tensors[name][:-1]}, rf"{name} is \(\d+.*\), and \(\d+.*\) is expected"),
        ({"stranger.weight": torch.ones(2)}, r"has no place for stranger\.weight"),
        ({name: tensors[name].long()}, rf"{name} is torch\.int64"),
    ):
        write(tmp_path, variant, change)
        with pytest.raises(UserError, match=line) as error:
            from_pretrained(tmp_path, as_=kind)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@VARIANTS
def test_another_kind_is_refused(variant, tmp_path):
    write(tmp_path, variant)
    for other in [each for each in PEERS if each != TINY[variant][0]]:
        with pytest.raises(UserError, match=rf"{other}|no configuration says"):
            from_pretrained(tmp_path, as_=other)


def test_weights_that_are_tied_are_one(tmp_path):
    """Halton-MaskGIT's table of codes is saved twice: both are written, and may not differ."""
    file = write(tmp_path / "theirs", "halton")
    prior = from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        prior.backbone.tokens.weight += 1
    state = published_state(prior)
    assert torch.equal(state["head.weight"], state["tok_emb.weight"])
    assert not torch.equal(state["head.weight"], load_file(file)["head.weight"])
    for missing in ("head.weight", "tok_emb.weight"):  # files that hold tensors once
        write(tmp_path / "once", "halton", {missing: None})
        once = from_pretrained(tmp_path / "once")
        same_bits(once.state_dict(), from_pretrained(tmp_path / "theirs").state_dict())
        assert missing not in published_state(once)
    write(tmp_path / "other", "halton", {"head.weight": torch.ones(CODES + 1, WIDTH)})
    with pytest.raises(UserError, match=r"head\.weight and tok_emb\.weight are one tensor"):
        from_pretrained(tmp_path / "other")


def test_files_of_some_versions_hold_position_ids(tmp_path):
    ids = {"model.embeddings.position_ids": torch.arange(LENGTH + 1)[None]}
    write(tmp_path, "titok", ids)
    same_bits(published_state(from_pretrained(tmp_path)), TINY["titok"][1]()[0] | ids)


def test_groups_of_bits_are_told_by_buffer_configuration_or_logits(tmp_path):
    def splits(change=None, **told):
        write(tmp_path, "maskbit in four groups", change)
        (tmp_path / "config.json").write_text(json.dumps({"heads": HEADS, **told}))
        return from_pretrained(tmp_path).splits

    unknown = {"bits_to_indices": None}
    assert splits() == 4 and splits(unknown, codebook_splits=4) == 4
    with pytest.raises(UserError, match=r"its 8 logits are of 2 or 4"):
        splits(unknown)  # 2 groups of 4 codes, or 4 of 2
    with pytest.raises(UserError, match=r"it says 3 how many groups"):
        splits(codebook_splits=3)


def test_joined_codes_are_refused(tmp_path):
    write(tmp_path, "halton", {"in_proj.weight": torch.ones(WIDTH, WIDTH, 2, 2)})
    with pytest.raises(UserError, match=r"joins codes by twos"):
        from_pretrained(tmp_path)


# Recipes


def test_recipes_are_those_of_configurations(tmp_path):
    def made(variant, **told):
        write(tmp_path, variant)
        path = tmp_path / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | told))
        config = from_pretrained(tmp_path).config
        return config.prior, config.sampling

    prior, sampling = made("titok")  # of L-32
    assert (prior.steps, prior.choice_temperature, prior.sampler) == (8, 9.5, "annealed")
    assert (sampling.guidance, sampling.guidance_schedule) == (5.5, "linear")
    told = {"num_steps": 64, "randomize_temperature": 2.8, "guidance_scale": 6.9}
    prior, sampling = made("titok", guidance_decay="power-cosine", **told)
    assert (prior.steps, prior.choice_temperature) == (64, 2.8)
    assert (sampling.guidance, sampling.guidance_schedule) == (6.9, "power_cosine")
    assert sampling.guidance_power == 3.0
    with pytest.raises(UserError, match=r"guidance_decay='falling' is not known"):
        made("titok", guidance_decay="falling")
    prior, sampling = made("maskbit", guidance_scale=5.8, randomize_temperature=10.3, num_steps=256)
    assert (prior.steps, prior.choice_temperature) == (256, 10.3)
    assert (sampling.guidance, sampling.guidance_schedule) == (6.8, "power_cosine")
    prior, sampling = made("halton", cfg_w=0.7, step=24)
    assert (prior.steps, prior.sampler, sampling.guidance) == (24, "halton", 1.7)


@pytest.mark.parametrize(
    ("name", "variant", "expected"),
    [
        ("halton-maskgit-tiny-256", "halton", (2.5, "constant", 32)),
        ("maskbit-14bit-generator", "maskbit", (8.1, "power_cosine", 64)),
        ("maskbit-14bit-generator-256steps", "maskbit", (6.8, "power_cosine", 256)),
    ],
)
def test_published_files_sample_as_their_authors_do(name, variant, expected, tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_PUBLISHED", str(tmp_path))
    peer = PEERS[TINY[variant][0]]
    file = next(each.file for each in peer.files if each.name == name)
    written = write(tmp_path / name, variant, suffix=file.rpartition(".")[2])
    written.rename(tmp_path / name / file)
    (tmp_path / name / "config.json").unlink()
    with pytest.raises(UserError, match="no configuration says heads"):
        from_pretrained(f"published:{name}")
    monkeypatch.setitem(peer.architecture.__globals__["HEADS"], WIDTH, HEADS)
    config = from_pretrained(f"published:{name}").config
    sampling = config.sampling
    assert (sampling.guidance, sampling.guidance_schedule, config.prior.steps) == expected


def test_a_file_of_an_everyday_name_is_no_known_one():
    """All of TiTok's are called model.safetensors."""
    peer = PEERS["titok-generator"]
    assert peer.file_of("model.safetensors") is None
    assert peer.file_of("titok-b64-generator").tokenizer == "titok-b64"
    assert peer.file_of("yucornetto/generator_titok_s128_imagenet").tokenizer == "titok-s128"


# Training on


def tokenizer_of(variant):
    """The configuration of a tiny tokenizer whose codes a variant is of: 4 of 16 of 8 px images."""
    if variant == "titok":
        sizes = {"channels": 16, "depth": 1, "heads": 2, "patch": 4}
        return VQVAEConfig(
            encoder=TiTokEncoderConfig(**sizes, num_tokens=LENGTH, out_channels=4),
            quantizer=VectorConfig(num_codes=CODES, code_dim=4),
            decoder=TiTokDecoderConfig(**sizes),
        )
    sizes = {"channels": 8, "residual_blocks": 1, "residual_channels": 4}
    quantizer = VectorConfig(num_codes=CODES, code_dim=2)
    if variant == "maskbit":
        quantizer = LookupFreeConfig(bits=4, lowest_first=True)
    return VQVAEConfig(
        encoder=ConvEncoderConfig(**sizes),
        quantizer=quantizer,
        decoder=ConvDecoderConfig(**sizes),
    )


@pytest.mark.parametrize("variant", ["halton", "titok", "maskbit"])
def test_training_goes_on_from_a_published_generator(variant, tmp_path, capsys):
    """On codes of the tokenizer that belongs to it, with two classes in the place of three."""
    save_images(tmp_path / "images")
    config = TokenizerRun(data=DataConfig(str(tmp_path / "images"), 8), model=tokenizer_of(variant))
    torch.manual_seed(0)
    folder = tmp_path / "tokenizer"
    write_weights(folder / "weights" / "model.safetensors", config.model.build(8).state_dict(), {})
    (folder / "config.yaml").write_text(to_yaml(config))
    encode_data(TokensRun(root=str(tmp_path), tokenizer=str(folder)))

    write(tmp_path / "theirs", variant)
    begun = import_prior(tmp_path / "theirs", tmp_path / "begun" / "prior", folder)
    network = from_pretrained(tmp_path / "theirs").config.prior
    run = PriorRun(
        root=str(tmp_path),
        tokens=str(tmp_path / "tokens"),
        prior=network,
        start_from=str(begun),
        loop=LoopConfig(steps=2, batch_size=4, log_every=1, save_every=2, preview_every=2),
        optimizer=OptimizerConfig(lr=1e-9, warmup_steps=0, schedule="constant"),
    )
    trained = train_prior(run)
    assert "it knows 3 classes, and there are 2" in capsys.readouterr().out
    before, after = priors.load(begun), priors.load(tmp_path / "prior")
    same = [  # of nobody, whose weights were taken over
        prior.nll(
            torch.randint(CODES, (3, LENGTH), generator=torch.Generator().manual_seed(0)), who
        )
        for prior, who in ((before, torch.full((3,), 3)), (after, torch.full((3,), 2)))
    ]
    torch.testing.assert_close(same[0].nats, same[1].nats, atol=1e-4, rtol=0)
    assert same[0].kind == "bound" and trained.num_classes == 2
    assert command("generate.sample", tmp_path / "prior", "--num", 4) == 0
    assert (tmp_path / "samples" / "samples.npz").is_file()
