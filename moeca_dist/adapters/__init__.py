"""The branch cache under other libraries' models. ``adapter`` is the mechanism, and each model has a file."""
