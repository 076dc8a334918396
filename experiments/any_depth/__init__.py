"""Plain networks of any depth: which starts and which penalties let them train."""
