"""pcae-serve and other servers, with the same model on the same core."""
