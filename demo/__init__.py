"""The built-in model: its files in model/, and how they were made in train.py."""
