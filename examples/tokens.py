"""A token cache as a data set of torch's, for a prior of one's own."""

from torch.utils.data import DataLoader

from tokenizer import TokenDataset

dataset = TokenDataset("runs/digits/tokens", split="train")
codes, labels = next(iter(DataLoader(dataset, batch_size=64, shuffle=True)))  # (B, N) int64, (B,)
print(dataset.layout.text, len(dataset), codes.shape, labels.shape)
