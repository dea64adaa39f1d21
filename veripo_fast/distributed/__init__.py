"""Many ranks: how the work of a step is shared out."""
