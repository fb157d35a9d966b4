"""What is measured: each metric from images, features or codes, without knowing a pipeline."""
