"""The decode engine under a prior of one's own: a step is one slot of the whole batch."""

import torch

from priors import BackboneConfig, Decoding
from tokenizer import CodeLayout

layout = CodeLayout(grids=((4, 4),), num_codes=(32,))
backbone = BackboneConfig(dim=32, depth=2, heads=2).build(layout, num_classes=10, causal=True)
# ... train it: backbone(codes, labels) gives the logits of every slot ...

decoding = Decoding(backbone.eval(), labels=torch.arange(5))
codes = []
for slot in range(layout.length):
    logits = decoding.step(slot, codes[-1] if codes else None)  # (B, num_codes)
    codes.append(torch.distributions.Categorical(logits=logits).sample())
codes = torch.stack(codes, dim=1)  # (B, N) int64
print(codes.shape)
