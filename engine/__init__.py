"""The commands and what they are made of: training, evaluation, search, export, reports."""
