"""Files of published weights: what they may be packed in, and that nothing in them runs."""

from __future__ import annotations

import collections
import io
import json
import pickle
import struct
import types
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokenizer.published.files import Hyperparameters, find_weights, open_weights
from tokenizer.published.pickles import Damaged, Opaque, read_torch
from training.errors import UserError


def tensors():
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3),
        "b.weight": torch.randn(2, 3, 1, 1),
    }


def assert_same(weights, expected):
    assert weights.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert weights.shapes[name] == tuple(tensor.shape)
        found = weights.read(name)
        assert found.dtype == tensor.dtype and torch.equal(found, tensor)


class Mine:
    """Something that a checkpoint holds beside tensors."""

    def __init__(self):
        self.__dict__["options"] = {"rate": 0.1, "inner": [object()]}


LIGHTNING = {
    "epoch": 3,
    "hyper_parameters": collections.defaultdict(list, {"a": [Mine()]}),
    "callbacks": {Mine: {"best": torch.tensor(0.5)}},
    "optimizer_states": [
        {
            "state": {0: {"step": 1, "exp_avg": torch.ones(2)}},
            "param_groups": [{"betas": (0.9, 1.0)}],
        }
    ],
    "namespace": types.SimpleNamespace(a=1),
}
ENVELOPES = [
    lambda t: t,
    lambda t: {"state_dict": t},
    lambda t: {**LIGHTNING, "state_dict": collections.OrderedDict(t)},
    lambda t: {"model": t, "optimizer": {"lr": 1.0}},
    lambda t: {"ema": t, "model": {name: tensor + 1 for name, tensor in t.items()}},
    lambda t: {"module": {f"module.{name}": tensor for name, tensor in t.items()}},
    lambda t: {
        "model_state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in t.items()},
        "iter": 1,
    },
    lambda t: {
        "state_dict": {f"_orig_mod.{name}": nn.Parameter(tensor) for name, tensor in t.items()}
    },
    lambda t: {
        "ema_state_dict": {f"module.module.{n}": v for n, v in t.items()},
        "state_dict": {"a": torch.ones(1)},
    },
    lambda t: {"state_dict": {"model": t}},
    lambda t: {
        "state_dict": {f"first_stage_model.{n}": v for n, v in t.items()}
        | {"model.x": torch.ones(1)}
    },
    lambda t: {name.replace("a.", "a._orig_mod."): tensor for name, tensor in t.items()},
]


@pytest.mark.parametrize("number", range(len(ENVELOPES)))
@pytest.mark.parametrize("zipped", [True, False])
def test_envelopes_and_prefixes_are_taken_off(tmp_path, number, zipped):
    file = tmp_path / "x.ckpt"
    torch.save(ENVELOPES[number](tensors()), file, _use_new_zipfile_serialization=zipped)
    assert_same(open_weights(file), tensors())


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_are_read(tmp_path, protocol):
    torch.save({**LIGHTNING, "state_dict": tensors()}, tmp_path / "x.pt", pickle_protocol=protocol)
    assert_same(open_weights(tmp_path / "x.pt"), tensors())


@pytest.mark.parametrize("zipped", [True, False])
def test_views_types_and_empty_tensors_come_back(tmp_path, zipped):
    whole = torch.arange(24.0).view(4, 6)
    saved = {
        "transposed": whole.T,
        "part": whole[1:3, 2:],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "half": torch.randn(3).half(),
        "brain": torch.randn(3).bfloat16(),
        "long": torch.tensor([1, -2]),
        "bool": torch.tensor([True, False]),
        "double": torch.randn(2).double(),
        "tied": whole,
        "again": whole,
    }
    torch.save(saved, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    assert_same(open_weights(tmp_path / "x.bin"), saved)


def test_a_whole_module_gives_its_tensors(tmp_path):
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.BatchNorm2d(4)))
    torch.save(module, tmp_path / "x.pkl")
    assert_same(open_weights(tmp_path / "x.pkl"), module.state_dict())


def test_two_halves_of_a_model_are_one(tmp_path):
    halves = {"encoder": nn.Conv2d(3, 4, 1), "decoder": nn.Conv2d(4, 3, 1)}
    expected = {
        f"{side}.{name}": v
        for side, half in halves.items()
        for name, v in half.state_dict().items()
    }
    torch.save({side: half.state_dict() for side, half in halves.items()}, tmp_path / "x.pt")
    assert_same(open_weights(tmp_path / "x.pt"), expected)
    for side, half in halves.items():
        torch.save(half, tmp_path / f"{side}.pkl")
    (tmp_path / "x.pt").unlink()
    assert_same(open_weights(find_weights(tmp_path)), expected)


