"""What an evaluation leaves: tables, rank lists, the HTML report."""
