"""The commands: configuration, run folders, and the wiring of `align`, `shards` and `eval`.

This is the only package that knows that a configuration exists; everything below takes plain
keyword arguments. Every verb is `align VERB` and `python -m pipelines.VERB`.
"""
