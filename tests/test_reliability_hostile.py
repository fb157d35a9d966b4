"""Files made to run code, or to lie about what they hold, through the commands that a user has:
nothing is executed.

Catalogue rows 10, 16 and 17 (docs/reliability.md). A payload that were executed would make the
folder `executed`.
"""

from __future__ import annotations

import json
import pickle
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_cache import save_images, save_tokenizer
from test_checkpoint import Payload
from tiny import command, save_encoder
from toy_pipeline import make_pipeline

from priors.run import PriorRun
from training.checkpoint import sha256
from training.config import load

ROOT = Path(__file__).parents[1]
TINY = [
    "loop.steps=2",
    "loop.batch_size=4",
    "loop.save_every=1",
    "loop.preview_every=2",
    "loop.workers=0",
]
SIZES = ["data.image_size=8", "data.held_out=0.2", "calibration_images=8"]
CONV = [
    "model.kind=vqvae",
    "model.encoder.channels=8",
    "model.encoder.residual_blocks=1",
    "model.encoder.residual_channels=4",
    "model.decoder.channels=8",
    "model.decoder.residual_blocks=1",
    "model.decoder.residual_channels=4",
    "model.quantizer.num_codes=16",
    "model.quantizer.code_dim=2",
]
VIT = [
    "model.kind=vqrae",
    "data.image_size=16",
    "model.quantizer.num_codes=8",
    "model.quantizer.code_dim=4",
    "model.decoder.dim=16",
    "model.decoder.depth=1",
    "model.decoder.heads=2",
]
PRIOR = ["prior.backbone.dim=16", "prior.backbone.depth=1", "prior.backbone.heads=2"]


def cases(name: str, table: dict[str, Any], *light: str) -> Any:
    """A table as a test's parameter; all but the `light` ones are slow."""
    marks = {key: () if key in light else (pytest.mark.slow,) for key in table}
    return pytest.mark.parametrize(
        name, [pytest.param(table[key], id=key, marks=marks[key]) for key in table]
    )


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with images, a tokenizer's finished run and its tokens, all sound."""
    save_images(tmp_path / "images")
    save_tokenizer(tmp_path / "tokenizer", tmp_path / "images")
    (tmp_path / "empty.yaml").write_text(f"root: {tmp_path}\n")
    monkeypatch.chdir(tmp_path)
    assert command("tokenizer.encode", "empty.yaml") == 0
    return tmp_path


@pytest.fixture
def refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> Any:
    """Run a command that must end with one line that says `says`, exit code 2, and nothing
    executed."""

    def run(*words: object, says: str) -> str:
        capsys.readouterr()
        code = command(*words)
        printed = capsys.readouterr().err
        assert not list(tmp_path.rglob("executed*")), "a payload was executed"
        assert code == 2 and printed.count("\n") == 1 and says in printed, (code, printed)
        return printed

    return run


def train(*words: str) -> list[str]:
    return ["tokenizer.train", "empty.yaml", "data.source=images", *SIZES, *TINY, *words]


def sealed(folder: Path) -> None:
    """A manifest that agrees with whatever lies there."""
    state = folder / "state.pt"
    files = {"state.pt": {"sha256": sha256(state), "bytes": state.stat().st_size}}
    (folder / "manifest.json").write_text(json.dumps({"step": 1, "files": files}))


def by_pickle(path: Path, trap: Path) -> None:
    path.write_bytes(pickle.dumps({"weight": Payload(trap)}))


def by_torch(path: Path, trap: Path) -> None:
    torch.save({"weight": Payload(trap)}, path)


def by_old_torch(path: Path, trap: Path) -> None:
    torch.save({"weight": Payload(trap)}, path, _use_new_zipfile_serialization=False)


def by_script(path: Path, trap: Path) -> None:
    """A TorchScript archive, which torch.load hands to another loader."""
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(path))
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/extra.pkl", pickle.dumps(Payload(trap)))


def by_tar(path: Path, trap: Path) -> None:
    """The format before the old one, which torch reads too."""
    import io
    import tarfile

    with tarfile.open(path, "w") as archive:
        for name in ("pickle", "storages", "tensors"):
            data = pickle.dumps(Payload(trap))
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))


PICKLES = {
    "pickle": by_pickle,
    "torch": by_torch,
    "old torch": by_old_torch,
    "script": by_script,
    "tar": by_tar,
}
each_pickle = cases("write", PICKLES, "torch")


