"""Verification: are two pictures of one class? Clean, and with one of them perturbed to be told apart or taken for another's."""
