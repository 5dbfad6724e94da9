"""Measurements side by side in one run; each prints ratios. `make bench` runs `--short` of all."""