def test_averages_without_dots_stand_for_what_they_are_averages_of(tmp_path):
    raw = {**tensors(), "loss.scale": torch.ones(1)}
    shadows = {f"model_ema.{name.replace('.', '')}": value + 1 for name, value in tensors().items()}
    counters = {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(3)}
    save_file({**raw, **shadows, **counters}, tmp_path / "x.safetensors")
    found = open_weights(tmp_path / "x.safetensors")
    assert_same(
        found,
        {**{name: value + 1 for name, value in tensors().items()}, "loss.scale": torch.ones(1)},
    )
    assert found.origins["a.weight"] == "model_ema.aweight" and set(found.rest) == {
        *tensors(),
        *counters,
    }
    assert_same(open_weights(tmp_path / "x.safetensors", averaged=False), raw)


def test_an_average_of_nothing_is_named(tmp_path):
    save_file({**tensors(), "model_ema.cweight": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"model_ema\.cweight is an average of nothing"):
        open_weights(tmp_path / "x.safetensors")


# What does not work


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".ckpt"])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_file_is_one_line(tmp_path, suffix, share):
    file = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        save_file(tensors(), file)
    else:
        torch.save({"state_dict": tensors()}, file, _use_new_zipfile_serialization=suffix == ".pt")
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(
        UserError, match=r"damaged, or no file of weights .* download it again"
    ) as error:
        weights = open_weights(file)
        for name in weights.tensors:
            weights.read(name)
    assert "\n" not in str(error.value)


def test_flipped_bytes_of_tensors_are_told(tmp_path):
    file = tmp_path / "x.pt"
    torch.save({"a": torch.zeros(1000)}, file)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        open_weights(file).read("a")


@pytest.mark.parametrize(
    ("saved", "told"),
    [
        ({"epoch": 1, "loss": 0.5}, "the keys epoch, loss"),
        ([torch.ones(1)], "a list"),
        (Mine(), "Mine"),
        ({}, "nothing"),
        (torch.ones(2), "a StoredTensor"),
    ],
)
def test_files_without_tensors_by_name_are_told(tmp_path, saved, told):
    torch.save(saved, tmp_path / "x.pt")
    with pytest.raises(UserError, match=f"it holds .*{told} and no tensors by name"):
        open_weights(tmp_path / "x.pt")


def test_folders_say_which_file_they_mean(tmp_path):
    with pytest.raises(UserError, match="it has none"):
        find_weights(tmp_path)
    for name in ("a.pt", "b.ckpt"):
        torch.save(tensors(), tmp_path / name)
    with pytest.raises(UserError, match=r"it has a\.pt, b\.ckpt: name it with file="):
        find_weights(tmp_path)
    assert find_weights(tmp_path, "b.ckpt") == tmp_path / "b.ckpt"
    with pytest.raises(UserError, match=r"c\.pt: there is no such file"):
        find_weights(tmp_path, "c.pt")
    (tmp_path / "model.safetensors").touch()
    assert find_weights(tmp_path).name == "model.safetensors"


def test_hyperparameters_are_found_wherever_they_stand():
    hyper = Hyperparameters(
        {"data": {"size": "7"}, "model": {"params": {"size": 5, "on": "True"}}, "n": 3}
    )
    assert (
        hyper.number("n") == 3 and hyper.number("size") == 7 and hyper.number("params", "size") == 5
    )
    assert hyper.flag("on") is True and hyper.find("none") is None
    with pytest.raises(UserError, match="no configuration says heads, which"):
        hyper.needed("heads", why="which shapes do not tell")


# What must not run


