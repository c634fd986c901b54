"""Pages of documentation that are run: every example, every command, every link."""
