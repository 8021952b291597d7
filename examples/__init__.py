"""Reference models and runnable examples; not installed with moefx."""
