def missing_reason() -> str | None:
    """Why the CUDA ops cannot serve here, in words; None where they can."""
