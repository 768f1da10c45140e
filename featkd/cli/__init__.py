"""Command line of featkd: one module per command."""
