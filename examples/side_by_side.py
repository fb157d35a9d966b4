"""The main example of vector-quantize-pytorch's README, and the same with the quantizers here."""

import torch

from tokenizer.quantizers import VQ

x = torch.randn(1, 1024, 256)

try:
    from vector_quantize_pytorch import VectorQuantize

    vq = VectorQuantize(
        dim=256,
        codebook_size=512,  # codebook size
        decay=0.8,  # the exponential moving average decay, lower means the dictionary will change faster
        commitment_weight=1.0,  # the weight on the commitment loss
    )
    quantized, indices, commit_loss = vq(x)  # (1, 1024, 256), (1, 1024), (1)
    print(quantized.shape, indices.shape, commit_loss.shape)
except ImportError:
    print("vector-quantize-pytorch is not installed")

quantizer = VQ(num_codes=512, dim=256, decay=0.8, commitment=1.0, init="normal")
out = quantizer(x)
quantizer.update()  # theirs happens within forward; here once a step, so that accumulation is exact
print(out.vectors.shape, out.codes.shape, out.loss.shape)  # (1, 1024, 256), (1, 1024), ()
