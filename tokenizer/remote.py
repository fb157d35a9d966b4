"""The Hugging Face Hub for callers that cannot wait for ever: bounded waits, a line for each, three
tries."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from training import distributed
from training.text import printable


class Patience(NamedTuple):
    """How long a Hub may be silent."""

    connect: float = 10  # seconds
    read: float = 60  # seconds without a byte
    tries: int = 3  # of a request that asks for something; what was sent is not sent twice


PATIENCE = Patience()
BRIEF = 10  # seconds: what a library itself waits for less than that, it can do without
WITHOUT_EFFECT = ("GET", "HEAD")  # requests that may be made again


class SilentHub(Exception):
    """No answer from the Hub, and nothing of earlier downloads that could stand in for it."""


@contextlib.contextmanager
def patient(what: str, patience: Patience | None = None) -> Iterator[None]:
    """Bound every request that huggingface_hub, `datasets` and transformers make inside the block.

    A time-out is said with `what` was wanted, and the request made again. After the last try the
    libraries are told that they are offline, so that they take what their cache holds (which is
    said, too) or fail at once: by themselves they wait without end for some answers, and for others
    try six times with pauses in between. Raises SilentHub where the block failed for that.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import OfflineModeIsEnabled
    from huggingface_hub.utils import get_session

    patience = patience or PATIENCE
    xet, constants.HF_HUB_DISABLE_XET = (
        constants.HF_HUB_DISABLE_XET,
        True,
    )  # it has its own client, and own patience
    client = type(
        get_session()
    )  # of httpx or of its successor; all of its instances, as the session is renewed
    timed_out = importlib.import_module(client.__module__.partition(".")[0]).TimeoutException
    limits = {
        "connect": patience.connect,
        "read": patience.read,
        "write": patience.read,
        "pool": patience.read,
    }
    silent: set[str] = set()

    def send(session: Any, request: Any, **options: Any) -> Any:
        seconds, host = request.extensions.get("timeout", {}).get("read"), request.url.host
        if seconds is not None and seconds < BRIEF:
            return original(session, request, **options)
        request.extensions = {**request.extensions, "timeout": limits}
        tries = patience.tries if request.method in WITHOUT_EFFECT else 1
        for number in range(1, tries + 1):
            if host in silent:  # for this request or another
                break
            try:
                return original(session, request, **options)
            except timed_out as error:
                _say(
                    f"{what}: {host} does not answer (try {number} of {tries}: "
                    f"{type(error).__name__})"
                )
        silent.add(host)
        raise OfflineModeIsEnabled(f"{host} does not answer")

    original, client.send = client.send, send
    try:
        yield
        if silent:
            _say(
                f"{what}: found without {', '.join(silent)}: in the cache of earlier downloads, or "
                "elsewhere"
            )
    except Exception as error:
        if silent and any(
            isinstance(cause, ConnectionError) for cause in _causes(error)
        ):  # Offline… is one
            raise SilentHub(
                f"{', '.join(silent)} does not answer, and no earlier download is in the cache"
            ) from error
        raise
    finally:
        client.send, constants.HF_HUB_DISABLE_XET = original, xet


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _say(line: str) -> None:
    if distributed.is_main():
        print(f"warning: {printable(line)}", flush=True)
