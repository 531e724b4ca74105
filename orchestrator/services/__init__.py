"""What the stages of a run share: its context, the services it started, and the work they do on them."""
