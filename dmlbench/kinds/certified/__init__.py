"""Certified R@1 by randomised smoothing of embeddings (docs/certified.md derives the bound)."""
