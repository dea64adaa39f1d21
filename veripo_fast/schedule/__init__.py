"""Where the time of a run went, and what the devices it ran on can do."""
