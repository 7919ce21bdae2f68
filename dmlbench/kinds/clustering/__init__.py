"""Clustering when every image is perturbed: the attacks on a set, what their clusters must fit, and the record of the kind."""
