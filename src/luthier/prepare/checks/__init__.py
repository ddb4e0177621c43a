"""What is looked for in rows: a file for each check, and the union of their settings."""
