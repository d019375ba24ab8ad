"""One module per thing a user wants; composes the stages and owns no mechanism."""
