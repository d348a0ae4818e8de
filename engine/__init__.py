"""The doors and the loop: training, evaluation and what comes after them."""
