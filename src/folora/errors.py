"""The one exception that users see as a single line: what is wrong, where, and what to do."""


class FoLoRAError(Exception):
    """A mistake in parameters, data or artefacts that the user can mend."""
