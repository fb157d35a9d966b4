"""Logits of many positions at once, again and again while codes change: what the samplers and
bounds of bidirectional networks ask for. Weights are those of priors.decoding.packed; what does not depend
on the codes is computed once."""

from __future__ import annotations

import functools
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from priors.backbone import Backbone, evaluation
from priors.decoding.packed import finish, modulate, pack, project, rotation_of


class Reading(Protocol):
    """Codes (B, N) int64, -1 where masked, to logits of the positions that are `asked`, (B, N)
    bool.

    Per level (copies x number of them, num_codes), row after row. Without `asked` all positions:
    (copies B, n, num_codes). Rows of which nothing is asked take no time. `time` (B,), of a timed
    network.
    """

    def __call__(
        self, codes: Tensor, asked: Tensor | None = None, time: Tensor | None = None
    ) -> list[Tensor]: ...


def reading(
    network: nn.Module, labels: Tensor, given: Tensor | None = None, copies: int = 1
) -> Reading:
    """`network(codes, labels, given=given)`, again and again, without gradients and dropout.

    labels (copies B,), given (copies B, M) int64: guidance has the codes twice, the second time
    unconditionally.
    """
    if isinstance(network, Backbone):
        return BackboneReading(network, labels, given, copies)
    return functools.partial(_read, network, labels, given, copies)


class BackboneReading:
    """A `Reading` of a bidirectional backbone with the weights that it has at construction, without
    dropout.

    Numbers have the weights' precision, or autocast's where that is on at construction. What a time
    sets is read anew in each call.
    """

    @torch.no_grad()
    def __init__(
        self, backbone: Backbone, labels: Tensor, given: Tensor | None = None, copies: int = 1
    ) -> None:
        assert not backbone.causal, (
            "a causal backbone predicts one slot after another: it has a decoding"
        )
        self.layout, self.embed, self.adaptive, self.copies = (
            backbone.layout,
            backbone.embed,
            backbone.adaptive,
            copies,
        )
        self.backbone, self.labels = backbone, labels
        context, context_angles = backbone.context(labels, given)
        self.weights = pack(backbone, labels, len(labels) * (context.shape[1] + self.layout.length))
        dtype = self.weights.classes.dtype
        places, *angles = backbone.slots(None)
        self.context, self.places, self.rotation = context.to(dtype), places.to(dtype), None
        if backbone.rotary:
            heads = self.weights.blocks[0].gains.shape[1]
            rotation = rotation_of(
                *(torch.cat([context_angles, side], 1) for side in angles), dtype
            )
            self.rotation = tuple(
                part.expand(-1, -1, -1, heads, -1).contiguous() for part in rotation
            )  # no broadcast later

    @torch.no_grad()
    def __call__(
        self, codes: Tensor, asked: Tensor | None = None, time: Tensor | None = None
    ) -> list[Tensor]:
        weights, context, whole = self.weights, self.context, slice(0, self.layout.length)
        if time is not None:
            weights = modulate(weights, self.backbone, self.labels, time.repeat(self.copies))
        wanted = torch.ones_like(codes, dtype=torch.bool) if asked is None else asked
        rows = wanted.any(1).nonzero()[:, 0]
        if len(rows) < len(codes):
            items = torch.cat([rows + copy * len(codes) for copy in range(self.copies)])
            codes, wanted, weights, context = (
                codes[rows],
                wanted[rows],
                weights.rows(items),
                context[items],
            )
        codes, wanted = codes.repeat(self.copies, 1), wanted.repeat(self.copies, 1)
        with torch.autocast(codes.device.type, enabled=False):
            slots = self.embed(codes, whole).to(context.dtype) + self.places
            if not self.adaptive:
                slots += weights.classes[:, None]
            features = torch.cat([context, slots], 1)
            shape = features.shape
            features = features.flatten(0, 1)
            for block in weights.blocks if len(codes) else ():
                queries, keys, values = project(block, features, self.rotation, *shape[:2])
                features = finish(
                    block, features, F.scaled_dot_product_attention(queries, keys, values)
                )
            slots, logits = features.view(shape)[:, context.shape[1] :], []
            for level, (span, _) in enumerate(self.layout.spans()):
                row, slot = wanted[:, span].nonzero(as_tuple=True)
                found = weights.logits(slots[:, span][row, slot], level, row)
                logits.append(
                    found if asked is not None else found.unflatten(0, wanted[:, span].shape)
                )
        return logits


def _read(
    network: nn.Module,
    labels: Tensor,
    given: Tensor | None,
    copies: int,
    codes: Tensor,
    asked: Tensor | None = None,
    time: Tensor | None = None,
) -> list[Tensor]:
    """A `Reading` of any network, which is asked everything."""
    timed = {} if time is None else {"time": time.repeat(copies)}
    with evaluation(network):
        logits = network(codes.repeat(copies, 1), labels, given=given, **timed)
    if asked is None:
        return logits
    parts = zip(logits, network.layout.spans())
    return [level[asked[:, span].repeat(copies, 1)] for level, (span, _) in parts]
