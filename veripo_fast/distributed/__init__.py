"""Many ranks: who they are, how a policy lies over them, who gets which work, and what happens when one is lost."""
