"""One module per pcae-serve subcommand."""
