"""The query, one wrong picture of the gallery, or both of them perturbed."""
