"""Verification: are two pictures of one class? Clean, and with one of them perturbed: dodging (one class decided as two) and impersonation (two as one)."""
