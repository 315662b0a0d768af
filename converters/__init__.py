"""Rules that turn modules into graph nodes and edges, one family of modules per file."""
