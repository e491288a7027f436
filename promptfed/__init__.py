"""promptfed."""
