"""Submissions: making a bundle, and checking one that somebody else made.

``bundle.py`` reads with suspicion, ``record.py`` is submission.yaml, ``static.py`` is level 0,
``rerun.py`` levels 1 to 4, ``validate.py`` puts them in order, ``pack.py`` makes bundles.
"""
