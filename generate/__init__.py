"""Generation: from a trained prior and its tokenizer to images."""
