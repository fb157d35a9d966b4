"""Images as data sets: what sources hold (listings), one split as pixels (sources, transforms), and
the order in which training sees them (sampler)."""
