"""Retrieval under common corruptions: noise, blur, weather and codecs, without any adversary."""