class Runs:
    """A pickle that would call `function(*arguments)` when it is read by what runs pickles."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def payloads(mark):
    """Pickles that would write the file `mark`, in ways that loaders fell for."""
    import importlib
    import os
    import runpy
    import shutil
    import subprocess
    import timeit

    code = f"open({str(mark)!r}, 'w').close()"
    script = mark.with_name("script.py")
    script.write_text(code)
    shell = f"touch {mark}"
    calls = [
        (os.system, shell),
        (eval, code),
        (exec, code),
        (subprocess.call, shell.split()),
        (subprocess.check_output, shell.split()),
        (os.popen, shell),
        (open, str(mark), "w"),
        (runpy.run_path, str(script)),
        (timeit.timeit, code),
        (shutil.copy, str(script), str(mark)),
        (os.mkdir, str(mark)),
        (os.symlink, str(script), str(mark)),
        (subprocess.Popen, shell.split()),
        (importlib.import_module, "script"),
        (os.rename, str(script), str(mark)),
        (torch.load, str(script)),
        (torch.save, {}, str(mark)),
        (torch.hub.load, str(mark.parent), "script"),
        (map, os.system, [shell]),
        (torch.jit.load, str(script)),
        (zipfile.ZipFile, str(mark), "w"),
        (io.FileIO, str(mark), "w"),
    ]
    return [Runs(*call) for call in calls]


def hand_written(mark):
    """The same in opcodes that pickling does not write."""
    touch = f"touch {mark}".encode()
    call = b"cposix\nsystem\n(S'" + touch + b"'\ntR"
    return [
        call + b".",
        b"(S'" + touch + b"'\nios\nsystem\n.",
        b"(cos\nsystem\nS'" + touch + b"'\no.",
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c" + bytes([len(touch)]) + touch + b"\x85R.",
        b"ctorch._utils\n_rebuild_parameter\n(" + call + b"I01\nNtR.",
        b"(dS'state_dict'\n" + call + b"s.",
        b"ccollections\nOrderedDict\n(lp0\n(lS'a'\na" + call + b"aatR.",
        b"c__builtin__\ngetattr\n(cos\nS'system'\ntR(S'" + touch + b"'\ntR.",
        b"cnumpy.testing._private.utils\nrunstring\n(S'" + touch + b"'\n(dtR.",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cposix\nsystem\nNN(S'" + touch + b"'\nttR.",
    ]


def archive(data):
    """A file of torch.save whose pickle is this one."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as made:
        made.writestr("x/data.pkl", data)
        made.writestr("x/version", "3\n")
    return buffer.getvalue()


def old_file(data):
    head = b"".join(pickle.dumps(each, 2) for each in (0x1950A86A20F9469CFC6C, 1001, {}))
    return head + data + pickle.dumps([], 2)


def test_nothing_in_a_hostile_file_runs(tmp_path):
    mark, place = tmp_path / "ran", tmp_path / "x"
    place.mkdir()
    pickles = [
        pickle.dumps({"state_dict": {"a": each}, "model": each}, 2) for each in payloads(mark)
    ]
    pickles += [pickle.dumps([torch.float32, each], 4) for each in payloads(mark)] + hand_written(
        mark
    )
    read = 0
    for data in pickles:
        for number, whole in enumerate((archive(data), old_file(data), data)):
            file = place / f"x{number}.ckpt"
            file.write_bytes(whole)
            with pytest.raises(UserError):
                open_weights(file)
            read += 1
        assert not mark.exists() and (tmp_path / "script.py").exists()
    assert read > 100


@pytest.mark.parametrize(
    "name", ["huge", "negative", "beyond", "missing", "compressed", "script", "byteorder"]
)
def test_tensors_that_cannot_be_are_refused(tmp_path, name):
    file = tmp_path / "x.pt"
    size, offset = {"huge": (2**40, 0), "beyond": (3, 6), "negative": (3, -1)}.get(name, (4, 0))

    class Tensor:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (Held(), offset, (size,), (1,), False, {})

    class Held:
        pass

    class Pickler(pickle.Pickler):
        def persistent_id(self, each):
            return (
                ("storage", torch.FloatStorage, "0", "cpu", 8) if isinstance(each, Held) else None
            )

    buffer = io.BytesIO()
    Pickler(buffer, 2).dump({"a": Tensor()})
    with zipfile.ZipFile(file, "w") as made:
        made.writestr("x/data.pkl" if name != "script" else "x/constants.pkl", buffer.getvalue())
        how = zipfile.ZIP_DEFLATED if name == "compressed" else zipfile.ZIP_STORED
        made.writestr("x/data/0" if name != "missing" else "x/data/1", bytes(32), how)
        if name == "byteorder":
            made.writestr("x/byteorder", "big")
    with pytest.raises(UserError, match="damaged"):
        open_weights(file).read("a")


def test_what_is_no_plain_value_is_opaque(tmp_path):
    torch.save({"a": Mine(), "b": [types.SimpleNamespace()]}, tmp_path / "x.pt")
    saved = read_torch(tmp_path / "x.pt")
    assert isinstance(saved["a"], Opaque) and saved["a"].of.endswith("Mine")
    assert saved["a"].state["options"]["rate"] == 0.1 and isinstance(saved["b"][0], Opaque)


def test_a_safetensors_header_that_lies_is_one_line(tmp_path):
    head = json.dumps({"a": {"dtype": "F32", "shape": [10**9], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "x.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(4))
    with pytest.raises(UserError, match="damaged"):
        open_weights(tmp_path / "x.safetensors")


def test_instructions_out_of_order_are_damage(tmp_path):
    for data in (
        b".",
        b"(.",
        b"a.",
        b"(s.",
        b"t.",
        b"g5\n.",
        b"0.",
        b"(lu.",
        b"Vx\n\x86.",
        b"\x80\x05\x97.",
    ):
        (tmp_path / "x.pt").write_bytes(old_file(data))
        with pytest.raises(Damaged):
            read_torch(tmp_path / "x.pt")
