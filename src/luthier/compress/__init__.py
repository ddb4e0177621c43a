"""After the run: models made smaller, or several into one."""
