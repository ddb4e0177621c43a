"""Raw documents to rows: a file per kind of document, told by content."""
