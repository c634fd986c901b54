"""The built-in protocols; each module is imported when its name is first looked up."""
