"""The one exception that a user can cause: its message is one line that says what to do."""


class UserError(Exception):
    """A mistake in a configuration, a path or a request. Entry points print it as one line and exit with 2."""


class Interrupted(Exception):
    """The run was asked to stop; its state is saved. The message says where."""
