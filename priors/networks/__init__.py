"""Networks of published priors, each trainable as the backbone is."""
