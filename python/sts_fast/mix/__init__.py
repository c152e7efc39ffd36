"""Training sets mixed so that the domains keep what they would lose."""
