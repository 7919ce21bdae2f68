"""Poisoned gallery pictures: perturbed to be the first answer to many queries."""
