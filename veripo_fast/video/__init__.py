"""video file -> frames -> patches: the sampling contract, the decoders, and what the vision tower reads."""
