"""What every test runs under: one thread, no network, and no GPU unless `-m gpu` asks for it."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import processes
import pytest

# Tests import helpers, and each other, by name from whichever folder they lie in. The processes
# that tests start do so too.
TESTS = Path(__file__).parent
PLACES = [str(TESTS.parent), str(TESTS), *map(str, sorted(TESTS.glob("[!_.]*/")))]
sys.path += [place for place in PLACES if place not in sys.path]
os.environ["PYTHONPATH"] = os.pathsep.join([*PLACES, *filter(None, [os.getenv("PYTHONPATH")])])


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--plugin",
        action="append",
        default=[],
        metavar="MODULE",
        help="import a module of your own first: the contract tests run over its kinds, too",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Tests feed tensors on the CPU to what moves to a GPU where there is one, and start more
    processes than GPUs."""
    if "gpu" not in config.getoption("-m").replace("not gpu", ""):
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ["HIP_VISIBLE_DEVICES"] = ""
    if modules := config.getoption("--plugin"):
        from training.plugins import import_plugins

        import_plugins(modules)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """What the project keeps of data sets is kept beside the tests' own files."""
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("xdg-cache"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    import torch

    torch.set_num_threads(1)
    if not torch.cuda.is_available():
        # torch.manual_seed has each of them note the whole stack for when it is first used.
        for device in (torch.cuda, torch.xpu, torch.mtia):
            device.manual_seed_all = lambda seed: None


@pytest.fixture(scope="session", autouse=True)
def starter(own_cache, one_thread):
    """What tests start as processes is forked from here, where no test has run yet."""
    gc.collect()
    gc.freeze()  # what is imported stays: else each collection in a test walks all of it
    processes.begin()
    yield
    processes.end()
