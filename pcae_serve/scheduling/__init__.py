"""The scheduler: a state machine without I/O and without a clock."""
