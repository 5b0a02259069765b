"""Pictures of results; called by commands only."""
