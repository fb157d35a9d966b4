"""A tokenizer trained on a data set of one's own; the same call goes on where it was stopped."""

import torch

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.encode import TokensRun, encode_data
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun
from tokenizer.train import train_tokenizer
from training.loop import LoopConfig


class Pictures(torch.utils.data.Dataset):
    """Items are PIL images, paths or uint8 pixels (3, H, W), with a label or without."""

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return torch.full((3, 16, 16), 4 * index, dtype=torch.uint8), index % 2


model = VQVAEConfig(
    encoder=ConvEncoderConfig(channels=16),
    quantizer=VectorConfig(num_codes=64, code_dim=8),
    decoder=ConvDecoderConfig(channels=16),
)
data = DataConfig(image_size=16, augment="flip")
loop = LoopConfig(steps=4, batch_size=16)
config = TokenizerRun(root="runs/mine", data=data, model=model, loop=loop)
train_tokenizer(config, images=Pictures())
cache = encode_data(TokensRun(root="runs/mine"), images=Pictures())
print(cache.layout.text)
