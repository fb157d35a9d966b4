"""Published priors: equal to their authors' code, loaded from any file, written back to the same
bits."""

from __future__ import annotations

import pytest
import torch
from golden import golden
from safetensors.torch import load_file

from priors.published.check import check
from priors.published.load import from_pretrained
from priors.published.table import PEERS
from tokenizer.published.check import told
from tokenizer.published.load import published_state

CASES = {
    "llamagen-gpt": "llamagen-gpt",
    "rar": "rar",
    "taming-mingpt": "taming-mingpt",
}  # golden case -> kind


@pytest.mark.parametrize("case", CASES)
def test_a_peer_gives_what_its_authors_code_gives(case):
    differences, computed = check(golden(case))
    assert all(each.within for each in differences), told(differences)
    assert "logits.conditional" in computed


@pytest.mark.parametrize("case", CASES)
def test_under_published_names_it_is_the_file(case):
    expected = load_file(golden(case) / "weights.safetensors")
    prior = from_pretrained(golden(case))
    assert prior.published.peer is PEERS[CASES[case]]
    found = published_state(prior)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
