"""Galleries that grow, as tables of LanceDB: adding to them, searching them, keeping them in order."""
