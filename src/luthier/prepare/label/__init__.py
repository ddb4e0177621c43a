"""Labels for rows: by rules, by a model that votes, by people on a local page; and Label Studio's files."""
