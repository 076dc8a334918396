"""One folder a claim, one script a figure or table: ``python -m experiments.FOLDER.SCRIPT``."""
