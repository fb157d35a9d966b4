"""Images to discrete codes and back.

    model = tokenizer.load("runs/digits")  # or a shared folder, owner/name, published:NAME
    codes = tokenizer.encode_images(model, ["a.png"])  # (1, N) int64
    pictures = tokenizer.decode_images(model, codes)  # PIL images

`tokenizer.quantizers` has the quantizers for models of others, `tokenizer.train.train_tokenizer`
trains, and `tokenizer.VQRAE` is the class behind the interface of RAE.
"""

import tessera.names  # also says so where another package has one of our names

_PUBLIC = {
    "CodeLayout": "tokenizer.interface",
    "DataConfig": "tokenizer.data.dataset",
    "TokenCache": "tokenizer.cache",
    "TokenDataset": "tokenizer.token_dataset",
    "TokenizerRun": "tokenizer.run",
    "TokensRun": "tokenizer.encode",
    "VQRAE": "tokenizer.vqrae",
    "decode_images": "tokenizer.api",
    "encode_data": "tokenizer.encode",
    "encode_images": "tokenizer.api",
    "from_pretrained": "tokenizer.sharing",
    "load": "tokenizer.api",
    "save_pretrained": "tokenizer.sharing",
    "train_tokenizer": "tokenizer.train",
}
__all__, __getattr__, __dir__ = tessera.names.public(__name__, _PUBLIC)
