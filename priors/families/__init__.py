"""The families of priors: what each trains, how likely it finds codes, how it samples."""
