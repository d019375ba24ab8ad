"""What stands in `sources` is text to review; the tests among it are none of ours."""

collect_ignore = ["sources"]
