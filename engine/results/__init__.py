"""What an evaluation leaves: measures, a table, a report."""
