"""Networks that see images for a distance between distributions, and how others fed them."""