# pickles in the places where tensors are expected


@each_pickle
def test_in_a_checkpoint(root, capsys, write):
    """Passed over, with a manifest that agrees; the run starts from the checkpoint before."""
    assert command(*train(*CONV, "name=run")) == 0
    last = root / "run" / "checkpoints" / "step-00000002"
    weights = (root / "run" / "weights" / "model.safetensors").read_bytes()
    write(last / "state.pt", root / "executed")
    sealed(last)
    capsys.readouterr()
    assert command(*train(*CONV, "name=run")) == 0
    assert "step-00000002 is damaged" in capsys.readouterr().out
    assert not list(root.rglob("executed*"))
    assert (root / "run" / "weights" / "model.safetensors").read_bytes() == weights


@each_pickle
def test_in_the_weights_to_start_from(root, refused, write):
    write(root / "tokenizer" / "weights" / "model.safetensors", root / "executed")
    refused(*train(*CONV, "start_from=tokenizer", "name=next"), says="model.safetensors: damaged")
    refused("tokenizer.encode", "empty.yaml", "name=again", says="model.safetensors: damaged")


@each_pickle
def test_in_an_encoder(root, refused, write):
    """Weights that are no safetensors are not opened, whatever else the folder says."""
    save_encoder(root / "encoder")
    for path in (root / "encoder").glob("*.safetensors"):
        path.unlink()
    write(root / "encoder" / "pytorch_model.bin", root / "executed")
    refused(*train(*VIT, "model.encoder.name=encoder"), says="model.encoder.name=encoder")
    index = {"metadata": {}, "weight_map": {"vit.x": "pytorch_model.bin"}}
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        (root / "encoder" / name).write_text(json.dumps(index))
        refused(*train(*VIT, "model.encoder.name=encoder"), says="model.encoder.name=encoder")


@each_pickle
@cases(
    "name",
    {name: name for name in ("decoder.pt", "decoder.bin", "decoder.safetensors")},
    "decoder.pt",
)
def test_in_a_decoder(root, refused, write, name):
    save_encoder(root / "encoder")
    write(root / name, root / "executed")
    refused(
        *train(
            *VIT,
            "model.encoder.name=encoder",
            f"model.decoder.weights={name}",
            "model.denormalise=true",
        ),
        says=name,
    )


