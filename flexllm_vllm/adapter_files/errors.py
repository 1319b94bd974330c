"""What is wrong with an adapter that somebody brings."""


class AdapterFileError(ValueError):
    """Names the archive's member, the setting or the tensor at fault."""
