"""Pictures to codes and back, with a tokenizer by any of its names."""

from PIL import Image

import tokenizer

# A run, a pipeline's root, a shared folder, a Hub name (owner/name), or published:NAME.
model = tokenizer.load("runs/digits")
codes = tokenizer.encode_images(model, ["cat.png", Image.open("cat.png")])  # (2, N) int64
pictures = tokenizer.decode_images(model, codes)  # PIL images

images = tokenizer.decode_images(model, codes, as_tensor=True)  # uint8
again = model.encode(images.float() / 127.5 - 1)  # (B, 3, H, W) in [-1, 1] -> (B, N)
print(model.layout.text, codes.shape, again.shape, pictures[0].size)
