"""The command line: one small file per verb, each a thin layer over the library."""
