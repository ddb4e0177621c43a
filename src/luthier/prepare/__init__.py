"""Before the run: raw files become clean, labelled, split rows; a file for each thing that is done with rows."""
