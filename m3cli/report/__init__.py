"""Values into bytes on stdout, on stderr or in files."""
