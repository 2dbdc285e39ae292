"""A package, or processes that tests spawn would import the `tests` that soft-moe installs."""
