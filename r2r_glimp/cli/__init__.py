"""The command line: one verb per file, each a thin face over the library."""
