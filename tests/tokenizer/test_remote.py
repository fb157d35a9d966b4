"""A Hub that takes connections and never answers: bounded waits, each said, and one line at the
end."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

SCRIPT = """
import json, os, sys, time
from tokenizer import remote
remote.PATIENCE = remote.Patience(connect=0.3, read=0.3)
from tokenizer.data.source import open_listing
from tokenizer.encoders.foundation import _download
from tokenizer.shared_folder import upload
from tokenizer.sharing import from_pretrained
from training.errors import UserError
from pathlib import Path

callers = {
    "hub:someone/pictures": lambda: open_listing("hub:someone/pictures", 0),
    "someone/encoder": lambda: _download("someone/encoder", None),
    "someone/tokenizer": lambda: from_pretrained("someone/tokenizer"),
    "someone/upload": lambda: upload(Path("."), "someone/upload", True),
    "someone/kept": lambda: kept("someone/kept"),
}

def kept(name):
    from huggingface_hub import hf_hub_download

    with remote.patient(name):
        print("file", hf_hub_download(name, "config.json"))

for name, call in callers.items():
    started = time.monotonic()
    try:
        call()
        outcome = "fine"
    except UserError as error:
        outcome = str(error)
    print("outcome", json.dumps([name, outcome, time.monotonic() - started]), flush=True)
"""


@pytest.fixture
def silent_hub():
    """Its address; whoever connects is accepted and hears nothing."""
    server = socket.create_server(("127.0.0.1", 0))
    accepted = []

    def accept() -> None:
        while True:
            try:
                accepted.append(server.accept())
            except OSError:
                return

    threading.Thread(target=accept, daemon=True).start()
    yield f"http://127.0.0.1:{server.getsockname()[1]}"
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    for connection, _ in accepted:
        connection.close()


def keep_in_cache(home: Path, name: str) -> None:
    """A model that was downloaded before, as huggingface_hub keeps it."""
    folder = home / "hub" / f"models--{name.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("0" * 40)
    (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (folder / "snapshots" / ("0" * 40) / "config.json").write_text("{}")


def test_a_silent_hub_ends_in_a_line_after_three_tries_that_are_said(
    tmp_path: Path, silent_hub: str
) -> None:
    keep_in_cache(tmp_path, "someone/kept")
    environment = os.environ | {
        "HF_ENDPOINT": silent_hub,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    environment |= {"HF_TOKEN": "none", "HF_UPDATE_DOWNLOAD_COUNTS": "0"}
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=tmp_path,
    )
    assert not ended.returncode, ended.stderr
    lines = ended.stdout.splitlines()
    outcomes = [
        json.loads(line.removeprefix("outcome ")) for line in lines if line.startswith("outcome ")
    ]
    assert len(outcomes) == 5
    for name, outcome, seconds in outcomes:
        tries = [
            line
            for line in lines
            if line.startswith(f"warning: {name}: 127.0.0.1 does not answer (try ")
        ]
        assert len(tries) == (1 if name == "someone/upload" else 3), ended.stdout
        assert seconds < 20, (name, outcome, seconds)  # the imports of large libraries among them
        assert "\n" not in outcome and (outcome == "fine") == (name == "someone/kept")
        assert name in outcome or outcome == "fine"
    assert any(
        line.startswith("warning: someone/kept: found without 127.0.0.1: in the cache")
        for line in lines
    )
    assert any(line.startswith("file") and line.endswith("/config.json") for line in lines)


def test_no_other_client_with_a_patience_of_its_own_is_used_meanwhile():
    """hf_xet downloads past the session whose waits are bounded."""
    from huggingface_hub.utils._runtime import is_xet_available

    from tokenizer.remote import patient

    before = is_xet_available()
    with patient("someone/pictures"):
        assert not is_xet_available()
    assert is_xet_available() == before
    with pytest.raises(KeyError), patient("someone/pictures"):
        raise KeyError
    assert is_xet_available() == before
