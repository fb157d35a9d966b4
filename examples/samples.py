"""Samples of a trained prior, as a tensor."""

from generate import sample_images

images = sample_images("runs/digits", labels=[0, 0, 1, 1], seed=7, top_p=0.95)  # uint8
print(images.shape)  # (4, 3, H, W); image i depends on the seed, i and its label alone