@each_pickle
def test_in_the_weights_of_a_score(tmp_path, monkeypatch, refused, write):
    """LPIPS's trunk, Inception and CLIP: of training and of evaluation."""
    root = make_pipeline(tmp_path, monkeypatch)
    write(root / "trunk.pth", tmp_path / "executed")
    save_images(tmp_path / "images")
    (tmp_path / "empty.yaml").write_text(f"root: {tmp_path}\n")
    monkeypatch.chdir(tmp_path)
    objective = [
        "objective.perceptual=1",
        "objective.lpips_net=squeeze",
        "objective.lpips_weights=trunk.pth",
    ]
    refused(*train(*CONV, *objective, "name=run"), says="trunk.pth")
    for flag in ("--lpips-weights", "--inception-weights"):
        refused(
            "eval.run",
            "generation",
            root,
            "--num",
            20,
            flag,
            root / "trunk.pth",
            "--fresh",
            says="trunk.pth",
        )
    (root / "clip").mkdir()
    shutil.copy(root / "trunk.pth", root / "clip" / "pytorch_model.bin")
    (root / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", **REMOTE}))
    refused("eval.run", "generation", root, "--num", 20, "--clip", root / "clip", says="--clip")


# code beside the weights

REMOTE = {
    "auto_map": {
        "AutoConfig": "evil.Config",
        "AutoModel": "evil.Model",
        "AutoImageProcessor": "evil.Processor",
        "AutoBackbone": "evil.Model",
    },
    "custom_pipelines": {"x": {"impl": "evil.Pipeline"}},
    "trust_remote_code": True,
}


def remote_code(folder: Path, model_type: str | None) -> None:
    """A model that brings its own code, of a type that transformers knows or not."""
    for name in (
        "evil.py",
        "modeling_evil.py",
        "configuration_evil.py",
        "__init__.py",
        "sitecustomize.py",
    ):
        (folder / name).write_text(
            "import os\nos.mkdir(os.path.join(os.path.dirname(__file__), '..', 'executed'))\n"
        )
    for name in ("config.json", "preprocessor_config.json"):
        settings = json.loads((folder / name).read_text())
        if model_type is not None and name == "config.json":
            settings["model_type"] = model_type
        (folder / name).write_text(json.dumps(settings | REMOTE))


@cases("model_type", {name: name for name in ("evil", "", "../evil", "internvl_chat")}, "evil")
def test_an_encoder_of_its_own_code_is_refused(root, refused, model_type):
    save_encoder(root / "encoder")
    remote_code(root / "encoder", model_type)
    refused(*train(*VIT, "model.encoder.name=encoder"), says="model.encoder.name=encoder")


def test_code_beside_a_known_encoder_is_not_looked_at(root):
    save_encoder(root / "encoder")
    remote_code(root / "encoder", None)
    assert command(*train(*VIT, "model.encoder.name=encoder", "name=vit")) == 0
    assert not list(root.rglob("executed*"))
    kept = json.loads((root / "vit" / "weights" / "encoder" / "config.json").read_text())
    assert kept["model_type"] == "vit_mae"
    assert command("tokenizer.encode", "empty.yaml", "tokenizer=vit", "name=others") == 0
    assert not list(root.rglob("executed*"))


# YAML

TAGS = {
    "apply": "!!python/object/apply:os.mkdir [executed]",
    "new": "!!python/object/new:os.mkdir {args: [executed]}",
    "name": "!!python/name:os.mkdir",
    "module": "!!python/module:os",
    "eval": "!!python/object/apply:builtins.eval [\"__import__('os').mkdir('executed')\"]",
    "target": "{_target_: os.mkdir, path: executed}",
    "resolver": '"${oc.create:${eval:executed}}"',
}


@cases("tag", TAGS, "apply", "target")
def test_in_a_configuration(root, refused, tag):
    modules = ("tokenizer.train", "tokenizer.encode", "priors.train", "tokenizer.encoders.pretrain")
    (root / "hostile.yaml").write_text(f"root: {root}\nname: {tag}\n")
    for module in modules:
        refused(module, "hostile.yaml", says="hostile.yaml: ")
    (root / "wrapper.yaml").write_text("include: hostile.yaml\n")
    refused("priors.train", "wrapper.yaml", says="hostile.yaml: ")
    refused("priors.train", "empty.yaml", f"seed={tag}", says="command line: ")
    assert (
        load(PriorRun, root / "empty.yaml", [f"name={tag}"]).name == tag
    )  # text, and nothing else
    assert not list(root.rglob("executed*"))


@cases("tag", TAGS, "apply", "target")
def test_in_the_configuration_of_a_downloaded_run(root, refused, tag):
    config = root / "tokenizer" / "config.yaml"
    config.write_text(config.read_text().replace("kind: vqvae", f"kind: {tag}"))
    refused("tokenizer.encode", "empty.yaml", "name=again", says="config.yaml: ")


# numpy


def objects(trap: Path) -> np.ndarray:
    return np.array([Payload(trap)], dtype=object)


def renew(folder: Path, name: str) -> None:
    """Let the manifest of a token cache agree with a file that was changed."""
    manifest = json.loads((folder / "manifest.json").read_text())
    for split in manifest["splits"].values():
        for shard in split["shards"]:
            if name in shard["files"]:
                shard["files"][name] = {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": sha256(folder / name),
                }
    (folder / "manifest.json").write_text(json.dumps(manifest))


@cases("array", {name: name for name in ("codes", "labels", "ids")}, "codes", "labels")
@pytest.mark.parametrize("kind", ["objects", "pickle"])
def test_in_the_shards_of_a_token_cache(root, refused, array, kind):
    path = root / "tokens" / f"train-00000.{array}.npy"
    if kind == "objects":
        np.save(path, objects(root / "executed"), allow_pickle=True)
    else:
        path.write_bytes(pickle.dumps(Payload(root / "executed")))
    renew(root / "tokens", path.name)
    refused("priors.train", "empty.yaml", *PRIOR, *TINY, says=str(root / "tokens"))


def test_in_references_and_samples_of_an_evaluation(tmp_path, monkeypatch, refused):
    root, trap = make_pipeline(tmp_path, monkeypatch), tmp_path / "executed"
    np.savez(root / "reference.npz", mu=objects(trap), sigma=objects(trap))
    refused(
        "eval.run",
        "generation",
        root,
        "--num",
        20,
        "--reference",
        root / "reference.npz",
        says="reference.npz",
    )
    (root / "reference.npz").write_bytes(pickle.dumps(Payload(trap)))
    refused(
        "eval.run",
        "generation",
        root,
        "--num",
        20,
        "--reference",
        root / "reference.npz",
        says="reference.npz",
    )
    np.savez(root / "images.npz", arr_0=objects(trap))
    extractor = ["--extractor", root / "extractor"]
    refused(
        "eval.run",
        "reference-stats",
        root / "images.npz",
        "--out",
        root / "x.npz",
        *extractor,
        says="images.npz",
    )
    np.savez(root / "samples" / "samples.npz", arr_0=objects(trap), arr_1=objects(trap))
    refused("eval.run", "generation", root, "--num", 20, says="samples.npz")


# safetensors that lie


def header(length: int, text: str) -> bytes:
    return struct.pack("<Q", length) + text.encode()


ENTRY = '{{"x": {{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}}}'
LIES = {
    "endless header": header(2**63, "{}"),
    "a header of a terabyte": header(2**40, "{}"),
    "a header longer than the file": header(10**8 - 1, "{}"),
    "no header": b"",
    "half a length": b"\x08\x00\x00",
    "no JSON": header(8, "AAAAAAAA"),
    "deep JSON": header(200_000, "[" * 200_000),
    "a negative shape": (t := ENTRY.format(shape="[-1]", offsets="[0, 4]"))
    and header(len(t), t) + b"\0" * 4,
    "a huge shape": (t := ENTRY.format(shape=f"[{2**40}, {2**40}]", offsets="[0, 4]"))
    and header(len(t), t) + b"\0" * 4,
    "offsets outside": (t := ENTRY.format(shape="[1]", offsets=f"[{2**50}, {2**50 + 4}]"))
    and header(len(t), t) + b"\0" * 4,
    "offsets backwards": (t := ENTRY.format(shape="[1]", offsets="[4, 0]"))
    and header(len(t), t) + b"\0" * 4,
    "an unknown type": (t := '{"x": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}')
    and header(len(t), t) + b"\0" * 4,
    "another network": (t := ENTRY.format(shape="[1]", offsets="[0, 4]"))
    and header(len(t), t) + b"\0" * 4,
}


@cases("lie", LIES, "a header of a terabyte", "a huge shape")
def test_safetensors_that_lie_are_refused(root, refused, lie):
    path = root / "tokenizer" / "weights" / "model.safetensors"
    path.write_bytes(lie)
    refused("tokenizer.encode", "empty.yaml", "name=again", says=str(root / "tokenizer"))
    save_encoder(root / "encoder")
    (root / "encoder" / "model.safetensors").write_bytes(lie)
    refused(*train(*VIT, "model.encoder.name=encoder"), says="model.encoder.name=encoder")


# a token cache's manifest (row 17): nothing outside its folder is read or written


def outside(manifest: dict, root: Path) -> None:
    manifest["splits"]["train"]["shards"][0]["files"]["../secret.npy"] = {"bytes": 1, "sha256": ""}


def absolute(manifest: dict, root: Path) -> None:
    manifest["splits"]["train"]["shards"][0]["files"][str(root / "secret.npy")] = {
        "bytes": 1,
        "sha256": "",
    }


def endless(manifest: dict, root: Path) -> None:
    manifest["splits"]["train"]["count"] = 2**62
    manifest["splits"]["train"]["shards"] *= 100


def negative(manifest: dict, root: Path) -> None:
    manifest["layout"] = {"grids": [[-2, 2]], "num_codes": [16]}


def uneven(manifest: dict, root: Path) -> None:
    manifest["layout"] = {"grids": [[2, 2]], "num_codes": [16, 16]}


def codeless(manifest: dict, root: Path) -> None:
    manifest["layout"] = {"grids": [[2, 2]], "num_codes": [0]}


def elsewhere(manifest: dict, root: Path) -> None:
    manifest["tokenizer"]["folder"] = "../../nowhere"


def without(key: str) -> Any:
    def change(manifest: dict, root: Path) -> None:
        del manifest[key]

    return change


def replaced(key: str, value: Any) -> Any:
    def change(manifest: dict, root: Path) -> None:
        manifest[key] = value

    return change


MANIFESTS = {
    "../": outside,
    "an absolute path": absolute,
    "too many shards": endless,
    "a negative grid": negative,
    "an uneven layout": uneven,
    "no codes": codeless,
    "a tokenizer elsewhere": elsewhere,
    **{f"no {key}": without(key) for key in ("layout", "splits", "tokenizer", "class_names")},
    **{
        f"{key} is {value!r}": replaced(key, value)
        for key in ("layout", "splits", "tokenizer", "class_names")
        for value in (None, 3, "x", [], {})
    },
}


@cases("change", MANIFESTS, "../", "an uneven layout", "no splits", "class_names is []")
def test_manifests_that_lie_are_refused(root, refused, change):
    (root / "secret.npy").write_bytes(b"x")
    path = root / "tokens" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest, root)
    path.write_text(json.dumps(manifest))
    before = {p for p in root.rglob("*") if root / "tokens" not in p.parents}
    refused("priors.train", "empty.yaml", *PRIOR, *TINY, "name=prior", says="")
    made = {p for p in root.rglob("*") if root / "tokens" not in p.parents} - before
    assert (
        all((root / "prior") in (p, *p.parents) for p in made)
        and (root / "secret.npy").read_bytes() == b"x"
    )


