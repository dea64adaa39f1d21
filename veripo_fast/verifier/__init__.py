"""The Rollout-Aware Verifier: checks and a judge read the rollouts, and contrastive pairs come out."""
