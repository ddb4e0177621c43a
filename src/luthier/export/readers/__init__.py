"""Scripts that load an export again, each in a fresh process and by the tool that will read it."""
