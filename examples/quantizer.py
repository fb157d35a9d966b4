"""One of the quantizers within an autoencoder of one's own."""

import torch
from torch import nn

from tokenizer.quantizers import SimVQ

encoder = nn.Conv2d(3, 64, kernel_size=4, stride=4)
decoder = nn.ConvTranspose2d(64, 3, kernel_size=4, stride=4)
quantizer = SimVQ(
    num_codes=1024, dim=64
)  # or VQ, ResidualVQ, ProductVQ, GumbelVQ, FSQ, LFQ, BSQ, IBQ
parameters = [*encoder.parameters(), *decoder.parameters(), *quantizer.parameters()]
optimizer = torch.optim.AdamW(parameters, lr=3e-4)

for _ in range(3):
    images = torch.rand(8, 3, 32, 32) * 2 - 1
    out = quantizer(encoder(images))  # (B, C, H, W), or (B, N, C)
    loss = (decoder(out.vectors) - images).square().mean() + out.loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    quantizer.update()  # once a step: moving averages, restarts, schedules

print(out.codes.shape, f"{float(out.parts['perplexity']):.1f} codes in use")
