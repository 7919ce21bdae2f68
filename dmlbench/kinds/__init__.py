"""Protocols of other kinds than a list of parts."""