def test_symbolic_links_in_a_token_cache(root, refused):
    """To a file outside: it is neither read as codes, nor written to, nor replaced; a linked folder
    is written to."""
    (root / "secret.npy").write_bytes(b"secret")
    path = root / "tokens" / "train-00000.codes.npy"
    path.unlink()
    path.symlink_to(root / "secret.npy")
    refused("priors.train", "empty.yaml", *PRIOR, *TINY, says="train-00000.codes.npy")
    refused(
        "tokenizer.encode", "empty.yaml", says="train-00000.codes.npy: no command here wrote it"
    )
    assert (root / "secret.npy").read_bytes() == b"secret" and path.is_symlink()
    path.unlink()
    assert command("tokenizer.encode", "empty.yaml") == 0
    shutil.move(root / "tokens", root / "moved")
    (root / "tokens").symlink_to(root / "moved")
    assert command("tokenizer.encode", "empty.yaml", "--fresh") == 0
    assert (root / "secret.npy").read_bytes() == b"secret"


# what does not belong together (row 16): refused before the first step


def test_what_does_not_belong_together_is_refused(root, refused):
    assert command("priors.train", "empty.yaml", *PRIOR, *TINY) == 0
    save_tokenizer(root / "tokenizer", root / "images", seed=1)  # retrained since
    refused(
        "priors.train", "empty.yaml", *PRIOR, *TINY, "name=other", says="run `make tokens` again"
    )
    refused("generate.sample", root, "--num", 2, says="make the tokens again")
    refused("eval.run", "codebook", root, says="run `make tokens` again")
    assert command("tokenizer.encode", "empty.yaml") == 0
    refused(
        "priors.train", "empty.yaml", *PRIOR, *TINY, says="made from tokens"
    )  # the old prior, new tokens
    save_tokenizer(root / "tokenizer", root / "images", num_codes=20)  # of another size
    assert command("tokenizer.encode", "empty.yaml") == 0
    refused("generate.sample", root, "--num", 2, says="make the tokens again")
    refused(
        *train(*CONV, "start_from=tokenizer", "name=next"), says="must be the same in both runs"
    )
    assert not (root / "next").exists() and not (root / "other" / "checkpoints").exists()


def test_a_record_of_a_prior_that_lies_is_refused(root, refused):
    assert command("priors.train", "empty.yaml", *PRIOR, *TINY) == 0
    path = root / "prior" / "weights" / "prior.json"
    sound = json.loads(path.read_text())
    for change in (
        {"tokenizer": "../../../etc"},
        {"layout": {"grids": [[3, 3]], "num_codes": [16]}},
        {"layout": {"grids": [[2, 2]], "num_codes": [16, 16]}},
        {"layout": {"grids": [[2, 2]], "num_codes": [0]}},
        {"layout": None},
        {"class_names": 3},
        {"class_names": []},
        {"sampling": {"top_p": 7}},
        {"sampling": {"unknown": 7}},
        {"surplus": 1},
        {"tokenizer_sha256": None},
    ):
        path.write_text(json.dumps(sound | change))
        refused("generate.sample", root, "--num", 2, says="")
    path.write_text("[]")
    refused("generate.sample", root, "--num", 2, says="prior.json: damaged")
    (root / "prior" / "weights" / "model.safetensors").write_bytes(
        pickle.dumps(Payload(root / "executed"))
    )
    path.write_text(json.dumps(sound))
    refused("generate.sample", root, "--num", 2, says="model.safetensors: damaged")
