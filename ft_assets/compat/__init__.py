"""Hooks into private APIs of Dagster, TRL, transformers and accelerate: one function for each hook."""
