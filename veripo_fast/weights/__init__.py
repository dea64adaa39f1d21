"""The policy's weights in the layout of a rollout engine: which slices go where, moving them, the whole hand-over."""
