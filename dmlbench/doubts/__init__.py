"""Doubts about a result, in words: checks after every run, and the audit."""
